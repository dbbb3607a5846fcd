"""Tables of many runs, from directories with known numbers in them."""

import json
import statistics

import pytest
import scipy.stats  # comes with scikit-learn

from common.errors import InputError
from common.report import __main__, tables


def write_run(root, name, settings, summary, stages=None):
    folder = root / name
    folder.mkdir(parents=True)
    resolved = {
        **(stages or {}),
        "backbone": settings.pop("backbone"),
        "script": "simclr",
        "targets": None,
    }
    settings = {"data": "sample"} | settings
    (folder / "config.json").write_text(
        json.dumps(settings | {"resolved": resolved, "identity": settings})
    )
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def grid(tmp_path):
    """Two backbones, two batches, three projections; one cell unfinished, one never started, one
    with three seeds.
    """
    for b, backbone in enumerate(("resnet18", "resnet50")):
        for bs in (64, 128):
            for proj in (32, 64, 128):
                if (backbone, bs, proj) == ("resnet50", 128, 32):
                    continue
                status = "stopped" if (backbone, bs, proj) == ("resnet50", 128, 64) else "finished"
                summary = {"status": status, "pretrain/train/loss": b + bs / 1000 + proj / 10}
                settings = {
                    "backbone": backbone,
                    "bs": None,
                    "proj_dim": proj,
                    "fraction": 1.0,
                    "seed": 0,
                }
                write_run(
                    tmp_path,
                    f"{backbone}-{bs}-{proj}",
                    settings,
                    summary,
                    {"pretrain": {"epochs": 1, "bs": bs}},
                )
    for seed, loss in enumerate((6.0, 7.0, 9.5), start=1):
        settings = {
            "backbone": "resnet18",
            "bs": 64,
            "proj_dim": 256,
            "fraction": 1.0,
            "seed": seed,
        }
        summary = {"status": "finished", "pretrain/train/loss": loss}
        write_run(
            tmp_path,
            f"deep/er/seed{seed}",
            settings,
            summary,
            {"pretrain": {"epochs": 1, "bs": 64}},
        )
    return tmp_path


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]


def test_a_pivot_shows_values_means_states_and_what_is_missing(grid, capsys):
    flags = ["--rows", "backbone,bs", "--cols", "proj_dim", "--value", "pretrain/train/loss"]
    assert __main__.main([str(grid), *flags]) == 0
    table = rows_of(capsys.readouterr().out)
    assert table[0] == [
        "backbone",
        "bs",
        "32",
        "64",
        "128",
        "256",
    ]  # numbers in the order of numbers
    spread = statistics.stdev((6.0, 7.0, 9.5))
    assert table[2] == [
        "resnet18",
        "64",
        "3.2640",
        "6.4640",
        "12.8640",
        f"7.5000 ± {spread:.4f} (3)",
    ]
    assert table[3] == ["resnet18", "128", "3.3280", "6.5280", "12.9280", "-"]
    assert table[5] == ["resnet50", "128", "-", "stopped", "13.9280", "-"]


def test_an_interval_is_students(grid):
    values = [6.0, 7.0, 9.5]
    mean, error = statistics.mean(values), statistics.stdev(values) / 3**0.5
    low, high = scipy.stats.t.interval(0.95, 2, mean, error)
    shown = tables.cell(values, interval=True).split()
    assert shown[0] == f"{mean:.4f}" and float(shown[2]) == pytest.approx(
        (high - low) / 2, rel=2e-4
    )
    for count in (2, 17, 31):
        assert tables._T95[count - 2] == pytest.approx(
            scipy.stats.t.ppf(0.975, count - 1), abs=6e-4
        )


def test_listed_values_stand_in_the_table_even_without_runs_and_filter_the_others(grid):
    found = tables.runs(grid)
    rows, cols = tables.parse_axis("backbone=resnet18|resnet101"), tables.parse_axis("bs=64")
    table = rows_of(tables.pivot(found, rows, cols, ["pretrain/train/loss"]))
    assert [row[0] for row in table[2:]] == ["resnet18", "resnet101"] and table[3][1] == "-"
    assert len(rows_of(tables.pivot(found, rows, cols, ["pretrain/train/loss"], compact=True))) == 3


def test_several_values_stand_side_by_side(grid):
    for file in grid.rglob("summary.json"):
        summary = json.loads(file.read_text())
        file.write_text(
            json.dumps(summary | {"linear/test/accuracy": 0.5, "linear/test/macro_f1": 0.25})
        )
    flags = {"backbone": ["resnet18"]}, {}, ["linear/test/accuracy", "linear/test/macro_f1"]
    table = rows_of(tables.pivot(tables.runs(grid), *flags))
    assert table[0] == ["backbone", "linear/test/accuracy", "linear/test/macro_f1"]
    assert table[2][1:] == ["0.5000 ± 0.0000 (9)", "0.2500 ± 0.0000 (9)"]


