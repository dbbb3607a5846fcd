"""The schedule's table: every epoch of the recipe, scaled tables, files, and what is refused."""

import json

import pytest

from common.errors import InputError
from common.longtail import Phase, Schedule, read_schedule

TABLE = Schedule(
    10, (Phase(0), Phase(4, "weighted", cap=2.0, mi=0.3, dc=0.1, ramp=4), Phase(8, lr=0.1))
)


def test_a_phase_holds_from_its_start_to_the_next_one_and_its_weights_rise():
    found = [TABLE.index(epoch) for epoch in range(12)]
    assert found == [0] * 4 + [1] * 4 + [2] * 4
    assert [TABLE.at(epoch).mi for epoch in range(10)] == pytest.approx(
        [0] * 4 + [0, 0.1, 0.2, 0.3] + [0] * 2
    )
    assert [TABLE.at(epoch).lr for epoch in (0, 7, 8, 9)] == [1.0, 1.0, 0.1, 0.1]
    at_once = Schedule(4, (Phase(0, mi=0.3, ramp=1),))
    assert at_once.at(0).mi == 0.3


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20, 60, 333])
def test_a_scaled_table_keeps_its_proportions_and_drops_what_no_epoch_is_left_for(epochs):
    scaled = TABLE.scaled(epochs)
    starts = [p.start for p in scaled.phases]
    assert starts[0] == 0 and sorted(set(starts)) == starts and starts[-1] < epochs
    wanted = {round(s * epochs / 10) for s in (0, 4, 8)}
    assert set(starts) <= wanted and {s for s in wanted if s < epochs} == set(starts)
    assert {scaled.at(e).sampler for e in range(epochs)} <= {"random", "weighted"}


def test_a_table_is_read_as_it_stands(tmp_path):
    rows = [
        {"start": 0, "smoothing": 0.05},
        {"start": 3, "sampler": "weighted", "cap": 1.5, "mi": 0.1, "ramp": 2},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"epochs": 6, "phases": rows}))
    lines = ["epochs = 6", "[[phases]]", "start = 0", "smoothing = 0.05", "[[phases]]", "start = 3"]
    lines += ['sampler = "weighted"', "cap = 1.5", "mi = 0.1", "ramp = 2"]
    (tmp_path / "a.toml").write_text("\n".join(lines))
    expected = Schedule(
        6, (Phase(0, smoothing=0.05), Phase(3, "weighted", cap=1.5, mi=0.1, ramp=2))
    )
    assert (
        read_schedule(str(tmp_path / "a.json"))
        == read_schedule(str(tmp_path / "a.toml"))
        == expected
    )
    text = expected.describe().splitlines()
    assert text[0].split() == ["epochs", "sampler", "cap", "smoothing", "mi", "ramp"]
    assert text[1].split() == ["[0,", "3)", "random", "none", "0.05", "0", "0"]
    assert text[2].split() == ["[3,", "6)", "weighted", "1.5", "0", "0.1", "2"]


@pytest.mark.parametrize(
    "table, message",
    [
        ("{", "schedule"),
        ([], "expected epochs"),
        ({"epochs": 6}, "expected epochs"),
        ({"epochs": 0, "phases": [{"start": 0}]}, "epochs must be"),
        ({"epochs": True, "phases": [{"start": 0}]}, "epochs must be"),
        ({"epochs": 6, "phases": []}, "must not be empty"),
        ({"epochs": 6, "phases": [{"start": 1}]}, "rise from 0"),
        ({"epochs": 6, "phases": [{"start": 0}, {"start": 6}]}, "stay below"),
        ({"epochs": 6, "phases": [{"start": 0}, {"start": 0}]}, "rise"),
        ({"epochs": 6, "phases": [{"tau": 0}]}, "a table with start"),
        ({"epochs": 6, "phases": [{"start": 0, "taus": 1}]}, "did you mean tau"),
        ({"epochs": 6, "phases": [{"start": 0, "tau": -1}]}, "tau is -1"),
        ({"epochs": 6, "phases": [{"start": 0, "tau": "1"}]}, "tau is '1'"),
        ({"epochs": 6, "phases": [{"start": 0.5}]}, "an integer"),
        ({"epochs": 6, "phases": [{"start": 0, "temperature": 0}]}, "> 0"),
        ({"epochs": 6, "phases": [{"start": 0, "smoothing": 2}]}, "0 to 1"),
        (
            {"epochs": 6, "phases": [{"start": 0, "sampler": "balanced"}]},
            "allowed random, weighted",
        ),
        ({"epochs": 6, "phases": [{"start": 0, "cap": 2.0}]}, "no effect"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, table, message):
    path = tmp_path / "table.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(InputError, match=message) as caught:
        read_schedule(str(path))
    assert "\n" not in str(caught.value) and "--schedule" in str(caught.value)


def test_a_missing_table_and_another_suffix_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_schedule(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="allowed are .toml and .json"):
        read_schedule(str(tmp_path / "table.yaml"))
