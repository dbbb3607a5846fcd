"""What a person looks at after clustering: words, mistakes, tables and a scatter plot."""

import csv
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from common import metrics
from common.data import utterances
from common.data.utterances import tokens
from common.deep_cluster import SCORES, SHOWN, STAGES, Targets, membership
from common.errors import aligned
from common.live import digits
from common.monitor import PROBLEMS, Monitor
from common.report import figures
from common.report.cluster_analysis import analysis
from common.run import log
from common.run.files import atomic_write, write_json
from common.run.run import Run

_TYPICAL = 5  # utterances shown of a cluster
_MISTAKES = 12
_UNSURE = 6
_NAMING = 3  # words that name a cluster


def distinctive_words(
    texts: list[str], clusters: np.ndarray, k: int, count: int = 8
) -> list[list[str]]:
    """The words of each cluster that set it apart.

    They have the largest z-scores of the log-odds against the other clusters, the corpus as prior
    (Monroe, Colaresi and Quinn 2008).
    """
    counters = [Counter() for _ in range(k)]
    for text, cluster in zip(texts, clusters, strict=True):
        counters[cluster].update(tokens(text))
    total = sum(counters, Counter())
    words = [word for word, times in total.items() if times > 1]
    prior = np.array([total[word] for word in words], float)
    distinctive = []
    for counter in counters:
        inside = np.array([counter[word] for word in words], float)
        outside = prior - inside
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = _log_odds(inside, prior) - _log_odds(outside, prior)
        z = difference / np.sqrt(1 / (inside + prior) + 1 / (outside + prior))
        order = np.argsort(-z, kind="stable")[:count]
        distinctive.append([words[i] for i in order if z[i] > 0])
    return distinctive


def _log_odds(counts: np.ndarray, prior: np.ndarray) -> np.ndarray:
    return np.log((counts + prior) / (counts.sum() + prior.sum() - counts - prior))


def scatter(run: Run, z: Tensor, clusters: np.ndarray, centroids: Tensor) -> None:
    """Leave rows z (n, d) on the two axes along which the centroids (k, d) differ most for the
    report.
    """
    centered = centroids.double() - centroids.double().mean(0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][:2]
    points = (z.double() @ axes.T).float().numpy()
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 1)))
    figures.put(
        run.folder,
        "scatter",
        "scatter",
        "Utterances and their clusters",
        "Each point is an utterance, each color and shape a cluster, whose number stands at its"
        " middle. The two axes are those along which the clusters' centers differ most; clusters"
        " that overlap here may lie apart on others.",
        points=np.round(points, 4),
        groups=clusters,
        names=[str(c) for c in range(len(centroids))],
        labels=True,
        x_label="axis 1 of the embedding",
        y_label="axis 2 of the embedding",
    )


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def log_choices(run: Run) -> None:
    """How the modalities are weighed and, where the data decides it, in which metric k-means
    works.
    """
    model_spec = run.model_spec
    weights = _named(model_spec["weights"])
    run.log.say(f"modalities by their agreement with {model_spec['anchor']}: {weights}")
    if model_spec["stability"]:
        run.log.say(
            f"metric: {model_spec['distance']}, by the stability of clusters before training:"
            f" {_named(model_spec['stability'])}"
        )
    if number_not_found(model_spec):
        wrong, cure = PROBLEMS["no_number"]
        run.log.say(f"WARN {wrong}: {model_spec['k']}. What to try: {cure}")


def number_not_found(model_spec: dict) -> bool:
    """Whether the number of clusters is the last that was tried, see `clustering.estimate_k`."""
    estimate = model_spec["estimate"]
    return bool(estimate) and model_spec["k"] == estimate[-1]["k"]


def log_scores(run: Run, results: dict) -> None:
    """What training brought, and one line for each test score among `results`: of the run, of its
    clusters found afresh and of each baseline.
    """
    header, *rows = stage_rows(results)
    run.log.say(*aligned([header, *rows]).split("\n"), gain(results))
    for stem, prefix in _scored(results):
        values = (f"{key} {_score(results, f'{stem}/test/{prefix}{key}', digits)}" for key in SHOWN)
        run.log.say(f"{_title(stem, prefix)}: {', '.join(values)}")


