"""What a run leaves for its report beside the log: figures/NAME.json, numbers and small pictures as
they are.

Each file holds `kind`, how the report draws it, `title`, `text` for whoever has never seen the
project, and the content. The same numbers are there for any other tool. Functions that need the
data on every process say so.
"""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid, save_image

from common import metrics

SIDE = 96  # of a picture, pixels
SHOWN = 12  # items of a gallery
POINTS = 1500  # of a scatter plot
_MOST_CLASSES = 30  # of a confusion matrix that is drawn


def put(folder: Path, name: str, kind: str, title: str, text: str, **content) -> None:
    """Write figures/NAME.json, never seen half written."""
    file = folder / "figures" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{name}.tmp")
    temporary.write_text(
        json.dumps({"kind": kind, "title": title, "text": text} | content, default=_plain)
    )
    temporary.replace(file)


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)


def picture(pixels: Tensor) -> str:
    """A data: address of uint8 pixels (3, h, w) as JPEG, at most SIDE high."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if image.height > SIDE:
        image = image.resize(
            (max(1, round(image.width * SIDE / image.height)), SIDE), Image.Resampling.BILINEAR
        )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictures(run, items: np.ndarray) -> list[str]:
    """Pictures of data items: an image; three frames of a video; face and scene in the middle of a
    two-stream clip.
    """
    data, workers = run.data, run.args.workers
    if not len(items):
        return []
    if not hasattr(data, "frames"):
        (pixels,) = data.batches([items], workers)
        return [picture(image) for image in pixels]
    lengths = data.lengths[items][:, None]
    (clips,) = data.batches([(items, lengths * np.array([1, 3, 5]) // 6)], workers)
    if isinstance(clips, Tensor):
        return [picture(torch.cat(list(clip), 2)) for clip in clips]
    return [picture(torch.cat([face[1], scene[1]], 2)) for face, scene in zip(*clips, strict=True)]


def classified(
    run, name: str, indices: np.ndarray, scores: Tensor, labels: np.ndarray, classes: list[str]
) -> None:
    """Confusion matrix, recall of each class and the worst errors of a classifier on items
    `indices` (n,).

    Args:
        name: the stage's, for titles.
        scores: (n, K) logits.
        labels: (n,) int64 into `classes`.

    Does nothing but on the main process. Also writes the matrix as confusion.csv, where the stage's
    checkpoints are.
    """
    if not run.world.is_main:
        return
    shares = scores.double().softmax(1).numpy()
    answers = shares.argmax(1)
    counts = metrics.confusion_matrix(labels, answers, len(classes))
    rows = [[label, *row] for label, row in zip(classes, counts.tolist(), strict=True)]
    place = run.folder if list(run.stages) == [name] else run.folder / name
    with open(place / "confusion.csv", "w", newline="") as file:
        csv.writer(file).writerows([["true", *classes], *rows])
    if len(classes) <= _MOST_CLASSES:
        text = (
            "Rows are the true classes, columns the answers; the darker, the larger its share"
            " of the row."
        )
        text += " A perfect classifier fills the diagonal alone."
        title, drawn = (
            f"Confusion matrix of the test split, stage {name}",
            dict(corner="true", columns=classes, rows=rows),
        )
        put(run.folder, f"confusion_{name}", "matrix", title, text, **drawn)
        bars = [
            (f"{label} ({size})", hits / max(size, 1), *metrics.share_interval(hits, size))
            for label, hits, size in zip(
                classes, counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True
            )
        ]
        text = (
            "The share of each class's test items (their number in parentheses) that is found."
            " Always answering the"
        )
        text += (
            " most frequent class has a recall of 1 there and 0 elsewhere: the dashed line is"
            " its mean."
        )
        title, levels = (
            f"Recall of each class of the test split, stage {name}",
            {"majority class": 1 / len(classes)},
        )
        put(
            run.folder,
            f"recall_{name}",
            "bars",
            title,
            text,
            label="recall",
            rows=bars,
            levels=levels,
        )
    wrong = np.flatnonzero(answers != labels)
    by_truth = wrong[np.argsort(shares[wrong, labels[wrong]], kind="stable")][:SHOWN]
    by_answer = wrong[np.argsort(-shares[wrong, answers[wrong]], kind="stable")][:SHOWN]
    unsure = np.argsort(shares.max(1), kind="stable")[: SHOWN // 2]
    groups = {
        "Worst: the true class got the least probability": by_truth,
        "Most confident: the wrong answer got the most": by_answer[~np.isin(by_answer, by_truth)],
        "Least certain of all": unsure,
    }

    def said(i: int) -> list[str]:
        truth, answer = labels[i], answers[i]
        right = f"{classes[truth]} {shares[i, truth]:.0%}"
        return (
            [right, "right"]
            if truth == answer
            else [right, f"said {classes[answer]} {shares[i, answer]:.0%}"]
        )

    _errors(
        run,
        name,
        indices,
        groups,
        said,
        f"{len(wrong)} of {len(labels)} test items are answered wrongly.",
    )


def _errors(run, name: str, indices, groups: dict, said, summary: str) -> None:
    rows = []
    for title, own in groups.items():
        own = np.asarray(own, np.int64)
        cards = [
            {"image": image, "lines": [*said(i), str(run.data.ids[indices[i]])]}
            for i, image in zip(own.tolist(), pictures(run, indices[own]), strict=True)
        ]
        if cards:
            rows.append({"title": title, "cards": cards})
    text = (
        f"{summary} Below each: what is true, with its probability; what was said; the item's name."
    )
    put(
        run.folder,
        f"errors_{name}",
        "gallery",
        f"Errors on the test split, stage {name}",
        text,
        rows=rows,
    )


def detected(run, indices: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    """ROC curve, table of methods and the worst errors of a detector of fakes on videos `indices`
    (n,).

    Args:
        scores: (n,) probabilities of fake.
        threshold: from which on a video is called fake.

    Does nothing but on the main process.
    """
    if not run.world.is_main:
        return
    labels, methods, seed = run.data.labels[indices], run.data.methods[indices], run.args.seed
    kinds = sorted(set(methods[labels == 1]))
    groups = {"all": np.full(len(labels), True)}
    if len(kinds) > 1:
        groups |= {kind: (labels == 0) | (methods == kind) for kind in kinds}
    series, bands, rows = {}, {}, []
    for name, kept in groups.items():
        target, own = labels[kept], scores[kept]
        points, band = metrics.roc(target, own, seed)
        found, (low, high) = metrics.detection(target, own), metrics.auc_interval(target, own, seed)
        shown = f"{name}, AUC {found['auc']:.3f} ({low:.3f} to {high:.3f})"
        series[shown] = points
        if name == "all":
            bands[shown] = band
        accuracy = float(((own >= threshold) == target).mean())
        rows.append(
            [
                name,
                int((target == 1).sum()),
                int((target == 0).sum()),
                found["auc"],
                f"{low:.4f} to {high:.4f}",
                found["ap"],
                found["eer"],
                accuracy,
            ]
        )
    header = ["manipulation", "fake", "real", "AUC", "95 % interval", "AP", "EER", "accuracy"]
    text = (
        "One row for all fakes, and where there are several methods of manipulation one for each,"
        " beside all real"
        " videos. AUC: chance that a fake scores above a real video, 0.5 is guessing. AP: average"
        " precision. EER: equal"
        f" error rate. Accuracy at the threshold of validation, {threshold:.4f}. The interval:"
        " bootstrap over videos."
    )
    put(
        run.folder,
        "methods",
        "table",
        "Test videos by method of manipulation",
        text,
        header=header,
        rows=rows,
    )
    text = (
        "How many fakes are found (upwards) for how many false alarms (to the right), as the"
        " threshold falls. The"
        " closer to the upper left corner, the better; the dashed diagonal is guessing. The band"
        " is the 95 % interval"
        " of all fakes, by bootstrap over videos."
    )
    put(
        run.folder,
        "roc",
        "lines",
        "ROC curve, test videos",
        text,
        series=series,
        bands=bands,
        diagonal="guessing",
        values=False,
        x_label="false alarms, share of the real videos",
        y_label="fakes found, share",
        frame=[[0, 1], [0, 1]],
    )
    answers = (scores >= threshold).astype(np.int64)
    wrong = np.flatnonzero(answers != labels)
    by_score = wrong[np.argsort(-np.abs(scores[wrong] - threshold), kind="stable")]
    unsure = np.argsort(np.abs(scores - threshold), kind="stable")[: SHOWN // 2]
    groups = {
        "Fakes taken for real, the most confident first": [i for i in by_score if labels[i] == 1][
            :SHOWN
        ],
        "Real videos taken for fake, the most confident first": [
            i for i in by_score if labels[i] == 0
        ][:SHOWN],
        "Closest to the threshold": unsure,
    }

    def said(i: int) -> list[str]:
        truth = "real" if labels[i] == 0 else f"fake, {methods[i]}" if methods[i] else "fake"
        return [
            truth,
            f"{'said ' + ('real', 'fake')[answers[i]] if answers[i] != labels[i] else 'right'},"
            f" {scores[i]:.3f}",
        ]

    summary = (
        f"{len(wrong)} of {len(labels)} test videos lie on the wrong side of the threshold"
        f" {threshold:.4f}."
    )
    _errors(
        run,
        "train",
        indices,
        groups,
        said,
        f"{summary} Three frames of each; the last figure is its score.",
    )


def attention_frames(run, items: np.ndarray, clips: Tensor, shares: Tensor, scores: Tensor) -> None:
    """How much each frame of some clips counts in the score.

    Args:
        clips: (n, T, 3, h, w) uint8, of the videos `items` (n,).
        shares: (n, T) weights that add up to 1 in each clip.
        scores: (n,) probabilities of fake.

    Does nothing but on the main process.
    """
    if not run.world.is_main:
        return
    found = []
    for item, clip, own, value in zip(
        items.tolist(), clips, shares.tolist(), scores.tolist(), strict=True
    ):
        cards = [
            {"image": picture(f), "share": s, "lines": [f"{s:.0%}"]}
            for f, s in zip(clip, own, strict=True)
        ]
        title = (
            f"{('real', 'fake')[run.data.labels[item]]}: {run.data.ids[item]}, score of fake"
            f" {value:.3f}"
        )
        found.append({"title": title, "cards": cards})
    text = (
        "Test clips, one a row, first real, then fake. The bar and the figure below a frame"
        " are its share in the"
    )
    text += f" clip's score; equal shares would be {1 / clips.shape[1]:.0%}."
    put(
        run.folder,
        "watched",
        "gallery",
        "Which frames count",
        text,
        rows=found,
        columns=clips.shape[1],
    )


def representation(run, features: Tensor) -> None:
    """Nearest neighbors of some images, and all of them on two principal axes, by features (n, d)
    of all items.

    Does nothing but on the main process.
    """
    if not run.world.is_main:
        return
    data, labels = run.data, run.data.labels
    x = features - features.mean(0)
    some = np.arange(len(x))[:: -(-len(x) // POINTS)]
    _, lengths, axes = torch.linalg.svd(x[some].double(), full_matrices=False)
    parts = (lengths.square() / lengths.square().sum().clamp(min=1e-30))[:2].tolist()
    points = (x[some].double() @ axes[:2].T).float()
    text = (
        "Each point is an image, placed by the two directions along which the features of the"
        " selected epoch vary"
    )
    text += (
        " most (PCA). Colors are labels, which pretraining has not seen: groups of one"
        " color are what it found."
    )
    put(
        run.folder,
        "features",
        "scatter",
        "Features on their first two principal axes",
        text,
        points=[[round(v, 4) for v in row] for row in points.tolist()],
        groups=labels[some],
        names=data.classes,
        x_label=f"axis 1, {parts[0]:.0%} of the variance",
        y_label=f"axis 2, {parts[-1]:.0%} of the variance",
    )
    asked = run.splits["test"] if len(run.splits.get("test", [])) else np.arange(len(x))
    if len(data.classes) > 1 and (labels[asked] >= 0).any():
        own = [asked[labels[asked] == c][:2] for c in range(len(data.classes))]
        asked = np.concatenate([part[:1] for part in own] + [part[1:] for part in own])[:8]
    else:
        asked = asked[np.linspace(0, len(asked) - 1, min(8, len(asked))).astype(int)]
    unit = torch.nn.functional.normalize(x, dim=1)
    similar = unit[asked] @ unit.T
    similar[torch.arange(len(asked)), torch.from_numpy(asked)] = -torch.inf
    near = similar.topk(min(6, len(x) - 1), dim=1)
    found = []

    def name(i: int) -> str:
        return data.classes[labels[i]] if labels[i] >= 0 else "no label"

    for query, others, cosines in zip(
        asked.tolist(), near.indices.tolist(), near.values.tolist(), strict=True
    ):
        images = pictures(run, np.array([query, *others]))
        cards = [{"image": images[0], "lines": [name(query), "the image"]}]
        for image, other, cosine in zip(images[1:], others, cosines, strict=True):
            same = labels[other] == labels[query] if labels[query] >= 0 else None
            tone = "" if same is None else "good" if same else "bad"
            cards.append({"image": image, "lines": [name(other), f"{cosine:.2f}"], "tone": tone})
        found.append({"title": "", "cards": cards})
    text = (
        "A test image in each row, then the images most like it by the features (cosine"
        " similarity below each)."
    )
    text += " A solid frame: the same label; a dashed one: another."
    put(
        run.folder,
        "neighbors",
        "gallery",
        "Nearest neighbors",
        text,
        rows=found,
        columns=len(found[0]["cards"]),
    )


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images (n, 3, h, w) in [0, 1] as a PNG grid of so many columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(
        images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=2, pad_value=1.0
    )
    scale = max(1, 96 // images.shape[-1])  # small images are enlarged in whole pixels
    save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), path)
