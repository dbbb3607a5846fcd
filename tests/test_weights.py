"""Weights are read as the safetensors package and torch read them; whatever is wrong ends in one
line, cheaply.
"""

import argparse
import hashlib
import http.server
import json
import os
import random
import resource
import threading
import warnings
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from common import weights
from common.errors import InputError
from common.run import checkpoint
from common.run.files import FORMAT
from tests.test_dist import ranks


def oracle():
    return pytest.importorskip("safetensors.torch", reason="pip install -r tests/requirements.txt")


def tensors():
    """One tensor of every dtype, a scalar, an empty one, and bit patterns that are not numbers."""
    torch.manual_seed(0)
    made = {
        name: torch.randint(0, 256, (3, 2 * dtype.itemsize), dtype=torch.uint8).view(dtype)
        for name, dtype in weights._DTYPES.items()
        if name != "BOOL"
    }
    made |= {
        "BOOL": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    return made | {"layer.0.weight": torch.randn(2, 3, 1, 1), "ключ": torch.arange(3)}


def raw(state):
    return {
        n: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for n, t in state.items()
    }


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.fixture
def little_memory():
    """Address space for 400 MB more than what is in use: a larger allocation fails."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_every_dtype_reads_as_the_package_reads_it(tmp_path):
    file = tmp_path / "w.safetensors"
    oracle().save_file(tensors(), file, metadata={"format": "pt"})
    read = weights.read(file)
    assert raw(read) == raw(oracle().load_file(file)) == raw(tensors())
    read["F32"].add_(1)  # the file is not mapped
    assert raw(weights.read(file)) == raw(tensors())


def test_unaligned_tensors_and_a_padded_header(tmp_path):
    header = (
        json.dumps({"a": entry("U8", [1], [0, 1]), "b": entry("F64", [1], [1, 9])}).encode()
        + b"   "
    )
    file = write(tmp_path / "w.safetensors", header, b"\x07" + bytes(6) + b"\xf0\x3f")
    assert raw(weights.read(file)) == raw(oracle().load_file(file))
    assert weights.read(file)["b"].item() == 1.0


FAULTS = {
    "empty": (b"", "header of 0 bytes in a file of 0"),
    "seven bytes": (b"\x02" + bytes(6), "in a file of 7"),
    "header longer than the file": (
        (2**62, b"{}", b""),
        "header of 4611686018427387904 bytes in a file of 10",
    ),
    "header over the limit": ((100_000_001, b"{}", b""), "allowed: 2 to 100000000"),
    "no JSON": (b"{]", "Expecting property name"),
    "no UTF-8": (b'{"\xff": 1}', "can't decode byte 0xff"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "array": ([1, 2], "not a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__ is not an object of strings"),
    "entry": ({"w": 3}, "'w' lacks dtype, shape or data_offsets"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, "'w' lacks"),
    "twice": (b'{"w": {}, "w": {}}', "'w' stands twice"),
    "dtype": ({"w": entry("F31")}, "'w' has dtype 'F31', allowed F64"),
    "dtype list": ({"w": entry(["F32"])}, "'w' has dtype"),
    "negative": ({"w": entry(shape=[-2, -1])}, r"'w' has shape \[-2, -1\]"),
    "bool": ({"w": entry(shape=[True, 2])}, "'w' has shape"),
    "float": ({"w": entry(shape=[2.0])}, "'w' has shape"),
    "65 dimensions": ({"w": entry(shape=[1] * 64 + [2])}, "'w' has shape"),
    "absurd": ({"w": entry(shape=[2**40, 2**40])}, "absurd shape"),
    "absurd but empty": ({"w": entry(shape=[0, 2**62, 8], span=[0, 0])}, "absurd shape"),
    "wraps to 8 bytes": ({"w": entry(shape=[2**62 + 2])}, "absurd shape"),
    "a number of 5000 digits": (b'{"w": ' + b"9" * 5000 + b"}", "digit"),
    "three offsets": ({"w": entry(span=[0, 4, 8])}, "'w' has shape"),
    "backwards": ({"w": entry(span=[8, 0])}, "needs 8 bytes"),
    "out of range": ({"w": entry(shape=[4], span=[0, 16])}, "of 8"),
    "size": ({"w": entry(shape=[3])}, "needs 12 bytes"),
    "overlap": (
        {"v": entry(shape=[1], span=[0, 4]), "w": entry()},
        "'w' overlaps another tensor at byte 0",
    ),
    "gap": ({"v": entry(shape=[1], span=[4, 8])}, "'v' leaves a gap at byte 4"),
    "hole at the end": ({"v": entry(shape=[1], span=[0, 4])}, "end at byte 4 of 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_safetensors_file_is_refused_in_one_line(tmp_path, fault, little_memory):
    content, message = FAULTS[fault]
    file = tmp_path / "w.safetensors"
    if isinstance(content, tuple):
        write(file, content[1], content[2], length=content[0])
    elif fault in ("empty", "seven bytes"):
        file.write_bytes(content)
    else:
        write(file, content, bytes(8))
    with pytest.raises(InputError, match=message) as error:
        weights.read(file)
    assert (
        str(file) in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 600
    )


def mutated(good: bytes, rng: random.Random, header: int) -> bytes:
    """The file with a few faults of the kinds that disks, networks and enemies make, most of them
    in its header.
    """
    bad = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 4))):
        place = rng.randrange(min(len(bad), rng.choice((9, header, len(good)))) or 1)
        kind = rng.randrange(7)
        if kind == 0:
            bad[place : place + 1] = bytes([bad[place] ^ 1 << rng.randrange(8)]) if bad else b""
        elif kind == 1:
            del bad[place : place + rng.choice((1, 1, 8, 1000))]
        elif kind == 2:
            bad[place:place] = bad[place : place + rng.choice((1, 8, 100))]
        elif kind == 3:
            bad[place : place + 1] = rng.choice(
                (b"0", b"9", b"-", b"[", b"}", b",", b'"', b" ", b"1e9", b"null")
            )
        elif kind == 4:
            del bad[rng.randrange(len(bad) + 1) :]
        elif kind == 5:
            bad[:8] = rng.choice(
                (0, 1, 2**20, 2**31, 2**63, 2**64 - 1, rng.randrange(2 * header))
            ).to_bytes(8, "little")
        else:
            digits = [i for i, byte in enumerate(bad[:header]) if 48 <= byte <= 57]
            if digits:
                bad[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(bad)


def test_mutated_safetensors_read_as_the_package_reads_them_or_are_refused(tmp_path, little_memory):
    load, rng, file = oracle().load_file, random.Random(0), tmp_path / "w.safetensors"
    files = [
        oracle().save(tensors()),
        oracle().save({"w": torch.ones(2, 3), "b": torch.zeros(3).half()}),
    ]
    read = refused = 0
    for turn in range(3000):
        good = files[turn % 2]
        file.write_bytes(mutated(good, rng, 8 + int.from_bytes(good[:8], "little")))
        try:
            ours = raw(weights.read(file))
        except InputError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
            with pytest.raises(pytest.importorskip("safetensors").SafetensorError):
                load(file)
            continue
        read += 1
        assert ours == raw(load(file))
    assert read > 80 and refused > 2000, (read, refused)


@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_torch_files_read_or_are_refused(tmp_path, little_memory, legacy):
    rng, file = random.Random(1), tmp_path / "w.pth"
    state = {"state_dict": {"w": torch.ones(20, 3), "b": torch.zeros(3).half()}, "epoch": 3}
    state["opt"] = argparse.Namespace(lr=0.1)
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    good, refused = file.read_bytes(), 0
    for _ in range(600):
        file.write_bytes(mutated(good, rng, len(good)))
        try:
            weights.read(file)
        except InputError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert refused > 300


def test_own_checkpoints_containers_and_prefixes_are_opened(tmp_path):
    state = {"conv.weight": torch.randn(2, 3), "bn.running_mean": torch.randn(2)}
    wrapped = {
        "plain": state,
        "timm": {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}},
        "timm's average": {"state_dict": {"conv.weight": torch.ones(1)}, "state_dict_ema": state},
        "torchvision": {"model": state, "lr_scheduler": {}},
        "own last.pt": {"format": FORMAT, "parts": {"model": state}, "place": {"step": 1}},
        "ddp": {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        "ddp of compiled": {f"module._orig_mod.{n}": t for n, t in state.items()},
        "compiled ddp": {f"_orig_mod.module.{n}": t for n, t in state.items()},
        "parameters": {n: nn.Parameter(t) for n, t in state.items()},
    }
    for suffix in (".pt", ".pth", ".bin", ".pth.tar"):
        for value in wrapped.values():
            torch.save(value, tmp_path / f"w{suffix}")
            read = weights.read(tmp_path / f"w{suffix}")
            assert raw(read) == raw(state) and not any(t.requires_grad for t in read.values())
    checkpoint.save(tmp_path / "backbone.pt", state)
    assert raw(weights.read(str(tmp_path / "backbone.pt"))) == raw(state)
    good = (tmp_path / "backbone.pt").read_bytes()
    (tmp_path / "backbone.pt").write_bytes(good.replace(b"conv.weight", b"conv.weighs"))
    with pytest.raises(InputError, match="SHA-256"):
        weights.read(tmp_path / "backbone.pt")


class Settings(dict):
    """Of another project."""


class History(list):
    """Of another project."""


def with_objects():
    """A checkpoint with what training scripts keep beside the weights."""
    state = {"conv.weight": nn.Parameter(torch.randn(3, 2)), "steps": torch.arange(2)[1]}
    settings = Settings(lr=0.1)
    settings.names = argparse.Namespace(data="x", more=settings)
    meters = defaultdict(list, loss=History([np.float64(3), np.ones(2, np.float32)]))
    return {
        "state_dict": nn.ModuleDict().state_dict() | state,
        "args": settings,
        "meters": [meters, {b"raw", 1 + 2j}],
        "kind": [torch.float16, torch.device("cuda", 0), torch.Size([2])],
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_read_beside_objects_that_stay_unread(tmp_path, monkeypatch, legacy):
    file = tmp_path / "w.pt"
    state = with_objects()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    # Nothing of the classes is there any more.
    monkeypatch.delattr(argparse, "Namespace")
    monkeypatch.delitem(globals(), "Settings")
    monkeypatch.delitem(globals(), "History")
    assert raw(weights.read(file)) == raw(state["state_dict"])
    with pytest.raises(InputError, match="asks to run"):
        checkpoint.load(file)


def test_files_that_are_no_weights_are_refused(tmp_path):
    def refused(name, match):
        with pytest.raises(InputError, match=match) as error:
            weights.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)

    refused("missing.pt", "no such file")
    refused("", "a folder; give a file")
    endless = {"epoch": 3}
    endless["model"] = endless
    for value, match in (
        (endless, "'epoch' is int"),
        ([torch.ones(2)], "holds no state dict of tensors: it is a list"),
        ({}, "it is empty"),
        ({"w": torch.ones(2), "n": 3}, "'n' is int"),
        ({"w": torch.ones(2).to_sparse()}, "sparse"),
        ({"w": torch.ones(2, device="meta")}, "without values"),
        ({"module.w": torch.ones(2), "w": torch.ones(2)}, "with and without the prefix"),
        (argparse.Namespace(lr=1), "asks to run argparse.Namespace; store its state dict alone"),
        (nn.Linear(2, 2), "asks to run torch.nn.modules.linear.Linear"),
        ({"model": nn.Linear(2, 2)}, "asks to run torch.nn.modules.linear.Linear; store"),
        ({"w": torch.ones(2), "n": argparse.Namespace(lr=1)}, "'n' is argparse.Namespace"),
    ):
        torch.save(value, tmp_path / "w.pt")
        refused("w.pt", match)
    for content in (b"", b"\xff\xd8\xff\xe0" + bytes(500), b"hello\n" * 100, bytes(9)):
        (tmp_path / "w.pt").write_bytes(content)
        refused("w.pt", "not a file of tensors")


class Scripted(nn.Module):
    """Mixed dtypes, a transposed, an empty and a shared tensor, and attributes of other types."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 4).half(), nn.ReLU(), nn.ModuleList([nn.BatchNorm2d(2)])[0]
        )
        self.p = nn.Parameter(torch.randn(2, 3).t())
        self.empty = nn.Parameter(torch.empty(0))
        self.alike = nn.Linear(3, 4)
        self.alike.weight = self.body[0].weight
        self.register_buffer("count", torch.tensor(7))
        self.names, self.sizes, self.table, self.factor = ["x"], [1, 2], {"a": 1}, 1.5

    def forward(self, x):
        return (
            x @ self.p * self.factor
            + self.count
            + len(self.names)
            + self.sizes[0]
            + self.table["a"]
        )


