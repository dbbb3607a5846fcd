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
    monkeypatch.setattr(logistic, "PENALTIES", (penalty,))
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
    for penalty in logistic.PENALTIES:
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
    assert solution.penalty == logistic.PENALTIES[int(np.argmax(expected))]
    assert solution.accuracy == pytest.approx(max(expected))
    assert 0.4 < max(expected) < 0.95 and max(expected) > expected[-1]
