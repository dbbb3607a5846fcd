"""What a run says at its end: figures beside baselines, the next command, a search's best trial."""

import json
import shlex

import pytest

import train_simclr
from common.config import without
from common.report import page
from common.report.record import Record
from common.run import ending
from common.run.directory import card_record
from common.run.files import FORMAT

CARD = card_record(train_simclr.CARD, {})


@pytest.mark.parametrize(
    ("name", "scores", "text"),
    [
        (
            "linear/test/accuracy",
            {
                "linear/test/accuracy": 0.787,
                "linear_pixels/test/accuracy": 0.813,
                "linear_random/test/accuracy": 0.751,
                "majority/test/accuracy": 0.71428571,
            },
            "worse than raw pixels 0.813; random weights 0.751, majority class 0.7143",
        ),
        (
            "linear/test/accuracy",  # by pairs
            {
                "linear/test/accuracy": 0.82,
                "linear/test/gain_over_pixels_low": -0.005,
                "linear/test/gain_over_pixels_high": 0.02,
                "linear/test/gain_over_random_low": 0.05,
                "linear/test/gain_over_random_high": 0.09,
                "linear_pixels/test/accuracy": 0.813,
                "linear_random/test/accuracy": 0.751,
            },
            "not surely better than raw pixels 0.813; random weights 0.751",
        ),
        (
            "finetune/test/accuracy",  # of other items than the linear protocol's, perhaps
            {"finetune/test/accuracy": 0.5, "majority/test/accuracy": 0.9},
            "no baseline",
        ),
        (
            "finetune/test/accuracy",  # of the same ones: the majority class has the same share
            {
                "finetune/test/accuracy": 0.5,
                "finetune/test/majority_accuracy": 0.4,
                "majority/test/accuracy": 0.4,
                "linear_pixels/test/accuracy": 0.55,
                "linear_random/test/accuracy": 0.45,
            },
            "worse than raw pixels 0.55; random weights 0.45, majority class 0.4",
        ),
        (
            "pretrain/test/knn_accuracy",
            {
                "pretrain/test/knn_accuracy": 0.55,
                "pretrain/test/majority_knn_accuracy": 0.5,
                "pretrain_pixels/test/knn_accuracy": 0.58,
                "pretrain_random/test/knn_accuracy": 0.54,
            },
            "worse than raw pixels 0.58; random weights 0.54, majority class 0.5",
        ),
        (
            "train/test/war",
            {"train/test/war": 0.4, "train/test/majority_war": 0.4},
            "no better than majority class 0.4",
        ),
        (
            "cluster/test/nmi",
            {
                "cluster/test/nmi": 0.5,
                "kmeans_text/test/nmi": 0.25,
                "kmeans_all/test/nmi": 0.75,
                "kmeans_text/test/acc": 0.9,
            },
            "worse than untrained k-means (all) 0.75",
        ),
        ("train/test/video_auc", {"train/test/video_auc": 0.4}, "worse than a guess 0.5"),
        (
            "pretrain/train/loss_over_chance",  # where less is better
            {"pretrain/train/loss_over_chance": 0.8},
            "a guess 1",
        ),
        (
            "train/test/uar",
            {"train/test/uar": 0.5, "train/test/majority_uar": "0.9"},
            "no baseline",
        ),
    ],
)
def test_a_figure_stands_beside_what_it_has_to_beat(name, scores, text):
    assert ending.compared(scores, name) == text


def config_of(identity=None, **flags):
    resolved = {"pretrain": {"bs": 8, "epochs": 1}}
    identity = {"data": "a digest"} | (identity or {})
    return {"format": FORMAT, "card": CARD, "identity": identity, "resolved": resolved, **flags}


