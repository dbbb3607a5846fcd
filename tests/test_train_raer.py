"""Functions of train_raer.py: augmentation and scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import train_raer
from common import config, longtail
from common.run import dist
from common.run.loop import Batch


def test_one_draw_a_clip_serves_all_frames_of_both_streams():
    class Fake:
        args = type("Args", (), {"augment": None, "seed": 0, "cache_features": False})
        model_spec = {"image_size": 16, "backbone": "vit_tiny"}
        world = dist.Dist(0, 1, torch.device("cpu"))
        schedule = longtail.SCHEDULES["three-stage"]

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
    # What a schedule file says of it is heeded: here nothing varies, or only mirrored.
    still = longtail.Augmentation(jitter=0, hue=0, degrees=0, crop=1, mirror=False)
    for mirror in (False, True):
        Fake.schedule = replace(Fake.schedule, augmentation=replace(still, mirror=mirror))
        x = train_raer.frames_of(Fake, Batch(both, np.arange(3), None, 2))
        for one, stored in zip(x, plain, strict=True):
            same = torch.allclose(one, stored, atol=0.02)
            assert same or (mirror and torch.allclose(one, stored.flip(-1), atol=0.02))
        flipped = [not torch.allclose(a, b, atol=0.02) for a, b in zip(x, plain, strict=True)]
        assert any(flipped) == mirror


def test_a_constant_answer_raises_the_alarm_beside_the_majority_class(capsys):
    class Fake:
        args = type("Args", (), {"seed": 0})
        model_spec = {"classes": ["neutrality", "enjoyment", "confusion", "fatigue", "distraction"]}
        data = type(
            "Clips", (), {"labels": np.repeat(np.arange(5), [277, 26, 6, 31, 84]), "groups": None}
        )

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


@pytest.mark.parametrize(
    ("text", "tune"),
    [
        ("", "full"),
        ("--backbone vit_l_14", "full"),
        ("--method ldam-drw --image-lr 1e-4 --checkpoint-blocks", "full"),
        ("--tune none", "none"),
        ("--tune adapter", "adapter"),
        ("--cache-features", "none"),
        ("--weights openai", "none"),
        ("--weights openai --tune full", "full"),
        ("--backbone resnet18", "none"),
        ("--backbone vit_tiny", "none"),
        ("--demo", "none"),
    ],
)
def test_a_tower_of_clip_without_weights_trains_whole_unless_told_otherwise(text, tune):
    args, _ = train_raer.parse_args(text.split())
    assert train_raer.tuned_part(args) == tune


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("vit_b_16 trains", "1024 frames a step", "--weights")),
        ("--bs 4 --num-frames 2", ("--tune full", " 16 frames a step")),
        ("--tune none", ("WARN ", "--tune none", "random and stays so", "--weights starts")),
        ("--cache-features --tune adapter", ("WARN ", "--tune adapter")),
        ("--backbone resnet18", ("WARN ", "--tune none", "--weights starts")),
        ("--backbone vit_tiny", ("WARN ", "trains it")),
        ("--demo", ("no --weights and --tune none",)),
    ],
)
def test_what_becomes_of_a_random_tower_is_said(text, parts):
    args, _ = train_raer.parse_args(text.split())
    said = train_raer.describe_random_tower(args, train_raer.settings(args)["train"].bs)
    assert all(part in said for part in parts) and "\n" not in said
    assert said.startswith("WARN ") == ("WARN " in parts)
    assert ("--weights starts" in said) == (args.backbone != "vit_tiny")  # of it none are published


def test_a_frozen_run_has_the_name_that_it_had_by_default(tmp_path):
    """`--tune none`, once the default, goes on with a run that was begun without it."""
    facts = {"tune": "none", "backbone": "vit_b_16"}
    plain, frozen = (train_raer.parse_args(text.split()) for text in ("", "--tune none"))
    ids = [config.run_id(parser, args, **facts) for args, parser in (plain, frozen)]
    assert ids[0] == ids[1]
