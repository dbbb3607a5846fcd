"""Checks of the data set: what `--check` says of the items before anything is trained on them.

Damaged items, duplicates and overlap of the splits, classes, outliers, and labels that the nearest
neighbors do not share. Each result says how many items were looked at, see
`common.check.inspection`.

The perceptual hash is that of 63 low frequencies (Zauner 2010, pHash); what it proposes is
confirmed by the correlation of the pixels.
"""

import functools
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import metrics
from common.check.inspection import PARTS, Duplicate, Inspection, empty_folders, inspect, read_all
from common.check.result import FAIL, PASS, SKIP, WARN, CheckSpec, Result, skip
from common.data.images import UNLABELED
from common.errors import first_few, only_warn, plural
from common.report import charts, figures
from common.rng import uniform
from common.run.files import atomic_write

NEAR_BITS = 6
NEAR_CORRELATION = 0.985  # different photographs of blood cells or faces stay below 0.98
NEAR_COSINE = 0.9999
NEAR_SHARE = 0.01  # of the test items: a few that are alike do not decide a test
RATIO = 10.0  # largest class over smallest
OUTLIER = 8.0  # robust z-score
NEIGHBORS = 10
LEAST_LABELED = 200  # items, to look at their neighbors
CERTAIN = 3.0  # standard errors above chance
WORST = 64  # items shown


def corrupt(seen: Inspection, folder: Path) -> Result:
    """FAIL for items that cannot be read, WARN for those that hold nothing.

    Where --check names it all of the data are read, among all checks a part of them.
    """
    rows = [["damaged", text] for text in seen.damaged]
    rows += [["empty", text] for text in seen.doubtful]
    empty = f", {len(seen.doubtful)} empty" if seen.doubtful else ""
    value = f"{len(seen.damaged)} damaged{empty} of {seen.of}"
    status = PASS
    fix = ""
    if seen.damaged:
        status = FAIL
        fix = f"fix or remove {first_few(seen.damaged)}; or --on-bad-item skip"
    elif seen.doubtful:
        status = WARN
        fix = f"look at {first_few(seen.doubtful)}: such items teach nothing"
    return Result(status, value, "0", fix, rows=table(["finding", "item"], rows))


