"""The monitor on curves whose course is known, and against scipy."""

import json
import math
import random

import pytest

from common.monitor import (
    PATIENCE,
    PROBLEMS,
    Monitor,
    contrastive_problem,
    slope,
    stability,
    trend,
)

ORACLE = "pip install -r tests/requirements.txt"


def replay(curve, **settings):
    """Run the monitor over a curve; returns it and the epoch index at which it stopped, or None."""
    monitor = Monitor(**settings)
    for epoch, score in enumerate(curve):
        monitor.add(score)
        if monitor.should_stop():
            return monitor, epoch
    return monitor, None


def noisy(shape, noise, seed, epochs=100):
    rng = random.Random(seed)
    return [shape(t) + rng.gauss(0, noise) for t in range(epochs)]


RISING = {
    "line": lambda t: 0.1 + 0.004 * t,
    "very slow": lambda t: 0.24 + 1e-6 * t,
    "saturating": lambda t: 0.4 - 0.3 * math.exp(-t / 30),
    "late": lambda t: 0.2 + 0.1 / (1 + math.exp(-(t - 15) / 4)) + 1e-5 * t,
    "below zero": lambda t: -0.5 + 0.003 * t,
}


@pytest.mark.parametrize("name", RISING)
def test_a_rising_curve_never_stops(name):
    monitor, stopped = replay([RISING[name](t) for t in range(150)])
    assert (
        stopped is None
        and monitor.report()["performance_trend"] == "improving"
        and monitor.alarms() == []
    )
    assert (
        monitor.report()["total_improvements"] == 149
        and monitor.report()["total_degradations"] == 0
    )


@pytest.mark.parametrize("rise, noise", [(0.004, 0.004), (0.004, 0.01), (0.002, 0.008)])
def test_a_noisy_rising_curve_never_stops(rise, noise):
    stopped = [replay(noisy(lambda t: 0.2 + rise * t, noise, seed))[1] for seed in range(100)]
    assert stopped == [None] * 100


def test_the_ancestors_rule_stopped_at_epoch_index_9_whatever_the_curve():
    def ancestor(scores):  # "the last 5 values are no better than the best", which includes them
        return len(scores) >= 10 and all(score <= max(scores) for score in scores[-5:])

    for curve in (
        [RISING["line"](t) for t in range(60)],
        [0.3] * 60,
        noisy(lambda t: 0.3, 0.02, 0),
    ):
        assert next(epoch for epoch in range(60) if ancestor(curve[: epoch + 1])) == 9
        _, stopped = replay(curve)
        assert stopped is None or stopped >= 19


@pytest.mark.parametrize("min_epochs, expected", [(20, 19), (1, 10), (50, 49)])
def test_a_flat_curve_stops_when_the_minimum_is_done(min_epochs, expected):
    monitor, stopped = replay([0.3] * 100, min_epochs=min_epochs)
    assert stopped == expected
    assert (
        monitor.alarms() == [f"no gain for {stopped} epochs"]
        and monitor.report()["performance_trend"] == "stable"
    )


def test_a_noisy_flat_curve_stops_early():
    for noise in (0.002, 0.02):
        stopped = [replay(noisy(lambda t: 0.3, noise, seed))[1] for seed in range(100)]
        assert None not in stopped and min(stopped) >= 19 and sorted(stopped)[50] < 35


def test_a_falling_curve_stops_and_says_so():
    monitor, stopped = replay([0.5 - 0.005 * t for t in range(100)])
    assert stopped == 19
    report = monitor.report()
    assert report["performance_trend"] == "declining" and report["best_epoch"] == 1
    assert report["total_degradations"] == 14 and report["total_improvements"] == 0
    assert monitor.alarms() == ["no gain for 19 epochs", "the score is declining"]


def test_a_rise_that_ends_stops_within_two_windows():
    for seed in range(50):
        _, stopped = replay(noisy(lambda t: 0.2 + 0.005 * min(t, 40), 0.005, seed, epochs=120))
        assert 45 < stopped < 90


def test_slope_equals_scipy():
    stats = pytest.importorskip("scipy.stats", reason=ORACLE)
    for seed in range(20):
        curve = noisy(lambda t: 0.1 * t, 1.0, seed, epochs=5 + seed)
        assert slope(curve) == pytest.approx(stats.theilslopes(curve).slope, abs=1e-12)
    assert slope([1.0]) == 0 and slope([]) == 0