def _scored(results: dict) -> list[tuple[str, str]]:
    # (stem, prefix) of the scores `STEM/test/PREFIXnmi` but those of the stages before the last.
    parts = [name.removesuffix("nmi").split("/") for name in results if name.endswith("nmi")]
    return [
        (stem, prefix)
        for stem, split, prefix in parts
        if split == "test" and prefix in ("", "refit_") and stem not in ("start", "pretrain")
    ]


def _title(stem: str, prefix: str) -> str:
    if stem != "cluster":
        return f"plain k-means, {stem.removeprefix('kmeans_')}"
    return "this run, k-means afresh on the test split" if prefix else "this run"


def _score(results: dict, name: str, shown, suffix: str = "") -> str:
    deviation = results.get(f"{name}_sd{suffix}")
    spread = "" if deviation is None else f" ± {shown(deviation)}"
    return f"{shown(results[name + suffix])}{spread}"


def stage_rows(results: dict) -> list[list[str]]:
    """A header, and what the model was at the start, after stage 1 and after stage 2."""
    columns = {
        "stability": "train/stability",
        "silhouette": "train/silhouette",
        "agreement with the start": "train/agreement",
        "change of z": "train/change",
    }
    columns |= {key: f"test/{key}" for key in SHOWN if f"cluster/test/{key}" in results}
    rows = [["", *columns]]
    for stage, name in STAGES.items():
        values = [results.get(f"{stage}/{key}") for key in columns.values()]
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in values)])
    return rows


def gain(results: dict) -> str:
    """One sentence on what training brought."""
    name, key = "stability", "train/stability"
    if "cluster/test/nmi" in results:
        name, key = "NMI", "test/nmi"
    first, last = (results[f"{stage}/{key}"] for stage in ("start", "cluster"))
    moved = results["cluster/train/moved"]
    if not results["cluster/train/change"] and not moved:
        return "training brought nothing: the start is kept"
    return (
        f"training brought {last - first:+.3f} {name} ({first:.3f} to {last:.3f});"
        f" {moved:.1%} of the training utterances have changed their cluster"
    )


def scores_table(results: dict) -> dict:
    """The test scores among `results` as a table of the report: a row for the chosen epoch, the
    last one, clusters found afresh and each baseline.
    """
    rows = []
    for stem, prefix in _scored(results):
        for suffix in ("", "_last_epoch"):
            names = [f"{stem}/test/{prefix}{score}" for score in SCORES]
            if names[0] + suffix in results:
                title = _title(stem, prefix) + suffix.replace("_", " ").replace(" last", ", last")
                rows.append(
                    [title, *(_score(results, name, "{:.3f}".format, suffix) for name in names)]
                )
    rows.sort(key=lambda row: not row[0].startswith("this run"))
    return {
        "part": "results",
        "text": (
            "Agreement with the labels, which training has not seen; 1 is best. nmi, ami, ari and"
            " fmi compare the two partitions, acc and the recalls give each cluster one label. This"
            " run's clusters are those of clusters.csv and --predict; afresh is k-means on the test"
            " split alone, as it is published. Plain k-means, fitted to the training split, is the"
            " baseline to beat."
        ),
        "header": ["clusters of", *(score.replace("_", " ") for score in SCORES)],
        "rows": rows,
    }


def _utterance(table: utterances.Utterances, i: int) -> str:
    return table.ids[i] if table.texts is None else f"{table.texts[i]} ({table.ids[i]})"


def _distinct(table: utterances.Utterances, order: np.ndarray, count: int) -> list[int]:
    """The first `count` of the utterances `order` (m,), of those of one text only the first."""
    if table.texts is None:
        return order[:count].tolist()
    first = {}
    for i in order.tolist():
        first.setdefault(table.texts[i].casefold(), i)
        if len(first) == count:
            break
    return list(first.values())


