"""What a run leaves for its report beside the log: figures/NAME.json, numbers and small pictures.

Each file holds `kind`, how the report draws it, `title`, `text` for whoever has never seen the
project, and the content. The same numbers are there for any other tool.
"""

import base64
import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid, save_image

from common import metrics
from common.errors import aligned, only_warn, plural, say
from common.report.record import interval_text
from common.run.files import atomic_write, csv_text, write_json

SIDE = 96  # of a picture, pixels
SHOWN = 12  # items of a gallery
POINTS = 1500  # of a scatter plot
_MOST_CLASSES = 30  # of a confusion matrix that is drawn
_QUERIES = 8  # images whose neighbors are shown
_NEIGHBORS = 6


def for_report(leave: Callable) -> Callable:
    """`leave`(run, ...), which leaves something for the report, on the main process alone; where it
    fails, that is said, and the run goes on.
    """

    @functools.wraps(leave)
    def on_main(run, *args, **kwargs) -> None:
        if run.world.is_main:
            with only_warn(run.log.say, f"figures ({leave.__name__})"):
                leave(run, *args, **kwargs)

    return on_main


def put(folder: Path, name: str, kind: str, title: str, text: str, **content) -> None:
    """Write figures/NAME.json, never seen half written."""
    file = folder / "figures" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = {"kind": kind, "title": title, "text": text, **content}
    with atomic_write(file) as stored:
        stored.write(json.dumps(figure, default=_plain))


@for_report
def put_tables(run, tables: dict) -> None:
    """Write tables.json; see `common.report.page` for what is in it."""
    write_json(run.folder / "tables.json", tables)


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)


