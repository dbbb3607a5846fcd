"""The benchmark of the input path runs, checks its peers and ends in one JSON line.

Its figures are nobody's oracle.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.data import benchmark
from tests.runs import refused


def test_every_pipeline_is_timed_on_the_same_images(capsys):
    threads = torch.get_num_threads()
    assert benchmark.main(["--size", "24", "--images", "4", "--repeats", "2"]) == 0
    *_, last = capsys.readouterr().out.strip().split("\n")
    result = json.loads(last)
    *rows, parts = result["rows"]
    names = [row["pipeline"] for row in rows]
    ours = ["ours, files", "ours, packed file", "ours, decoded before"]
    assert (
        names[:2] == ["torchvision, PIL images", "torchvision, uint8 tensors"]
        and names[-3:] == ours
    )
    assert list(parts["ms_a_picture"]) == ["decode", "crop", "color", "blur", "normalize"]
    assert parts["two_threads"] > 0
    for row in rows:
        assert row["antialiased"] != row["pipeline"].startswith(("albumentations", "kornia"))
        assert row["size"] == 24 and len(row["seconds"]) == 2 and row["pairs_per_s"] > 0
    assert result["rows"][0]["ratio_to"]["torchvision, PIL images"] == 1
    assert result["torch"] == torch.__version__ and torch.get_num_threads() == threads


def test_the_share_of_the_augmentation_is_measured_where_it_is_asked_for(capsys):
    argv = ["--size", "24", "--images", "2", "--repeats", "1", "--pairs", "2"]
    assert benchmark.main(argv) == 0
    *_, last = capsys.readouterr().out.strip().split("\n")
    step = json.loads(last)["rows"][-1]
    assert step["pairs"] == 2 and step["size"] == 24
    both = step["augmentation_ms"] + step["step_ms"]
    assert 0 < step["share"] < 1 and step["share"] == step["augmentation_ms"] / both


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    refused(benchmark.main, ["--device", "cuda"], capsys, "no GPU")


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "common.data.benchmark", "--help"]
    root = Path(benchmark.__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and "--images" in result.stdout
