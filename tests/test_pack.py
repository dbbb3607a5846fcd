"""Packed files: the set they were made of, in one file; small memory; whatever is not one is
refused.
"""

import errno
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import __main__, faceforensics, pack, sampling
from common.data import images as images_module
from common.data.open import open_images
from common.errors import InputError
from common.retry import io_retry
from tests.data import image_folder, numbered_ffpp, picture, read_pixels, zipped
from tests.runs import refused

NAMES = [
    f"{split}/{name}/{i}.png"
    for split in ("train", "test")
    for name in ("b", "a")
    for i in range(5)
]


def packed(source, *flags, name="set.packed"):
    target = source.parent / name
    assert __main__.main(["pack", str(source), str(target), *flags]) == 0
    return target


def same(a, b):
    assert a.ids == b.ids and a.classes == b.classes and len(a) == len(b)
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.splits, b.splits)
    assert all(
        np.array_equal(x, y)
        for x, y in zip(sampling.split(a).values(), sampling.split(b).values(), strict=True)
    )
    order = [np.array([3, 1, 1]), np.array([7, 19, 0]), np.arange(20)]
    for x, y in zip(a.batches(order, 2), b.batches(order, 3), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("archive", [False, True])
def test_a_packed_set_is_its_source(tmp_path, archive, capsys):
    root = image_folder(tmp_path / "set", NAMES, width=30, height=24)
    source = zipped(root, "top/") if archive else root
    target = packed(source)
    plain, one = open_images(str(source)), open_images(str(target))
    same(plain, one)
    assert (
        one.fingerprint == plain.fingerprint
        and one.store_size == plain.store_size == one.native_size == 24
    )
    assert "20 images in 2 classes" in one.describe() and one.name == "set.packed"
    said = capsys.readouterr().out
    assert f"read {plain.num_bytes / 1e6:.1f} MB" in said and "images/s" in said


def test_a_packed_table_keeps_its_groups(tmp_path):
    image_folder(tmp_path, [f"{i:02d}.png" for i in range(20)])
    rows = [f"{i:02d}.png,{'ab'[i % 2]},p{i // 4}" for i in range(20)]
    source = tmp_path / "list.csv"
    source.write_text("\n".join(["path,label,group", *rows]))
    plain, one = open_images(str(source)), open_images(str(packed(source)))
    same(plain, one)
    assert plain.fingerprint == one.fingerprint and plain.groups.tolist() == one.groups.tolist()
    assert len(set(one.groups)) == 5 and open_images("sample").groups is None


def test_the_embedded_set_can_be_packed(tmp_path):
    target = tmp_path / "sample.packed"
    assert __main__.main(["pack", "sample", str(target), "--workers", "1"]) == 0
    plain, one = open_images("sample"), open_images(str(target))
    same(plain, one)
    assert one.fingerprint == plain.fingerprint


def test_the_fingerprint_is_the_sources_exactly_where_the_same_command_reads_the_same_pixels(
    tmp_path,
):
    root = image_folder(tmp_path / "set", NAMES, width=40, height=40)
    target = packed(root, "--store-size", "16")

    def opened(path, size):
        images = open_images(str(path))
        if size:
            images.resize_store(size)
        return images

    same(opened(root, 16), opened(target, 16))
    assert opened(root, 16).fingerprint == opened(target, 16).fingerprint
    # Without the flag the source is decoded to 40 pixels, and 8 pixels come from 16 there and from
    # 40 here.
    assert opened(target, None).store_size == 16
    prints = {opened(target, size).fingerprint for size in (None, 8)} | {
        opened(root, None).fingerprint
    }
    assert len(prints) == 2 and opened(target, 8).fingerprint != opened(root, 8).fingerprint


def test_a_smaller_side_is_resized_and_a_larger_one_refused(tmp_path):
    root = image_folder(tmp_path / "set", NAMES, width=32, height=32)
    images = open_images(str(packed(root)))
    images.resize_store(16)
    expected = picture(0, 32, 32).resize((16, 16), Image.Resampling.BILINEAR)
    first = images.ids.index("train/b/0.png")
    assert torch.equal(
        read_pixels(images, [first])[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    )
    with pytest.raises(
        InputError,
        match="--store-size 64: set.packed is packed at 32 px; give at most that, or pack",
    ):
        images.resize_store(64)


def test_a_damaged_image_ends_the_packing_or_is_left_out(tmp_path, capsys):
    root = image_folder(tmp_path / "set", [f"{c}/{i:03d}.png" for c in "xy" for i in range(60)])
    before = open_images(str(root)).fingerprint
    (root / "x" / "003.png").write_bytes((root / "x" / "003.png").read_bytes()[:-60])
    plain = open_images(str(root))
    target = tmp_path / "set.packed"
    refused(__main__.main, ["pack", str(root), str(target)], capsys, "x/003.png")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    packed(root, "--on-bad-item", "skip")
    images = open_images(str(target))
    assert len(images) == 119 and "x/003.png" not in images.ids
    assert images.fingerprint not in (before, plain.fingerprint)
    assert "left out 1 damaged image, the first is x/003.png" in capsys.readouterr().out


def test_every_cut_and_every_flipped_byte_is_found(tmp_path):
    target = packed(image_folder(tmp_path / "set", NAMES, width=8, height=8))
    whole = target.read_bytes()
    for size in [*range(0, 100, 7), len(whole) // 2, len(whole) - 1]:
        target.write_bytes(whole[:size])
        with pytest.raises(InputError, match="pack it again|not a packed data set"):
            open_images(str(target))
    for place in range(0, len(whole), 97):
        target.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(InputError, match="pack it again|not a packed data set"):
            read_pixels(open_images(str(target)), range(20))
    target.write_bytes(whole)
    target.write_bytes(whole + b"more")
    with pytest.raises(InputError, match="pack it again"):
        open_images(str(target))


def test_a_file_of_the_first_version_with_planes_is_read(tmp_path):
    target = packed(image_folder(tmp_path / "set", NAMES, width=9, height=7))
    images = open_images(str(target))
    planes = [images.decode(i).numpy().tobytes() for i in range(20)]
    index = {key: value for key, value in pack._read_index(target).items() if key != "planes"}
    index["crc"] = [pack.zlib.crc32(image) for image in planes]
    text = json.dumps(index).encode()
    trailer = pack._TRAILER.pack(len(text), pack.hashlib.sha256(text).digest())
    old = tmp_path / "old.packed"
    magic = b"packed uint8 images, version 1\n\0"
    old.write_bytes(magic + b"".join(planes) + text + trailer)
    again = open_images(str(old))
    same(images, again)
    for one in (images, again):
        one.resize_store(5)
    same(images, again)


def test_an_image_that_is_damaged_is_named(tmp_path):
    target = packed(image_folder(tmp_path / "set", NAMES, width=8, height=8))
    content = bytearray(target.read_bytes())
    content[len(pack._MAGIC) + 7 * 3 * 64 + 5] ^= 1
    target.write_bytes(content)
    images = open_images(str(target))
    assert read_pixels(images, range(7)).shape == (7, 3, 8, 8)
    with pytest.raises(
        InputError, match=f"set.packed is damaged at image {images.ids[7]}; pack it again"
    ):
        read_pixels(images, [7])


@pytest.mark.parametrize(
    ("target", "said"),
    [("set.zip", "must end in .packed"), ("no/set.packed", "No such file or directory")],
)
def test_a_target_that_cannot_be_written_is_one_line(tmp_path, target, said, capsys):
    root = image_folder(tmp_path / "set", NAMES[:4])
    with pytest.raises(SystemExit) as error:
        __main__.main(["pack", str(root), str(tmp_path / target)])
    text = capsys.readouterr().err
    assert error.value.code == 2 and said in text and text.count("\n") == 1


def test_an_old_file_stays_when_packing_fails(tmp_path):
    root = image_folder(tmp_path / "set", NAMES)
    target = packed(root)
    before = target.read_bytes()
    (root / NAMES[3]).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        __main__.main(["pack", str(root), str(target)])
    assert target.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["set", "set.packed"]


def test_packing_and_reading_take_little_memory(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "set", [f"{i}.png" for i in range(64)], width=64, height=64)
    monkeypatch.setattr(pack, "_BATCH_BYTES", 4 * 3 * 64 * 64)
    made = []
    monkeypatch.setattr(
        images_module.Images,
        "_empty",
        lambda self, n, empty=images_module.Images._empty: made.append(n) or empty(self, n),
    )
    target = packed(root, "--workers", "1")
    assert made and max(made) <= 4
    tracemalloc.start()
    images = open_images(str(target))
    for batch in images.batches(np.array_split(np.arange(64), 16), 1):
        assert batch.shape == (4, 3, 64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images._cache is None and peak < 64 * 3 * 64 * 64


def test_the_module_is_a_command(tmp_path):
    root = image_folder(tmp_path / "set", NAMES)
    command = [sys.executable, "-m", "common.data", "pack", str(root), str(tmp_path / "set.packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote" in done.stdout and len(open_images(str(tmp_path / "set.packed"))) == 20


def test_a_packed_file_that_cannot_be_read_for_a_moment_is_opened_again(tmp_path, monkeypatch):
    target = packed(image_folder(tmp_path / "set", NAMES, width=16, height=16))
    images, plain = open_images(str(target)), open_images(str(tmp_path / "set"))
    assert torch.equal(images.decode(0), plain.decode(0))
    before, preadv, numbers = images._file, os.preadv, [errno.ESTALE, errno.EIO]

    def read_some(descriptor, buffers, offset):
        if numbers:
            raise OSError(numbers.pop(), "gone")
        return preadv(descriptor, [buffers[0][:100]], offset)  # a network may give less than asked

    monkeypatch.setattr(os, "preadv", read_some)
    with io_retry(1, lambda: 0):
        assert torch.equal(images.decode(1), plain.decode(1))
    assert images._file is not before and not numbers


def test_a_packed_file_that_is_cut_short_while_it_is_read_is_named(tmp_path):
    """With a memory map this would be a SIGBUS."""
    target = packed(image_folder(tmp_path / "set", NAMES, width=16, height=16))
    images = open_images(str(target))
    os.truncate(target, 1000)
    with pytest.raises(InputError, match=r"set\.packed is cut short"):
        images.decode(19)


def clips(path, **changes):
    return faceforensics.open_videos(str(path), workers=2, **changes)


def same_clips(a, b):
    assert (a.ids, a.keys, a.persons) == (b.ids, b.keys, b.persons)
    assert a.fingerprint == b.fingerprint and a.store_size == b.store_size
    for name in ("labels", "splits", "lengths", "rates"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()
    assert (a.groups is None) == (b.groups is None)
    items = np.arange(2 * len(a))
    drawn = [videos.train_clips(items, 0, 3, 4, 0.5) for videos in (a, b)]
    (one,), (other,) = (
        list(videos.batches([(items % len(a), rows)], 2))
        for videos, rows in zip((a, b), drawn, strict=True)
    )
    assert torch.equal(one, other)


def test_packed_clips_are_their_source_and_so_is_each_compression(tmp_path):
    pairs = {"train": [["000", "001"]], "val": [["002", "003"]], "test": [["004", "005"]]}
    root = numbered_ffpp(tmp_path / "set", pairs, ("Deepfakes",), ("c23", "c40"))
    target = packed(root, "--clips")
    same_clips(clips(root), clips(target))
    for level in ("c23", "c40"):
        same_clips(clips(root, compression=level), clips(target, compression=level))
    preferred = clips(target, preferred="c40")
    assert len(preferred) == 12 and {key[2] for key in preferred.keys} == {"c40"}
    parts = [faceforensics.split(clips(path)) for path in (root, target)]
    assert all(np.array_equal(parts[0][name], parts[1][name]) for name in parts[0])
    with pytest.raises(InputError, match=r"compression 'raw'; .*there: c23, c40$"):
        clips(target, compression="raw")


def test_packed_clips_keep_groups_rates_and_gaps(tmp_path):
    root = tmp_path / "set"
    for name, numbers in (("a", range(6)), ("b", (0, 1, 4, 5, 9)), ("c", range(0, 12, 2))):
        image_folder(root, [f"{name}/{k}.png" for k in numbers])
    rows = ["a,real,a,p1", "b,fake,b,p2", "c,fake,c,p2"]
    (root / "list.csv").write_text("\n".join(["video_id,label,path,group", *rows]))
    plain = clips(root, fps=30.0)
    one = clips(packed(root, "--clips", "--fps", "30"))
    same_clips(plain, one)
    assert one.groups.tolist() == ["p1", "p2", "p2"] and one.rates[2] == 15
    assert np.array_equal(one.times[1], plain.times[1]) and one.times[0] is None


def test_a_damaged_frame_takes_its_packed_video_along(tmp_path):
    videos = [f"{label}/{k:03d}/0.png" for label in ("real", "fake") for k in range(60)]
    root = image_folder(tmp_path / "set", videos)
    before = clips(root).fingerprint
    (root / "fake/003/0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        packed(root, "--clips")
    one = clips(packed(root, "--clips", "--on-bad-item", "skip"))
    assert len(one) == 119 and "fake/003" not in one.ids and one.fingerprint != before


def test_images_are_no_clips_and_flags_of_clips_need_them(tmp_path, capsys):
    root = image_folder(tmp_path / "set", NAMES)
    with pytest.raises(InputError, match=r"set\.packed holds images, no videos; pack them with"):
        clips(packed(root))
    with pytest.raises(SystemExit):
        packed(root, "--fps", "30")
    assert "--fps has no effect without --clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", 9), ("key", ["a"]), ("rate", 0), ("times", [1, 2]), ("label", 7)],
)
def test_a_list_of_videos_that_cannot_be_is_refused(tmp_path, monkeypatch, field, value):
    root = image_folder(tmp_path / "set", ["real/a/0.png", "fake/b/0.png"])
    whole = pack.pack

    def changed(*args, videos, **options):
        videos[1][field] = value
        whole(*args, videos=videos, **options)

    monkeypatch.setattr(faceforensics, "pack", changed)
    target = packed(root, "--clips")
    with pytest.raises(InputError, match="not a packed data set"):
        clips(target)
