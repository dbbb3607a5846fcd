"""Groups of items that stay on one side of every split: the images of a patient, of a slide.

They come from the items' names by --group-by, or from a column `group` of a table, and lie in
`data.groups`: (n,) names, None where there are none. `sampling.hold_out` chooses whole groups.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from common.errors import InputError, first_few, plural


def check_column(what, groups: Sequence[str], places: Sequence) -> bool:
    """Whether a column `group` says anything.

    Args:
        groups: its cells.
        places: where each stands, for messages.

    Raises:
        InputError: only some cells are empty: whether those items may be parted is not known.
    """
    empty = [place for place, name in zip(places, groups, strict=True) if not name]
    if empty and len(empty) < len(groups):
        raise InputError(
            f"{what}: {len(empty)} of {len(groups)} rows without a group: {first_few(empty)};"
            " give each one, of its own where it stands alone"
        )
    return not empty


def group_items(data, args, unit: str, say: Callable[[str], None], own_splits: bool = True) -> None:
    """Settle `data.groups` by --group-by, or as the data's column has them, and say how many.

    There are none with --predict. --eval on data that has a test split holds nothing out: groups
    of the test items serve their intervals, and there are none where some have no group.

    Args:
        data: a data set with `name`, `ids`, `splits` and `groups`.
        args: the shared flags.
        unit: the word for items.
        own_splits: whether the data's splits are used.

    Raises:
        InputError: a name has no group by the pattern, all items are in one, or there is a column,
            too.
    """
    if args.predict:
        data.groups = None
        return
    if args.eval and own_splits and (data.splits == "test").any():
        try:
            _find_groups(data, args, unit, say)
        except InputError as error:
            data.groups = None
            say(f"the {unit} are not grouped: {str(error).partition(';')[0]}")
        if data.groups is not None:  # whose other items may be in other splits, unused here
            data.groups = np.where(data.splits == "test", data.groups, data.ids)
    else:
        _find_groups(data, args, unit, say)


def _find_groups(data, args, unit: str, say: Callable[[str], None]) -> None:
    def refuse(received: str, remedy: str) -> None:
        if args.eval:
            remedy = "--eval has the groups of its run; it needs none on data with a test split"
        raise InputError(f"{received}; {remedy}")

    source = "by the column `group`"
    if args.group_by is not None:
        source = "by --group-by"
        if data.groups is not None:
            refuse(f"--group-by: {data.name} has a column `group`", "leave out one of them")
        found = [re.search(args.group_by, name) for name in data.ids]
        groups = [match and match[1] for match in found]
        without = [name for name, group in zip(data.ids, groups, strict=True) if not group]
        if without:
            refuse(
                f"--group-by '{args.group_by}': {len(without)} of {len(groups)} {unit} without a"
                f" group by it: {first_few(without)}",
                "write a pattern that finds one in every name",
            )
        data.groups = np.array(groups, dtype=object)
    if data.groups is None:
        return
    names, counts = np.unique(data.groups, return_counts=True)
    low, high = counts.min(), counts.max()
    if len(names) == 1:
        refuse(
            f"{data.name}: {source} all {len(data.ids)} {unit} are in one group, {names[0]}:"
            " nothing can be held out",
            "tell them apart, or leave the groups out",
        )
    if high == 1:
        say(f"WARN {source} each of the {len(names)} {unit} is a group of its own: none are joined")
        return
    sizes = f"{low} to {high}" if low < high else high
    largest = f", the largest {names[counts.argmax()]}" if low < high else ""
    say(f"{len(names)} groups of {sizes} {unit} {source}{largest}")


def groups_of(data, indices: np.ndarray) -> np.ndarray | None:
    """The groups (m,) of the items `indices` (m,), None where there are none."""
    return None if data.groups is None else data.groups[indices]


def same_groups(groups: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The sorted indices of all items that are in a group of one of the items `indices`."""
    wanted = set(groups[indices])
    return np.flatnonzero([name in wanted for name in groups])


def joined(names_of: Sequence[Sequence[str]]) -> list[str]:
    """The group of items that are in several, or show several persons: in their closure.

    Whoever is in one item with somebody is in his group, which goes by its first name.

    Args:
        names_of: the names of each item, one or more.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for names in names_of:
        first, *others = sorted(set(map(find, names)))
        leader.update(dict.fromkeys(others, first))
    return [find(names[0]) for names in names_of]


def refuse_spanning(
    data,
    names_of: Sequence[Sequence[str]],
    parts: dict[str, np.ndarray],
    noun: str = "group",
    shown: Callable[[str], str] = str,
) -> None:
    """Refuse parts that share a group or a person.

    Args:
        names_of: the names of each item.
        parts: indices of items by the name of the part.
        shown: a name as messages have it.

    Raises:
        InputError: with the first names, and an item on each side.
    """
    seen: dict[str, dict[str, int]] = defaultdict(dict)  # name -> part -> an item
    for part, indices in parts.items():
        for index in indices:
            for name in names_of[index]:
                seen[name].setdefault(part, int(index))
    examples = []
    for name, item_in in seen.items():
        if len(item_in) > 1:
            places = ", ".join(f"{data.ids[i]} in {part}" for part, i in item_in.items())
            examples.append(f"{shown(name)} ({places})")
    if examples:
        count = plural(len(examples), noun) + (" is" if len(examples) == 1 else " are")
        raise InputError(
            f"{data.name}: {count} in two splits: {first_few(examples)}; fix the splits"
        )
