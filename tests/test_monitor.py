"""The monitor on curves whose course is known, and against scipy."""

import json
import math
import random

import pytest

from common.monitor import PATIENCE, Monitor, slope, stability, trend

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
