"""Whatever is in a file that is read as data, weights or settings, its reader returns or ends with
exit code 2 in one line, in time and within --max-item-mb. Small valid inputs are mutated by a fixed
seed.
"""

import contextlib
import gzip
import hashlib
import json
import pickle
import random
import re
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_simclr
from common import longtail, weights
from common.data import faceforensics, raer, sampling, utterances
from common.data.open import open_images
from common.data.pack import _TRAILER, pack
from common.errors import InputError, exit_codes, printable
from common.models import clip
from common.models.bpe import Tokenizer
from common.models.text import WordPiece, read_bert
from common.run import checkpoint
from common.run.files import FORMAT
from tests.data import (
    image_folder,
    numbered_ffpp,
    numbered_raer,
    picture,
    utterance_arrays,
    utterances_tsv,
    zipped,
)

CASE_MB = 256  # above the start
CASE_SECONDS = 60  # of CPU time: a hang, not a slow machine
NAMES = [f"{name}/{i}.png" for name in "ab" for i in range(3)]


# The readers, each as the scripts call it.


def read_images(path: Path) -> None:
    images = open_images(str(path))
    images.describe()
    images.resize_store(8)
    sampling.split(images)
    decode_all(images)


def decode_all(images) -> None:
    damaged = None
    for index in range(len(images)):
        try:
            images.decode(index)
        except InputError as error:
            damaged = error
    if damaged:
        raise damaged


def read_faces(path: Path) -> None:
    videos = faceforensics.open_videos(str(path), fps=25.0, workers=1)
    videos.describe()
    faceforensics.split(videos, ["train"])


def read_clips(path: Path) -> None:
    clips = raer.open_clips(str(path), workers=1, margin=0.1)
    clips.describe()
    decode_all(clips.images)
    raer.split(clips, say=lambda _: None)


def read_utterances(path: Path) -> None:
    table = utterances.open_utterances(str(path), 10)
    table.describe()
    utterances.data_problems(table)
    utterances.split(table)


def read_flags(path: Path) -> None:
    train_simclr.parse_args(["--config", str(path)])


def read_schedule(path: Path) -> None:
    longtail.read_schedule(str(path)).scaled(10, constant=False).describe()