def picture(pixels: Tensor) -> str:
    """A data: address of uint8 pixels (3, h, w) as JPEG, at most SIDE high."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if image.height > SIDE:
        width = max(1, round(image.width * SIDE / image.height))
        image = image.resize((width, SIDE), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictures(run, items: np.ndarray) -> list[str]:
    """Pictures of data items: an image; three frames of a video; what is seen in the middle of a
    clip of streams, face and scene or the face.
    """
    data = run.data
    workers = run.args.workers
    if not len(items):
        return []
    if not hasattr(data, "frames"):
        (images,) = data.batches([items], workers)
        return [picture(image) for image in images]
    frames = data.lengths[items][:, None] * np.array([1, 3, 5]) // 6
    (clips,) = data.batches([(items, frames)], workers)
    if isinstance(clips, Tensor):
        return [picture(torch.cat(list(clip), 2)) for clip in clips]
    return [picture(torch.cat([part[1] for part in clip], 2)) for clip in zip(*clips, strict=True)]


@for_report
def classified(
    run, name: str, indices: np.ndarray, scores: Tensor, labels: np.ndarray, classes: list[str]
) -> None:
    """Confusion matrix, recall of each class and the worst errors of a classifier on items
    `indices` (n,).

    Args:
        name: the stage's, for titles.
        scores: (n, K) logits.
        labels: (n,) int64 into `classes`.

    Also writes the matrix as confusion.csv, where the stage's checkpoints are.
    """
    probabilities = scores.double().softmax(1).numpy()
    answers = probabilities.argmax(1)
    counts = metrics.confusion_matrix(labels, answers, len(classes))
    rows = [[label, *row] for label, row in zip(classes, counts.tolist(), strict=True)]
    place = run.folder if list(run.stages) == [name] else run.folder / name
    with atomic_write(place / "confusion.csv") as file:
        csv.writer(file).writerows([["true", *classes], *rows])
    if len(classes) <= _MOST_CLASSES:
        put(
            run.folder,
            f"confusion_{name}",
            "matrix",
            f"Confusion matrix of the test split, stage {name}",
            "The fuller the color, the larger the share of the row. A perfect classifier fills the"
            " diagonal alone.",
            corner="true",
            above="predicted",
            columns=classes,
            rows=rows,
        )
        _recalls(run.folder, name, classes, counts)
    wrong = np.flatnonzero(answers != labels)
    by_truth = np.argsort(probabilities[wrong, labels[wrong]], kind="stable")
    by_answer = np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")
    worst = wrong[by_truth][:SHOWN]
    confident = wrong[by_answer][:SHOWN]
    groups = {
        "Worst: the true class got the least probability": worst,
        "Most confident of the others: the wrong answer got the most": confident[
            ~np.isin(confident, worst)
        ],
        "Least certain of all": np.argsort(probabilities.max(1), kind="stable")[: SHOWN // 2],
    }

    def caption(i: int) -> list[str]:
        truth = labels[i]
        answer = answers[i]
        verdict = "right"
        if truth != answer:
            verdict = f"said {classes[answer]} {probabilities[i, answer]:.0%}"
        return [f"{classes[truth]} {probabilities[i, truth]:.0%}", verdict]

    summary = f"{len(wrong)} of {len(labels)} test items are answered wrongly."
    _errors(run, name, indices, groups, caption, summary)


def _recalls(folder: Path, name: str, classes: list[str], counts: np.ndarray) -> None:
    hits = counts.diagonal().tolist()
    sizes = counts.sum(1).tolist()
    rows = [
        (f"{label} ({size})", hit / size, *metrics.share_interval(hit, size))
        for label, hit, size in zip(classes, hits, sizes, strict=True)
        if size
    ]
    put(
        folder,
        f"recall_{name}",
        "bars",
        f"Recall of each class of the test split, stage {name}",
        "The share of each class's test items (their number in parentheses) that is found. Always"
        " answering the most frequent class has a recall of 1 there and 0 elsewhere: the dashed"
        " line is its mean.",
        label="recall",
        rows=rows,
        levels={"majority class": 1 / len(classes)},
    )


def _errors(
    run,
    name: str,
    indices: np.ndarray,
    groups: dict[str, Iterable[int]],
    caption: Callable[[int], list[str]],
    summary: str,
) -> None:
    rows = []
    for title, group in groups.items():
        members = np.asarray(group, np.int64)
        cards = [
            {"image": image, "lines": [*caption(i), str(run.data.ids[indices[i]])]}
            for i, image in zip(members.tolist(), pictures(run, indices[members]), strict=True)
        ]
        if cards:
            rows.append({"title": title, "cards": cards})
    put(
        run.folder,
        f"errors_{name}",
        "gallery",
        f"Errors on the test split, stage {name}",
        f"{summary} Below each: what is true, with its probability; what was said; the item's"
        " name.",
        rows=rows,
    )


@for_report
def detected(
    run, indices: np.ndarray, scores: np.ndarray, threshold: float, units: np.ndarray
) -> None:
    """ROC curve, table of methods and the worst errors of a detector of fakes on videos `indices`
    (n,).

    Args:
        scores: (n,) probabilities of fake.
        threshold: from which on a video is called fake.
        units: (n,) names of what the bootstrap draws.
    """
    labels = run.data.labels[indices]
    methods = run.data.methods[indices]
    _methods(run, labels, methods, scores, threshold, units)
    answers = (scores >= threshold).astype(np.int64)
    distance = np.abs(scores - threshold)
    wrong = np.flatnonzero(answers != labels)
    wrong = wrong[np.argsort(-distance[wrong], kind="stable")]
    groups = {
        "Fakes taken for real, the most confident first": wrong[labels[wrong] == 1][:SHOWN],
        "Real videos taken for fake, the most confident first": wrong[labels[wrong] == 0][:SHOWN],
        "Closest to the threshold": np.argsort(distance, kind="stable")[: SHOWN // 2],
    }

    def caption(i: int) -> list[str]:
        truth = ("real", "fake")[labels[i]]
        if truth == "fake" and methods[i]:
            truth = f"fake, {methods[i]}"
        verdict = "right"
        if answers[i] != labels[i]:
            verdict = f"said {('real', 'fake')[answers[i]]}"
        return [truth, f"{verdict}, {scores[i]:.3f}"]

    summary = (
        f"{len(wrong)} of {len(labels)} test videos lie on the wrong side of the threshold"
        f" {threshold:.4f}. Three frames of each; the last figure is its score."
    )
    _errors(run, "train", indices, groups, caption, summary)


_EVALUATED = ("video_auc", "video_ap", "video_eer", "video_balanced_accuracy", "clip_auc")
_EVALUATED += ("frame_auc", "video_detection_rate", "video_false_alarm_rate")


def evaluated(folder: Path) -> None:
    """Print the table of a run's evaluations, eval/DATA/eval.json, and write it: eval/table.csv,
    and a table of the report.
    """
    rows = []
    kinds = set()  # of manipulation, or compressions
    for file in sorted(folder.glob("eval/*/eval.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        scores = {k.removeprefix("eval/test/"): v for k, v in found.items() if k.count("/") == 2}
        # The ends of an interval behind the name that they belong to, as `interval_text` has them.
        scores = {re.sub("_(low|high)_(.+)", r"_\2_\1", name): v for name, v in scores.items()}
        rows.append((file.parent.name, found["data"], scores))
        kinds |= {*found["data"]["methods"], *found["data"]["compressions"]}
    columns = list(_EVALUATED)
    for metric in ("video_auc", "video_detection_rate", "video_false_alarm_rate"):
        columns += [f"{metric}_{kind}" for kind in sorted(kinds)]
    columns = [name for name in columns if any(name in scores for *_, scores in rows)]
    header = ["data", "real", "fake", *columns]
    table = [header]
    exact = [[*header[:3], *(f"{c}{end}" for c in columns for end in ("", "_low", "_high"))]]
    for name, data, scores in rows:
        counts = [name, data["real"], data["fake"]]
        table.append([*counts, *(interval_text(scores, column) for column in columns)])
        exact.append([*counts, *(scores.get(column, "") for column in exact[0][3:])])
    with atomic_write(folder / "eval" / "table.csv") as file:
        file.write(csv_text(exact))
    say(*aligned(table).split("\n"), f"table: {folder / 'eval' / 'table.csv'}")
    if not (folder / "log.jsonl").exists():  # a checkpoint alone has no report
        return
    put(
        folder,
        "evaluations",
        "table",
        "Evaluations on other data",
        "Each data set with its videos, scored by the selected model at validation's threshold;"
        " in brackets 95 % intervals by bootstrap over persons, or pairs of them.",
        header=header,
        rows=table[1:],
    )


def perturbed(folder: Path, name: str, found: dict, metric: str, unchanged: float) -> None:
    """Print a metric of a data set's videos at each level of change, and write it as perturb.csv
    and as curves of the report.

    Args:
        folder: eval/NAME of a run.
        found: kind -> ((level, value), ...), from mild to strong.
        metric: its name, such as `eval/test/video_auc`.
        unchanged: of the videos as they are.
    """
    column = metric.rpartition("/")[2]
    words = column.replace("_", " ").replace("auc", "AUC")
    rows = [[kind, level, value] for kind, points in found.items() for level, value in points]
    with atomic_write(folder / "perturb.csv") as file:
        file.write(csv_text([["change", "level", column], ["none", "", unchanged], *rows]))
    header = [words, "0", "1", "2", "3", "4", "5"]
    table = [[kind, unchanged, *(value for _, value in points)] for kind, points in found.items()]
    shown = [[kind, *(f"{value:.4f}" for value in values)] for kind, *values in table]
    say(*aligned([header, *shown]).split("\n"), f"levels: {folder / 'perturb.csv'}")
    run = folder.parent.parent
    if (run / "log.jsonl").exists():
        put(
            run,
            f"perturbed_{name}",
            "lines",
            f"{name}: {words} as frames get worse",
            "From left to right five levels of each change, 0: the videos as they are; the levels"
            f" are in eval/{name}/perturb.csv." + " 0.5 is guessing." * (column == "video_auc"),
            series={kind: list(enumerate(values)) for kind, *values in table},
            x_label="level",
            y_label=words,
        )


def _methods(
    run,
    labels: np.ndarray,
    methods: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    units: np.ndarray,
) -> None:
    # The table of methods and the ROC curve.
    seed = run.args.seed
    kinds = sorted(set(methods[labels == 1]) - {""})
    groups = {"all": np.full(len(labels), True)}
    if len(kinds) > 1:
        for kind in kinds:
            groups[kind] = (labels == 0) | (methods == kind)
    series = {}
    bands = {}
    rows = []
    for name, kept in groups.items():
        target = labels[kept]
        values = scores[kept]
        points, band = metrics.roc(target, values, seed, units[kept])
        results = metrics.detection(target, values)
        low, high = metrics.auc_interval(target, values, seed, units[kept])
        legend = f"{name}, AUC {results['auc']:.3f} ({low:.3f} to {high:.3f})"
        series[legend] = points
        if name == "all":
            bands[legend] = band
        rows.append(
            [
                name,
                int((target == 1).sum()),
                int((target == 0).sum()),
                results["auc"],
                f"{low:.4f} to {high:.4f}",
                results["ap"],
                results["eer"],
                *metrics.answers(target, values, threshold).values(),
                *(metrics.hits_at(target, values, rate) for rate in (0.01, 0.1)),
            ]
        )
    put(
        run.folder,
        "methods",
        "table",
        "Test videos by method of manipulation",
        "One row for all fakes, and where there are several methods of manipulation one for each,"
        " beside all real videos. AUC: chance that a fake scores above a real video, 0.5 is"
        " guessing. AP: average precision. EER: equal error rate. Accuracy at the threshold of"
        f" validation, {threshold:.4f}; balanced: the mean over real and fake. TPR: fakes found"
        " with 1 and 10 % false alarms. The interval: bootstrap over"
        f" {plural(len(set(units)), 'group')} of videos, each of those that share persons.",
        header=[
            "manipulation",
            "fake",
            "real",
            "AUC",
            "95 % interval",
            "AP",
            "EER",
            "accuracy",
            "balanced",
            "TPR, 1 %",
            "TPR, 10 %",
        ],
        rows=rows,
    )
    put(
        run.folder,
        "roc",
        "lines",
        "ROC curve, test videos",
        "How many fakes are found (upwards) for how many false alarms (to the right), as the"
        " threshold falls. The closer to the upper left corner, the better; the dashed diagonal is"
        " guessing. The band is the 95 % interval of all fakes, by bootstrap over the same groups.",
        series=series,
        bands=bands,
        diagonal="guessing",
        values=False,
        x_label="false alarms, share of the real videos",
        y_label="fakes found, share",
        frame=[[0, 1], [0, 1]],
    )


@for_report
def attention_frames(run, items: np.ndarray, clips: Tensor, shares: Tensor, scores: Tensor) -> None:
    """How much each frame of some clips counts in the score.

    Args:
        clips: (n, T, 3, h, w) uint8, of the videos `items` (n,).
        shares: (n, T) weights that add up to 1 in each clip.
        scores: (n,) probabilities of fake.
    """
    num_frames = clips.shape[1]
    rows = []
    for item, clip, weights, score in zip(
        items.tolist(), clips, shares.tolist(), scores.tolist(), strict=True
    ):
        cards = [
            {"image": picture(frame), "share": weight, "lines": [f"{weight:.0%}"]}
            for frame, weight in zip(clip, weights, strict=True)
        ]
        truth = ("real", "fake")[run.data.labels[item]]
        title = f"{truth}: {run.data.ids[item]}, score of fake {score:.3f}"
        rows.append({"title": title, "cards": cards})
    put(
        run.folder,
        "watched",
        "gallery",
        "Which frames count",
        "Test clips, one a row, first real, then fake. The bar and the figure below a frame are"
        f" its share in the clip's score; equal shares would be {1 / num_frames:.0%}.",
        rows=rows,
        columns=num_frames,
    )


@for_report
def looked_at(run, titles: list[str], clips: Tensor, maps: Tensor, shares: Tensor) -> None:
    """Where the model looks in some clips.

    Args:
        titles: n lines.
        clips: (n, T, 3, h, w) uint8.
        maps: (n, T, a, b), at least 0, of `grad_cam`.
        shares: (n, T) weights of frames.
    """
    most = maps.flatten(1).amax(1).clamp(min=1e-12)[:, None, None, None]
    heat = F.interpolate(maps / most, clips.shape[-2:], mode="bilinear").unsqueeze(2)
    # Grayer where it is cold; from red to yellow where it is hot.
    gray = clips.float().mean(2, keepdim=True)
    color = torch.cat([torch.full_like(heat, 255), 255 * heat, torch.zeros_like(heat)], 2)
    shown = torch.lerp(gray.expand_as(color), color, 0.5 * heat).to(torch.uint8)
    rows = [
        {
            "title": title,
            "cards": [
                {"image": picture(frame), "share": share, "lines": [f"{share:.0%}"]}
                for frame, share in zip(frames, weights, strict=True)
            ],
        }
        for title, frames, weights in zip(titles, shown, shares.tolist(), strict=True)
    ]
    note = ""
    if maps.shape[-2:] == (1, 1):
        note = " Of an input this small the map is one cell: it tells frames apart, not places."
    put(
        run.folder,
        "looked",
        "gallery",
        "Where the model looks",
        "The test clips whose answers are the most confident, right ones first, then wrong ones."
        " Yellow is what speaks most for the answer that was given (Grad-CAM of the last map, whose"
        " cells are 32 pixels of the input wide); below a frame is its share in the clip's score."
        + note,
        rows=rows,
        columns=clips.shape[1],
    )


@for_report
def representation(run, features: Tensor) -> None:
    """Nearest neighbors of some images, and all of them on two principal axes, by features (n, d)
    of all items.
    """
    centered = features - features.mean(0)
    _principal_axes(run, centered)
    _neighbors(run, centered)


def _principal_axes(run, centered: Tensor) -> None:
    sample = np.arange(len(centered))[:: -(-len(centered) // POINTS)]
    x = centered[sample].double()
    _, lengths, axes = torch.linalg.svd(x, full_matrices=False)
    variances = lengths.square() / lengths.square().sum().clamp(min=1e-30)
    shares = variances[:2].tolist()
    points = (x @ axes[:2].T).float()
    put(
        run.folder,
        "features",
        "scatter",
        "Features on their first two principal axes",
        "Each point is an image, placed by the two directions along which the features of the"
        " selected epoch vary most (PCA). Colors are labels, which pretraining has not seen: groups"
        " of one color are what it found.",
        points=[[round(v, 4) for v in row] for row in points.tolist()],
        groups=run.data.labels[sample],
        names=run.data.classes,
        x_label=f"axis 1, {shares[0]:.0%} of the variance",
        y_label=f"axis 2, {shares[-1]:.0%} of the variance",
    )


def _queries(run, count: int) -> np.ndarray:
    # Test images where there are any; of all classes where there are labels.
    labels = run.data.labels
    num_classes = len(run.data.classes)
    candidates = run.splits["test"] if len(run.splits.get("test", [])) else np.arange(count)
    if num_classes > 1 and (labels[candidates] >= 0).any():
        pairs = [candidates[labels[candidates] == c][:2] for c in range(num_classes)]
        firsts = [pair[:1] for pair in pairs]
        seconds = [pair[1:] for pair in pairs]
        return np.concatenate(firsts + seconds)[:_QUERIES]
    spread = np.linspace(0, len(candidates) - 1, min(_QUERIES, len(candidates)))
    return candidates[spread.astype(int)]


def _neighbors(run, centered: Tensor) -> None:
    labels = run.data.labels
    queries = _queries(run, len(centered))
    unit = torch.nn.functional.normalize(centered, dim=1)
    similar = unit[queries] @ unit.T
    similar[torch.arange(len(queries)), torch.from_numpy(queries)] = -torch.inf
    nearest = similar.topk(min(_NEIGHBORS, len(centered) - 1), dim=1)

    def label_of(i: int) -> str:
        return run.data.classes[labels[i]] if labels[i] >= 0 else "no label"

    def tone_of(query: int, other: int) -> str:
        if labels[query] < 0:
            return ""
        return "good" if labels[other] == labels[query] else "bad"

    rows = []
    for query, others, cosines in zip(
        queries.tolist(), nearest.indices.tolist(), nearest.values.tolist(), strict=True
    ):
        query_image, *images = pictures(run, np.array([query, *others]))
        cards = [{"image": query_image, "lines": [label_of(query), "the image"]}]
        for image, other, cosine in zip(images, others, cosines, strict=True):
            lines = [label_of(other), f"{cosine:.2f}"]
            cards.append({"image": image, "lines": lines, "tone": tone_of(query, other)})
        rows.append({"title": "", "cards": cards})
    put(
        run.folder,
        "neighbors",
        "gallery",
        "Nearest neighbors",
        "A test image in each row, then the images most like it by the features (cosine similarity"
        " below each). A solid frame: the same label; a dashed one: another.",
        rows=rows,
        columns=len(rows[0]["cards"]),
    )


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images (n, 3, h, w) in [0, 1] as a PNG grid of so many columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(
        images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=2, pad_value=1.0
    )
    scale = max(1, SIDE // images.shape[-1])  # small images are enlarged in whole pixels
    with atomic_write(path, "wb") as file:
        save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), file, format="png")
