"""Functions of train_raer.py: augmentation and scores."""

import numpy as np
import pytest
import torch

import train_raer
from common.run import dist
from common.run.loop import Batch


def test_one_draw_a_clip_serves_all_frames_of_both_streams():
    class Fake:
        args = type("Args", (), {"augment": None, "seed": 0, "cache_features": False})
        model_spec = {"image_size": 16, "backbone": "vit_tiny"}
        world = dist.Dist(0, 1, torch.device("cpu"))

    frame = torch.randint(0, 256, (3, 1, 3, 20, 20), dtype=torch.uint8).expand(3, 4, 3, 20, 20)
    both = (frame, frame)
    x = train_raer.frames_of(Fake, Batch(both, np.array([5, 9, 14]), None, 2))
    assert x.shape == (3, 2, 4, 3, 16, 16)
    assert all(torch.equal(x[:, 0, :1], x[:, i, t : t + 1]) for i in (0, 1) for t in range(4))
    plain = train_raer.frames_of(Fake, Batch(both, np.array([5, 9, 14]), None, None))
    other = train_raer.frames_of(Fake, Batch(both, np.array([5, 9, 15]), None, 2))
    assert (
        not torch.equal(x[0], plain[0])
        and torch.equal(x[:2], other[:2])
        and not torch.equal(x[2], other[2])
    )


def test_a_constant_answer_raises_the_alarm_beside_the_majority_class(capsys):
    class Fake:
        args = type("Args", (), {"seed": 0})
        model_spec = {"classes": ["neutrality", "enjoyment", "confusion", "fatigue", "distraction"]}
        data = type("Clips", (), {"labels": np.repeat(np.arange(5), [277, 26, 6, 31, 84])})

    Fake.model_spec["counts"] = [1106, 103, 24, 126, 338]
    said = []
    scores = torch.zeros(424, 5)
    scores[:, 0] = 1
    values = train_raer.score(Fake, "train/val", np.arange(424), scores, said.append)
    assert values["train/val/uar"] == values["train/val/majority_uar"] == pytest.approx(0.2)
    assert round(values["train/val/majority_war"], 4) == 0.6533
    assert len(said) == 1 and "the model predicts one class, UAR 20.0%, WAR 65.3%" in said[0]
    scores[3, 2] = 2
    assert (
        train_raer.score(Fake, "train/val", np.arange(424), scores, said.append) and len(said) == 1
    )
