"""The benchmark runs without a GPU, reports what it says it reports, and refuses to time a wrong
kernel.
"""

import json
import sys

import pytest
import torch

import kernels.benchmark
import kernels.dispatch
import kernels.tiles
from kernels import shift_conv1x1_reference
from tests.runs import ended

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", kernels.benchmark.OPS)
def test_every_operation_on_the_cpu(op, capsys):
    kernels.benchmark.main(["--op", op, "--cpu", "--quick", "--peers"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"device", "cpu", "torch", "triton", "cuda", "ptxas", "commit", "date"} <= report.keys()
    assert report["quick"] and report["clocks"] is None
    by_name = {(row["implementation"], row["pass"], row["shape"]): row for row in report["rows"]}
    names = {name for name, _, _ in by_name}
    assert any(name.startswith("ours") for name in names) and "eager" in names
    for row in report["rows"]:
        assert row["op"] == op
        if row["implementation"] in kernels.benchmark.OTHERS:
            assert row["error"] is None  # it computes something else
        else:
            assert row["error"] <= 1e-4
        assert 0 < row["ms_min"] <= row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert op != "temporal_shift" or row["share_of_bound"] > 0


def test_peak_memory_counts_what_a_call_needs():
    result = {}
    with kernels.benchmark.peak_memory(torch.device("cpu"), result):
        torch.ones(25_000_000).sum()
    assert result["peak_mb"] is None or 95 < result["peak_mb"] < 140


def test_a_missing_peer_is_said(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(kernels.benchmark.importlib, "import_module", missing)
    assert kernels.benchmark.peers("nt_xent", 0.1) == {}
    assert "pip install lightly" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    right = kernels.benchmark.nt_xent
    monkeypatch.setattr(
        kernels.benchmark, "nt_xent", lambda *args, **kwargs: 1.001 * right(*args, **kwargs)
    )
    with pytest.raises(SystemExit) as stop:
        kernels.benchmark.main(["--op", "nt_xent", "--cpu", "--quick"])
    assert stop.value.code == 4
    captured = capsys.readouterr()
    assert "wrong kernel is not timed" in captured.err and "median" not in captured.out


def test_each_error_is_its_rows_own(monkeypatch, capsys):
    eager = kernels.benchmark.nt_xent_eager
    monkeypatch.setattr(kernels.benchmark, "nt_xent_eager", lambda *z, **k: 1.01 * eager(*z, **k))
    kernels.benchmark.main(["--op", "nt_xent", "--cpu", "--quick"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    errors = {row["implementation"]: row["error"] for row in report["rows"]}
    assert errors.pop("eager") == pytest.approx(0.01, rel=0.01)
    assert errors and max(errors.values()) < 1e-5


def test_flags_shape_the_inputs_and_json_keeps_the_report(tmp_path, monkeypatch, capsys):
    seen = []
    check = kernels.benchmark.check

    def watched(op, function, inputs, others, *rest, **options):
        seen.append((inputs, others, rest))
        return check(op, function, inputs, others, *rest, **options)

    monkeypatch.setattr(kernels.benchmark, "check", watched)
    flags = ["--cpu", "--quick", "--n", "40", "--dim", "24", "--temperature", "0.3"]
    flags += ["--dtype", "float16"]
    file = tmp_path / "report.json"
    for seed in ("0", "0", "1"):
        argv = [*flags, "--op", "sup_con", "--labels", "long-tailed", "--seed", seed]
        kernels.benchmark.main([*argv, "--json", str(file)])
    assert file.read_text() == capsys.readouterr().out.splitlines(keepends=True)[-1]
    assert json.loads(file.read_text())["seed"] == 1
    first, again, other = (seen[i] for i in (0, len(seen) // 3, -1))
    (z,), (labels,), (dtype, temperature) = first
    assert z.shape == (80, 24) and dtype == z.dtype == torch.float16 and temperature == 0.3
    assert labels.bincount().max() > 20 and labels.unique().numel() > 5
    assert torch.equal(z, again[0][0]) and not torch.equal(z, other[0][0])


def test_the_bounds_are_those_written_down(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    gpu = torch.device("cuda")
    # The table of kernels/README.md: N = 16384, D = 128.
    forward = kernels.benchmark.loss_bound(32768, 128, False, gpu)
    assert forward == pytest.approx(0.174, abs=1e-3)
    both = kernels.benchmark.loss_bound(32768, 128, True, gpu)
    assert both - forward == pytest.approx(0.696, abs=1e-3)
    least = kernels.benchmark.loss_bound(32768, 128, True, gpu, half_backward=True)
    assert least - forward == pytest.approx(0.522, abs=1e-3)


@pytest.mark.skipif(not kernels.dispatch.INTERPRETED, reason="in Triton's interpreter")
def test_a_sweep_times_tiles_and_prints_the_tables_row(tmp_path, capsys):
    file = tmp_path / "sweep.json"
    argv = ["--sweep", "--cpu", "--quick", "--dtype", "float16", "--dim", "20", "--json", str(file)]
    before = kernels.tiles.tile
    kernels.benchmark.main(argv)
    report = json.loads(file.read_text())
    assert report["timed"] == report["tiles"] == len(report["rows"]) == 6
    assert {row["kernel"] for row in report["rows"]} == {"bwd", "half", "full"}
    assert all(row["error"] < 1e-3 and row["ms"] > 0 for row in report["rows"])
    target, *paste = report["paste"]
    assert target == "# interpreter"
    rows = eval("{" + "\n".join(paste) + "\n}")
    for kernel in ("half", "full", "bwd"):
        of_kernel = [row for row in report["rows"] if row["kernel"] == kernel]
        best = kernels.tiles.Tile(*min(of_kernel, key=lambda row: row["ms"])["tile"])
        assert kernels.tiles.Tile(*rows[kernel, "bf16", 64]) == best
    assert "\n".join(report["paste"]) in capsys.readouterr().out
    assert kernels.tiles.tile is before


@pytest.mark.skipif(not kernels.dispatch.INTERPRETED, reason="in Triton's interpreter")
def test_a_tile_that_is_wrong_or_does_not_fit_is_no_choice(monkeypatch, capsys):
    result, wrong = kernels.benchmark.Problem.result, (16, 16, 1, 1, False, 0)

    def broken(self, kernel):
        if self.table(kernel) != wrong:
            return result(self, kernel)
        if kernel == "half":
            raise RuntimeError("out of resource: shared memory\nand more")
        return result(self, kernel) * 1.1

    monkeypatch.setattr(kernels.benchmark.Problem, "result", broken)
    kernels.benchmark.main(["--sweep", "--cpu", "--quick", "--dim", "16"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    failed = [row["failed"] for row in report["rows"] if "failed" in row]
    assert failed == ["out of resource: shared memory"]
    assert [row.partition(": ")[2] for row in report["paste"][1:]] == ["(16, 32, 1, 1),"] * 3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--n", "0"], "--n 0"),
        (["--minutes", "-1"], "--minutes -1"),
        (["--sweep", "--temperature", "0.001"], "0.0128"),
        (["--json", "nowhere/x.json"], "no folder nowhere"),
        (["--labels", "uneven"], "long-tailed"),
    ],
)
def test_bad_flags_are_refused(flags, named, capsys):
    assert ended(kernels.benchmark.main, ["--cpu", *flags]) == 2
    assert named in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ended(kernels.benchmark.main, []) == 2
    assert "--cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "shares"), [(torch.bfloat16, {0, 2, 4}), (torch.float32, {0})])
def test_a_sweep_tries_the_variants_of_the_backward(dtype, shares):
    problem = kernels.benchmark.Problem(torch.device("cpu"), dtype, 32, 16, 0.1)
    plain = kernels.benchmark.tiles_of("bwd", problem, quick=False)
    assert {tile[4:] for tile in plain} == {(False, 0)}
    variants = kernels.benchmark.variants_of(plain, problem)
    expected = {(ahead, share) for ahead in (False, True) for share in shares} - {(False, 0)}
    assert {tile[4:] for tile in variants} == expected
    assert len({*plain, *variants}) == len(plain) + len(variants)


@pytest.mark.skipif(not kernels.dispatch.INTERPRETED, reason="in Triton's interpreter")
def test_a_convolution_of_few_channels_is_timed_with_the_looped_kernel_too(monkeypatch):
    """On a GPU; the choice between the two stays what it was."""
    module = sys.modules["kernels.shift_conv1x1"]
    resident, looped = module.shift_conv1x1_fwd_kernel, module.shift_conv1x1_fwd_loop_kernel
    launched, launch = [], type(looped).__getitem__
    monkeypatch.setattr(
        type(looped), "__getitem__", lambda self, grid: launched.append(self) or launch(self, grid)
    )
    functions = kernels.benchmark.variants("shift_conv1x1", 0, True, False, 0.1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, 3, 3, generator=generator).half()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(24, 16, generator=generator).half()
    truth = shift_conv1x1_reference(x.double(), weight.double(), None, 8)
    for name in ("fused, forward looped", "ours (Triton)"):
        y = functions[name](x, weight, 8)
        assert ((y - truth).norm() / truth.norm()).item() < 1e-3
    assert launched == [looped, resident]
