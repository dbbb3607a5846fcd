"""The benchmark runs without a GPU, reports what it says it reports, and refuses to time a wrong
kernel.
"""

import json

import pytest
import torch

import kernels.benchmark
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
    assert {"device", "torch", "triton", "cuda", "ptxas", "commit", "date"} <= report.keys()
    by_name = {(row["implementation"], row["pass"], row["shape"]): row for row in report["rows"]}
    names = {name for name, _, _ in by_name}
    assert any(name.startswith("ours") for name in names) and "eager" in names
    for row in report["rows"]:
        assert row["op"] == op and row["error"] <= 1e-4
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
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
    assert kernels.benchmark.peers("nt_xent") == {}
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


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ended(kernels.benchmark.main, []) == 2
    assert "--cpu" in capsys.readouterr().err