def test_select_takes_the_largest_batch_then_the_lowest_loss_and_says_where_the_experiment_differed(
    grid, capsys
):
    assert __main__.main([str(grid), "--select"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "resnet18: proj_dim 32, bs 128, fraction 1, pretrain/train/loss 3.3280"
    )
    assert lines[1].endswith("--from " + str(grid / "resnet18-128-32"))
    assert (
        "--stage linear --data sample --from" in lines[1]
    )  # no flag of the protocol, which these runs have not
    # Of the largest batch only projection 128 has finished; the experiment chose 64.
    assert lines[2].startswith("resnet50: proj_dim 128") and lines[2].endswith(
        "went on with projection 64)"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", "bakbone", "--value", "pretrain/train/loss"], "did you mean backbone"),
        (
            ["--rows", "backbone", "--value", "pretrain/train/los"],
            "did you mean pretrain/train/loss",
        ),
        (["--rows", "backbone"], "--rows needs --value"),
        (["--rows", "backbone", "--value", "x", "--where", "bs=7"], "no run has bs=7"),
        (["--rows", "backbone", "--value", "x", "--where", "bakbone=7"], "did you mean backbone"),
        (
            ["--rows", "backbone", "--value", "x", "--where", "backbone"],
            "--where backbone lists no values",
        ),
        (["--rows", "backbone", "--value", "status"], "--value status is no number in any run"),
        (["--cols", "backbone"], "--cols has no effect without --rows"),
        (["--text", "--out", "x"], "--out has no effect"),
    ],
)
def test_bad_input_is_one_line(grid, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(grid), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_folder_without_runs_has_no_selection(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        tables.select([{"status": "started"}])


def test_numbers_are_listed_in_any_form(grid):
    found = tables.where(tables.runs(grid), "fraction=1,bs=64.0")
    table = rows_of(
        tables.pivot(found, {"fraction": None, "bs": None}, {}, ["pretrain/train/loss"])
    )
    assert len(table) == 3 and table[2][:2] == ["1", "64"]


def test_a_run_that_is_given_twice_counts_once(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid)
    flags = [
        "--rows",
        "backbone=resnet18",
        "--cols",
        "proj_dim=256",
        "--value",
        "pretrain/train/loss",
    ]
    assert __main__.main([".", "deep/er/seed3", str(grid / "deep"), *flags]) == 0
    assert rows_of(capsys.readouterr().out)[2][1].endswith("(3)")


def test_what_holds_no_run_is_named(grid, capsys):
    checked = grid / "checked"
    checked.mkdir()
    (checked / "check.json").write_text('{"script": "simclr", "command": "x", "items": []}')
    given = [
        str(grid / "resnet18-64-32"),
        str(grid / "resnet18-64-64"),
        str(checked),
        str(grid / "nothing"),
    ]
    assert __main__.main([*given, "--rows", "proj_dim", "--value", "pretrain/train/loss"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"{checked}: checked, not trained; left out",
        f"{grid / 'nothing'}: no run there; left out",
    ]
    assert len(rows_of(said.out)) == 4
    with pytest.raises(SystemExit):
        __main__.main([str(checked), str(checked), "--text"])
    assert "checked, not trained" in capsys.readouterr().err


def test_any_value_is_one_that_is_set():
    found = [{"trial": trial, "search": n} for trial, n in ((0, 2), (1, 4), (None, None))]
    assert tables.where(found, "trial=any") == found[:2]
    assert tables.where(found, "trial=any,search=4") == found[1:2]


def test_select_names_the_data_and_the_protocol_and_passes_over_other_scripts(tmp_path):
    settings = {
        "bs": 64,
        "proj_dim": 32,
        "fraction": 0.7,
        "data": "my cells.zip",
        "protocol": "cytology",
    }
    summary = {"status": "finished", "pretrain/train/loss": 1.0}
    run = (
        settings
        | {"backbone": "resnet18", "target_labels": "A,B", "targets": ["A", "B"], "run": "x"}
        | summary
    )
    lines = tables.select(
        [run | {"script": "simclr"}, {"script": "cluster"} | summary]
    ).splitlines()
    flags = "--stage linear --data 'my cells.zip' --protocol cytology --target-labels A,B --from x"
    assert lines[1:] == [f"  python train_simclr.py {flags}"]


@pytest.mark.parametrize("flags", [[], ["--select"]])
def test_a_damaged_summary_is_named(grid, capsys, flags):
    folder = grid / "resnet18-64-32"
    (folder / "summary.json").write_text('{"status": "fini')
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(folder), *flags])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "summary.json cannot be read" in error and error.count("\n") == 1
    )


def test_what_the_runs_of_a_cell_do_not_share_is_said_but_for_the_seed(grid, capsys):
    flags = [str(grid), "--rows", "backbone", "--value", "pretrain/train/loss"]
    assert __main__.main(flags) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "Runs that share a cell differ in: bs, proj_dim"
    )
    assert __main__.main([*flags, "--cols", "proj_dim,bs"]) == 0
    assert "share a cell" not in capsys.readouterr().out
