"""Checks of the data set: what `--check` says of the items before anything is trained on them.

Damaged items, duplicates and overlap of the splits, classes, outliers, and labels that the nearest
neighbors do not share. Of more than `LOOKED` items a part is looked at, chosen by a hash of their
names; files are compared byte by byte up to `HASHED` of them. Each finding says how many that were.

The perceptual hash is that of 63 low frequencies (Zauner 2010, pHash); what it proposes is
confirmed by the correlation of the pixels.
"""

import functools
import hashlib
import io
import math
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import metrics
from common.check.result import FAIL, PASS, SKIP, WARN, CheckSpec, Result, skip
from common.data.clips import VideoFiles, Videos
from common.data.images import DECODE_ERRORS, UNLABELED, hidden, reason
from common.data.sampling import hash_order
from common.data.utterances import tokens
from common.errors import InputError
from common.report import charts, figures
from common.rng import uniform

PARTS = ("train", "val", "test")
LOOKED, FRAMES, HASHED = 1000, 3000, 10_000  # items, their frames, files compared byte by byte
SIDE = 32  # of the thumbnails that are compared, pixels
NEAR_BITS, NEAR_CORRELATION = (
    6,
    0.985,
)  # different photographs of blood cells or faces stay below 0.98
NEAR_COSINE = 0.9999
NEAR_SHARE = 0.01  # of the test items: a few that are alike do not decide a test
LONG_TEXT = 8  # words: shorter utterances are said again and again
RATIO = 10.0  # largest class over smallest
OUTLIER = 8.0  # robust z-score
NEIGHBORS, LEAST_LABELED, CERTAIN = 10, 200, 3.0
WORST = 64


@dataclass
class Inspection:
    """The items that were looked at, and what was found when they were.

    Attributes:
        unit: what an item is, in the plural: images, clips, utterances.
        total: items of the data set that are in some part.
        ids: (n,) names.
        labels: (n,) int64 into `classes`; UNLABELED where there is none.
        parts: (n,) "train", "val" or "test".
        counts: (4, classes) labeled items of the whole data set in each of PARTS, and in none.
        classes: names.
        features: (n, d) float32, what neighbors are sought by.
        facts: (n,) float64 by name: sizes, brightness and so on.
        twins: groups of items of the same content.
        compared: how many were compared for that.
        thumbs: (n, V, 3, SIDE, SIDE) uint8, V frames of each item; None where there are no
            pictures.
        damaged: "NAME (reason)" of the items that cannot be read.
        doubtful: names of items that can be read, but hold nothing.
        supervised: whether the run trains on the labels.
        empty: folders of classes without any file.
        near_rows: whether items without pictures are alike where their features are.
    """

    unit: str
    total: int
    ids: list[str]
    labels: np.ndarray
    parts: np.ndarray
    counts: np.ndarray
    classes: list[str]
    features: Tensor
    facts: dict[str, np.ndarray]
    twins: list[list["Duplicate"]]
    compared: int
    thumbs: Tensor | None = None
    damaged: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    near_rows: bool = False
    supervised: bool = True

    @property
    def of(self) -> str:
        """`1000 of 4886 images`, or `576 images` where all were looked at."""
        seen = len(self.ids) + len(self.damaged)
        return (
            f"{seen} {self.unit}" if seen >= self.total else f"{seen} of {self.total} {self.unit}"
        )


@dataclass(frozen=True)
class Duplicate:
    """An item that has the content of another one."""

    name: str
    part: str
    label: int


