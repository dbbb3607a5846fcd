"""Splits, the order of an epoch, and how its batches are cut and balanced.

Order is a function, not state: the permutation of an epoch depends on `(seed, epoch)` alone, so a
resumed run, another number of threads or of processes sees the same items in the same order.
"""

import functools
import hashlib

import numpy as np

from common.data.groups import refuse_spanning, same_groups
from common.data.images import UNLABELED, Images
from common.errors import InputError, first_few, plural
from common.rng import uniform

TEST_SHARE = 0.15
FINETUNE_DEV_SHARE = 0.15
_ORDER_STREAM = 2**31  # no view has this number
_DRAW_STREAM = 2**31 + 3  # beside the streams of clips
_CLASS_STREAMS = 2**32  # the first of one a class


def hash_order(ids: list[str], indices: np.ndarray, salt: str) -> list[int]:
    """`indices` in the order of a hash of their items' names.

    It is as good as chance, and always the same.
    """

    def digest(index: int) -> bytes:
        name = f"{salt}/{ids[index]}"
        return hashlib.blake2b(name.encode(errors="backslashreplace"), digest_size=8).digest()

    return sorted(indices, key=digest)


def hold_out(
    ids: list[str],
    labels: np.ndarray,
    indices: np.ndarray,
    share: float,
    salt: str,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """A class-stratified share of `indices`, chosen by a hash of the item's name: sorted int64.

    It depends on nothing else, so every run and every stage holds out the same items; shares are
    nested, and items added later do not move the others from one side to the other at random. Each
    class gives round(share * its count), at least one when it has two or more items and 0 < share <
    1. With `groups` (n,) see `hold_out_groups`.
    """
    if groups is not None:
        return hold_out_groups(groups, labels, indices, share, salt)
    chosen: list[int] = []
    for label in np.flatnonzero(np.bincount(labels[indices] - UNLABELED)) + UNLABELED:
        members = indices[labels[indices] == label]
        count = round(share * len(members))
        if 0 < share < 1 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        if count < len(members):
            members = hash_order(ids, members, salt)
        chosen += list(members[:count])
    return np.array(sorted(chosen), np.int64)


def hold_out_groups(
    groups: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    share: float,
    salt: str,
    keep_classes: bool = True,
) -> np.ndarray:
    """As `hold_out`, in whole groups: items of a name in `groups` (n,) are on one side.

    Groups are gone through in the order of a hash of their names; one is held out if that brings
    the classes' counts of items nearer to their shares.

    Args:
        keep_classes: first those groups that exceed no class's share; none that holds all that is
            left of a class, which could not be trained on then; and if that leaves a class out,
            the group of it that does least harm.
    """
    classes, labels = np.unique(labels[indices], return_inverse=True)
    names, groups = np.unique(groups[indices], return_inverse=True)
    sizes = np.zeros((len(names), len(classes)), np.int64)  # items by group and class
    np.add.at(sizes, (groups, labels), 1)
    counts = sizes.sum(0)
    target = np.maximum(np.minimum(np.maximum(share * counts, 1), counts - 1), 0)
    scale = np.square(np.maximum(target, 1))
    order = hash_order(names, np.arange(len(names)), salt)
    chosen = np.zeros(len(names), bool)
    held = np.zeros(len(classes), np.int64)  # items of each class in the chosen groups

    def gain(group: int, most=np.inf) -> float:
        more = held + sizes[group]
        if (more > most).any() or (keep_classes and (more == counts)[sizes[group] > 0].any()):
            return -np.inf
        nearer = np.square(held - target) - np.square(more - target)
        return (nearer / scale).sum()

    def choose(group: int) -> None:
        chosen[group] = True
        held[:] += sizes[group]

    for most in [np.ceil(target), np.inf] if keep_classes else [np.inf]:
        for group in order:
            if not chosen[group] and gain(group, most) > 0:
                choose(group)
    for label in range(len(classes) if keep_classes else 0):
        if not held[label]:
            best = max((group for group in order if sizes[group, label]), key=gain)
            if gain(best) > -np.inf:
                choose(best)
    return np.sort(indices[chosen[groups]]).astype(np.int64)


def split(images: Images, fraction: float = 1.0, say=print) -> dict[str, np.ndarray]:
    """The indices of every part of an image set.

    `test` and `finetune_test` (here the same): the data's own test split, or 15 % held out. `rest`:
    all else. `dev`: the data's own validation split, or a part of the labeled rest: 70/15/15 in
    all for the linear protocol, and (`finetune_dev`) 15 % of the training labels for fine-tuning.
    `train` and `finetune_train`: the labeled rest without it. `pretrain`: the share `fraction` of
    the rest, used without its labels. Everything is stratified by class and depends on the items'
    names alone, so no stage of any run trains on the test part. No group of `images` is in the test
    part and the rest, or in dev and train; the classes that this leaves out are said.

    Raises:
        InputError: the data's own splits share a group.
    """
    ids = images.ids
    labels = images.labels
    groups = images.groups
    test = np.flatnonzero(images.splits == "test")
    val = np.flatnonzero(images.splits == "val")
    if groups is not None:
        own = {"train": np.flatnonzero(images.splits == "train"), "val": val, "test": test}
        refuse_spanning(images, groups[:, None], own)
    # `assume_unique` spares NumPy a search for repeats, which at a million images takes seconds.
    candidates = np.setdiff1d(np.flatnonzero(labels != UNLABELED), val, assume_unique=True)
    if not len(test):
        test = hold_out(ids, labels, candidates, TEST_SHARE, "test", groups)
        if groups is not None:
            held = same_groups(groups, test)
            if len(held) > len(test):
                say(f"left out {plural(len(held) - len(test), 'unlabeled image')} of test groups")
            test = held
    rest = np.setdiff1d(np.arange(len(images)), test, assume_unique=True)
    labeled = rest[labels[rest] != UNLABELED]
    parts = {"rest": rest, "test": test[labels[test] != UNLABELED]}
    for name, share in (("", TEST_SHARE / (1 - TEST_SHARE)), ("finetune_", FINETUNE_DEV_SHARE)):
        dev = np.intersect1d(val, labeled, assume_unique=True)
        if not len(dev):
            dev = hold_out(ids, labels, labeled, share, "dev", groups)
        parts[f"{name}dev"] = dev
        parts[f"{name}train"] = np.setdiff1d(labeled, parts[f"{name}dev"], assume_unique=True)
    parts["finetune_test"] = parts["test"]
    if groups is not None:
        given = {"test": "test", "dev": "val", "finetune_dev": "val"}
        held_out = [part for part, own in given.items() if own not in images.splits]
        labeled = np.flatnonzero(labels != UNLABELED)
        say_lost(images, labeled, {part: parts[part] for part in held_out}, say)
    parts["pretrain"] = hold_out(ids, labels, rest, fraction, "fraction")
    return parts


def even_shares(total: int, holds: dict) -> dict:
    """How much of `total` each name gives, evenly, where it holds so much; by `holds`' names.

    Smallest first: what a small one cannot give is shared among the larger ones.
    """
    share = {}
    left = total
    for done, name in enumerate(sorted(holds, key=lambda name: (holds[name], name))):
        share[name] = min(holds[name], left // (len(holds) - done))
        left -= share[name]
    return share


def fewer_labels(
    images: Images, splits: dict[str, np.ndarray], share: float, stages: list[str], seed: int, say
) -> dict[str, np.ndarray]:
    """The parts of an image set as `split` gives them, with a share of the labels.

    Train and dev of each labeled stage keep so many of their images, as many of each class where it
    has them, and one at least (SimCLR, section 5: 1 and 10 % of ImageNet's). Which ones follows
    from the images' names and the seed; a larger share holds those of a smaller one. `all_train`
    and so on are the whole parts, `pretrain` stays whole.

    Args:
        stages: those of which the counts are said.
    """
    ids, labels = images.ids, images.labels
    parts = dict(splits)
    for stage, prefix in (("linear", ""), ("finetune", "finetune_")):
        kept = []
        for name in (f"{prefix}train", f"{prefix}dev"):
            whole = splits[name]
            classes, counts = np.unique(labels[whole], return_counts=True)
            total = max(round(share * len(whole)), len(classes))
            taken = even_shares(total, dict(zip(classes, counts.tolist(), strict=True)))
            rows = [
                hash_order(ids, whole[labels[whole] == label], f"labels {seed}")[:count]
                for label, count in taken.items()
            ]
            parts[f"all_{name}"] = whole
            parts[name] = np.sort(np.concatenate([*rows, []]).astype(np.int64))
            kept.append(parts[name])
        if stage in stages:
            held = np.bincount(labels[np.concatenate(kept)], minlength=len(images.classes))
            of_classes = ", ".join(
                f"{name} {count}" for name, count in zip(images.classes, held, strict=True) if count
            )
            whole = sum(len(splits[f"{prefix}{part}"]) for part in ("train", "dev"))
            say(f"{stage}: {held.sum():,} of {whole:,} labels (--label-fraction): {of_classes}")
    return parts


def say_lost(data, pool: np.ndarray, parts: dict[str, np.ndarray], say) -> None:
    """Say which classes of `pool` one of the `parts` held out of it lacks."""
    for name, indices in parts.items():
        lost = np.setdiff1d(data.labels[pool], data.labels[indices])
        if len(lost):
            classes = first_few([data.classes[label] for label in lost])
            say(f"WARN {name} has nothing of {classes}: too few groups hold it; add others")


def permutation(count: int, seed: int, epoch: int, stream: int = _ORDER_STREAM) -> np.ndarray:
    """The order of an epoch: a permutation of range(count).

    It is a function of (seed, epoch, stream).
    """
    keys = uniform(seed, epoch, np.arange(count), stream, 1)[:, 0]
    return np.argsort(keys, kind="stable")


def epoch_batches(
    indices: np.ndarray, bs: int, seed: int, epoch: int, done: int = 0, world=None
) -> list[np.ndarray]:
    """An epoch's batches but for the first `done`.

    Each is this process's equal share, as items of `indices`. The last, incomplete batch is left
    out; another epoch's order has other items there.
    """
    return batch_slices(indices[permutation(len(indices), seed, epoch)], bs, done, world)


def batch_slices(order: np.ndarray, bs: int, done: int = 0, world=None) -> list[np.ndarray]:
    """The batches of an epoch whose items come in `order`, as `epoch_batches` gives them."""
    rank, world_size = (world.rank, world.world_size) if world else (0, 1)
    share = bs // world_size
    starts = [batch * bs + rank * share for batch in range(done, len(order) // bs)]
    return [order[start : start + share] for start in starts]


def balanced_batches(
    indices: np.ndarray,
    labels: np.ndarray,
    bs: int,
    seed: int,
    epoch: int,
    done: int = 0,
    world=None,
    flag: str = "--bs",
) -> list[np.ndarray]:
    """As `epoch_batches`, but every batch holds as many items of each class, to within one.

    No item is twice in a batch. An epoch has as many batches as without balance. Each class is gone
    through in permutations of its own, from one epoch to the next, so that every item is drawn
    about equally often within its class. A process's share is balanced too, and so is every chunk
    of it.

    Args:
        indices: (n,) items to draw from.
        labels: (n,) their classes, integers.
        flag: the one that sets the batch.

    Raises:
        InputError: a class has fewer items than a batch needs.
    """
    rank, world_size = (world.rank, world.world_size) if world else (0, 1)
    classes = np.unique(labels)
    share = bs // world_size
    steps = len(indices) // bs
    need = -(-bs // len(classes))
    members = [indices[labels == label] for label in classes]
    order_of = functools.lru_cache(maxsize=len(classes))(permutation)
    for label, items in zip(classes, members, strict=True):
        if len(items) < need:
            raise InputError(
                f"--sampler balanced: a batch of {bs} needs {need} items of class {label}, which"
                f" has {len(items)}; lower {flag}, or give --sampler none"
            )

    def drawn(number: int, batch: int) -> np.ndarray:
        cycle, place = divmod(batch, len(members[number]) // need)
        order = order_of(len(members[number]), seed, cycle, _CLASS_STREAMS + number)
        return members[number][order[place * need :][:need]]

    batches = []
    for batch in range(epoch * steps + done, (epoch + 1) * steps):
        columns = [drawn(number, batch) for number in range(len(classes))]
        # Where the batch does not divide into the classes, another one is short each time.
        rows = np.roll(np.stack(columns, axis=1), batch, axis=1)  # [need, classes]
        items = rows.ravel()[:bs]
        batches.append(items[rank * share :][:share])
    return batches


def class_weights(counts: np.ndarray, cap: float | None) -> np.ndarray:
    """How much more often than by chance to draw each class.

    Returns (K,) float64 min(N / (K n_c), cap). Without a cap every class is drawn equally often; a
    cap leaves rare classes rare, but less so.
    """
    weights = counts.sum() / (len(counts) * counts)
    return weights if cap is None else np.minimum(weights, cap)


def weighted_order(indices: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch's items drawn with replacement, each by its weight: (n,) of `indices`.

    Draw i is a function of (seed, epoch, i).

    Args:
        indices: (n,) items to draw from.
        weights: (n,) positive.
    """
    edges = np.cumsum(weights)
    u = uniform(seed, epoch, np.arange(len(indices)), _DRAW_STREAM, 1)[:, 0] * edges[-1]
    # A product with the last edge may round up to it.
    return indices[np.minimum(np.searchsorted(edges, u, side="right"), len(indices) - 1)]


def check_batch(stage: str, bs: int, count: int, parts: int, flag: str = "--bs") -> None:
    """Refuse a batch larger than the data, or not divisible by `parts` (processes x chunks).

    `flag` is the one that sets the stage's batch.
    """
    if bs > count:
        raise InputError(
            f"{stage}: a batch of {bs} is larger than the {count} training items; lower {flag}"
        )
    if bs % parts:
        raise InputError(
            f"{stage}: a batch of {bs} is not divisible by {parts} (processes x chunks);"
            f" change {flag}"
        )