def test_trend_agrees_with_kendalls_test():
    stats = pytest.importorskip("scipy.stats", reason=ORACLE)
    called = 0
    for seed in range(200):
        rise = 0.05 * (seed % 5 - 2)
        curve = [
            score + rise * t for t, score in enumerate(noisy(lambda t: 0.0, 0.5, seed, epochs=20))
        ]
        tau = stats.kendalltau(range(20), curve)
        if tau.pvalue < 0.03:
            assert trend(curve) == ("improving" if tau.statistic > 0 else "declining")
        elif tau.pvalue > 0.07:
            assert trend(curve) == "stable"
        called += trend(curve) != "stable"
    assert 50 < called < 180
    assert trend([]) == trend([0.1, 0.2, 0.3, 0.4]) == trend([0.3] * 20) == "stable"
    assert trend([0.1, 0.2, 0.3, 0.4, 0.5]) == "improving"
    # One wild epoch is no trend, and hides none.
    assert trend([0.3 + 0.001 * t for t in range(15)] + [0.0]) == "improving"


def test_stability_measures_noise_and_not_the_rise():
    assert stability([0.1 + 0.01 * t for t in range(20)]) == pytest.approx(1)
    assert (
        stability([0.4 - 0.3 * math.exp(-t / 5) for t in range(20)]) > 0.9
    )  # the ancestor gave a rise 0.07
    scores = [
        sum(stability(noisy(lambda t: 0.3, noise, seed, 20)) for seed in range(50)) / 50
        for noise in (0.003, 0.01)
    ]
    assert scores == pytest.approx([1 - 10 * 0.003 / 0.3, 1 - 10 * 0.01 / 0.3], abs=0.03)
    assert (
        stability([0.1, 0.5] * 10) == 0
        and stability([0.0] * 20) == stability([0.3]) == stability([]) == 1
    )
    monitor = Monitor(scores=[0.1, 0.5] * 4)
    assert monitor.alarms() == ["stability 0.00 is below 0.3"]


def test_a_score_must_be_finite():
    with pytest.raises(ValueError, match="epoch 0 must be finite, got nan"):
        Monitor().add(math.nan)
    empty = Monitor().report()
    assert (
        math.isnan(empty.pop("best_performance"))
        and empty["best_epoch"] == 0
        and Monitor().alarms() == []
    )


def test_state_survives_a_checkpoint_exactly():
    curve = noisy(lambda t: 0.2 + 0.003 * min(t, 20), 0.01, 3)
    whole, resumed = Monitor(), Monitor()
    for score in curve:
        whole.add(score)
        again = Monitor()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        again.add(score)
        resumed = again
        for monitor in (whole, resumed):
            if advised := monitor.advice("lr"):
                monitor.act(advised)
        assert resumed == whole and resumed.report() == whole.report()
        assert resumed.should_stop("lr") == whole.should_stop("lr")
    assert whole.actions


@pytest.mark.parametrize("on_plateau", ["lr", "share"])
def test_a_plateau_is_answered_twice_and_then_ends(on_plateau):
    monitor = Monitor()
    monitor.add(0.3)
    taken = []
    for epoch in range(1, 100):
        monitor.add(0.29)
        if advised := monitor.advice(on_plateau):
            monitor.act(advised)
            taken.append((epoch, advised))
            assert monitor.advice(on_plateau) is None and not monitor.should_stop(on_plateau)
        if monitor.should_stop(on_plateau):
            break
    assert taken == [(PATIENCE, on_plateau), (2 * PATIENCE, on_plateau)] and epoch == 3 * PATIENCE
    assert monitor.nothing_helped()


def test_an_action_that_helps_starts_anew():
    monitor = Monitor(scores=[0.3] * 11)
    assert monitor.advice("none") is None
    assert monitor.advice("lr") == "lr"
    monitor.act("lr")
    assert monitor.nothing_helped()
    monitor.add(0.35)
    assert not monitor.nothing_helped() and monitor.advice("lr") is None
    for _ in range(30):
        monitor.add(0.35)
    assert monitor.advice("lr") == "lr"
    with pytest.raises(ValueError, match="lr, share or none, got 'wd'"):
        monitor.advice("wd")


