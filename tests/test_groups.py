"""Groups that stay together: where they come from, their closure, and parts that share one."""

from types import SimpleNamespace

import numpy as np
import pytest

from common import config
from common.data.groups import check_column, group_items, joined, refuse_spanning, same_groups
from common.errors import InputError


def items(*ids, groups=None, splits=None):
    splits = np.array(splits or [""] * len(ids), dtype=object)
    groups = None if groups is None else np.array(groups, dtype=object)
    return SimpleNamespace(name="data", ids=list(ids), splits=splits, groups=groups)


def flags(group_by=None, **modes):
    return SimpleNamespace(group_by=group_by, **{"eval": None, "predict": None} | modes)


def grouped(data, args):
    said = []
    group_items(data, args, "images", said.append)
    return said


def test_the_first_group_of_the_pattern_in_each_name_is_its_group():
    data = items("a/p1_0.png", "b/p1_1.png", "a/p20_0.png")
    said = grouped(data, flags(r"(p\d+)_(\d)"))
    assert data.groups.tolist() == ["p1", "p1", "p20"]
    assert said == ["2 groups of 1 to 2 images by --group-by, the largest p1"]


def test_a_column_is_taken_as_it_is_and_no_group_is_none():
    data = items("a", "b", "c", "d", groups=["x", "y", "x", "y"])
    assert grouped(data, flags()) == ["2 groups of 2 images by the column `group`"]
    bare = items("a", "b")
    assert grouped(bare, flags()) == [] and bare.groups is None


@pytest.mark.parametrize(
    ("data", "pattern", "said"),
    [
        (
            items("p1.png", "q2.png", "p3.png", "q4.png"),
            r"(p\d)",
            r"'\(p\\d\)': 2 of 4 images without a group by it: q2.png, q4.png",
        ),
        (items("p1.png", "q2.png"), r"(p\d)?", "1 of 2 images without a group by it: q2.png"),
        (items("p1.png", "p2.png"), "(p)", "all 2 images are in one group, p"),
        (items("a", "b", groups=["x", "x"]), None, "column `group` all 2 images are in one group"),
        (items("p1", "p2", groups=["x", "y"]), r"(p\d)", "has a column `group`; leave out one"),
    ],
)
def test_groups_that_cannot_be_used_are_refused(data, pattern, said):
    with pytest.raises(InputError, match=said):
        grouped(data, flags(pattern))


def test_groups_that_join_nothing_are_told():
    said = grouped(items("p1", "p2", "p3"), flags(r"(p\d)"))
    assert said[0].startswith("WARN by --group-by each of the 3 images is a group of its own")


@pytest.mark.parametrize(
    ("modes", "splits"), [({"predict": "x"}, None), ({"eval": "run"}, ["test", "test"])]
)
def test_where_nothing_is_held_out_groups_are_not_needed(modes, splits):
    """Neither a name without a group nor a single group may keep a model from answering."""
    for data in (items("a", "b", splits=splits), items("a", "b", splits=splits, groups=["x", "x"])):
        said = grouped(data, flags(r"(p\d)", **modes))
        assert data.groups is None and len(said) == ("eval" in modes)
        assert all(line.startswith("the images are not grouped: ") for line in said)


def test_eval_on_a_test_split_groups_its_items_alone():
    """For their intervals; another split that shares a group is not used."""
    data = items("p1/a", "p1/b", "p1/c", "p2/a", splits=["train", "test", "test", "test"])
    grouped(data, flags(r"(p\d)", eval="run"))
    assert data.groups.tolist() == ["p1/a", "p1", "p1", "p2"]
    refuse_spanning(data, data.groups[:, None], {"train": np.array([0]), "test": np.arange(1, 4)})


def test_eval_of_a_protocol_needs_groups_whatever_splits_the_data_have():
    data = items("p1", "p1/2", "p2", splits=["test", "train", "test"])
    group_items(data, flags(r"(p\d)", eval="run"), "images", print, own_splits=False)
    assert data.groups.tolist() == ["p1", "p1", "p2"]


@pytest.mark.parametrize(
    "data", [items("q1", "p1"), items("p1", "p1/2"), items("p1", "p2", groups=["x", "y"])]
)
def test_what_eval_cannot_group_is_told_what_helps_there(data):
    """--eval takes no --group-by of its own."""
    with pytest.raises(InputError, match="groups of its run; it needs none on data with a test sp"):
        grouped(data, flags(r"(p\d)", eval="run"))


def test_a_column_says_nothing_or_something_of_each_row():
    assert check_column("t.csv", ["a", "b"], [2, 3]) and not check_column("t.csv", ["", ""], [2, 3])
    with pytest.raises(
        InputError, match=r"t.csv: 2 of 3 rows without a group: line 2, line 4; give"
    ):
        check_column("t.csv", ["", "a", ""], ["line 2", "line 3", "line 4"])


def components(names_of):
    """The closure by another way: join sets until none overlap."""
    sets = [set(names) for names in names_of]
    while True:
        merged = []
        for names in sets:
            apart = [other for other in merged if not other & names]
            merged = [*apart, names.union(*(other for other in merged if other & names))]
        if len(merged) == len(sets):
            return [min(next(s for s in merged if names[0] in s)) for names in names_of]
        sets = merged


def test_the_closure_joins_who_is_in_one_item_with_somebody():
    assert joined([["b"], ["c", "b"], ["a"], ["d", "c"], ["e"]]) == ["b", "b", "a", "b", "e"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = rng.integers(1, 25)
        names_of = [
            [f"p{rng.integers(20)}" for _ in range(rng.integers(1, 4))] for _ in range(count)
        ]
        assert joined(names_of) == components(names_of)


def test_parts_that_share_a_group_are_refused_with_an_item_of_each():
    data = items("a", "b", "c", "d", "e", groups=["x", "y", "x", "z", "z"])
    parts = {"train": np.array([0, 1]), "test": np.array([2, 3])}
    with pytest.raises(
        InputError, match=r"data: 1 group is in two splits: x \(a in train, c in test\); fix"
    ):
        refuse_spanning(data, data.groups[:, None], parts)
    refuse_spanning(data, data.groups[:, None], {"train": np.array([0, 2]), "test": np.array([3])})
    assert same_groups(data.groups, np.array([2, 3])).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("text", ["(", "p\\d", "(?:p)", "(a{9999999999})"])
def test_a_pattern_without_a_group_is_refused(text, capsys):
    with pytest.raises(SystemExit) as ending:
        config.base_parser("x", "").parse_args(["--group-by", text])
    error = capsys.readouterr().err
    assert ending.value.code == 2 and "--group-by" in error and f"'{text}'" in error