def read_weights(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    weights.load(model, weights.read(path), path, head=("head.",))


def read_backbone(path: Path) -> None:
    weights.load_backbone(str(path), "simclr")


def read_selected(path: Path) -> None:
    state = checkpoint.load_selected(str(path))
    checkpoint.load_weights(torch.nn.Linear(4, 3), state["model"], path)
    state["model_spec"]["backbone"]


def read_state(path: Path) -> None:
    state, _ = checkpoint.load_training_state(path, "train")
    checkpoint.load_weights(torch.nn.Linear(4, 3), state["parts"]["model"], path)


def read_clip_config(path: Path) -> None:
    clip.source_activation({"text_model.embeddings.token_embedding.weight": None}, path)
    clip.source_activation({}, path)


# Small valid inputs; each gives the path to open.


def formats(root: Path) -> Path:
    image_folder(root, NAMES)
    for i, suffix in enumerate(("jpg", "gif", "bmp", "tif", "webp", "ppm", "pgm")):
        mode = {"gif": "P", "pgm": "L"}.get(suffix, "RGB")
        picture(i, mode=mode).save(root / "a" / f"x.{suffix}")
    picture(9).save(root / "b" / "p.jpg", progressive=True)
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(root / "b" / "deep.png")
    return root


def packed(root: Path) -> Path:
    images = open_images(str(image_folder(root / "set", NAMES)))
    images.resize_store(8)
    pack(images, root / "set.packed", default_size=20, workers=1)
    shutil.rmtree(root / "set")
    return root / "set.packed"


def deflated(root: Path) -> Path:
    image_folder(root / "set", NAMES)
    with zipfile.ZipFile(root / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((root / "set").rglob("*.png")):
            file.write(path, path.relative_to(root).as_posix())
    shutil.rmtree(root / "set")
    return root / "deflated.zip"


def archive(tree):
    def made(root: Path) -> Path:
        path = zipped(tree(root / "set"))
        shutil.rmtree(root / "set")
        return path

    return made


def face_list(root: Path) -> Path:
    image_folder(root, [f"{name}/{k}.png" for name in ("r1", "r2", "f1", "f2") for k in range(2)])
    rows = [f"{name},{name[0] == 'f':d},{name},train" for name in ("r1", "r2", "f1", "f2")]
    (root / "faces.csv").write_text("\n".join(["video_id,label,path,split", *rows]) + "\n")
    return root


def bench(root: Path) -> Path:
    content = {"FF": {"FF-real": {}, "FF-F2F": {}}}
    for label, name in (("FF-real", "000"), ("FF-F2F", "000_001")):
        files = [f"FF/{label}/c23/{name}/{k}.png" for k in range(2)]
        image_folder(root, files)
        video = {name: {"label": label, "frames": files}}
        content["FF"][label] = {part: {"c23": video} for part in ("train",)}
    (root / "FF.json").write_text(json.dumps(content))
    return root


def official(root: Path) -> Path:
    return numbered_ffpp(root, methods=("Deepfakes",))


def emotions(root: Path) -> Path:
    lists = {"train": [(f"c{k}", k % 2 + 1) for k in range(4)], "test": [("d0", 1), ("d1", 2)]}
    numbered_raer(root, lists, length=2)
    (root / "classes.txt").write_text("calm\ta calm face\nglad\n")
    return root


def npz(compress: bool):
    def made(root: Path) -> Path:
        write = np.savez_compressed if compress else np.savez
        write(root / "u.npz", **utterance_arrays(count=20))
        return root / "u.npz"

    return made


def tsv(root: Path) -> Path:
    return utterances_tsv(root / "u.tsv")


def umc(root: Path) -> Path:
    (root / "video_data").mkdir()
    rows = [f"S\tE\t{k}\ttext {k} of it\tact{k % 3}" for k in range(9)]
    text = "\n".join(["season\tepisode\tclip\ttext\tlabel", *rows]) + "\n"
    (root / "train.tsv").write_text(text)
    arrays = {f"S_E_{k}": np.ones((k % 3 + 1, 4), np.float32) for k in range(9)}
    (root / "video_data" / "swin_feats.pkl").write_bytes(pickle.dumps(arrays))
    return root


def text_file(name: str, text: str):
    def made(root: Path) -> Path:
        (root / name).write_text(text)
        return root / name

    return made


def state_dict() -> dict:
    torch.manual_seed(0)
    return {"0.weight": torch.randn(3, 4), "0.bias": torch.randn(3)}


def safetensors(root: Path) -> Path:
    header, offset, data = {"__metadata__": {"format": "pt"}}, 0, b""
    for name, tensor in state_dict().items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        offset, data = span[1], data + tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    (root / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return root / "w.safetensors"


def torch_file(name: str, content, **options):
    def made(root: Path) -> Path:
        torch.save(content(), root / name, **options)
        return root / name

    return made


def best() -> dict:
    spec = {"script": "simclr", "backbone": "resnet18", "stage": "pretrain", "image_size": 8}
    model = dict(torch.nn.Linear(4, 3).state_dict())
    return dict(format=FORMAT, model=model, model_spec=spec, epoch=3, metrics={"m": 0.5}, value=1.0)


def last() -> dict:
    place = dict.fromkeys(checkpoint._COUNTS, 1) | {"best": 0.5, "results": {}, "seconds": 1.0}
    kinds = {"model": "Linear"}
    parts = {"model": dict(torch.nn.Linear(4, 3).state_dict())}
    start = dict(stage="train", start="random", model_spec=best()["model_spec"], format=FORMAT)
    return start | dict(place=place, kinds=kinds, parts=parts, sums={}, rng={})


def scripted(root: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        model = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        torch.jit.save(model, root / "w.pt")
    return root / "w.pt"


def merges(root: Path) -> Path:
    with gzip.open(root / "v.txt.gz", "wb") as file:
        file.write(b"version\nt h\nth e</w>\na n\n")
    return root / "v.txt.gz"


def bert(root: Path) -> Path:
    sizes = dict(vocab_size=6, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    sizes |= dict(intermediate_size=4, max_position_embeddings=8, type_vocab_size=2)
    (root / "config.json").write_text(json.dumps(sizes | {"model_type": "bert"}))
    (root / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n##s\n")
    (root / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    torch.save(state_dict(), root / "pytorch_model.bin")
    return root


def read_encoder(path: Path) -> None:
    WordPiece.read(path)("the thes", 8)
    with pytest.raises(InputError):  # these are no encoder's weights
        read_bert(path)
    raise InputError("as it should be")


SCHEDULE = '[[phases]]\nstart = 0\nsampler = "random"\n[[phases]]\nstart = 5\ntau = 0.5\n'
FLAGS = 'backbone = "resnet18"\nbs = 32\nlr = 0.5\ncompile = false\ndata = "x"\n'
READERS = {
    "image folder": (formats, read_images),
    "image zip": (archive(lambda root: image_folder(root, NAMES)), read_images),
    "deflated zip": (deflated, read_images),
    "packed": (packed, read_images),
    "faces csv": (face_list, read_faces),
    "faces bench": (bench, read_faces),
    "faces official": (official, read_faces),
    "raer": (emotions, read_clips),
    "raer zip": (archive(emotions), read_clips),
    "npz": (npz(False), read_utterances),
    "compressed npz": (npz(True), read_utterances),
    "tsv": (tsv, read_utterances),
    "umc": (umc, read_utterances),
    "config toml": (text_file("f.toml", FLAGS), read_flags),
    "config json": (text_file("f.json", '{"backbone": "resnet18", "bs": 32}'), read_flags),
    "schedule toml": (text_file("s.toml", "epochs = 10\n" + SCHEDULE), read_schedule),
    "schedule json": (
        text_file("s.json", '{"epochs": 10, "phases": [{"start": 0, "tau": 0.5}]}'),
        read_schedule,
    ),
    "safetensors": (safetensors, read_weights),
    "weights": (torch_file("w.pt", state_dict), read_weights),
    "from": (torch_file("w.pt", state_dict), read_backbone),
    "old weights": (
        torch_file("w.pth", state_dict, _use_new_zipfile_serialization=False),
        read_weights,
    ),
    "torchscript": (scripted, read_weights),
    "best": (torch_file("m.pt", best), read_selected),
    "last": (torch_file("m.pt", last), read_state),
    "merges": (merges, Tokenizer.read),
    "plain merges": (text_file("v.txt", "version\nt h\nth e</w>\n"), Tokenizer.read),
    "encoder": (bert, read_encoder),
    "clip config": (
        text_file("open_clip_config.json", '{"model_cfg": {"quick_gelu": true}}'),
        read_clip_config,
    ),
}

# Mutations of bytes.

NUMBERS = [b"0", b"-1", b"1", b"255", b"65536", b"2147483648", b"9" * 25, b"1e999", b"NaN", b"0.5"]
NUMBERS += [b"9" * 5000]
VALUES = [None, True, 0, -1, 2, 1.5, 10**30, "", "x", "a\nb\x1b[2J", "\udce9", [], {}, [[]], ["x"]]
VALUES += [{"a": 1}, "n" * 300, [1, 2], float("nan")]
WORDS = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**31, 10**8]


def flip(rng, data):
    for _ in range(rng.choice((1, 1, 1, 4, 32))):
        i = rng.randrange(len(data))
        data[i] ^= 1 << rng.randrange(8)


def cut(rng, data):
    del data[rng.randrange(len(data)) :]


def splice(rng, data):
    start, target = rng.randrange(len(data)), rng.randrange(len(data))
    part = data[start : start + rng.randrange(1, 200)]
    if rng.random() < 0.5:
        data[target:target] = part * rng.choice((1, 1, 3, 1000))
    else:
        data[target : target + len(part)] = part


def size_field(rng, data):
    i = rng.randrange(len(data))
    width, order = rng.choice((2, 4, 4, 8)), rng.choice(("little", "big"))
    data[i : i + width] = (rng.choice(WORDS) % 256**width).to_bytes(width, order)


def digits(rng, data):
    found = list(re.finditer(rb"\d+", data))
    if found:
        match = rng.choice(found)
        data[match.start() : match.end()] = rng.choice(NUMBERS)


def value(rng, data):
    """Another value somewhere in JSON."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return digits(rng, data)
    holder, node = None, root
    while isinstance(node, dict | list) and node and (holder is None or rng.random() < 0.8):
        holder = node
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[key]
    if holder is None:
        root = rng.choice(VALUES)
    elif rng.random() < 0.1:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    data[:] = json.dumps(root).encode()


def nest(rng, data):
    i = rng.randrange(len(data))
    data[i:i] = rng.choice((b"[", b'{"a":', b"(", b"a.", b"\t", b"\n", b",")) * rng.choice(
        (10, 5000, 100_000)
    )


def text(rng, data):
    i = rng.randrange(len(data))
    data[i : i + rng.randrange(4)] = rng.choice(
        (
            b"\xff",
            b"\0",
            b"\x1b[31m",
            b"\r\n",
            b"\xef\xbb\xbf",
            "\u2028".encode(),
            b'"',
            b"\xed\xb3\xa9",
        )
    )


MUTATIONS = (flip, flip, cut, splice, size_field, size_field, digits, value, nest, text)


def repair(rng, path: Path, data: bytearray) -> None:
    """Give a mutated content the checksums that let it be looked at."""
    if path.suffix == ".packed" and rng.random() < 0.8 and len(data) > 200:
        start = data.rfind(b'{"ids"')
        if start > 0:
            index = bytearray(data[start : -_TRAILER.size])
            rng.choice((value, digits, nest, value))(rng, index)
            index = bytes(index)
            trailer = _TRAILER.pack(len(index), hashlib.sha256(index).digest())
            data[start:] = index + trailer
    if data.startswith(b"\x89PNG") and rng.random() < 0.5 and len(data) > 33:
        data[16:24] = struct.pack(">II", rng.choice(WORDS) % 2**31, rng.choice(WORDS) % 2**31)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))


# The harness.


class Timeout(BaseException):
    """No reader catches it."""


@contextlib.contextmanager
def limited_time():
    def hangs(*_):
        raise Timeout(f"more than {CASE_SECONDS} s of CPU time")

    earlier = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, or since `forget_peak` VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def outcome(read, path: Path, capsys) -> tuple[int, str]:
    """The exit code of a reader and the line it ends with; it took neither long nor much."""
    forget_peak()
    before = memory("VmRSS")
    capsys.readouterr()
    code = 0
    with limited_time():
        try:
            with exit_codes():
                read(path)
        except SystemExit as ending:
            code = ending.code
    error = capsys.readouterr().err
    grown = memory("VmHWM") - before
    assert grown < CASE_MB * 2**20, f"{grown / 2**20:.0f} MB"
    assert code == (2 if error else 0), error
    if error:
        lines = error.splitlines()
        assert error.startswith("error: ") and len(lines) == 1 and len(error) < 3000, error
        assert printable(lines[0]) == lines[0]
    return code, error


def fuzz(name: str, count: int, tmp_path: Path, capsys, seed: int = 0) -> list[int]:
    make, read = READERS[name]
    root = tmp_path / "input"
    root.mkdir()
    path = make(root)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    listed = [p for p in files if p.suffix in (".json", ".csv", ".txt", ".tsv", ".pkl")]
    code, error = outcome(read, path, capsys)
    assert code == 0 or "as it should be" in error, error
    codes = []
    for i in range(count):
        rng = random.Random(f"{name} {seed} {i}")
        file = rng.choice(listed if listed and rng.random() < 0.8 else files)
        content = file.read_bytes()
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 3))):
            if data:
                rng.choice(MUTATIONS)(rng, data)
        repair(rng, file, data)
        file.write_bytes(data)
        try:
            codes.append(outcome(read, path, capsys)[0])
        except BaseException as fault:
            kept = tmp_path / f"fault{file.suffix}"
            kept.write_bytes(data)
            raise AssertionError(f"{name}, mutation {i} of {file.name} in {kept}") from fault
        finally:
            file.write_bytes(content)
    return codes


@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs_end_in_one_line_within_bounds(name, tmp_path, capsys):
    codes = fuzz(name, 2000 // len(READERS), tmp_path, capsys)
    assert codes.count(2) > len(codes) // 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_mutated_inputs_end_in_one_line_within_bounds(name, tmp_path, capsys):
    fuzz(name, 20_000 // len(READERS), tmp_path, capsys, seed=1)