def test_the_report_s_head_and_the_console_say_the_same(tmp_path):
    summary = {
        "status": "finished",
        "seconds": 75,
        "pretrain/test/knn_accuracy": 0.123456,
        "pretrain/test/majority_knn_accuracy": 0.25,
        "pretrain/train/loss_over_chance": 1e400,  # not a figure
    }
    config = config_of(data="cells", stage="pretrain")
    for name, content in (("config", config), ("summary", summary)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    head = page.tiles(Record(tmp_path))
    first, figure, following = ending.lines(tmp_path, config, summary)
    assert first.startswith("finished in 1m: ") and "without its report.html" in first
    title, _, shown = figure.partition(": ")
    assert shown == "0.1235 (worse than majority class 0.25)"
    assert title.strip() in head and "worse than majority class 0.25" in head
    assert following.startswith("  next: python train_simclr.py --stage linear --from ")


@pytest.mark.parametrize("seconds", [None, "3", True, float("nan"), float("inf"), 10**400])
def test_a_summary_that_somebody_has_changed_is_shown_as_far_as_it_goes(tmp_path, seconds):
    summary = {"seconds": seconds, "linear/test/accuracy": seconds}
    assert len(ending.lines(tmp_path, config_of(data="cells"), summary)) == 2


def test_the_next_command_reads_what_the_run_has_read(tmp_path):
    folder = tmp_path / "it's a run"
    flags = dict(data="my cells", store_size=64, protocol="none", target_labels="a")
    config = config_of({"store_size": 64, "bs": 8}, **flags)
    labeled = {"pretrain/test/knn_accuracy": 0.5}
    command = ending.next_command(folder, config, labeled)
    start = ["python", "train_simclr.py", "--stage", "linear", "--from", str(folder)]
    assert shlex.split(command) == [*start, "--data", "my cells", "--store-size", "64"]
    # Nothing was scored on a test split: there are no labels.
    command = ending.next_command(folder, config, {"pretrain/train/loss": 1.0})
    assert shlex.split(command) == [*start, "--data", "LABELED", "--store-size", "64"]
    config["resolved"]["linear"] = {}
    command = ending.next_command(folder, config, labeled)
    assert shlex.split(command)[2:] == ["--predict", "PATH", "--resume", str(folder)]


def trial(folder, summary):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(data="cells")))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize("best_is", ["lowest", "highest"])
def test_a_search_ends_with_its_table_and_the_best_trial(tmp_path, best_is):
    values = (0.2, None, 0.1, 0.3)
    trials = []
    for number, value in enumerate(values):
        status = "diverged" if value is None else "finished"
        summary = {"status": status, "best_value": value or 9, "best_is": best_is}
        folder = trial(tmp_path / f"trial{number}", summary)
        trials.append((number, ["--lr", f"{number}e-3", "--linear-lr", "2"], folder))
    lines = ending.search_lines(trials, ["--data", "my cells"])
    rows = [line.split() for line in lines if line.startswith("  ")]
    order = [2, 0, 3, 1] if best_is == "lowest" else [3, 0, 2, 1]
    assert rows[0] == ["trial", "status", "best_value", "lr", "linear-lr"]
    assert [row[0] for row in rows[1:5]] == [str(number) for number in order]
    assert rows[4][1:] == ["diverged", "-", "1e-3", "2"]
    assert best_is in lines[0] and f"trial {order[0]}, {trials[order[0]][2]};" in lines[-3]
    command = shlex.split(lines[-2])
    drawn = ["--lr", f"{order[0]}e-3", "--linear-lr", "2"]
    assert command == ["python", "train_simclr.py", "--data", "my cells", *drawn]
    assert str(trials[order[0]][2]) in lines[-1] and "next: " in lines[-1]


def test_a_wide_and_long_search_says_what_its_table_leaves_out(tmp_path):
    flags = [word for i in range(9) for word in (f"--a-rather-long-name-{i}", "1e-05")]
    summary = {"status": "diverged"}
    trials = [(i, flags, trial(tmp_path / str(i), summary)) for i in range(23)]
    lines = ending.search_lines(trials, [])
    table = [line for line in lines if line.startswith("  ")]
    assert max(map(len, table)) <= 102 and len(table) == 1 + 20 + 1
    assert "left out here: a-rather-long-name-3" in lines[-2] and "and 6 more" in lines[-2]
    assert lines[-1].startswith("no trial has finished: lower the high ends of --ranges")


def test_flags_are_taken_out_with_their_values():
    argv = ["--a", "1", "--out", "x", "--b", "--ensemble", "p", "q", "--out=y", "--c=2"]
    assert without(argv, {"--ensemble": 2, "--out": 1}) == ["--a", "1", "--b", "--c=2"]
