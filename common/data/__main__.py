"""`python -m common.data pack` writes a packed file, `crop-faces` cuts the faces out of videos."""

import time
from pathlib import Path

from common import config, reading
from common.data import faceforensics
from common.data.crops import crop_faces
from common.data.faceforensics import FACES
from common.data.images import Images
from common.data.open import open_images
from common.data.pack import SUFFIX, pack
from common.errors import InputError, exit_codes, plural, say


def main(argv: list[str] | None = None) -> int:
    doc = (
        f"pack: decode a data set once to uint8 pixels in one {SUFFIX} file, which --data then"
        " takes. crop-faces: cut the faces out of videos of whole scenes, as folders of frames."
    )
    parser = config.Parser(prog="python -m common.data", description=doc)
    parser.choice("command", ["pack", "crop-faces"], None, "what to do")
    parser.add_argument(
        "src", metavar="SRC", help="folder, .zip of one, .csv, packed file or `sample`"
    )
    parser.add_argument(
        "dst",
        metavar="DST",
        help=f"pack: the file to write, *{SUFFIX}; an old one is replaced. crop-faces: a folder;"
        " what is there stays",
    )
    parser.number(
        "--store-size",
        int,
        None,
        "side of the stored squares, pixels; unset: that of the images, at most 256",
        low=8,
    )
    parser.add_argument(
        "--boxes",
        metavar="JSON",
        help="for crop-faces: {video: {frame: [[x1, y1, x2, y2], ...], ...}, ...}, docs/tsm.md",
    )
    group = parser.add_argument_group("clips")
    group.switch("--clips", "pack videos, in a layout of docs/tsm.md")
    group.number("--fps", float, 25.0, "as in training on them", above=0)
    group.choice("--face", FACES, FACES[0], "as in training on them")
    group.add_argument("--frames-root", metavar="DIR", help="as in training on them")
    config.reading_flags(parser)
    args = parser.parse_args(argv)
    refuse = config.reject_unused_flags
    if not args.clips:
        refuse(parser, args, ["fps", "face", "frames_root"], "without --clips")
    if args.command == "crop-faces":
        refuse(parser, args, ["clips"], "with crop-faces")
        refuse(parser, args, ["store_size"], "with crop-faces, which keeps the pixels")
        if args.boxes is None:
            parser.error("crop-faces needs --boxes JSON")
    else:
        refuse(parser, args, ["boxes"], "with pack")
    with exit_codes():
        reading.limit_items(args.max_item_mb)
        if args.command == "pack":
            _pack(args)
            return 0
        how = {"workers": args.workers, "on_bad_item": args.on_bad_item}
        for line in crop_faces(args.src, Path(args.dst), Path(args.boxes), **how):
            say(line)
    return 0


def _pack(args) -> None:
    target = Path(args.dst)
    if target.suffix != SUFFIX or target.is_dir():
        raise InputError(f"{target}: the packed file's name must end in {SUFFIX}")
    begun = time.perf_counter()
    images = _pack_clips(args, target) if args.clips else _pack_images(args, target)
    seconds = time.perf_counter() - begun
    written = target.stat().st_size
    say(
        f"read {images.num_bytes / 1e6:.1f} MB, wrote {written / 1e6:.1f} MB to {target} in"
        f" {seconds:.1f} s ({len(images) / seconds:.0f} images/s)"
    )


def _pack_images(args, target: Path) -> Images:
    images = open_images(args.src)
    default_size = images.store_size
    left_out = []
    if args.store_size:
        images.resize_store(args.store_size)
    if args.on_bad_item == "skip":
        left_out = images.drop_damaged(args.workers)
        first = f", the first is {left_out[0]}" if left_out else ""
        say(f"left out {plural(len(left_out), 'damaged image')}{first}")
    say(images.describe())
    pack(images, target, default_size=default_size, left_out=left_out, workers=args.workers)
    return images


def _pack_clips(args, target: Path) -> Images:
    reading_as = {"fps": args.fps, "face": args.face, "frames_root": args.frames_root}
    how = {"workers": args.workers, "on_bad_item": args.on_bad_item}
    videos = faceforensics.prepare(args.src, store_size=None, say=say, **how, **reading_as)
    default_size = videos.store_size
    if args.store_size:
        videos.resize_store(args.store_size)
    faceforensics.pack_videos(videos, target, default_size=default_size, workers=args.workers)
    return videos.images


if __name__ == "__main__":
    raise SystemExit(main())
