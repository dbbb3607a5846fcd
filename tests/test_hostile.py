"""Files that declare more than they hold, that are no files, that stand for another: each is
refused in one line, by every reader that meets it.
"""

import ast
import contextlib
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import train_simclr
from common import config, errors, longtail, reading, weights
from common.data import faceforensics, pack, utterances
from common.data.open import open_images
from common.errors import InputError, exit_codes, printable
from common.models import build_backbone, load_published
from common.models.bpe import Tokenizer
from common.run import checkpoint
from common.run.files import atomic_write, write_new
from common.run.inference import predictions_text
from common.run.log import Log
from tests.data import cells_tree, image_folder, picture
from tests.runs import flags, refused

ROOT = Path(__file__).parent.parent
# What opens a file of that name, as the scripts do.
OPENERS = {
    "x.zip": lambda path: open_images(str(path)),
    "x.packed": lambda path: open_images(str(path)),
    "x.npz": lambda path: utterances.open_utterances(str(path)),
    "x.tsv": lambda path: utterances.open_utterances(str(path)),
    "x.csv": lambda path: faceforensics.open_videos(str(path), fps=25.0, workers=1),
    "x.safetensors": weights.read,
    "x.pth": weights.read,
    "x.pt": checkpoint.load,
    "best.pt": lambda path: checkpoint.load_selected(str(path)),
    "last.pt": lambda path: checkpoint.load_training_state(path, "train"),
    "w.pt": lambda path: weights.load_backbone(str(path), "simclr"),
    "s.toml": lambda path: longtail.read_schedule(str(path)),
    "s.json": lambda path: longtail.read_schedule(str(path)),
    "v.txt.gz": Tokenizer.read,
    "v.txt": Tokenizer.read,
    "a/x.png": lambda path: open_images(str(path.parent.parent)).decode(0),
}


@contextlib.contextmanager
def little_memory(megabytes=300):
    """The peak of what Python and NumPy allocate meanwhile stays below."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20, f"{peak / 2**20:.0f} MB"


def test_pillow_is_never_asked_to_guess_a_format():
    calls = 0
    for path in (*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls += 1
                given = [keyword.arg for keyword in node.keywords]
                assert "formats" in given, f"{path}:{node.lineno}: Image.open without formats="
    assert calls


def test_a_text_of_another_format_starts_no_program(tmp_path):
    root = image_folder(tmp_path / "set", ["a/0.png", "b/0.png"])
    (root / "a" / "zz.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    opened = open_images(str(root))
    with pytest.raises(InputError, match=r"a/zz\.png .* cannot identify image file"):
        opened.decode(opened.ids.index("a/zz.png"))


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
@pytest.mark.parametrize("name", OPENERS)
def test_what_is_no_regular_file_is_refused_without_opening(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("d", name)
    path.parent.mkdir(parents=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(InputError, match=kind):
        OPENERS[name](path)


@pytest.mark.parametrize("name", OPENERS)
def test_a_sparse_file_is_not_read(name, tmp_path):
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(2**40)
    with little_memory(), pytest.raises(InputError):
        OPENERS[name](path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
        ("\n<!DOCTYPE html>\n<html><body>404</body></html>\n", "an HTML page"),
    ],
)
@pytest.mark.parametrize("name", sorted(set(OPENERS) - {"best.pt"}))
def test_a_placeholder_is_named_as_what_it_is(name, content, said, tmp_path):
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    (path.parent / "y.png").symlink_to(path)
    with pytest.raises(InputError, match=said):
        OPENERS[name](path)


def png(width: int, height: int, color=2) -> bytes:
    """A PNG of that size, whose pixels are cut short where they are more than 2 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    pixels = zlib.compress(bytes(2 * 10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (3_000, 60_000)])