def mistakes(
    table: utterances.Utterances, known: np.ndarray, clusters, confidence, matched: dict[int, int]
) -> dict:
    """The most confident mistakes and the least certain utterances as a table of the report.

    A mistake is one of the labeled utterances `known` whose cluster is matched to another label.
    """
    answers = np.array([matched.get(int(c), -1) for c in clusters[known]])
    wrong = known[answers != table.labels[known]]
    worst = _distinct(table, wrong[np.argsort(-confidence[wrong], kind="stable")], _MISTAKES)
    unsure = _distinct(table, known[np.argsort(confidence[known], kind="stable")], _UNSURE)
    rows = []
    for kind, members in (("confident and wrong", worst), ("least certain", unsure)):
        for i in members:
            c = int(clusters[i])
            label = table.classes[matched[c]] if c in matched else "no label"
            truth = table.classes[table.labels[i]]
            rows.append([kind, _utterance(table, i), truth, f"{c} ({label})", float(confidence[i])])
    return {
        "header": ["", "utterance", "label", "cluster (matched)", "confidence"],
        "rows": rows,
        "text": (
            f"{len(wrong)} of {len(known)} labeled test utterances lie in a cluster that is"
            " matched to another label."
        ),
    }


def cluster_names(
    table: utterances.Utterances, clusters: np.ndarray, distance: np.ndarray, k: int
) -> list[str]:
    """A name for each cluster: the words that set it apart, or the utterance nearest to its
    center.
    """
    words = [[]] * k
    if table.texts is not None:
        words = distinctive_words(table.texts, clusters, k, _NAMING)
    names = []
    for c in range(k):
        members = np.flatnonzero(clusters == c)
        name = " ".join(words[c])
        if not name and len(members):
            name = table.ids[members[distance[members].argmin()]]
        names.append(name)
    return names


