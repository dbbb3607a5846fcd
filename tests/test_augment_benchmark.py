"""The benchmark of the input path runs, checks its peers and ends in one JSON line; its figures are
nobody's oracle.
"""

import json

import pytest
import torch

from common.data import benchmark


def test_every_pipeline_is_timed_on_the_same_images(capsys):
    threads = torch.get_num_threads()
    argv = ["--benchmark", "--size", "24", "--images", "4", "--repeats", "2"]
    assert benchmark.main(argv) == 0
    *_, last = capsys.readouterr().out.strip().split("\n")
    result = json.loads(last)
    names = [row["pipeline"] for row in result["rows"]]
    ours = ["ours, files", "ours, packed file", "ours, augmentation alone"]
    assert (
        names[:2] == ["torchvision, PIL images", "torchvision, uint8 tensors"]
        and names[-3:] == ours
    )
    for row in result["rows"]:
        assert row["size"] == 24 and len(row["seconds"]) == 2 and row["pairs_per_s"] > 0
    assert result["rows"][0]["ratio_to"]["torchvision, PIL images"] == 1
    assert result["torch"] == torch.__version__ and torch.get_num_threads() == threads


def test_without_its_flag_or_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main([])
    assert error.value.code == 2 and "--benchmark" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as error:
            benchmark.main(["--benchmark", "--device", "cuda"])
        assert error.value.code == 2 and "no GPU" in capsys.readouterr().err