def script(tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        model = torch.jit.script(Scripted())
        model.save(tmp_path / "script.pt")
    return tmp_path / "script.pt", model.state_dict()


def rewrite(file, change, kind=zipfile.ZIP_STORED):
    """The archive with another data.pkl and correct checksums."""
    with (
        zipfile.ZipFile(file) as source,
        zipfile.ZipFile(file.with_name("new.pt"), "w", kind) as made,
    ):
        for entry in source.infolist():
            data = source.read(entry)
            made.writestr(
                entry.filename, change(data) if entry.filename.endswith("/data.pkl") else data
            )
    return file.with_name("new.pt")


def test_a_torchscript_archive_gives_its_tensors(tmp_path):
    file, expected = script(tmp_path)
    read = weights.read(file)
    assert (
        raw(read) == raw({name: expected[name] for name in read}) and read.keys() == expected.keys()
    )
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(Scripted(), torch.randn(2, 3)).save(file)
    assert weights.read(file).keys() == expected.keys()


def test_a_torchscript_archive_runs_nothing(tmp_path, monkeypatch):
    file, _ = script(tmp_path)
    monkeypatch.setattr(
        torch.jit, "load", lambda *_: pytest.fail("torch.jit.load runs the archive's program")
    )
    call = b"cos\nsystem\n(X\x08\x00\x00\x00touch me\x86R."
    for change, match in (
        (lambda data: b"\x80\x02" + call, "names os.system"),
        (
            lambda data: data.replace(b"ctorch._utils\n_rebuild_tensor_v2", b"cbuiltins\neval"),
            "names builtins.eval",
        ),
        (lambda data: data.replace(b"HalfStorage", b"QInt8Storage"), "names torch.QInt8Storage"),
        (lambda data: b"\x80\x02}r\xff\xff\xff\x7f.", "absurd memo index"),
        (lambda data: data.replace(b"K\x03K\x02t", b"K\xffK\xfft"), "in a storage of 6 elements"),
        (lambda data: data[: len(data) // 2], "no TorchScript archive of a plain module"),
        (lambda data: b"\x80\x02}.", "no TorchScript archive of a plain module"),
        # A module that holds itself, and one of 2 ** 40 modules.
        (
            lambda data: b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
            "more than 100000 modules",
        ),
        (
            lambda data: (
                b"\x80\x02"
                + b"c__torch__\nM\n)\x81q\x00"
                + b"".join(
                    b"0c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cubq%c"
                    % (i, i, i + 1)
                    for i in range(40)
                )
                + b"."
            ),
            "more than 100000 modules",
        ),
    ):
        with pytest.raises(InputError, match=match) as error:
            weights.read(rewrite(file, change))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="data.pkl is compressed"):
        weights.read(rewrite(file, lambda data: data, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("kind", ["TorchScript", "objects"])
def test_damaged_archives_end_in_one_line(kind, tmp_path, little_memory):
    if kind == "TorchScript":
        file, _ = script(tmp_path)
    else:
        file = tmp_path / "w.pt"
        torch.save(with_objects(), file)
    rng, refused = random.Random(0), 0
    for trial in range(400):

        def damage(data):
            data = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)

        if trial % 2:
            bad = rewrite(file, damage)
        else:  # with checksums that tell
            bad = file.with_name("new.pt")
            bad.write_bytes(damage(file.read_bytes()))
        try:
            weights.read(bad)
        except InputError as error:
            assert "\n" not in str(error) and str(bad) in str(error)
            refused += 1
    assert refused > 200


def test_a_compressed_archive_is_not_unpacked(tmp_path, little_memory):
    torch.save({"w": torch.zeros(50_000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb,
    ):
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry), 8)
    with pytest.raises(InputError, match="compressed"):
        weights.read(tmp_path / "bomb.pt")


def small(classes=5):
    model = nn.Sequential()
    model.body, model.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
    model.fc = nn.Linear(4, classes) if classes else nn.Identity()
    return model


def test_a_head_that_fits_is_loaded_and_one_that_does_not_is_left_out_and_said():
    model = small()
    assert weights.load(model, small().state_dict(), "x.pt", head=("fc.",)) == []
    source = small(7)
    before = model.fc.weight.clone()
    left_out = weights.load(model, source.state_dict(), "x.pt", head=("fc.",))
    assert left_out == [
        "x.pt: the head fc.* is left out (in the file (7, 4), in this model (5, 4))"
    ]
    assert torch.equal(model.fc.weight, before) and torch.equal(
        model.body.weight, source.body.weight
    )
    assert (
        "in this model none"
        in weights.load(small(0), small().state_dict(), "x.pt", head=("fc.",))[0]
    )
    assert (
        "in the file none" in weights.load(small(), small(0).state_dict(), "x.pt", head=("fc.",))[0]
    )
    with pytest.raises(InputError, match=r"fc.weight is \(7, 4\), the model's is \(5, 4\)"):
        weights.load(model, small(7).state_dict(), "x.pt")


def test_all_but_the_head_must_fit():
    model, state = small(), small().state_dict()
    extra = {"aux.weight": torch.ones(1), "aux.bias": torch.ones(1)}
    assert weights.load(model, state | extra, "x.pt", ignore=("aux.",)) == [
        "x.pt: aux.* (2 tensors) is not used"
    ]
    with pytest.raises(
        InputError, match=r"x.pt does not fit .* 2 unknown keys \(first: aux.weight, aux.bias\)"
    ):
        weights.load(model, state | extra, "x.pt", head=("fc.",))
    with pytest.raises(InputError, match=r"1 key missing \(first: body.bias\)"):
        weights.load(
            model, {n: t for n, t in state.items() if n != "body.bias"}, "x.pt", head=("fc.",)
        )
    with pytest.raises(InputError, match=r"body.bias is torch.int8, the model's is torch.float32"):
        weights.load(model, state | {"body.bias": torch.ones(4, dtype=torch.int8)}, "x.pt")


def test_files_without_batch_counts_and_of_half_precision_load():
    model, source = small(), small()
    state = {
        n: t.half() for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")
    }
    weights.load(model, state, "x.pt")
    assert model.body.weight.dtype == torch.float32 and torch.equal(
        model.body.weight, source.body.weight.half().float()
    )


CONTENT = random.Random(0).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server on this machine; `asked` lists what it was asked for. torch.hub's
    folder is `tmp_path / "hub"`.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/missing.pt":
                return self.send_error(404)
            if self.path == "/odd.pt":
                return self.wfile.write(b"no answer of a web server\n")
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000] if self.path == "/short.pt" else CONTENT)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield argparse.Namespace(url=f"http://127.0.0.1:{listening.server_port}", asked=asked)
        listening.shutdown()
        thread.join()


GONE = "http://127.0.0.1:9"  # the port "discard", on which nothing listens


def test_a_published_file_is_fetched_once(server, tmp_path, capfd):
    url = f"{server.url}/a/w.pt"
    cached = tmp_path / "hub" / "checkpoints" / "w.pt"
    assert weights.fetch(url, SHA256[:8], "--weights") == cached
    assert cached.read_bytes() == CONTENT and server.asked == ["/a/w.pt"]
    assert [file.name for file in cached.parent.iterdir()] == ["w.pt"]
    out, err = capfd.readouterr()
    assert out == f"downloading {url} to {cached}\n" and err == ""
    # The network is not needed any more, nor where the file was carried here by hand.
    assert weights.fetch(f"{GONE}/w.pt", SHA256, "--weights") == cached
    cached.rename(cached.with_name("carried.pt"))
    assert weights.fetch(f"{GONE}/carried.pt", SHA256, "--weights").read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "") and len(server.asked) == 1