def duplicates(seen: Inspection, folder: Path) -> Result:
    """Items that are there more than once.

    FAIL where a part shares an item with another part, exactly or, for more than `NEAR_SHARE` of
    the smaller one, nearly; WARN for fewer, for more than that share within a part, and for one
    content with more than one label.
    """
    groups = sorted(seen.duplicates, key=lambda group: not _is_across(group))
    exact_across = sum(_is_across(group) for group in groups)
    repeated = sum(len(group) - 1 for group in groups)
    unlike = [group for group in groups if len({twin.label for twin in group} - {UNLABELED}) > 1]
    fields = zip(seen.ids, seen.parts, seen.labels.tolist(), strict=True)
    items = [Duplicate(*row) for row in fields]
    known = {twin for group in groups for twin in group}
    near = [pair for pair in near_pairs(seen) if not {items[i] for i in pair} <= known]
    near.sort(key=lambda pair: seen.parts[pair[0]] == seen.parts[pair[1]])
    near_across = sum(seen.parts[i] != seen.parts[j] for i, j in near)
    smallest = min(int((seen.parts == part).sum()) or len(seen.ids) for part in PARTS)
    most = max(NEAR_SHARE * smallest, 1)
    # Rows of features and texts recur in talk; a whole picture does not recur by chance.
    most_exact = most if seen.unit == "utterances" else 0
    status = PASS
    if near_across > most or exact_across > most_exact:
        status = FAIL
    elif (
        exact_across
        or near_across
        or repeated > NEAR_SHARE * seen.compared
        or (unlike and seen.unit == "images")
    ):
        status = WARN
    value = (
        f"{exact_across} exact and {near_across} near across splits,"
        f" {repeated - exact_across} exact and {len(near) - near_across} near within them,"
        f" of {seen.of}"
    )
    if seen.compared > len(seen.ids):
        value += f"; {plural(seen.compared, 'file')} compared"
    pairs = []
    for group in groups:
        first, *others = group
        other = next((twin for twin in others if twin.part != first.part), others[0])
        pairs.append(("exact", first, other))
    pairs += [("near", items[i], items[j]) for i, j in near]
    rows = [[kind, f"{a.name} ({a.part})", f"{b.name} ({b.part})"] for kind, a, b in pairs[:WORST]]
    fix = ""
    if status != PASS:
        # Pairs across splits stand first among the exact and among the near ones.
        across = [row for row, (_, a, b) in zip(rows, pairs, strict=False) if a.part != b.part]
        fix = f"keep one of each pair, such as {rows[0][1]} and {rows[0][2]}"
        if across:
            _, one, other = across[0]
            fix = f"keep {one} or {other}, and so on: no part may ask what another has shown"
        if unlike:
            of_label = {twin.label: twin.name for twin in unlike[0] if twin.label != UNLABELED}
            named = [f"{name} ({seen.classes[label]})" for label, name in of_label.items()]
            fix += (
                f"; more than one label: {plural(len(unlike), 'group')} of equal {seen.unit},"
                f" such as {first_few(named)}"
            )
    drawn = [row for pair in near[: WORST // 2] for row in pair]
    pictures = save_thumbs(seen, drawn, folder, "check_duplicates")
    threshold = f"0 exact, {NEAR_SHARE:.0%} near across splits"
    return Result(status, value, threshold, fix, pictures, table(["alike", "one", "other"], rows))


def _is_across(group: list[Duplicate]) -> bool:
    return len({twin.part for twin in group}) > 1


def near_pairs(seen: Inspection) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of items that look the same.

    Compression, scale, brightness and contrast may differ. Utterances are alike where their rows of
    features have a cosine above NEAR_COSINE.
    """
    if seen.thumbs is None and not seen.near_rows:
        return []
    if seen.thumbs is None:
        x = F.normalize(seen.features, dim=1)
        pairs = []
        for start in range(0, len(x), 1024):
            alike = (x[start : start + 1024] @ x.T > NEAR_COSINE).nonzero()
            pairs += [(int(i) + start, int(j)) for i, j in alike if i + start < j]
        return pairs
    close = None
    for frames in seen.thumbs.float().unbind(1):
        x = frames.flatten(1)
        x = F.normalize(x - x.mean(1, keepdim=True), dim=1)
        # A constant image resembles nothing, not even another one: the outliers have it.
        alike = x @ x.T > NEAR_CORRELATION
        bits = perceptual_hash(frames).float()
        alike &= bits.shape[1] - bits @ bits.T - (1 - bits) @ (1 - bits).T <= NEAR_BITS
        close = alike if close is None else close & alike
    return [(int(i), int(j)) for i, j in close.nonzero() if i < j]


def perceptual_hash(frames: Tensor) -> Tensor:
    """63 bits of images (n, 3, s, s): bool (n, 63).

    They say which of the lowest frequencies of their gray values, but for the mean, are above the
    median of these.
    """
    gray = frames.float().mean(1)
    k = torch.arange(frames.shape[-1], dtype=torch.float32)
    frequencies = torch.arange(8).view(-1, 1)
    cosines = torch.cos(math.pi * (2 * k + 1) * frequencies / (2 * len(k)))  # [8, s]
    low = (cosines @ gray @ cosines.T).flatten(1)[:, 1:]
    return low > low.median(1, keepdim=True).values


def imbalance(seen: Inspection, folder: Path) -> Result:
    """The classes' shares, and the bias that they mean for the last layer.

    FAIL for a class that training does not have, WARN for a class more than `RATIO` times another.
    """
    counts, unused = seen.counts[[0, 3]]
    if not seen.counts.any():
        value = f"{seen.of}, none labeled"
        return Result(SKIP, value, f"{RATIO:g}", "no labels, no classes to compare")
    prior = counts / max(counts.sum(), 1)
    bias = np.log(np.maximum(prior, 1e-12))
    if len(counts) == 2:
        bias = np.array([0.0, bias[1] - bias[0]])
    rows = []
    for i, name in enumerate(seen.classes):
        shown_bias = f"{bias[i]:+.3f}" if counts[i] else "-"
        rows.append([name, *map(int, seen.counts[:3, i]), f"{prior[i]:.4f}", shown_bias])
    missing = [seen.classes[i] for i in np.flatnonzero((counts == 0) & (unused == 0))] + seen.empty
    lacking = []
    for part, part_counts in zip(PARTS[1:], seen.counts[1:3], strict=True):
        if part_counts.any():
            absent = np.flatnonzero((part_counts == 0) & (counts > 0))
            lacking += [f"{seen.classes[i]} in {part}" for i in absent]
    ratio = counts.max() / counts[counts > 0].min() if counts.any() else 1.0
    largest, smallest = (
        f"{seen.classes[i]} {counts[i]}"
        for i in (counts.argmax(), np.where(counts > 0, counts, np.inf).argmin())
    )
    value = f"{ratio:.1f} in the training part: "
    value += f"{largest} over {smallest}" if ratio > 1 else f"all like {largest}"
    value += f"; no training {seen.unit} of {first_few(missing)}" if missing else ""
    value += f"; none of {first_few(lacking)}" if lacking else ""
    status = PASS
    fix = ""
    if missing:
        status = FAIL if seen.supervised else WARN
        fix = f"give {first_few(missing)} training {seen.unit}, or remove the class"
    elif lacking or ratio > RATIO:
        status = WARN
        order = np.argsort(-prior, kind="stable")
        shares = first_few([f"{seen.classes[i]} {prior[i]:.3g}" for i in order], 5)
        fix = f"report macro averages; balance, adjust or weight by the prior: {shares}"
    total = int(counts.sum())
    bars = [
        (name, share, *metrics.share_interval(int(count), total))
        for name, share, count in zip(seen.classes, prior, counts, strict=True)
    ]
    chart = charts.bars(
        "classes of the training part", bars[:40], label="share of the training part"
    )
    picture = save_chart(chart, folder, "check_classes")
    header = ["class", *PARTS, "prior", "bias"]
    threshold = f"at most {RATIO:g}, no empty class"
    return Result(status, value, threshold, fix, [picture], table(header, rows))


def outliers(seen: Inspection, folder: Path) -> Result:
    """WARN for items whose size, brightness, entropy, length or norm lies far from the others'.

    The measure is a robust z-score, see `robust_z`.
    """
    names = list(seen.facts)
    columns = [robust_z(name, seen.facts[name]) for name in names] or [np.zeros(len(seen.ids))]
    scores = np.stack(columns, 1)
    which = np.abs(scores).argmax(1)
    worst = scores[np.arange(len(scores)), which]
    far = [int(i) for i in np.argsort(-np.abs(worst), kind="stable") if abs(worst[i]) > OUTLIER]
    rows = []
    for i in far:
        name = names[which[i]]
        rows.append([seen.ids[i], name, f"{seen.facts[name][i]:.4g}", f"{worst[i]:+.1f}"])
    status = PASS
    value = f"{len(far)} of {seen.of}"
    fix = ""
    if far:
        status = WARN
        value += f"; the farthest is {rows[0][0]}, {rows[0][1]} {rows[0][2]}"
        few = first_few([seen.ids[i] for i in far])
        fix = f"look at {few}; fix or remove what does not belong there"
    pictures = save_thumbs(seen, far, folder, "check_outliers")
    for name in names:
        values = np.sort(seen.facts[name])
        if len(values) and values[0] < values[-1]:
            shares = np.arange(1, len(values) + 1) / len(values)
            points = list(zip(values.tolist(), shares.tolist(), strict=True))
            label = f"share of {seen.unit} up to there"
            chart = charts.lines(name, {seen.unit: points}, x_label=name, y_label=label)
            pictures.append(save_chart(chart, folder, f"check_{file_name(name)}"))
    shown = table(["item", "of", "value", "z"], rows[:WORST])
    return Result(status, value, f"|z| at most {OUTLIER:g}", fix, pictures, shown)


def robust_z(name: str, values: np.ndarray) -> np.ndarray:
    """(n,) distances from the median in units of 1.4826 median distances.

    Those of sizes and lengths are taken on a log scale. The unit is at least a twentieth of what
    the quantity spans by nature, so that in a set of equal items those that differ a little are
    none.
    """
    floor = {"brightness": 255 / 20, "entropy, bits": 8 / 20}.get(name)
    if floor is None:
        # A text of no words has a length too; a norm has no unit.
        values = np.log(np.maximum(values, 1e-12)) if name.startswith("norm") else np.log1p(values)
        floor = 0.05
    away = values - np.median(values)
    return away / max(1.4826 * float(np.median(np.abs(away))), floor)


def label_noise(seen: Inspection, folder: Path) -> Result:
    """Do the nearest neighbors among the training items share a label more often than by chance?

    Where they do not, the labels may be shuffled: FAIL for images that a run trains to classify;
    WARN for clips, whose single frames may not show the classes. The items, 64 at most, that four
    of five neighbors contradict are drawn.
    """
    threshold = f"{CERTAIN:g} standard errors above chance"
    labeled = np.flatnonzero((seen.parts == "train") & (seen.labels != UNLABELED))
    truth = seen.labels[labeled]
    num_present = len(np.unique(truth))
    if len(labeled) < LEAST_LABELED or num_present < 2:
        value = f"{len(labeled)} labeled training {seen.unit} in {plural(num_present, 'class')}"
        return Result(SKIP, value, threshold, f"needs {LEAST_LABELED} of two classes")
    near = nearest(seen.features[torch.from_numpy(labeled)].double())
    agreement, z = label_agreement(truth, near)
    rates = np.bincount(truth, minlength=len(seen.classes)) / len(truth)
    votes = np.stack([(truth[near] == c).mean(1) for c in range(len(rates))], 1)  # [n, classes]
    rows = np.arange(len(labeled))
    rival = np.where(np.arange(len(rates)) == truth[:, None], -1, votes).argmax(1)
    against = votes[rows, rival]
    order = np.argsort(votes[rows, truth] - against, kind="stable")
    doubted = [int(i) for i in order if against[i] >= 0.8][:WORST]
    by_chance = float((rates**2).sum())
    value = (
        f"neighbors agree {agreement:.3f}, by chance {by_chance:.3f} (z {z:+.1f}),"
        f" of {len(labeled)} training {seen.unit}"
    )
    pixels_tell = seen.unit == "images" and seen.supervised
    status = PASS
    fix = ""
    if not z > CERTAIN:
        status = FAIL if pixels_tell else WARN
        fix = "compare labels with items by eye, they may be shuffled or shifted"
        if not pixels_tell:
            fix += (
                "; or what tells these classes apart does not show in single"
                f" {seen.unit}' pixels or rows"
            )
    contradicted = [
        [seen.ids[labeled[i]], seen.classes[truth[i]], seen.classes[rival[i]], f"{against[i]:.0%}"]
        for i in doubted
    ]
    # Where neighbors hardly know better than chance their word against a label is worth nothing.
    if contradicted and agreement - by_chance > (1 - by_chance) / 2:
        named = [
            f"{item} ({label}, neighbors say {other})" for item, label, other, _ in contradicted
        ]
        value += f"; look at {first_few(named, 2)}"
    pictures = save_thumbs(seen, labeled[doubted].tolist(), folder, "check_labels")
    header = ["item", "label", "neighbors say", "share of them"]
    return Result(status, value, threshold, fix, pictures, table(header, contradicted))


def nearest(features: Tensor) -> np.ndarray:
    """The nearest NEIGHBORS (n, k) of rows (n, d) by the cosine of the centered rows."""
    x = F.normalize(features - features.mean(0), dim=1)
    near = []
    for start in range(0, len(x), 1024):
        alike = x[start : start + 1024] @ x.T
        rows = torch.arange(len(alike))
        alike[rows, start + rows] = -torch.inf
        near.append(alike.topk(min(NEIGHBORS, len(x) - 1), dim=1).indices)
    return torch.cat(near).numpy()


def label_agreement(truth: np.ndarray, near: np.ndarray, rounds: int = 100) -> tuple[float, float]:
    """The share of neighbors (n, k) that have an item's label (n,).

    And its distance from that of shuffled labels, in their standard deviations.
    """
    share = float((truth[near] == truth[:, None]).mean())
    shuffled = []
    for k in range(rounds):
        order = np.argsort(uniform(0, k, np.arange(len(truth)), 0, 1)[:, 0])
        shuffled.append(float((truth[order][near] == truth[order][:, None]).mean()))
    return share, (share - float(np.mean(shuffled))) / max(float(np.std(shuffled)), 1e-9)


def save_thumbs(seen: Inspection, rows: list[int], folder: Path, name: str) -> list[str]:
    """Draw the items (their middle frames) at `rows`, 8 a line, as figures/NAME.png.

    Returns:
        Its path below `folder`, or nothing where there are no pictures.
    """
    if seen.thumbs is None or not rows:
        return []
    thumbs = seen.thumbs[torch.tensor(rows[:WORST])]
    path = folder / "figures" / f"{name}.png"
    with only_warn(print, str(path)):
        figures.save_grid(path, thumbs[:, thumbs.shape[1] // 2] / 255, 8)
    return [str(path.relative_to(folder))]


def save_chart(svg: str, folder: Path, name: str) -> str:
    """Write a chart as figures/NAME.svg; returns its path below `folder`."""
    path = folder / "figures" / f"{name}.svg"
    with only_warn(print, str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(charts.standalone(svg))
    return str(path.relative_to(folder))


def file_name(name: str) -> str:
    """`entropy, bits` as `entropy_bits`."""
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))


def table(header: list[str], rows: list[list]) -> list[list[str]]:
    """A table of texts, the header first; nothing without rows."""
    return [header, *([str(cell) for cell in row] for row in rows)] if rows else []


CHECKS = {
    "corrupt": corrupt,
    "duplicates": duplicates,
    "imbalance": imbalance,
    "outliers": outliers,
    "label-noise": label_noise,
}


def examine(
    items, splits: dict[str, np.ndarray], folder: Path, workers: int, supervised: bool
) -> dict[str, Result]:
    """What all of `CHECKS` find; pictures go to `folder`/figures.

    Args:
        items: as `inspect` takes them.
        splits: a script's parts.
        supervised: whether the run trains on labels: then a class without items and labels that
            look shuffled FAIL.
    """
    seen = inspect(items, splits, workers)
    seen.supervised = supervised
    return {name: result_of(name, seen, folder) for name in CHECKS}


def result_of(name: str, seen: Inspection, folder: Path) -> Result:
    """What the check of that name finds."""
    if not seen.ids and name != "corrupt":
        return skip(f"none of {seen.of} can be read")
    return CHECKS[name](seen, folder)


@functools.lru_cache(maxsize=1)
def cached_inspection(spec: CheckSpec) -> Inspection:
    """The items of a run, looked at once for all checks."""
    run = spec.run
    seen = inspect(run.data, run.splits, run.args.workers)
    seen.supervised = spec.labels is not None
    if seen.unit == "images":
        seen.empty = empty_folders(Path(run.args.data))
    return seen


def item(name: str, spec: CheckSpec) -> Result:
    """The item of that name of --check, see `CHECKS`."""
    seen = cached_inspection(spec)
    # Among all items a part of the data has to do: reading everything may take hours.
    if name == "corrupt" and spec.run.args.check != "all":
        seen = read_all(seen, spec.run.data, spec.run.args.workers)
    return result_of(name, seen, spec.run.folder)


ITEMS = {name: functools.partial(item, name) for name in CHECKS}
