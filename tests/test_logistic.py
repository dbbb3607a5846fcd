"""Logistic regression against scikit-learn: the solution, and the penalty that is chosen."""

import numpy as np
import pytest
import torch

from common import logistic


def problem(count=300, width=20, classes=3, noise=3.0, seed=0):
    """Rows of features of very different scale, off the origin, with labels and folds."""
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(count) % classes
    rows = rng.normal(size=(classes, width))[labels] + noise * rng.normal(size=(count, width))
    rows = rows * np.logspace(-3, 3, width) + 5
    folds = np.arange(count) // classes % 5
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels), torch.tensor(folds)


def solve(rows, labels, folds, **more):
    classes = int(labels.max()) + 1
    everything = torch.arange(len(rows))
    return logistic.solve(rows, everything, labels, folds, classes, torch.device("cpu"), **more)


def oracle(penalty, rows, labels):
    """scikit-learn's fit to standardized rows, as a function of rows to probabilities."""
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="pip install -r tests/requirements.txt"
    )
    mean, deviation = rows.mean(0), rows.std(0)
    model = linear_model.LogisticRegression(C=1 / (penalty * len(rows)), tol=1e-9, max_iter=50_000)
    model.fit((rows - mean) / deviation, labels)
    return lambda more: model.predict_proba((more - mean) / deviation)


def probabilities(solution, rows):
    return (rows.double() @ solution.weight.T + solution.bias).softmax(1).numpy()


@pytest.mark.parametrize(("count", "width"), [(300, 20), (60, 150)], ids=["tall", "wide"])
@pytest.mark.parametrize("penalty", [10.0, 0.1, 1e-4])
def test_the_solution_is_that_of_scikit_learn(count, width, penalty, monkeypatch):
    monkeypatch.setattr(logistic, "path", lambda count: [penalty])
    monkeypatch.setattr(logistic, "_BLOCK", 7 * width)  # many blocks, the last one ragged
    rows, labels, folds = problem(count, width)
    solution = solve(rows, labels, folds)
    assert solution.penalty == penalty and solution.unsolved == []
    expected = oracle(penalty, rows.double().numpy(), labels.numpy())(rows.double().numpy())
    np.testing.assert_allclose(probabilities(solution, rows), expected, atol=1e-3)


def test_the_penalty_is_that_of_a_loop_over_folds():
    rows, labels, folds = problem(noise=4.0)
    x, y, fold = rows.double().numpy(), labels.numpy(), folds.numpy()
    mean, deviation = x.mean(0), x.std(0)
    linear_model = pytest.importorskip("sklearn.linear_model")
    expected = []
    for penalty in logistic.path(len(y)):
        right = 0
        for k in range(5):
            held = fold == k
            c = 1 / (penalty * (~held).sum())
            model = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=50_000)
            model.fit((x[~held] - mean) / deviation, y[~held])
            right += (model.predict((x[held] - mean) / deviation) == y[held]).sum()
        expected.append(right / len(y))
    found = []
    solution = solve(rows, labels, folds, agreed=lambda value: found.append(value) or value)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-3)
    assert solution.penalty == logistic.path(len(y))[int(np.argmax(expected))]
    assert solution.accuracy == pytest.approx(max(expected))
    assert 0.4 < max(expected) < 0.95 and max(expected) > expected[-1]


def test_a_class_that_folds_lack_and_two_rows_are_solved():
    rows, labels, folds = problem(40)
    labels[:] = torch.arange(40) % 2
    labels[7] = 2  # without its fold there is none of it
    solution = solve(rows, labels, folds)
    assert solution.unsolved == [] and solution.weight.isfinite().all()
    two = solve(rows[:2], labels[:2], torch.tensor([0, 1]))
    answers = (rows[:2].double() @ two.weight.T + two.bias).argmax(1)
    assert answers.tolist() == labels[:2].tolist() and two.accuracy == 0


def test_a_constant_feature_has_no_weight():
    rows, labels, folds = problem()
    rows[:, 3] = 7.0
    rows[:, 4] = 0.0
    rows[:, 5] = 1.0 + 1e-6 * labels  # rounding may look like this
    solution = solve(rows, labels, folds)
    assert (solution.weight[:, [3, 4, 5]] == 0).all() and solution.weight.abs().max() > 0
    nothing = solve(torch.ones(300, 4), labels, folds)
    assert (nothing.weight == 0).all() and nothing.unsolved == []


def test_what_is_not_solved_is_counted(monkeypatch):
    monkeypatch.setattr(logistic, "MOST_STEPS", 2)
    assert len(solve(*problem()).unsolved) > 3


def test_no_penalty_is_tried_behind_one_that_is_worse(monkeypatch):
    monkeypatch.setattr(logistic, "WORSE", 1)
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 2, 400))
    rows = torch.tensor(rng.normal(size=(400, 300)), dtype=torch.float32)
    rows[:, :100] += 0.3 * labels[:, None]
    seen = []
    solve(rows, labels, torch.arange(400) % 5, agreed=lambda value: seen.append(value) or value)
    best = max(seen)
    is_worse = np.array(seen) < best - np.sqrt(best * (1 - best) / 400)
    after = is_worse[int(np.argmax(seen)) :]
    assert after.tolist() == [False] * (len(after) - 1) + [True]
    assert len(seen) < 10


def test_the_path_goes_from_strong_to_the_weaker_the_more_rows():
    for count in (2, 1000, 10**6):
        penalties = logistic.path(count)
        assert len(penalties) == 10 and penalties == sorted(penalties, reverse=True)
        assert penalties[0] == 10 and penalties[-1] == pytest.approx(0.1 / count)
