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
    assert monitor.alarms() == ["the score jumps: its steadiness 0 is below 0.3"]


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
# temperature 0.2 and each optimizer's own rate where nothing else is said. After the batch and the
# first epoch's loss over chance, at three points: (share of the epochs, loss over chance,
# alignment, uniformity, effective rank, gain of the kNN accuracy over its start).
HEALTHY = {
    "blood cells, adamw, bs 128, 8 epochs, temperature 0.07": (128, 1.739,
        (0.50, 1.599, 1.81, -3.32, 29.4, 0.160),
        (0.75, 1.509, 1.72, -3.35, 36.5, 0.200),
        (1.00, 1.476, 1.77, -3.41, 41.2, 0.240)),
    "blood cells, adamw, bs 16, 4 epochs, seed 6": (16, 1.197,
        (0.50, 1.172, 1.81, -2.94, 24.5, 0.220),
        (0.75, 1.180, 2.07, -3.59, 24.3, 0.200),
        (1.00, 1.119, 1.93, -3.42, 23.1, 0.210)),
    "blood cells, adamw, bs 64, 8 epochs, seed 1": (64, 1.104,
        (0.50, 1.075, 1.80, -3.06, 25.1, 0.065),
        (0.75, 1.039, 1.51, -3.07, 25.1, 0.105),
        (1.00, 1.018, 1.66, -3.19, 27.2, 0.105)),
    "blood cells, adamw, bs 64, 8 epochs, dim 32, seed 13": (64, 1.170,
        (0.50, 1.160, 1.87, -3.09, 21.3, 0.150),
        (0.75, 1.086, 1.65, -2.95, 20.0, 0.170),
        (1.00, 1.099, 1.79, -3.07, 22.1, 0.170)),
    "blood cells, lars, bs 64, 14 epochs, seed 4": (64, 1.106,
        (0.57, 0.972, 0.28, -0.69, 11.1, 0.165),
        (0.86, 0.947, 0.33, -0.85, 12.1, 0.185),
        (1.00, 0.944, 0.34, -0.88, 12.1, 0.190)),
    "CIFAR-10, adamw, bs 128, 10 epochs, color 0.5, seed 2": (128, 0.955,
        (0.50, 0.854, 1.32, -3.41, 28.8, 0.052),
        (0.80, 0.821, 1.15, -3.39, 31.1, 0.061),
        (1.00, 0.815, 1.24, -3.39, 31.5, 0.070)),
    "CIFAR-10, adamw, bs 32, 4 epochs, color 0.5, seed 9": (32, 0.950,
        (0.50, 0.892, 1.51, -3.51, 37.7, 0.131),
        (0.75, 0.863, 1.52, -3.51, 37.8, 0.085),
        (1.00, 0.835, 1.26, -3.46, 37.9, 0.115)),
    "CIFAR-10, adamw, bs 64, 8 epochs, seed 5": (64, 1.019,
        (0.50, 0.989, 1.76, -3.53, 45.8, 0.046),
        (0.75, 0.969, 1.64, -3.60, 46.6, 0.123),
        (1.00, 0.941, 1.65, -3.58, 47.8, 0.115)),
    "CIFAR-10, adamw, bs 64, 8 epochs, color 0, seed 12": (64, 0.862,
        (0.50, 0.693, 1.00, -3.33, 22.9, 0.115),
        (0.75, 0.652, 0.82, -3.29, 23.7, 0.100),
        (1.00, 0.662, 0.90, -3.30, 24.5, 0.100)),
    "CIFAR-10, lars, bs 64, 14 epochs, lr 1.5, color 0.5": (64, 0.953,
        (0.57, 0.796, 0.94, -2.92, 14.3, 0.096),
        (0.86, 0.733, 1.09, -3.19, 15.4, 0.113),
        (1.00, 0.719, 0.93, -3.20, 15.4, 0.113)),
    "faces, adamw, bs 256, 10 epochs, color 0.5, seed 3": (256, 0.994,
        (0.50, 0.940, 1.57, -3.51, 37.1, 0.019),
        (0.80, 0.918, 1.47, -3.44, 35.1, 0.019),
        (1.00, 0.918, 1.46, -3.41, 37.4, 0.019)),
    "faces, adamw, bs 32, 5 epochs, color 0.5, temperature 0.1": (32, 1.120,
        (0.60, 1.117, 1.72, -3.74, 48.5, 0.016),
        (0.80, 1.078, 1.75, -3.79, 51.0, 0.016),
        (1.00, 1.048, 1.78, -3.83, 50.4, 0.005)),
    "faces, adamw, bs 64, 8 epochs, color 0.5": (64, 0.981,
        (0.50, 0.915, 1.50, -3.41, 31.3, 0.022),
        (0.75, 0.886, 1.39, -3.32, 32.6, 0.014),
        (1.00, 0.870, 1.46, -3.45, 33.6, 0.019)),
    "faces, adamw, bs 64, 8 epochs, seed 8": (64, 1.051,
        (0.50, 1.037, 1.92, -3.60, 36.5, 0.000),
        (0.75, 1.001, 1.70, -3.62, 38.9, 0.011),
        (1.00, 0.991, 1.72, -3.62, 39.2, 0.005)),
    "faces, adamw, bs 64, 6 epochs, color 0.5, temperature 0.5": (64, 0.975,
        (0.50, 0.934, 1.23, -2.89, 21.5, 0.005),
        (0.83, 0.923, 1.28, -2.90, 21.4, 0.005),
        (1.00, 0.913, 1.35, -2.84, 22.2, 0.005)),
    "faces, lars, bs 32, 8 epochs, color 0.5, seed 10": (32, 0.996,
        (0.50, 0.951, 1.20, -2.99, 28.8, 0.011),
        (0.75, 0.910, 1.10, -2.65, 26.4, 0.011),
        (1.00, 0.895, 1.03, -2.52, 26.7, 0.011)),
    "faces, lars, bs 64, 12 epochs, lr 1.5, color 0.5": (64, 0.992,
        (0.50, 0.887, 0.60, -1.64, 9.2, 0.019),
        (0.83, 0.844, 0.58, -2.08, 10.8, 0.022),
        (1.00, 0.835, 0.74, -2.16, 11.2, 0.022)),
    "faces, sgd, bs 64, 8 epochs, lr 0.05, color 0.5": (64, 1.004,
        (0.50, 0.990, 1.49, -3.05, 16.0, 0.000),
        (0.75, 0.927, 1.36, -3.04, 16.0, 0.005),
        (1.00, 0.901, 1.21, -2.97, 16.7, 0.005)),
    "sample, adamw, bs 64, 8 epochs, color 0.5, seed 7": (64, 1.013,
        (0.50, 0.942, 1.54, -3.46, 36.0, 0.104),
        (0.75, 0.912, 1.41, -3.46, 37.8, 0.125),
        (1.00, 0.892, 1.47, -3.44, 38.4, 0.125)),
    "sample, lars, bs 64, 24 epochs, color 0.5": (64, 1.013,
        (0.50, 0.875, 0.89, -2.43, 21.2, 0.182),
        (0.83, 0.810, 0.93, -2.68, 19.2, 0.229),
        (1.00, 0.816, 1.05, -2.72, 20.5, 0.214)),
    "sample, lars, bs 32, 10 epochs, color 0.5, seed 11": (32, 1.004,
        (0.60, 0.873, 1.03, -2.55, 19.3, 0.141),
        (0.80, 0.860, 0.98, -2.50, 18.7, 0.182),
        (1.00, 0.835, 1.08, -2.52, 18.9, 0.172)),
}  # fmt: skip
BROKEN = {
    "blood cells, adamw, bs 2, 2 epochs, color 0.5": ("few_negatives", 2, 1.020,
        (0.50, 1.020, 2.86, -4.90, 4.5, 0.170),
        (1.00, 0.953, 2.32, -5.19, 6.5, 0.180)),
    "faces, adamw, bs 64, 8 epochs, color 2.5": ("near_chance", 64, 1.071,
        (0.50, 1.064, 1.83, -3.55, 43.9, 0.011),
        (0.75, 1.043, 1.83, -3.54, 37.6, 0.011),
        (1.00, 1.012, 1.81, -3.64, 38.7, 0.014)),
    "blood cells, adamw, bs 64, 8 epochs, color 2.5": ("collapsed", 64, 1.170,
        (0.50, 1.155, 1.39, -1.74, 7.9, 0.080),
        (0.75, 1.114, 1.07, -1.34, 8.4, 0.085),
        (1.00, 1.116, 0.79, -1.08, 9.2, 0.085)),
    "one image, adamw, bs 64, 8 epochs": ("collapsed", 64, 1.436,
        (0.50, 1.241, 1.02, -0.93, 0.0, 0.000),
        (0.75, 1.203, 0.89, -0.86, 0.0, 0.000),
        (1.00, 1.159, 0.77, -0.96, 0.0, 0.000)),
    "faces, adamw, bs 64, 6 epochs, lr 1e-12, weight decay 0, color 0.5": ("near_chance", 64, 1.004,
        (0.50, 1.008, 1.89, -3.84, 74.7, 0.016),
        (0.83, 1.006, 1.88, -3.82, 73.6, 0.011),
        (1.00, 0.997, 1.95, -3.80, 73.5, 0.011)),
    "faces, lars, bs 64, 8 epochs, lr 0.006, color 0.5": ("near_chance", 64, 1.004,
        (0.50, 0.995, 1.94, -3.83, 73.8, 0.011),
        (0.75, 0.990, 1.93, -3.83, 73.1, 0.011),
        (1.00, 0.991, 1.85, -3.81, 73.6, 0.011)),
    "faces, lars, bs 256, 8 epochs": ("near_chance", 256, 1.031,
        (0.50, 1.012, 1.68, -3.44, 51.9, 0.014),
        (0.75, 1.001, 1.46, -3.02, 40.1, 0.016),
        (1.00, 0.986, 1.40, -2.82, 39.3, 0.019)),
    "faces, adamw, bs 64, 6 epochs, augment none": ("views_alike", 64, 0.136,
        (0.50, 0.133, 0.00, -3.64, 97.1, 0.022),
        (0.83, 0.130, 0.00, -3.64, 105.9, 0.011),
        (1.00, 0.130, 0.00, -3.64, 106.0, 0.008)),
    "faces, adamw, bs 64, 6 epochs, lr 0.1, color 0.5": ("collapsed", 64, 1.061,
        (0.50, 0.929, 0.40, -1.08, 6.7, 0.000),
        (0.83, 0.905, 0.29, -1.20, 6.8, 0.008),
        (1.00, 0.906, 0.42, -1.25, 6.9, 0.005)),
    "faces, lars, bs 64, 6 epochs, lr 60, color 0.5": ("collapsed", 64, 0.995,
        (0.50, 0.961, 0.22, -0.55, 2.7, 0.014),
        (0.83, 0.952, 0.15, -0.61, 2.9, 0.011),
        (1.00, 0.936, 0.24, -0.64, 3.1, 0.016)),
    "faces, adamw, bs 64, 8 epochs, color 0.5, temperature 0.001": ("far_above_chance", 64, 66.287,
        (0.50, 64.207, 1.85, -3.87, 73.5, 0.014),
        (0.75, 58.957, 1.86, -3.88, 80.2, 0.019),
        (1.00, 54.746, 1.88, -3.90, 84.2, 0.022)),
}  # fmt: skip
# A weight decay of 10 was to break these; what is seen of them is as of runs that learn.
MISSED = {
    "faces, adamw, bs 64, 8 epochs, weight decay 10, color 0.5": (64, 0.991,
        (0.50, 0.958, 1.71, -3.43, 29.5, 0.005),
        (0.75, 0.925, 1.54, -3.37, 29.1, 0.016),
        (1.00, 0.889, 1.39, -3.32, 27.5, 0.022)),
    "faces, lars, bs 64, 8 epochs, weight decay 10, color 0.5": (64, 0.996,
        (0.50, 0.965, 1.76, -3.58, 42.1, 0.005),
        (0.75, 0.953, 1.63, -3.43, 42.2, 0.022),
        (1.00, 0.941, 1.49, -3.29, 41.9, 0.022)),
}  # fmt: skip


