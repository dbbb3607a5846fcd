"""Random search: trials are functions of their number, on a log scale, and ordinary runs."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import train_cluster
import train_tsm
from common import config, search
from common.errors import EXIT_DIVERGED, EXIT_STOPPED
from common.run.launch import every, run_sweep
from tests.data import utterances_npz
from tests.runs import flags, summary

RANGES = {"lr": (1e-4, 1e-1), "wd": (1e-6, 1e-2)}


def parse(argv):
    parser = config.base_parser("demo", "A script.")
    return config.parse(parser, argv, {}, RANGES), parser


def test_values_are_uniform_on_a_log_scale_within_their_range():
    drawn = [search.draw(RANGES, 0, trial) for trial in range(2000)]
    for name, (low, high) in RANGES.items():
        shares = np.log([float(values[name]) / low for values in drawn]) / np.log(high / low)
        assert shares.min() >= 0 and shares.max() <= 1
        counts = np.histogram(shares, 10, (0, 1))[0]
        # Chi-squared with 9 degrees of freedom, p = 0.001.
        assert ((counts - 200) ** 2 / 200).sum() < 27.9
    rates, decays = (np.log([float(values[name]) for values in drawn]) for name in RANGES)
    assert abs(np.corrcoef(rates, decays)[0, 1]) < 0.08


def test_a_trial_is_a_function_of_its_number_and_the_seed():
    args, _ = parse(["--search", "20", "--trial", "7"])
    again, _ = parse(["--search", "500", "--trial", "7"])
    assert (args.lr, args.wd) == (again.lr, again.wd)
    others = [
        parse(flags("--search 20 --trial 8")),
        parse(flags("--search 20 --trial 7 --seed 1")),
    ]
    assert all(args.lr != other.lr and args.wd != other.wd for other, _ in others)
    assert args.lr == float(f"{args.lr:.3g}")  # as it would be typed


def test_what_is_given_is_not_drawn_and_leaves_the_rest_as_it_is(tmp_path):
    args, _ = parse(["--search", "9", "--trial", "3"])
    for fixed in (["--lr", "0.5"], ["--lr=0.5"], ["--learning-rate", "0.5"]):
        given, _ = parse(["--search", "9", "--trial", "3", *fixed])
        assert (given.lr, given.wd) == (0.5, args.wd)
    file = tmp_path / "flags.toml"
    file.write_text("lr = 0.5\n")
    assert parse(["--config", str(file), "--search", "9", "--trial", "3"])[0].lr == 0.5
    ranges = ["--ranges", "lr=1:10,teacher-weight=0.1:0.9", "--teacher", "x"]
    wider, _ = parse(["--search", "9", "--trial", "3", *ranges])
    assert 1 <= wider.lr <= 10
    assert wider.wd == args.wd
    assert 0.1 <= wider.teacher_weight <= 0.9


def test_an_integer_flag_draws_integers_of_its_range():
    argv = ["--search", "200", "--ranges", "bs=1.5:4.4", "--trial"]
    assert {parse([*argv, str(trial)])[0].bs for trial in range(60)} == {2, 3, 4}
    large, _ = parse(["--search", "9", "--ranges", "bs=20000:40000", "--trial", "1"])
    assert 20000 <= large.bs <= 40000


def test_a_trial_is_the_run_that_its_values_name():
    args, parser = parse(["--search", "20", "--trial", "7"])
    typed, other = parse(["--lr", str(args.lr), "--wd", str(args.wd)])
    assert config.run_id(parser, args) == config.run_id(other, typed)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trial", "3"], "--trial has no effect without --search"),
        (["--ranges", "lr=1:2"], "--ranges has no effect without --search"),
        (
            ["--search", "3", "--trial", "3"],
            "--trial received 3, allowed 0 to 2: --search 3 has 3 trials",
        ),
        (
            ["--search", "3", "--trial", "1", "--ranges", "epoch=1:2"],
            "no number is called epoch; did you mean epochs?",
        ),
        (["--search", "3", "--trial", "1", "--ranges", "lr=2:1"], "allowed is FLAG=LOW:HIGH"),
        (["--search", "3", "--trial", "1", "--ranges", "lr=0:1"], "0 < LOW < HIGH"),
        (["--search", "3", "--trial", "1", "--ranges", "bs=4.1:4.9"], "holds no integer"),
        (["--search", "3", "--trial", "1", "--resume", "runs/x"], "a trial continues its own run"),
        (["--teacher-weight", "0.3"], "--teacher-weight has no effect without --teacher"),
    ],
)
def test_what_makes_no_search_is_refused_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as ending:
        parse(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_learning_rates_below_the_last_one_are_refused_before_a_trial_runs(tmp_path, capsys):
    argv = ["--demo", "--search", "2", "--out", str(tmp_path / "runs")]
    for extra in (
        ["--ranges", "lr=1e-6:1"],
        ["--min-lr", "1e-4"],
        ["--ranges", "min-lr=1e-6:1e-4"],
    ):
        with pytest.raises(SystemExit) as ending:
            train_tsm.main([*argv, *extra])
        error = capsys.readouterr().err
        assert ending.value.code == 2
        assert "begins below --min-lr" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    train_tsm.parse_args([*argv, "--trial", "1"])  # the script's own ranges


def test_all_trials_run_and_a_diverged_one_is_left(capsys):
    done = []

    def main(argv):
        args, _ = parse(argv)
        done.append(args.trial)
        if args.trial == 1:
            raise SystemExit(EXIT_DIVERGED)
        return 0

    args, parser = parse(["--search", "3"])
    assert run_sweep(main, parser, ["--search", "3"], args, RANGES, None)
    output = capsys.readouterr().out
    assert done == [0, 1, 2]
    assert "diverged: 1" in output
    assert "runs --where trial=any --rows trial,lr" in output
    args, parser = parse(["--search", "3", "--out", "mine"])
    assert run_sweep(main, parser, ["--search", "3"], args, RANGES, None)
    assert "common.report mine --rows trial,lr,wd" in capsys.readouterr().out

    def stopped(argv):
        raise SystemExit(EXIT_STOPPED)

    assert not run_sweep(main, parser, [], parse([])[0], RANGES, None)
    with pytest.raises(SystemExit) as ending:
        every(stopped, parser, ["--search", "3"], args, RANGES)
    assert ending.value.code == EXIT_STOPPED


@pytest.mark.e2e
@pytest.mark.parametrize("out", [True, False], ids=["out", "default"])
def test_the_best_trial_s_commands_are_an_ordinary_run_and_its_use(
    tmp_path, monkeypatch, capsys, out
):
    monkeypatch.chdir(tmp_path)
    acts = utterances_npz(tmp_path / "my acts.npz")
    Path("flags.toml").write_text(
        "search = 3\nepochs = 1\ncluster-epochs = 1\nbs = 32\ncluster-bs = 32\nbase-dim = 8\n"
    )
    argv = flags("--config flags.toml --device cpu --ranges lr=1e-40:1e20 --resume none")
    argv += ["--data", acts.name, *(["--output-dir", "some trials"] if out else [])]
    assert train_cluster.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("best first, by the highest"))
    rows = [line.split() for line in lines[head + 2 : head + 5]]
    folders = {}
    for file in tmp_path.rglob("config.json"):
        folders[json.loads(file.read_text())["trial"]] = file.parent
    found = {number: summary(folder) for number, folder in folders.items()}
    statuses = {str(number): result["status"] for number, result in found.items()}
    assert {row[0]: row[1] for row in rows} == statuses
    assert set(statuses.values()) == {"finished", "diverged"}
    values = [result["best_value"] for result in found.values() if result["status"] == "finished"]
    best = int(rows[0][0])
    assert found[best]["best_value"] == max(values)
    assert float(rows[0][2]) == pytest.approx(max(values), rel=1e-3)
    command, use = (shlex.split(line.removeprefix("  next: ")) for line in lines[-2:])
    assert command[:2] == use[:2] == ["python", "train_cluster.py"]
    assert not {"--search", "--out", "--config", "--resume", "--ranges"} & set(command)
    assert train_cluster.main(command[2:]) == 0  # of the same name as the trial
    printed = capsys.readouterr().out
    assert ("already finished" in printed) == (not out)
    ran = {summary(file.parent).get("best_value") for file in Path("runs").rglob("config.json")}
    assert max(values) in ran
    assert train_cluster.main([acts.name if word == "PATH" else word for word in use[2:]]) == 0
    assert (folders[best] / "predictions.csv").exists()
