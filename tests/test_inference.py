"""What --predict writes."""

import csv

import torch

from common.run.inference import write_predictions


def test_predictions_hold_id_class_and_scores(tmp_path):
    scores = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    write_predictions(tmp_path / "p.csv", ["x,1", "y"], ["cat", "dog"], scores)
    rows = list(csv.reader((tmp_path / "p.csv").read_text().splitlines()))
    assert rows == [
        ["id", "class", "score_cat", "score_dog"],
        ["x,1", "dog", "0.200000", "0.800000"],
        ["y", "cat", "0.600000", "0.400000"],
    ]