# Broken runs of the table whose loss alone, without labels, does not tell.
MISSED_WITHOUT_LABELS = {
    "faces, lars, bs 256, 8 epochs",
    "faces, adamw, bs 64, 8 epochs, color 2.5",
    "faces, lars, bs 64, 8 epochs, lr 0.006, color 0.5",
}


def problems_of(bs, first, points, labels=True):
    found = {
        contrastive_problem(
            share,
            bs=bs,
            loss_over_chance=loss,
            first_loss=first,
            alignment=alignment,
            uniformity=uniformity,
            effective_rank=rank,
            knn_gain=gain if labels else None,
        )
        for share, loss, alignment, uniformity, rank, gain in points
    }
    return found - {None}


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("run", [*HEALTHY, *MISSED])
def test_a_pretraining_that_learns_raises_no_alarm(run, labels):
    bs, first, *points = (HEALTHY | MISSED)[run]
    assert problems_of(bs, first, points, labels) == set()


@pytest.mark.parametrize("run", BROKEN)
def test_a_pretraining_that_does_not_learn_is_told_with_its_cure(run):
    problem, bs, first, *points = BROKEN[run]
    assert problems_of(bs, first, points) == {problem}
    missed = run in MISSED_WITHOUT_LABELS
    assert problems_of(bs, first, points, labels=False) == (set() if missed else {problem})
    early = [(0.4, *point[1:]) for point in points]
    assert problems_of(bs, first, early) == set()  # too early to tell
    wrong, cure = PROBLEMS[problem]
    assert "--" in cure and "--" not in wrong