def parts_of(splits: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Which part each of `count` items belongs to by a script's splits: "train", "val", "test", or
    "" for none.

    An item that some stage tests on belongs to the test, whatever else it serves.
    """
    parts = np.full(count, "", dtype=object)
    kinds = {
        name: "test" if "test" in name else "val" if name.endswith(("val", "dev")) else "train"
        for name in splits
    }
    for kind in PARTS:
        for name in (name for name, own in kinds.items() if own == kind):
            parts[splits[name]] = kind
    return parts


def sampled_items(ids: list[str], parts: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the items that are in a part, by a hash of their names; a quarter are of
    the test, as far as it has them: sorted int64.
    """
    own = np.flatnonzero(parts != "")
    if len(own) <= most:
        return own
    test, rest = own[parts[own] == "test"], own[parts[own] != "test"]
    kept = hash_order(ids, test, "check")[: max(most // 4, most - len(rest))]
    kept += hash_order(ids, rest, "check")[: most - len(kept)]
    return np.array(sorted(kept), np.int64)


def inspect(items, splits: dict[str, np.ndarray], workers: int) -> Inspection:
    """Look at `common.data.Images` or `common.clips.Videos`.

    Of a clip the first, the middle and the last frame are compared; as many more are decoded as
    `FRAMES` in all allow.
    """
    clips = isinstance(items, Videos)
    images, parts = items.images if clips else items, parts_of(splits, len(items))
    rows = sampled_items(items.ids, parts, LOOKED)
    files = not images.in_memory and not isinstance(images, VideoFiles)
    each = max(FRAMES // max(len(rows), 1), 3) if files else 3

    def view(row: int):
        frames = np.array([row])
        if clips:
            frames = items.frames[row]
            frames = frames[
                np.linspace(0, len(frames) - 1, min(max(each, 3), len(frames))).round().astype(int)
            ]
        try:
            decoded = [images.decode(int(index)) for index in frames]
            width, height = _size(images.read(int(frames[0]))) if files else decoded[0].shape[-2:]
        except (InputError, *DECODE_ERRORS) as error:
            return f"{items.ids[row]} ({reason(error).split('cannot be read: ')[-1].split(';')[0]})"
        shown = [decoded[0], decoded[len(decoded) // 2], decoded[-1]] if clips else decoded
        # Of two streams the first, the face, shows what is asked about.
        pixels = torch.stack([frame[0] if frame.ndim == 4 else frame for frame in shown])
        gray = pixels[len(pixels) // 2].float().mean(0)
        share = torch.bincount(gray.long().flatten(), minlength=256).double() / gray.numel()
        facts = {"shorter side, px": min(width, height), "width / height": width / height}
        facts |= {"frames": len(items.frames[row])} if clips else {}
        facts |= {
            "brightness": float(gray.mean()),
            "entropy, bits": float(torch.special.entr(share).sum()) / math.log(2),
        }
        digest = hashlib.sha256(b"".join(frame.numpy().tobytes() for frame in decoded)).digest()
        return digest, _small(pixels, SIDE), facts

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(view, rows))
        damaged = {
            int(row): one for row, one in zip(rows, found, strict=True) if isinstance(one, str)
        }
        rows = np.array([row for row in rows if row not in damaged], np.int64)
        found = [one for one in found if not isinstance(one, str)]
        digests = dict(zip(rows.tolist(), (one[0] for one in found), strict=True))
        if files and not clips:
            some = _of_equal_size(images, parts)
            digests = dict(
                zip(
                    some.tolist(),
                    pool.map(functools.partial(_file_digest, images), some),
                    strict=True,
                )
            )
            damaged |= {
                row: text
                for row, text in digests.items()
                if isinstance(text, str) and row not in damaged
            }
    thumbs = (
        torch.stack([one[1] for one in found])
        if found
        else torch.zeros(0, 1, 3, SIDE, SIDE, dtype=torch.uint8)
    )
    return Inspection(
        unit="clips" if clips else "images",
        total=int((parts != "").sum()),
        **_common(items, parts, rows),
        features=_small(thumbs.flatten(0, 1), SIDE // 2).reshape(len(thumbs), -1).float(),
        facts={
            name: np.array([one[2][name] for one in found], float)
            for name in (found[0][2] if found else ())
        },
        twins=_twins(items, parts, {row: d for row, d in digests.items() if row not in damaged}),
        compared=len(digests),
        thumbs=thumbs,
        damaged=[damaged[row] for row in sorted(damaged)],
    )


def inspect_rows(rows, splits: dict[str, np.ndarray]) -> Inspection:
    """Look at the utterances of `common.discovery.Rows`: their texts and what the network reads of
    them.
    """
    table, parts = rows.table, parts_of(splits, len(rows.table))
    kept = sampled_items(
        table.ids, parts, 4 * LOOKED
    )  # nothing is decoded: an utterance costs little
    arrays = {name: rows.pooled(name).cpu().float()[torch.from_numpy(kept)] for name in rows.names}
    given = {name: x for name, x in arrays.items() if name not in rows.as_is}
    facts = {f"length of {name}": own[kept].astype(float) for name, own in table.lengths.items()}
    # Zeros stand for what an utterance has not, such as the one before a dialogue's first.
    for name, x in given.items():
        norm = x.norm(dim=1).double().numpy()
        facts[f"norm of {name}"] = np.where(
            norm > 0, norm, np.median(norm[norm > 0]) if norm.any() else 0.0
        )
    words = (
        None
        if table.texts is None
        else [tuple(t for t in tokens(table.texts[i]) if t[0].isalnum()) for i in kept]
    )
    if words is not None:
        facts["words"] = np.array([len(own) for own in words], float)
    nothing = np.stack([~x.any(1).numpy() for x in arrays.values()]).all(0)
    raw = list(table.modalities.values())
    if raw:
        digests = {
            int(i): hashlib.sha256(b"".join(x[i].tobytes() for x in raw)).digest() for i in kept
        }
    else:
        digests = {int(i): own for i, own in zip(kept, words, strict=True) if len(own) >= LONG_TEXT}
    features = [
        (x - x.mean(0)) / x.std(0).clamp(min=1e-6) / x.shape[1] ** 0.5 for x in arrays.values()
    ]
    return Inspection(
        unit="utterances",
        total=int((parts != "").sum()),
        **_common(table, parts, kept),
        features=torch.cat(features, 1),
        facts=facts,
        twins=_twins(table, parts, digests),
        compared=len(digests),
        doubtful=[table.ids[kept[i]] for i in np.flatnonzero(nothing)],
        near_rows=bool(raw),
    )


def _common(items, parts: np.ndarray, rows: np.ndarray) -> dict:
    known = items.labels != UNLABELED
    kinds = (*PARTS, "")
    counts = [
        np.bincount(items.labels[known & (parts == part)], minlength=len(items.classes))
        for part in kinds
    ]
    ids = [items.ids[i] for i in rows]
    return dict(
        ids=ids,
        labels=items.labels[rows],
        parts=parts[rows],
        counts=np.stack(counts),
        classes=items.classes,
    )


def _small(pixels: Tensor, side: int) -> Tensor:
    # uint8 (n, 3, side, side), stretched to a square.
    small = F.interpolate(
        pixels.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return small.round().clamp(0, 255).byte()


def _size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        return image.size


def _file_digest(images, row: int) -> bytes | str:
    # Reading it all checks an archive's CRC, opening it the header: what that finds is damaged,
    # decoded or not.
    try:
        content = images.read(int(row))
        _size(content)
    except DECODE_ERRORS as error:
        return f"{images.ids[row]} ({reason(error)})"
    return hashlib.sha256(content).digest()


def _of_equal_size(images, parts: np.ndarray) -> np.ndarray:
    # Files of equal size stay together: of a pair of duplicates both are compared, or none.
    own = np.flatnonzero(parts != "")
    if len(own) <= HASHED:
        return own
    sizes, where, times = np.unique(images.sizes[own], return_inverse=True, return_counts=True)
    order = np.argsort(uniform(0, 0, sizes, 0, 1)[:, 0], kind="stable")
    order = order[times[order] > 1]
    kept = order[np.cumsum(times[order]) <= HASHED]
    return own[np.isin(where, kept)]


def _twins(items, parts: np.ndarray, digests: dict) -> list[list[Duplicate]]:
    groups = defaultdict(list)
    for row, digest in digests.items():
        groups[digest].append(row)
    found = sorted(rows for rows in groups.values() if len(rows) > 1)
    return [
        [Duplicate(items.ids[row], parts[row], int(items.labels[row])) for row in rows]
        for rows in found
    ]


def corrupt(seen: Inspection, folder: Path) -> Result:
    """FAIL for items that cannot be read, WARN for those that hold nothing."""
    rows = [["damaged", text] for text in seen.damaged] + [
        ["empty", text] for text in seen.doubtful
    ]
    status = FAIL if seen.damaged else WARN if seen.doubtful else PASS
    empty = f", {len(seen.doubtful)} empty" if seen.doubtful else ""
    value = f"{len(seen.damaged)} damaged{empty} of {seen.of}"
    fix = ""
    if seen.damaged:
        fix = f"fix or remove {first_few(seen.damaged)}; or --on-bad-item skip"
    elif seen.doubtful:
        fix = f"look at {first_few(seen.doubtful)}: such items teach nothing"
    return Result(status, value, "0", fix, rows=table(["finding", "item"], rows))


def duplicates(seen: Inspection, folder: Path) -> Result:
    """FAIL where a part shares an item with another part, exactly or, for more than `NEAR_SHARE` of
    the smaller one, nearly; WARN for fewer, for more than that share within a part, and for one
    content with two labels.
    """
    groups = sorted(seen.twins, key=lambda group: len({twin.part for twin in group}) < 2)
    across = [group for group in groups if len({twin.part for twin in group}) > 1]
    unlike = [group for group in groups if len({twin.label for twin in group} - {UNLABELED}) > 1]
    repeated = sum(len(group) - 1 for group in groups)
    twins = [
        Duplicate(*row) for row in zip(seen.ids, seen.parts, seen.labels.tolist(), strict=True)
    ]
    known = {twin for group in groups for twin in group}
    near = [pair for pair in near_pairs(seen) if not {twins[i] for i in pair} <= known]
    near.sort(key=lambda pair: seen.parts[pair[0]] == seen.parts[pair[1]])
    near_across = sum(seen.parts[i] != seen.parts[j] for i, j in near)
    most = max(
        NEAR_SHARE * min(int((seen.parts == part).sum()) or len(seen.ids) for part in PARTS), 1
    )
    # Rows of features and texts recur in talk; a whole picture does not recur by chance.
    failed = near_across > most or len(across) > (most if seen.unit == "utterances" else 0)
    warned = (
        across
        or near_across
        or repeated > NEAR_SHARE * seen.compared
        or (unlike and seen.unit == "images")
    )
    value = (
        f"{len(across)} exact and {near_across} near across splits, {repeated - len(across)}"
        " exact and"
    )
    value += f" {len(near) - near_across} near within them, of {seen.of}"
    value += f"; {seen.compared} files compared" if seen.compared > len(seen.ids) else ""
    pairs = [
        ("exact", group[0], max(group[1:], key=lambda twin: twin.part != group[0].part))
        for group in groups
    ]
    pairs += [("near", twins[i], twins[j]) for i, j in near]
    rows = [
        [kind, *(f"{twin.name} ({twin.part})" for twin in pair)] for kind, *pair in pairs[:WORST]
    ]
    fix = ""
    if failed or warned:
        first = next(
            (row for row, (_, a, b) in zip(rows, pairs, strict=False) if a.part != b.part), None
        )
        fix = f"keep one of each pair, such as {rows[0][1]} and {rows[0][2]}"
        if first:
            fix = (
                f"keep {first[1]} or {first[2]}, and so on: no part may ask what another has shown"
            )
        fix += f"; {len(unlike)} groups of equal {seen.unit} have several labels" if unlike else ""
    pictures = grid(
        seen, [row for pair in near[: WORST // 2] for row in pair], folder, "check_duplicates"
    )
    status = FAIL if failed else WARN if warned else PASS
    threshold = f"0 exact, {NEAR_SHARE:.0%} near across splits"
    return Result(status, value, threshold, fix, pictures, table(["alike", "one", "other"], rows))


def near_pairs(seen: Inspection) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of items that look the same but for compression, scale, brightness and
    contrast; of utterances, whose rows of features have a cosine above NEAR_COSINE.
    """
    if seen.thumbs is None and not seen.near_rows:
        return []
    if seen.thumbs is None:
        x, found = F.normalize(seen.features, dim=1), []
        for start in range(0, len(x), 1024):
            alike = (x[start : start + 1024] @ x.T > NEAR_COSINE).nonzero()
            found += [(int(i) + start, int(j)) for i, j in alike if i + start < j]
        return found
    close = None
    for frames in seen.thumbs.float().unbind(1):
        x = frames.flatten(1)
        x = x - x.mean(1, keepdim=True)
        # A constant image resembles nothing, not even another one: that is the outliers' finding.
        alike = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T > NEAR_CORRELATION
        bits = perceptual_hash(frames).float()
        alike &= bits.shape[1] - bits @ bits.T - (1 - bits) @ (1 - bits).T <= NEAR_BITS
        close = alike if close is None else close & alike
    return [(int(i), int(j)) for i, j in close.nonzero() if i < j]


def perceptual_hash(frames: Tensor) -> Tensor:
    """63 bits of images (n, 3, s, s): which of the lowest frequencies of their gray values, but for
    the mean, are above the median of these. bool (n, 63).
    """
    gray, k = frames.float().mean(1), torch.arange(frames.shape[-1], dtype=torch.float32)
    cosines = torch.cos(
        math.pi * (2 * k + 1) * torch.arange(8).view(-1, 1) / (2 * len(k))
    )  # [8, s]
    low = (cosines @ gray @ cosines.T).flatten(1)[:, 1:]
    return low > low.median(1, keepdim=True).values


def imbalance(seen: Inspection, folder: Path) -> Result:
    """FAIL for a class that training does not have, WARN for a class more than `RATIO` times
    another; the prior and the bias that it means for the last layer.
    """
    counts, unused = seen.counts[[0, 3]]
    if not seen.counts.any():
        return Result(
            SKIP, f"{seen.of}, none labeled", f"{RATIO:g}", "no labels, no classes to compare"
        )
    prior = counts / max(counts.sum(), 1)
    bias = np.log(np.maximum(prior, 1e-12))
    if len(counts) == 2:
        bias = np.array([0.0, bias[1] - bias[0]])
    rows = [
        [
            c,
            *map(int, seen.counts[:3, i]),
            f"{prior[i]:.4f}",
            f"{bias[i]:+.3f}" if counts[i] else "-",
        ]
        for i, c in enumerate(seen.classes)
    ]
    missing = [seen.classes[i] for i in np.flatnonzero((counts == 0) & (unused == 0))] + seen.empty
    lacking = [
        f"{seen.classes[i]} in {part}"
        for part, own in zip(PARTS[1:], seen.counts[1:3], strict=True)
        if own.any()
        for i in np.flatnonzero((own == 0) & (counts > 0))
    ]
    ratio = counts.max() / counts[counts > 0].min() if counts.any() else 1.0
    most, least = (
        seen.classes[int(counts.argmax())],
        seen.classes[int(np.where(counts > 0, counts, np.inf).argmin())],
    )
    bad = FAIL if seen.supervised else WARN
    status = bad if missing else WARN if lacking or ratio > RATIO else PASS
    value = f"{ratio:.1f}, {most} over {least}"
    value += f"; no training {seen.unit} of {first_few(missing)}" if missing else ""
    value += f"; none of {first_few(lacking)}" if lacking else ""
    fix = ""
    if missing:
        fix = f"give {first_few(missing)} training {seen.unit}, or remove the class"
    elif status == WARN:
        fix = "report macro averages; balance, adjust or weight by the prior " + ", ".join(
            f"{p:.3g}" for p in prior
        )
    shown = [
        (c, p, *metrics.share_interval(int(n), int(counts.sum())))
        for c, p, n in zip(seen.classes, prior, counts, strict=True)
    ]
    figure = folder / "figures" / "check_classes.svg"
    draw_grid(
        figure,
        charts.bars("classes of the training part", shown[:40], label="share of the training part"),
    )
    header = ["class", *PARTS, "prior", "bias"]
    threshold = f"at most {RATIO:g}, no empty class"
    return Result(
        status, value, threshold, fix, [str(figure.relative_to(folder))], table(header, rows)
    )


def outliers(seen: Inspection, folder: Path) -> Result:
    """WARN for items whose size, brightness, entropy, length or norm lies far from the others': a
    robust z-score, of the distance from the median in units of the median distance.
    """
    names = list(seen.facts)
    scores = np.stack(
        [robust_z(name, seen.facts[name]) for name in names] or [np.zeros(len(seen.ids))], 1
    )
    which = np.abs(scores).argmax(1)
    worst = scores[np.arange(len(scores)), which]
    far = [int(i) for i in np.argsort(-np.abs(worst), kind="stable") if abs(worst[i]) > OUTLIER]
    rows = [
        [seen.ids[i], names[which[i]], f"{seen.facts[names[which[i]]][i]:.4g}", f"{worst[i]:+.1f}"]
        for i in far
    ]
    value = f"{len(far)} of {seen.of}" + (
        f"; the farthest is {rows[0][0]}, {rows[0][1]} {rows[0][2]}" if far else ""
    )
    fix = (
        f"look at {first_few([seen.ids[i] for i in far])}; fix or remove what does not belong there"
        if far
        else ""
    )
    pictures = grid(seen, far, folder, "check_outliers")
    for name in names:
        values = np.sort(seen.facts[name])
        if len(values) and values[0] < values[-1]:
            points = list(
                zip(
                    values.tolist(),
                    (np.arange(1, len(values) + 1) / len(values)).tolist(),
                    strict=True,
                )
            )
            figure = folder / "figures" / f"check_{file_name(name)}.svg"
            share = f"share of {seen.unit} up to there"
            draw_grid(figure, charts.lines(name, {seen.unit: points}, x_label=name, y_label=share))
            pictures.append(str(figure.relative_to(folder)))
    status, rows = WARN if far else PASS, table(["item", "of", "value", "z"], rows[:WORST])
    return Result(status, value, f"|z| at most {OUTLIER:g}", fix, pictures, rows)


def robust_z(name: str, values: np.ndarray) -> np.ndarray:
    """(n,) distances from the median in units of 1.4826 median distances; of sizes and lengths on a
    log scale.

    The unit is at least a twentieth of what the quantity spans by nature, so that in a set of equal
    items those that differ a little are none.
    """
    floor = {"brightness": 255 / 20, "entropy, bits": 8 / 20}.get(name)
    if floor is None:
        # A text of no words has a length too; a norm has no unit.
        values = np.log(np.maximum(values, 1e-12)) if name.startswith("norm") else np.log1p(values)
        floor = 0.05
    away = values - np.median(values)
    return away / max(1.4826 * float(np.median(np.abs(away))), floor)


def neighbors(seen: Inspection, folder: Path) -> Result:
    """Do the nearest neighbors among the training items share a label more often than by chance?

    Where they do not, the labels may be shuffled: FAIL for images that a run trains to classify;
    WARN for clips, whose single frames may not show the classes. The items, 64 at most, that four
    of five neighbors contradict are drawn.
    """
    threshold = f"{CERTAIN:g} standard errors above chance"
    own = np.flatnonzero((seen.parts == "train") & (seen.labels != UNLABELED))
    truth = seen.labels[own]
    if len(own) < LEAST_LABELED or len(np.unique(truth)) < 2:
        value = f"{len(own)} labeled training {seen.unit} in {len(np.unique(truth))} classes"
        return Result(SKIP, value, threshold, f"needs {LEAST_LABELED} of two classes")
    x = seen.features[torch.from_numpy(own)].double()
    x = F.normalize(x - x.mean(0), dim=1)
    near = []
    for start in range(0, len(x), 1024):
        alike = x[start : start + 1024] @ x.T
        alike[torch.arange(len(alike)), start + torch.arange(len(alike))] = -torch.inf
        near.append(alike.topk(min(NEIGHBORS, len(x) - 1), dim=1).indices)
    near = torch.cat(near).numpy()
    agreement, z = label_agreement(truth, near)
    rates = np.bincount(truth, minlength=len(seen.classes)) / len(truth)
    votes = np.stack([(truth[near] == c).mean(1) for c in range(len(rates))], 1)  # [n, classes]
    rows = np.arange(len(own))
    rival = np.where(np.arange(len(rates)) == truth[:, None], -1, votes).argmax(1)
    against = votes[rows, rival]
    doubted = [
        int(i) for i in np.argsort(votes[rows, truth] - against, kind="stable") if against[i] >= 0.8
    ][:WORST]
    value = (
        f"neighbors agree {agreement:.3f}, by chance {float((rates**2).sum()):.3f} (z"
        f" {z:+.1f}), of {len(own)}"
    )
    value += f" training {seen.unit}"
    sure = seen.unit == "images" and seen.supervised
    status = PASS if z > CERTAIN else FAIL if sure else WARN
    fix = ""
    if status != PASS:
        fix = "compare labels with items by eye, they may be shuffled or shifted"
        fix += (
            ""
            if sure
            else f"; or what tells these classes apart does not show in single {seen.unit}'"
            " pixels or rows"
        )
    header = ["item", "label", "neighbors say", "share of them"]
    found = [
        [seen.ids[own[i]], seen.classes[truth[i]], seen.classes[rival[i]], f"{against[i]:.0%}"]
        for i in doubted
    ]
    pictures = grid(seen, own[doubted].tolist(), folder, "check_labels")
    return Result(status, value, threshold, fix, pictures, table(header, found))


def label_agreement(truth: np.ndarray, near: np.ndarray, rounds: int = 100) -> tuple[float, float]:
    """The share of neighbors (n, k) that have an item's label (n,), and its distance from that of
    shuffled labels, in their standard deviations.
    """
    found = float((truth[near] == truth[:, None]).mean())
    orders = [np.argsort(uniform(0, r, np.arange(len(truth)), 0, 1)[:, 0]) for r in range(rounds)]
    shuffled = [float((truth[order][near] == truth[order][:, None]).mean()) for order in orders]
    return found, (found - float(np.mean(shuffled))) / max(float(np.std(shuffled)), 1e-9)


def grid(seen: Inspection, rows: list[int], folder: Path, name: str) -> list[str]:
    """Draw the items (their middle frames) at `rows`, 8 a line, as figures/NAME.png: its path, or
    none.
    """
    if seen.thumbs is None or not rows:
        return []
    thumbs = seen.thumbs[torch.tensor(rows[:WORST])]
    path = folder / "figures" / f"{name}.png"
    figures.save_grid(path, thumbs[:, thumbs.shape[1] // 2] / 255, 8)
    return [str(path.relative_to(folder))]


def draw_grid(path: Path, svg: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(charts.standalone(svg))


def file_name(name: str) -> str:
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))


def table(header: list[str], rows: list[list]) -> list[list[str]]:
    return [header, *([str(cell) for cell in row] for row in rows)] if rows else []


def first_few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


CHECKS = {
    "corrupt": corrupt,
    "duplicates": duplicates,
    "imbalance": imbalance,
    "outliers": outliers,
}
CHECKS |= {"label-noise": neighbors}


def examine(
    items, splits: dict[str, np.ndarray], folder: Path, workers: int, supervised: bool
) -> dict[str, Result]:
    """What all of `CHECKS` find; pictures go to `folder`/figures.

    Args:
        items: `common.data.Images`, `common.clips.Videos` or `common.discovery.Rows`.
        splits: a script's parts.
        supervised: whether the run trains on labels: then a class without items and labels that
            look shuffled FAIL.
    """
    seen = (
        inspect_rows(items, splits) if hasattr(items, "table") else inspect(items, splits, workers)
    )
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
    seen = (
        inspect_rows(run.data, run.splits)
        if hasattr(run.data, "table")
        else inspect(run.data, run.splits, run.args.workers)
    )
    seen.supervised = spec.labels is not None
    seen.empty = empty_folders(Path(run.args.data)) if seen.unit == "images" else []
    return seen


def empty_folders(root: Path) -> list[str]:
    """Folders without any file that lie where the folders of classes lie: classes that were meant
    to have images.
    """
    if not root.is_dir():
        return []
    full = {path.parent for path in root.rglob("*") if path.is_file()}
    beside = {folder.parent for folder in full if folder != root}
    return sorted(
        path.relative_to(root).as_posix()
        for parent in beside
        for path in parent.iterdir()
        if path.is_dir() and not hidden(path.name) and not any(path.iterdir())
    )


def item(name: str, spec: CheckSpec) -> Result:
    """The item of that name of --check, see `CHECKS`."""
    return result_of(name, cached_inspection(spec), spec.run.folder)


ITEMS = {name: functools.partial(item, name) for name in CHECKS}
