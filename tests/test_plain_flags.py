"""The recipe's plain advice as flags: no augmentation, one rate, early stopping, clipping."""

import shlex

import numpy as np
import pytest

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import amp, optim
from common.run import log
from tests.data import cells_tree, raer_tree, utterances_npz
from tests.runs import ended

pytestmark = pytest.mark.e2e

TSM = shlex.split(
    "--backbone conv_small_035 --image-size 32 --bs 24 --accum 1 --epochs 2 --clips 1 --n-segment 2"
    " --data sample-flicker --device cpu"
)
RAER = shlex.split(
    "--backbone vit_tiny --num-frames 2 --bs 64 --cache-features --method ce --device cpu"
)
CLUSTER = shlex.split("--bs 512 --epochs 2 --cluster-epochs 2 --device cpu")
SIMCLR = shlex.split(
    "--backbone resnet18 --stem cifar --image-size 8 --stage finetune --from none --bs 28"
    " --epochs 3 --lr 0 --device cpu"
)


@pytest.mark.parametrize(
    ("script", "flags"),
    [(train_tsm, TSM), (train_raer, [*RAER, "--epochs", "6"]), (train_cluster, CLUSTER)],
    ids=["tsm", "raer", "cluster"],
)
def test_a_constant_learning_rate_is_one(script, flags, tmp_path):
    rates = {}
    for name, extra in (("falls", []), ("constant", ["--lr-schedule", "constant"])):
        out = ["--out", str(tmp_path / name)]
        assert script.main([*flags, "--warmup-epochs", "0", "--log-every", "1", *extra, *out]) == 0
        rates[name] = [
            line["lr"]
            for line in log.read(tmp_path / name)
            if line["stage"] != "pretrain" and "lr" in line
        ]
    # On a plateau clustering halves the rate.
    assert len({rate for rate in rates["constant"] if rate > 0.6 * rates["constant"][-1]}) <= 2
    assert rates["constant"][-1] > rates["falls"][-1]
    assert rates["falls"][0] > rates["falls"][-1]


def test_fine_tuning_without_augmentation_sees_the_images_themselves(tmp_path):
    cells_tree(tmp_path / "data", per_class=20, classes="ab")
    argv = [*SIMCLR, "--data", str(tmp_path / "data")]
    losses = {}
    for kind in ("simclr", "none"):
        out = tmp_path / kind
        assert train_simclr.main([*argv, "--augment", kind, "--out", str(out)]) == 0
        name = "finetune/train/loss"
        losses[kind] = [line[name] for line in log.read(out) if name in line]
    # One batch holds all training images: only the augmentation can tell epochs apart.
    assert np.ptp(losses["none"]) < 1e-5 < 1e-3 < np.ptp(losses["simclr"])


def test_patience_ends_what_no_longer_improves(tmp_path):
    argv = [*RAER, "--epochs", "8", "--lr", "1e-7"]
    assert train_raer.main([*argv, "--patience", "2", "--out", str(tmp_path)]) == 0
    # One epoch that sets the mark, two that do not pass it.
    assert max(line["epoch"] for line in log.read(tmp_path)) == 3


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (train_simclr, [*SIMCLR, "--lr", "0.1"]),
        (train_simclr, [*SIMCLR, "--stage", "linear", "--linear-solver", "sgd", "--lr", "0.1"]),
        (train_simclr, [*SIMCLR[:6], "--bs", "28", "--lr", "0.1"]),
        (train_simclr, [*SIMCLR[:6], "--bs", "28", "--lr", "0.1", "--accum", "2"]),
        (train_tsm, [*TSM, "--accum", "2"]),
        (train_raer, [*RAER[:4], "--bs", "8", "--method", "ce", "--device", "cpu"]),
        (train_cluster, [*CLUSTER, *shlex.split("--base-dim 16 --bs 32 --cluster-bs 32")]),
    ],
    ids=["finetune", "linear", "pretrain", "gradcache", "tsm", "raer", "cluster"],
)
def test_every_step_is_clipped(script, argv, tmp_path, monkeypatch):
    if script is train_simclr:
        cells_tree(tmp_path / "data", per_class=20, classes="ab")
        argv = [*argv, "--data", str(tmp_path / "data"), "--device", "cpu"]
    elif script is train_cluster:
        argv = [*argv, "--data", str(utterances_npz(tmp_path / "acts.npz"))]
    elif script is train_raer:
        argv = [*argv, "--data", str(raer_tree(tmp_path / "raer"))]
    guarded_step, seen = amp.guarded_step, []

    def watched(optimizer, *rest):
        norm, bad = guarded_step(optimizer, *rest)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((norm.item(), optim.grad_norm(parameters).item()))
        return norm, bad

    monkeypatch.setattr(amp, "guarded_step", watched)
    argv = [*argv, "--max-steps", "2"]
    for limit in (None, 1e-3):
        out = tmp_path / str(limit)
        clip = [] if limit is None else ["--clip-grad", str(limit)]
        assert ended(script.main, [*argv, *clip, "--out", str(out)]) == 0
        norms, left = zip(*seen, strict=True)
        seen.clear()
        assert len(norms) == 2 and min(norms) > 1e-3
        assert left == pytest.approx(norms if limit is None else [limit, limit], rel=2e-3)
        logged = [line["grad_norm"] for line in log.read(out) if "grad_norm" in line]
        assert logged in (list(norms), [])  # as they were before; the linear stage logs epochs


def test_a_last_rate_needs_a_schedule_that_falls(capsys):
    with pytest.raises(SystemExit) as ending:
        train_tsm.main([*TSM, "--lr-schedule", "constant", "--min-lr", "1e-6"])
    assert ending.value.code == 2
    assert "--min-lr has no effect with --lr-schedule constant" in capsys.readouterr().err
