"""Tables of many runs, from directories with known numbers in them."""

import json
import statistics

import pytest
import scipy.stats  # comes with scikit-learn

from common.data.cytology import select_run
from common.errors import InputError
from common.report import __main__, tables
from common.run.files import FORMAT

LOSS = "pretrain/train/loss"


def write_run(folder, backbone, bs, flags, summary):
    """A run whose batch is `bs`, by a flag or as its first stage's default."""
    folder.mkdir(parents=True)
    flags = {"data": "sample", "fraction": 1.0, "bs": None, "seed": 0, **flags}
    resolved = {
        "pretrain": {"epochs": 1, "bs": bs},
        "backbone": backbone,
        "script": "simclr",
        "targets": None,
    }
    config = {**flags, "format": FORMAT, "resolved": resolved, "identity": flags}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def grid(tmp_path):
    """Two backbones, two batches, three projections; one cell unfinished, one never started, one
    with three seeds.
    """
    for b, backbone in enumerate(("resnet18", "resnet50")):
        for bs in (64, 128):
            for proj_dim in (32, 64, 128):
                if (backbone, bs, proj_dim) == ("resnet50", 128, 32):
                    continue
                stopped = (backbone, bs, proj_dim) == ("resnet50", 128, 64)
                summary = {
                    "status": "stopped" if stopped else "finished",
                    LOSS: b + bs / 1000 + proj_dim / 10,
                }
                folder = tmp_path / f"{backbone}-{bs}-{proj_dim}"
                write_run(folder, backbone, bs, {"proj_dim": proj_dim}, summary)
    for seed, loss in enumerate((6.0, 7.0, 9.5), start=1):
        folder = tmp_path / "deep" / "er" / f"seed{seed}"
        flags = {"bs": 64, "proj_dim": 256, "seed": seed}
        write_run(folder, "resnet18", 64, flags, {"status": "finished", LOSS: loss})
    return tmp_path


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]


def test_a_pivot_shows_values_means_states_and_what_is_missing(grid, capsys):
    flags = ["--rows", "backbone,bs", "--cols", "proj_dim", "--value", LOSS]
    assert __main__.main([str(grid), *flags]) == 0
    header, _, *rows = rows_of(capsys.readouterr().out)
    assert header == ["backbone", "bs", "32", "64", "128", "256"]  # in the order of numbers
    spread = statistics.stdev((6.0, 7.0, 9.5))
    seeds = f"7.5000 ± {spread:.4f} (3)"
    assert rows[0] == ["resnet18", "64", "3.2640", "6.4640", "12.8640", seeds]
    assert rows[1] == ["resnet18", "128", "3.3280", "6.5280", "12.9280", "-"]
    assert rows[3] == ["resnet50", "128", "-", "stopped", "13.9280", "-"]


def test_an_interval_is_students():
    values = [6.0, 7.0, 9.5]
    mean = statistics.mean(values)
    error = statistics.stdev(values) / 3**0.5
    low, high = scipy.stats.t.interval(0.95, 2, mean, error)
    text, _, half, _ = tables.mean_text(values, interval=True).split()
    assert text == f"{mean:.4f}" and float(half) == pytest.approx((high - low) / 2, rel=2e-4)
    for count in (2, 17, 31):
        quantile = scipy.stats.t.ppf(0.975, count - 1)
        assert tables._T95[count - 2] == pytest.approx(quantile, abs=6e-4)


def test_listed_values_stand_in_the_table_even_without_runs_and_filter_the_others(grid):
    runs = tables.read_runs(grid)
    rows = tables.parse_axis("backbone=resnet18|resnet101")
    cols = tables.parse_axis("bs=64")
    table = rows_of(tables.pivot(runs, rows, cols, [LOSS]))
    assert [row[0] for row in table[2:]] == ["resnet18", "resnet101"] and table[3][1] == "-"
    assert len(rows_of(tables.pivot(runs, rows, cols, [LOSS], compact=True))) == 3


def test_several_values_stand_side_by_side(grid):
    metrics = {"linear/test/accuracy": 0.5, "linear/test/macro_f1": 0.25}
    for file in grid.rglob("summary.json"):
        summary = json.loads(file.read_text())
        file.write_text(json.dumps(summary | metrics))
    runs = tables.read_runs(grid)
    table = rows_of(tables.pivot(runs, {"backbone": ["resnet18"]}, {}, list(metrics)))
    assert table[0] == ["backbone", *metrics]
    assert table[2][1:] == ["0.5000 ± 0.0000 (9)", "0.2500 ± 0.0000 (9)"]