def test_a_damaged_copy_is_fetched_anew(server, tmp_path):
    cached = tmp_path / "hub" / "checkpoints" / "w.pt"
    cached.parent.mkdir(parents=True)
    for content in (CONTENT[:-1], b"<html>log in first</html>", b""):
        cached.write_bytes(content)
        with pytest.raises(InputError, match="could not be fetched"):
            weights.fetch(f"{GONE}/w.pt", SHA256, "--weights")
        assert cached.read_bytes() == content
        weights.fetch(f"{server.url}/w.pt", SHA256, "--weights")
        assert cached.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("w.pt", "another SHA-256"),
        ("short.pt", "another SHA-256"),
        ("missing.pt", "Not Found"),
        ("odd.pt", "answer of a web server"),
        ("gone.pt", "refused"),
        ("folder.pt", "is a folder"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_with_the_address_and_the_place(
    server, tmp_path, name, fault
):
    cached = tmp_path / "hub" / "checkpoints" / name
    url = f"{GONE if name == 'gone.pt' else server.url}/{name}"
    sha256 = SHA256[::-1] if name == "w.pt" else SHA256
    if name == "folder.pt":
        cached.mkdir(parents=True)
    with pytest.raises(InputError, match=fault) as error:
        weights.fetch(url, sha256, "--weights")
    assert "\n" not in str(error.value)
    for part in (url, sha256, f"at {cached}", "--weights FILE"):
        assert part in str(error.value)
    assert not cached.is_file() and not any(cached.parent.glob("*.partial"))


def test_a_cache_folder_that_cannot_be_made_is_one_line(server, tmp_path):
    (tmp_path / "hub").touch()
    with pytest.raises(InputError, match="could not be fetched .*put that file .* at "):
        weights.fetch(f"{server.url}/w.pt", SHA256, "--weights")


def fetched_by(world, url, own_cache):
    if own_cache:
        os.environ["TORCH_HOME"] += f"/node{world.rank}"
    try:
        path = weights.fetch(url, SHA256, "--weights")
    except InputError as error:
        return {"refused": str(error)}
    return {"read": path.read_bytes() == CONTENT}


@pytest.mark.parametrize(("own_cache", "times"), [(False, 1), (True, 2)])
def test_two_ranks_download_once_a_cache(server, tmp_path, own_cache, times):
    assert ranks(tmp_path, 2, fetched_by, f"{server.url}/w.pt", own_cache) == 2 * [{"read": True}]
    assert server.asked == times * ["/w.pt"]


def test_both_ranks_refuse_what_the_first_cannot_fetch(server, tmp_path):
    lines = ranks(tmp_path, 2, fetched_by, f"{server.url}/missing.pt", False)
    assert lines[0] == lines[1] and "missing.pt could not be fetched" in lines[0]["refused"]
    assert server.asked == ["/missing.pt"]


def test_a_name_means_what_is_published_and_anything_else_a_path(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = {"imagenet": weights.Published(f"{server.url}/w.pt", SHA256)}
    for name in ("imagenet", "openai", "mine"):
        (tmp_path / name).touch()  # the first two are ./imagenet and ./openai
    assert weights.locate("imagenet", "net", published).read_bytes() == CONTENT
    for path in ("./imagenet", "mine", "lost.pt", "folder/lost", "openai.pt"):
        assert weights.locate(path, "net", published) == path
    for name in ("openai", "imagnet", "IMAGENET1K_V2"):
        with pytest.raises(InputError, match=f"--weights {name}: by name net has imagenet;"):
            weights.locate(name, "net", published)
    with pytest.raises(InputError, match="--weights imagenet: by name net has none; .* a file"):
        weights.locate("imagenet", "net", {})
