"""What --eval reads and --predict writes."""

import csv
from types import SimpleNamespace

import pytest
import torch

from common.errors import InputError
from common.run import checkpoint
from common.run.files import FORMAT
from common.run.inference import load_run, predictions_text


def test_predictions_hold_id_class_and_scores():
    scores = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    text = predictions_text(["x,1", "y"], ["cat", "dog"], scores)
    rows = list(csv.reader(text.splitlines()))
    assert rows == [
        ["id", "class", "score_cat", "score_dog"],
        ["x,1", "dog", "0.200000", "0.800000"],
        ["y", "cat", "0.600000", "0.400000"],
    ]


@pytest.mark.parametrize("data", ["there/cells", "sample"])
def test_a_model_whose_data_are_not_here_asks_for_them(data, tmp_path, monkeypatch):
    config = {"data": data}
    state = {"format": FORMAT, "model": {}, "model_spec": {"script": "tsm"}, "config": config}
    file = tmp_path / "m.pt"
    checkpoint.save(file, state)
    args = SimpleNamespace(eval=str(file), predict=None, data="sample", out=None, resume="auto")
    if data == "sample":
        assert load_run(args, SimpleNamespace(name="tsm")).path == "sample"
    else:
        with pytest.raises(InputError, match="trained on there/cells.* give --data"):
            load_run(args, SimpleNamespace(name="tsm"))