def write_clusters(run: Run, z: Tensor, centroids: Tensor, reach: float) -> None:
    """Write clusters.csv, the cluster of every utterance by its row of z (n, base_dim), and
    embeddings.npz, these rows.

    An utterance whose distance is above `reach` is far. Does nothing but on the main process.
    """
    if not run.world.is_main:
        return
    table = run.data.table
    clusters, distance, confidence, _ = membership(z, centroids)
    names = cluster_names(table, clusters.numpy(), distance.numpy(), len(centroids))
    split = np.full(len(clusters), "train", dtype=object)
    split[run.splits["test"]] = "test"
    columns = (x.tolist() for x in (clusters, confidence, distance))
    with atomic_write(run.folder / "clusters.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "cluster", "confidence", "distance", "far", "name"])
        for row, part, c, sure, away in zip(table.ids, split, *columns, strict=True):
            far = "yes" if away > reach else "no"
            writer.writerow([row, part, c, f"{sure:.6f}", f"{away:.6f}", far, names[c]])
    with atomic_write(run.folder / "embeddings.npz", "wb") as file:
        np.savez(
            file,
            id=np.array(table.ids),
            embedding=z.numpy(),
            cluster=clusters.numpy(),
            centroids=centroids.numpy(),
        )


@figures.for_report
def write_cluster_report(
    run: Run, z: Tensor, centroids: Tensor, monitor: Monitor, targets: Targets, results: dict
) -> None:
    """Leave what a person looks at: figures/scatter.json, and the tables of the report.

    z (n, base_dim) are all utterances as the chosen model gives them, `results` the run's metrics.
    """
    table = run.data.table
    k = run.model_spec["k"]
    clusters, distance, confidence, _ = membership(z, centroids)
    clusters = clusters.numpy()
    test = run.splits["test"]
    sample = np.arange(len(z))[:: -(-len(z) // figures.POINTS)]
    scatter(run, z[sample], clusters[sample], centroids)

    tables = {}
    scores = scores_table(results)
    if scores["rows"]:
        tables["Test scores"] = scores
    header, *rows = stage_rows(results)
    tables["What training brought"] = {
        "part": "results",
        "text": f"{gain(results)[:1].upper()}{gain(results)[1:]}. Stability and silhouette are of"
        " the training utterances and need no labels; what the distances were compared by before"
        " training is a mean over several searches for axes and centers, not this start.",
        "header": header,
        "rows": rows,
    }
    trained = clusters[run.splits["train"]][targets.selected.numpy()]
    selected = np.bincount(trained, minlength=k)
    tables["Clusters"] = _clusters_table(table, clusters, distance.numpy(), selected)
    known = test[table.labels[test] >= 0]
    if len(known):
        matched = metrics.match_clusters(table.labels[known], clusters[known])
        tables["Clusters and labels, test"] = _labels_table(table, known, clusters, matched, k)
        tables["Worst utterances, test"] = mistakes(
            table, known, clusters, confidence.numpy(), matched
        )
    tables["Monitor"] = _monitor_table(monitor, results)
    tables |= analysis(run, monitor)
    stability = run.model_spec["stability"]
    if stability:
        tables[f"Metric: {run.model_spec['distance']}"] = {
            "header": ["metric", "stability before training"],
            "rows": list(stability.items()),
        }
    tables["Weights of the modalities"] = {
        "header": ["modality", "weight"],
        "rows": list(run.model_spec["weights"].items()),
    }
    estimate = run.model_spec["estimate"]
    if estimate:
        columns = list(estimate[0])
        why = "where the gap is largest"
        if number_not_found(run.model_spec):
            why = "the most that was tried: the data gives no number"
        tables[f"Number of clusters: {k}, {why}"] = {
            "header": columns,
            "rows": [[row[column] for column in columns] for row in estimate],
        }
    tables["Seconds of each stage"] = _times_table(run)
    write_json(run.folder / "tables.json", tables)


def _clusters_table(
    table: utterances.Utterances, clusters: np.ndarray, distance: np.ndarray, selected
) -> dict:
    k = len(selected)
    words = [[]] * k if table.texts is None else distinctive_words(table.texts, clusters, k)
    rows = []
    for c in range(k):
        members = np.flatnonzero(clusters == c)
        order = members[np.argsort(distance[members], kind="stable")]
        nearest = _distinct(table, order, _TYPICAL)
        typical = " | ".join(_utterance(table, i) for i in nearest)
        row = [c, len(members), int(selected[c]), " ".join(words[c]), typical]
        rows.append(row + ([_majority(table, members)] if table.labeled else []))
    return {
        "as": "cards",
        "header": [
            "cluster",
            "utterances",
            "selected, last epoch",
            "words",
            "nearest to the center",
            *(["most frequent label"] if table.labeled else []),
        ],
        "rows": rows,
        "text": (
            "What each cluster holds: how many utterances, how many of them the last epoch trained"
            " on, the words that set it apart from the others, and its most typical utterances."
        ),
    }


def _majority(table: utterances.Utterances, members: np.ndarray) -> str:
    # The label that most of the labeled members have, and the share of them.
    labels = table.labels[members]
    counts = np.bincount(labels[labels >= 0], minlength=1)
    if not counts.any():
        return "-"
    return f"{table.classes[counts.argmax()]} ({counts.max() / counts.sum():.0%})"


def _labels_table(
    table: utterances.Utterances,
    known: np.ndarray,
    clusters: np.ndarray,
    matched: dict[int, int],
    k: int,
) -> dict:
    counts = np.zeros((k, len(table.classes)), np.int64)
    np.add.at(counts, (clusters[known], table.labels[known]), 1)
    rows = []
    for c in range(k):
        label = table.classes[matched[c]] if c in matched else "-"
        rows.append([c, label, *counts[c].tolist()])
    return {
        "as": "matrix",
        "header": ["cluster", "matched", *table.classes],
        "rows": rows,
        "text": (
            "How many test utterances of each label lie in each cluster; the fuller the color,"
            " the larger the share of the row."
        ),
    }


def _monitor_table(monitor: Monitor, results: dict) -> dict:
    rows = [[name.replace("_", " "), value] for name, value in monitor.report().items()]
    rows += [[f"action after epoch {done}", name] for done, name in monitor.actions]
    rows += [["alarm", alarm] for alarm in monitor.alarms()]
    correlation = results.get("cluster/train/stability_tracks_nmi")
    if correlation is not None:
        rows.append(["rank correlation of stability and nmi", correlation])
    if monitor.nothing_helped():
        rows.append(["advice", "halving did not help: --base-dim 512 is worth a run"])
    return {"header": ["figure", "at the last epoch"], "rows": rows}


def _times_table(run: Run) -> dict:
    times = {stage: [] for stage in run.stages}
    for line in log.read(run.folder):
        if line["stage"] in times:
            times[line["stage"]].append(line["time"])
    rows = [[stage, seconds[-1] - seconds[0]] for stage, seconds in times.items() if seconds]
    rows.append(["test and findings", run.log.seconds - times["cluster"][-1]])
    return {"header": ["stage", "seconds"], "rows": rows}