# Measured: pretraining runs of a ResNet-10 of half the width on images of 32 px (photographs of
# faces, blood cells, CIFAR-10, the embedded sample), 11 to 40 steps an epoch; color strength 1,
# temperature 0.2 and each optimizer's own rate where nothing else is said. After the batch, at
# three points: (share of the epochs, loss over chance, alignment, uniformity, effective rank, gain
# of the kNN accuracy over its start).
HEALTHY = {
    "faces, lars, bs 64, 12 epochs, lr 1.5, color 0.5": (64,
        (0.50, 0.887, 0.60, -1.64, 9.2, 0.019),
        (0.83, 0.844, 0.58, -2.08, 10.8, 0.022),
        (1.00, 0.835, 0.74, -2.16, 11.2, 0.022)),
    "faces, adamw, bs 64, 8 epochs, color 0.5": (64,
        (0.50, 0.915, 1.50, -3.41, 31.3, 0.022),
        (0.75, 0.886, 1.39, -3.32, 32.6, 0.014),
        (1.00, 0.870, 1.46, -3.45, 33.6, 0.019)),
    "blood cells, adamw, bs 64, 8 epochs": (64,
        (0.50, 1.075, 1.80, -3.06, 25.1, 0.065),
        (0.75, 1.039, 1.51, -3.07, 25.1, 0.105),
        (1.00, 1.018, 1.66, -3.19, 27.2, 0.105)),
    "CIFAR-10, adamw, bs 128, 10 epochs, color 0.5": (128,
        (0.50, 0.854, 1.32, -3.41, 28.8, 0.052),
        (0.80, 0.821, 1.15, -3.39, 31.1, 0.061),
        (1.00, 0.815, 1.24, -3.39, 31.5, 0.070)),
    "sample, lars, bs 64, 24 epochs, color 0.5": (64,
        (0.50, 0.875, 0.89, -2.43, 21.2, 0.182),
        (0.83, 0.810, 0.93, -2.68, 19.2, 0.229),
        (1.00, 0.816, 1.05, -2.72, 20.5, 0.214)),
    "faces, adamw, bs 256, 10 epochs, color 0.5": (256,
        (0.50, 0.940, 1.57, -3.51, 37.1, 0.019),
        (0.80, 0.918, 1.47, -3.44, 35.1, 0.019),
        (1.00, 0.918, 1.46, -3.41, 37.4, 0.019)),
    "CIFAR-10, lars, bs 64, 14 epochs, lr 1.5, color 0.5": (64,
        (0.57, 0.796, 0.94, -2.92, 14.3, 0.096),
        (0.86, 0.733, 1.09, -3.19, 15.4, 0.113),
        (1.00, 0.719, 0.93, -3.20, 15.4, 0.113)),
    "blood cells, lars, bs 64, 14 epochs": (64,
        (0.57, 0.972, 0.28, -0.69, 11.1, 0.165),
        (0.86, 0.947, 0.33, -0.85, 12.1, 0.185),
        (1.00, 0.944, 0.34, -0.88, 12.1, 0.190)),
    "faces, adamw, bs 64, 6 epochs, color 0.5, temperature 0.5": (64,
        (0.50, 0.934, 1.23, -2.89, 21.5, 0.005),
        (0.83, 0.923, 1.28, -2.90, 21.4, 0.005),
        (1.00, 0.913, 1.35, -2.84, 22.2, 0.005)),
    "faces, adamw, weight decay 10": (64,
        (0.50, 0.958, 1.71, -3.43, 29.5, 0.005),
        (0.75, 0.925, 1.54, -3.37, 29.1, 0.016),
        (1.00, 0.889, 1.39, -3.32, 27.5, 0.022)),
    "CIFAR-10, adamw, bs 64, 8 epochs": (64,
        (0.50, 0.989, 1.76, -3.53, 45.8, 0.046),
        (0.75, 0.969, 1.64, -3.60, 46.6, 0.123),
        (1.00, 0.941, 1.65, -3.58, 47.8, 0.115)),
    "faces, sgd, bs 64, 8 epochs, lr 0.05, color 0.5": (64,
        (0.50, 0.990, 1.49, -3.05, 16.0, 0.000),
        (0.75, 0.927, 1.36, -3.04, 16.0, 0.005),
        (1.00, 0.901, 1.21, -2.97, 16.7, 0.005)),
    "blood cells, adamw, bs 16, 4 epochs": (16,
        (0.50, 1.172, 1.81, -2.94, 24.5, 0.220),
        (0.75, 1.180, 2.07, -3.59, 24.3, 0.200),
        (1.00, 1.119, 1.93, -3.42, 23.1, 0.210)),
}  # fmt: skip
BROKEN = {
    "faces, the default recipe, bs 256, 8 epochs": ("near_chance", 256,
        (0.50, 1.012, 1.68, -3.44, 51.9, 0.014),
        (0.75, 1.001, 1.46, -3.02, 40.1, 0.016),
        (1.00, 0.986, 1.40, -2.82, 39.3, 0.019)),
    "faces, adamw, rate x100": ("collapsed", 64,
        (0.50, 0.929, 0.40, -1.08, 6.7, 0.000),
        (0.83, 0.905, 0.29, -1.20, 6.8, 0.008),
        (1.00, 0.906, 0.42, -1.25, 6.9, 0.005)),
    "faces, lars, rate x100": ("collapsed", 64,
        (0.50, 0.961, 0.22, -0.55, 2.7, 0.014),
        (0.83, 0.952, 0.15, -0.61, 2.9, 0.011),
        (1.00, 0.936, 0.24, -0.64, 3.1, 0.016)),
    "faces, temperature 0.001": ("far_above_chance", 64,
        (0.50, 64.207, 1.85, -3.87, 73.5, 0.014),
        (0.75, 58.957, 1.86, -3.88, 80.2, 0.019),
        (1.00, 54.746, 1.88, -3.90, 84.2, 0.022)),
    "faces, no augmentation": ("views_alike", 64,
        (0.50, 0.133, 0.00, -3.64, 97.1, 0.022),
        (0.83, 0.130, 0.00, -3.64, 105.9, 0.011),
        (1.00, 0.130, 0.00, -3.64, 106.0, 0.008)),
    "faces, color strength 2.5": ("near_chance", 64,
        (0.50, 1.064, 1.83, -3.55, 43.9, 0.011),
        (0.75, 1.043, 1.83, -3.54, 37.6, 0.011),
        (1.00, 1.012, 1.81, -3.64, 38.7, 0.014)),
    "blood cells, bs 2": ("few_negatives", 2,
        (0.50, 1.020, 2.86, -4.90, 4.5, 0.170),
        (1.00, 0.953, 2.32, -5.19, 6.5, 0.180)),
    "faces, frozen": ("near_chance", 64,
        (0.50, 1.008, 1.89, -3.84, 74.7, 0.016),
        (0.83, 1.006, 1.88, -3.82, 73.6, 0.011),
        (1.00, 0.997, 1.95, -3.80, 73.5, 0.011)),
    "one image over and over": ("collapsed", 64,
        (0.50, 1.241, 1.02, -0.93, 0.0, 0.000),
        (0.75, 1.203, 0.89, -0.86, 0.0, 0.000),
        (1.00, 1.159, 0.77, -0.96, 0.0, 0.000)),
    "faces, lars, rate / 100": ("near_chance", 64,
        (0.50, 0.995, 1.94, -3.83, 73.8, 0.011),
        (0.75, 0.990, 1.93, -3.83, 73.1, 0.011),
        (1.00, 0.991, 1.85, -3.81, 73.6, 0.011)),
}  # fmt: skip


def problem_at(point, bs, labels=True):
    share, loss, alignment, uniformity, rank, gain = point
    return contrastive_problem(
        share,
        bs=bs,
        loss_over_chance=loss,
        alignment=alignment,
        uniformity=uniformity,
        effective_rank=rank,
        knn_gain=gain if labels else None,
    )


@pytest.mark.parametrize("run", HEALTHY)
def test_a_pretraining_that_learns_raises_no_alarm(run):
    bs, *points = HEALTHY[run]
    assert {problem_at(point, bs) for point in points} == {None}


@pytest.mark.parametrize("run", BROKEN)
def test_a_pretraining_that_does_not_learn_is_told_with_its_cure(run):
    problem, bs, *points = BROKEN[run]
    found = {problem_at(point, bs) for point in points}
    assert found - {None} == {problem} and problem_at(points[-1], bs) == problem
    assert problem_at(points[-1], bs, labels=False) == problem
    assert problem_at((0.4, *points[-1][1:]), bs) is None  # too early to tell
    wrong, cure = PROBLEMS[problem]
    assert "--" in cure and "--" not in wrong