def test_an_image_that_declares_too_many_pixels_is_refused_before_decoding(width, height, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (root / "big.png").write_bytes(png(width, height))
    picture(0, 300, 300).save(root / "z.png")
    opened = open_images(str(root))
    opened.resize_store(1024)
    with pytest.raises(InputError, match=r"big\.png .*pixels.*--max-item-mb \d+"):
        opened.decode(0)


def _tiff(*entries):
    packed = [struct.pack("<HHII", tag, kind, count, value) for tag, kind, count, value in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(1000)


# 20 x 20 gray pixels in one strip, by deflate or as they are.
_STRIP = (262, 3, 1, 1), (273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, 20)
_GRAY = (256, 4, 1, 20), (257, 4, 1, 20), (258, 3, 1, 8)


@pytest.mark.parametrize(
    "content",
    [
        _tiff(*_GRAY, (259, 3, 1, 8), *_STRIP, (279, 4, 1, 2**31)),
        _tiff(*_GRAY, (259, 3, 1, 1), *_STRIP, (279, 4, 1, 400), (270, 2, 2**32 - 1, 8)),
    ],
    ids=["damaged", "odd"],
)
def test_pillow_and_libtiff_print_nothing_by_themselves(content, tmp_path):
    image_folder(tmp_path / "cells", ["a/0.png", "b/0.png"])
    (tmp_path / "cells/a/1.tif").write_bytes(content)
    code = (
        "import contextlib, sys; from common.data.open import open_images\n"
        "with contextlib.suppress(ValueError): open_images(sys.argv[1]).decode(1)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cells")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""


def test_the_limit_is_a_flag_of_all_programs_and_names_what_would_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reading, "_most", reading._most)
    root = cells_tree(tmp_path / "cells")
    out = ["--out", str(tmp_path / "run")]
    argv = flags("--backbone resnet18 --stem cifar --image-size 8 --bs 8 --epochs 1", out)
    said = refused(
        train_simclr.main, [*argv, "--data", str(root), "--max-item-mb", "0.001"], capsys
    )
    assert "--max-item-mb" in said and not (tmp_path / "run" / "last.pt").exists()
    args, parser = train_simclr.parse_args(["--max-item-mb", "9"])
    assert "max_item_mb" not in config.run_id(parser, args)


def bomb(path: Path, method: int, megabytes: int, name="a/x.png") -> None:
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(name, "w") as file:
        for _ in range(megabytes):
            file.write(bytes(2**20))


def test_a_member_of_an_archive_is_not_unpacked_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_most", 10 * 2**20)
    bomb(tmp_path / "x.zip", zipfile.ZIP_DEFLATED, 40)
    # Its size is declared as 100 bytes: what is read is that.
    data = (tmp_path / "x.zip").read_bytes().replace(struct.pack("<I", 40 * 2**20), b"d\0\0\0")
    (tmp_path / "liar.zip").write_bytes(data)
    bomb(tmp_path / "y.zip", zipfile.ZIP_BZIP2, 40)
    for name in ("x.zip", "liar.zip", "y.zip"):
        with little_memory(20), pytest.raises(InputError, match="none of the images"):
            open_images(str(tmp_path / name))
        archive = reading.open_zip(tmp_path / name)
        with little_memory(20), pytest.raises((InputError, zipfile.BadZipFile)):
            reading.read_member(archive, archive.infolist()[0])
    bomb(tmp_path / "u.npz", zipfile.ZIP_DEFLATED, 40, "text.npy")
    with little_memory(20), pytest.raises(InputError, match="u.npz, which is compressed"):
        utterances.open_utterances(str(tmp_path / "u.npz"))


def test_a_member_without_a_name_is_no_image(tmp_path):
    image_folder(tmp_path, ["a/x.png"])
    member = zipfile.ZipInfo("x")
    member.filename = ""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a/x.png", "a/x.png")
        archive.writestr(member, b"hello")
    assert len(open_images(str(tmp_path / "x.zip"))) == 1


def test_an_array_that_declares_more_than_it_holds_is_not_allocated(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (20, 90000000), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "u.npz", "w") as archive:
        archive.writestr("text.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header)
    with little_memory(10), pytest.raises(InputError, match="more than it holds"):
        utterances.open_utterances(str(tmp_path / "u.npz"))


def test_a_table_or_json_that_grows_when_it_is_read_is_refused(tmp_path):
    (tmp_path / "u.tsv").write_text("text" + "\n" * 2_000_000)
    with little_memory(), pytest.raises(InputError, match="--max-item-mb"):
        utterances.open_utterances(str(tmp_path / "u.tsv"))
    (tmp_path / "s.json").write_text("[" + "[]," * 4_000_000 + "[]]")
    with little_memory(), pytest.raises(InputError, match="--max-item-mb"):
        longtail.read_schedule(str(tmp_path / "s.json"))


def test_a_text_whose_words_would_fill_the_memory_is_refused(tmp_path):
    rows = "".join(f"hi\t{i % 2}\n" for i in range(8))
    (tmp_path / "x.tsv").write_text("text\tlabel\n" + rows + "w " * 2**20 + "\t0\n")
    with pytest.raises(InputError, match="x.tsv: a text of 2097152 char.*--max-item-mb 512"):
        utterances.open_utterances(str(tmp_path / "x.tsv"))


def test_a_name_that_stands_twice_among_many_is_found_at_once(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"n{i}":{entry}' for i in range(200_000)] + [f'"n199999":{entry}']
    text = ("{" + ",".join(names) + "}").encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="'n199999' stands twice"):
        weights.read(tmp_path / "w.safetensors")


def compressed(path: Path, content) -> Path:
    """A file of torch.save whose entries are compressed."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_no_checkpoint_unpacks_to_more_than_its_file(tmp_path):
    path = compressed(tmp_path / "c.pt", {"model": {"w": torch.zeros(10**6)}})
    readers = (
        weights.read,
        checkpoint.load,
        lambda p: checkpoint.load_selected(str(p)),
        lambda p: checkpoint.load_training_state(p, "train"),
        lambda p: weights.load_backbone(str(p), "simclr"),
    )
    for read in readers:
        with pytest.raises(InputError, match="entries are compressed"):
            read(path)
    torch.save({"w": torch.zeros(1).expand(10**9)}, path)
    with pytest.raises(InputError, match="one of its tensors: reading it takes 3815 MB"):
        weights.read(path)
    torch.save({"w": torch.zeros(1), "b": bytearray(5)}, path)
    with pytest.raises(InputError, match="raw bytes"):
        checkpoint.load(path)


CONTENTS = {
    "tensor": torch.zeros(3),
    "list": [1, 2],
    "ints": {1: 2, 3: 4},
    "nested": {"model": {"model": {"model": 3}}},
    "spec": {"model": {"w": torch.zeros(1)}, "model_spec": {"script": "simclr"}, "epoch": 0},
    "place": {"place": 3, "parts": {}},
    "state": dict(stage="pretrain", start="random", place={}, kinds={}, parts={}, sums={}, rng={}),
}


@pytest.mark.parametrize("flag", ["--eval", "--resume", "--weights", "--from", "--teacher"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_checkpoint_with_other_contents_ends_in_one_line(kind, flag, tmp_path, capsys):
    torch.save(CONTENTS[kind], tmp_path / "c.pt")
    argv = [flag, str(tmp_path / "c.pt")]
    if flag != "--eval":
        argv += flags("--backbone resnet18 --stem cifar --bs 64 --epochs 1 --device cpu")
        argv += ["--out", str(tmp_path / "run")]
    if flag in ("--from", "--teacher"):
        argv += ["--stage", "finetune"]
    if flag == "--teacher":
        argv += ["--from", "none"]
    refused(train_simclr.main, argv, capsys, "c.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flag", ["--weights", "--from", "--teacher"])
def test_weights_that_are_not_finite_are_refused_by_file(flag, value, tmp_path, capsys):
    backbone = build_backbone("resnet18", "cifar")
    state = backbone.state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    if flag == "--weights":
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=r"bad\.pt holds values that are NaN or infinite"):
            load_published(build_backbone("resnet18", "cifar"), tmp_path / "bad.pt")
        return
    args = flags("--backbone resnet18 --stem cifar --bs 64 --epochs 1 --device cpu")
    args += ["--stage", "finetune", "--out", str(tmp_path / "run")]
    spec = {"script": "simclr", "backbone": "resnet18", "stem": "cifar", "image_size": 32}
    model = {f"backbone.{name}": tensor for name, tensor in state.items()}
    if flag == "--teacher":
        args += ["--from", "none", "--image-size", "32"]
        classes = open_images("sample").classes
        spec |= {"stage": "finetune", "targets": None, "proj_dim": 8}
        spec |= {"classes": {"linear": classes, "finetune": classes}}
        model |= {"head.weight": torch.zeros(len(classes), 512)}
        model |= {"head.bias": torch.zeros(len(classes))}
    content = {"model": model, "model_spec": spec, "epoch": 1, "metrics": {}, "format": 2}
    torch.save(content, tmp_path / "bad.pt")
    said = refused(train_simclr.main, [*args, flag, str(tmp_path / "bad.pt")], capsys)
    assert "bad.pt" in said and "NaN or infinite" in said


def packed(root: Path) -> Path:
    made = open_images(
        str(image_folder(root / "set", [f"{c}/{i}.png" for c in "ab" for i in "01"]))
    )
    pack.pack(made, root / "set.packed", default_size=20, workers=1)
    return root / "set.packed"


FACTS = {
    "labels": [0, 0, 1, 7],
    "crc": [1, 2],
    "ids": ["a"],
    "store_size": "20",
    "splits": [[], "", "", ""],
    "classes": [1, 2],
    "native_size": 0,
    "fingerprint": None,
}


@pytest.mark.parametrize("name", FACTS)
def test_a_packed_file_with_a_valid_hash_and_wrong_facts_is_refused(name, tmp_path):
    path = packed(tmp_path)
    data = path.read_bytes()
    start = data.rfind(b'{"ids"')
    index = json.loads(data[start : -pack._TRAILER.size])
    for facts in (index | {name: FACTS[name]}, {k: v for k, v in index.items() if k != name}):
        text = json.dumps(facts).encode()
        trailer = pack._TRAILER.pack(len(text), hashlib.sha256(text).digest())
        path.write_bytes(data[:start] + text + trailer)
        with pytest.raises(InputError, match="not a packed data set"):
            open_images(str(path))
    path.write_bytes(data)
    assert len(open_images(str(path))) == 4


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_settings_that_are_nested_too_deeply_are_refused(suffix, tmp_path, capsys):
    file = tmp_path / f"c.{suffix}"
    file.write_text(("a = " if suffix == "toml" else "") + "[" * 20_000)
    refused(train_simclr.main, ["--config", str(file)], capsys, "nested too deeply")
    with pytest.raises(InputError, match="nested too deeply"):
        longtail.read_schedule(str(file))


@pytest.mark.parametrize("flag", ["--data", "--out", "--resume", "--config", "--eval", "--weights"])
def test_names_that_no_file_can_have_end_in_one_line(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["n" * 300, "a/" * 3000, "no\nsuch\x1b[2J"]
    for name in names[:2] if flag == "--out" else names:  # the third is a folder to create
        said = refused(train_simclr.main, [*flags("--bs 64 --epochs 1"), flag, name], capsys)
        assert "\x1b" not in said


def test_a_folder_of_another_user_ends_in_one_line(tmp_path, capsys, monkeypatch):
    stat = os.stat

    def denied(path, *args, **kwargs):
        if "secret" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", denied)
    for flag in ("--data", "--resume", "--eval", "--weights", "--config"):
        argv = [*flags("--bs 64 --epochs 1 --out"), str(tmp_path / "run"), flag]
        if flag == "--eval":
            argv = [flag]
        suffix = ".toml" if flag == "--config" else ".pt"
        refused(train_simclr.main, [*argv, str(tmp_path / f"secret{suffix}")], capsys, "ermission")
    with pytest.raises(SystemExit, match="2"), exit_codes():
        raise PermissionError(13, "Permission denied", "x")


ODD = "caf\udce9.png"  # b"caf\xe9.png"


def test_names_that_are_no_text_and_control_characters_are_items_and_print_as_one_line(
    tmp_path, capsys, monkeypatch
):
    names = [f"{name}/{i}.png" for name in ("a\x1b[31m\nb", "c") for i in range(4)]
    root = image_folder(tmp_path / "set", names)
    picture(0).save(tmp_path / "odd.png")
    (tmp_path / "odd.png").rename(root / "c" / ODD)
    opened = open_images(str(root))
    assert r"c/caf\udce9.png" in opened.ids and r"a\x1b[31m\nb" in opened.classes
    for index in range(len(opened)):
        opened.decode(index)
    monkeypatch.chdir(tmp_path)
    scores = torch.eye(2)[opened.labels % 2]
    write_new(tmp_path / "p.csv", predictions_text(opened.ids, opened.classes, scores))
    with atomic_write(tmp_path / "q.csv") as file:
        file.write(ODD)
    assert r"caf\udce9" in (tmp_path / "q.csv").read_text()
    Log(None, main=True).say("x\ny", ODD)
    assert capsys.readouterr().out == "x\\ny\n" + "caf\\udce9.png\n"
    argv = flags(
        "--backbone resnet18 --stem cifar --image-size 8 --bs 4 --epochs 1", "--data", root
    )
    argv += ["--device", "cpu", "--max-steps", "1", "--out", f"run{ODD}"]
    with pytest.raises(SystemExit, match="0"):
        train_simclr.main(argv)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and r"a\x1b[31m\nb 4" in printed.out


def test_control_characters_of_a_table_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "u.tsv").write_text("text\tlabel\nhi\ta\nho\ta\x1b[2J\x07\n" * 1)
    table = utterances.open_utterances(str(tmp_path / "u.tsv"))
    Log(None, main=True).say(table.describe())
    errors.say("ok")
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    with pytest.raises(SystemExit, match="2"), exit_codes():
        raise InputError(f"the id {table.classes[1]}\n is \u202e bad")
    said = capsys.readouterr().err
    assert said == "error: the id a\\x1b[2J\\x07\\n is \\u202e bad\n"
    assert printable("é 'τ'") == "é 'τ'"


def test_a_read_that_hangs_before_training_ends_with_75(tmp_path):
    cells_tree(tmp_path / "cells", per_class=4)
    code = (
        "import sys, time, os, train_simclr\n"
        "from common import reading\n"
        "status = reading.regular_status\n"
        "def hang(path):\n"
        "    if str(path).endswith('round/02.png'): time.sleep(1000)\n"
        "    return status(path)\n"
        "reading.regular_status = hang\n"
        "train_simclr.main(sys.argv[1:])\n"
    )
    argv = ["--data", str(tmp_path / "cells"), "--timeout", "0.02", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("\n") == 1 and "cells is not read in 0.02 minutes" in done.stderr