def test_select_takes_the_largest_batch_then_the_lowest_loss_and_says_where_the_experiment_differed(
    grid, capsys
):
    assert __main__.main([str(grid), "--select"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"resnet18: proj_dim 32, bs 128, fraction 1, {LOSS} 3.328"
    assert lines[1].endswith(f"--from {grid / 'resnet18-128-32'}")
    # No flag of the protocol, which these runs have not.
    assert "--stage linear --data sample --from" in lines[1]
    # Of the largest batch only projection 128 has finished; the experiment chose 64.
    assert lines[2].startswith("resnet50: proj_dim 128")
    assert lines[2].endswith("went on with projection 64)")


ROWS = ["--rows", "backbone", "--value"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "bakbone", "--value", LOSS], "did you mean backbone"),
        ([*ROWS, "pretrain/train/los"], f"did you mean {LOSS}"),
        (["--rows", "backbone"], "--rows needs --value"),
        ([*ROWS, "x", "--where", "bs=7"], "no run has bs=7"),
        ([*ROWS, "x", "--where", "bakbone=7"], "did you mean backbone"),
        ([*ROWS, "x", "--where", "backbone"], "--where backbone lists no values"),
        ([*ROWS, "status"], "--value status is no number in any run"),
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
        select_run([{"status": "started"}])


def test_numbers_are_listed_in_any_form(grid):
    runs = tables.where(tables.read_runs(grid), "fraction=1,bs=64.0")
    table = rows_of(tables.pivot(runs, {"fraction": None, "bs": None}, {}, [LOSS]))
    assert len(table) == 3 and table[2][:2] == ["1", "64"]


def test_a_run_that_is_given_twice_counts_once(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid)
    flags = ["--rows", "backbone=resnet18", "--cols", "proj_dim=256", "--value", LOSS]
    assert __main__.main([".", "deep/er/seed3", str(grid / "deep"), *flags]) == 0
    assert rows_of(capsys.readouterr().out)[2][1].endswith("(3)")


def test_what_holds_no_run_is_named(grid, capsys):
    checked = grid / "checked"
    checked.mkdir()
    (checked / "check.json").write_text('{"command": "x", "items": []}')
    nothing = grid / "nothing"
    folders = [grid / "resnet18-64-32", grid / "resnet18-64-64", checked, nothing]
    assert __main__.main([*map(str, folders), "--rows", "proj_dim", "--value", LOSS]) == 0
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        f"{checked}: checked, not trained; left out",
        f"{nothing}: no run there; left out",
    ]
    assert len(rows_of(output.out)) == 4
    with pytest.raises(SystemExit):
        __main__.main([str(checked), str(checked), "--text"])
    assert "checked, not trained" in capsys.readouterr().err


def test_any_value_is_one_that_is_set():
    runs = [{"trial": trial, "search": n} for trial, n in ((0, 2), (1, 4), (None, None))]
    assert tables.where(runs, "trial=any") == runs[:2]
    assert tables.where(runs, "trial=any,search=4") == runs[1:2]


def test_select_names_the_data_and_the_protocol_and_passes_over_other_scripts():
    run = {
        "script": "simclr",
        "run": "x",
        "status": "finished",
        "backbone": "resnet18",
        "bs": 64,
        "proj_dim": 32,
        "fraction": 0.7,
        "data": "my cells.zip",
        "protocol": "cytology",
        "target_labels": "A,B",
        "targets": ["A", "B"],
        "identity": {"group_by": r"(p\d+)"},
        "group_by": r"(p\d+)",
        LOSS: 1.0,
    }
    other = {"script": "cluster", "status": "finished", LOSS: 1.0}
    lines = select_run([run, other]).splitlines()
    flags = (
        "--stage linear --data 'my cells.zip' --protocol cytology --target-labels A,B"
        r" --group-by '(p\d+)' --from x"
    )
    assert lines[1:] == [f"  python train_simclr.py {flags}"]


@pytest.mark.parametrize("flags", [[], ["--select"]])
def test_a_damaged_summary_is_named(grid, capsys, flags):
    folder = grid / "resnet18-64-32"
    (folder / "summary.json").write_text('{"status": "fini')
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(folder), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "summary.json cannot be read" in error


def test_what_the_runs_of_a_cell_do_not_share_is_said_but_for_the_seed(grid, capsys):
    flags = [str(grid), "--rows", "backbone", "--value", LOSS]
    assert __main__.main(flags) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Runs that share a cell differ in: bs, proj_dim"
    assert __main__.main([*flags, "--cols", "proj_dim,bs"]) == 0
    assert "share a cell" not in capsys.readouterr().out
