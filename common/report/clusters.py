"""What a person looks at after clustering: words, mistakes, tables and a scatter plot."""

import csv
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from common import metrics
from common.data import utterances
from common.data.utterances import tokens
from common.deep_cluster import SCORES, SHOWN, Targets, membership
from common.monitor import Monitor
from common.report import figures
from common.run import log
from common.run.files import write_json
from common.run.run import Run


def distinctive_words(
    texts: list[str], clusters: np.ndarray, k: int, count: int = 8
) -> list[list[str]]:
    """The words of each cluster that set it apart: the largest z-scores of the log-odds against the
    other clusters, the corpus as prior (Monroe, Colaresi and Quinn 2008).
    """
    own = [Counter() for _ in range(k)]
    for text, cluster in zip(texts, clusters, strict=True):
        own[cluster].update(tokens(text))
    total = sum(own, Counter())
    words = [word for word, times in total.items() if times > 1]
    prior = np.array([total[word] for word in words], float)
    counts = np.array([[mine[word] for word in words] for mine in own], float).reshape(
        k, len(words)
    )
    found = []
    for mine in counts:
        rest = prior - mine
        with np.errstate(divide="ignore", invalid="ignore"):
            odds = [np.log((c + prior) / (c.sum() + prior.sum() - c - prior)) for c in (mine, rest)]
        z = (odds[0] - odds[1]) / np.sqrt(1 / (mine + prior) + 1 / (rest + prior))
        found.append([words[i] for i in np.argsort(-z, kind="stable")[:count] if z[i] > 0])
    return found


def scatter(run: Run, z: Tensor, clusters: np.ndarray, centroids: Tensor) -> None:
    """Leave rows z (n, d) on the two axes along which the centroids (k, d) differ most for the
    report.
    """
    centered = centroids.double() - centroids.double().mean(0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][:2]
    points = (z.double() @ axes.T).float().numpy()
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 1)))
    text = (
        "Each point is an utterance, each color and shape a cluster, whose number stands at its"
        " middle. The two axes"
        " are those along which the clusters' centers differ most; clusters that overlap here may"
        " lie apart on others."
    )
    figures.put(
        run.folder,
        "scatter",
        "scatter",
        "Utterances and their clusters",
        text,
        points=np.round(points, 4),
        groups=clusters,
        names=[str(c) for c in range(len(centroids))],
        labels=True,
        x_label="axis 1 of the embedding",
        y_label="axis 2 of the embedding",
    )


def log_choices(run: Run) -> None:
    """How the modalities are weighed and, where the data decides it, in which metric k-means works."""
    model_spec = run.model_spec
    shown = ", ".join(f"{name} {weight:.3f}" for name, weight in model_spec["weights"].items())
    run.log.say(f"modalities by their agreement with {model_spec['anchor']}: {shown}")
    if model_spec["stability"]:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in model_spec["stability"].items())
        run.log.say(
            f"metric: {model_spec['distance']}, by the stability of clusters before training: {shown}"
        )


def log_scores(run: Run, results: dict) -> None:
    """One line for each test score among `results`: of the run and of each baseline."""
    for name in [name.removesuffix("/nmi") for name in results if name.endswith("/test/nmi")]:
        values = (
            f"{key} {results[f'{name}/{key}']:.4f} ± {results[f'{name}/{key}_sd']:.4f}"
            for key in SHOWN
        )
        run.log.say(f"{name}: {', '.join(values)}")


def scores_table(results: dict) -> dict:
    """The test scores among `results`, a row for the chosen epoch, the last one and each baseline,
    as the report's.
    """
    rows = []
    for key in [key for key in results if key.removesuffix("_last_epoch").endswith("/test/nmi")]:
        last = "_last_epoch" * key.endswith("_last_epoch")
        stem = key.removesuffix(last).removesuffix("nmi")
        name = (
            "this run"
            if stem == "cluster/test/"
            else f"plain k-means, {stem.split('/')[0].removeprefix('kmeans_')}"
        )
        metric = [(results[f"{stem}{m}{last}"], results[f"{stem}{m}_sd{last}"]) for m in SCORES]
        rows.append(
            [
                f"{name}, last epoch" if last else name,
                *(f"{mean:.3f} ± {sd:.3f}" for mean, sd in metric),
            ]
        )
    rows.sort(key=lambda row: row[0] != "this run")
    return {"header": ["clusters of", *(m.replace("_", " ") for m in SCORES)], "rows": rows}


def mistakes(
    table: utterances.Utterances, known: np.ndarray, clusters, confidence, matched: dict[int, int]
) -> dict:
    """The labeled utterances `known` whose cluster is matched to another label, the most confident
    ones, and the least certain utterances of all, as a table of the report.
    """
    answers = np.array([matched.get(int(c), -1) for c in clusters[known]])
    wrong = known[answers != table.labels[known]]
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:12]
    unsure = known[np.argsort(confidence[known], kind="stable")][:6]
    rows = []
    for kind, own in (("confident and wrong", worst), ("least certain", unsure)):
        for i in own.tolist():
            c = int(clusters[i])
            of = table.classes[matched[c]] if c in matched else "no label"
            said = table.ids[i] if table.texts is None else f"{table.texts[i]} ({table.ids[i]})"
            rows.append(
                [kind, said, table.classes[table.labels[i]], f"{c} ({of})", float(confidence[i])]
            )
    text = (
        f"{len(wrong)} of {len(known)} labeled test utterances lie in a cluster that is"
        " matched to another label."
    )
    header = ["", "utterance", "label", "cluster (matched)", "confidence"]
    return (
        {"Worst utterances, test": {"header": header, "rows": rows, "text": text}} if rows else {}
    )


def write_cluster_report(
    run: Run, z: Tensor, centroids: Tensor, monitor: Monitor, targets: Targets, results: dict
) -> None:
    """Write what a person looks at: clusters.csv, figures/scatter.json, and the tables of the
    report.

    z (n, base_dim) are all utterances as the chosen model gives them, `results` the run's metrics.
    """
    table, k = run.data.table, run.model_spec["k"]
    clusters, distance, confidence, _ = membership(z, centroids)
    names, test = clusters.numpy(), run.splits["test"]
    part = np.full(len(table), "train", dtype=object)
    part[test] = "test"
    with open(run.folder / "clusters.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "cluster", "confidence", "distance"])
        for row in zip(table.ids, part, names, confidence.tolist(), distance.tolist(), strict=True):
            writer.writerow([*row[:3], *(f"{value:.6f}" for value in row[3:])])
    some = np.arange(len(z))[:: -(-len(z) // figures.POINTS)]
    scatter(run, z[some], names[some], centroids)
    words = [[]] * k if table.texts is None else distinctive_words(table.texts, names, k)
    rows = []
    for c in range(k):
        own = np.flatnonzero(names == c)
        nearest = own[np.argsort(distance[own].numpy(), kind="stable")[:5]]
        shown = [
            table.ids[i] if table.texts is None else f"{table.texts[i]} ({table.ids[i]})"
            for i in nearest
        ]
        rows.append([c, len(own), int(targets.sizes(k)[c]), " ".join(words[c]), " | ".join(shown)])
    scores = scores_table(results)
    scores["part"], scores["text"] = (
        "results",
        (
            "Agreement with the labels, which training has not seen; 1 is best. nmi, ami, ari and"
            " fmi compare the two"
            " partitions, acc and the recalls give each cluster one label. Plain k-means is the"
            " baseline to beat."
        ),
    )
    found = {"Test scores, mean and deviation of k-means seeds": scores} if scores["rows"] else {}
    header = ["cluster", "utterances", "selected, last epoch", "words", "nearest to the center"]
    said = (
        "What each cluster holds: how many utterances, how many of them the last epoch trained"
        " on, the words that set"
    )
    said += " it apart from the others, and its most typical utterances."
    found["Clusters"] = {"as": "cards", "header": header, "rows": rows, "text": said}
    labels = table.labels[test]
    known = test[labels >= 0]
    if len(known):
        counts = np.zeros((k, len(table.classes)), np.int64)
        np.add.at(counts, (names[known], table.labels[known]), 1)
        matched = metrics.match_clusters(table.labels[known], names[known])
        rows = [
            [c, table.classes[matched[c]] if c in matched else "-", *counts[c].tolist()]
            for c in range(k)
        ]
        said = (
            "How many test utterances of each label lie in each cluster; the darker, the"
            " larger its share of the row."
        )
        header = ["cluster", "matched", *table.classes]
        found["Clusters and labels, test"] = {
            "as": "matrix",
            "header": header,
            "rows": rows,
            "text": said,
        }
        found |= mistakes(table, known, names, confidence.numpy(), matched)
    rows = [[name.replace("_", " "), value] for name, value in monitor.report().items()]
    rows += [["action after epoch " + str(done), name] for done, name in monitor.actions]
    rows += [["alarm", alarm] for alarm in monitor.alarms()]
    if "cluster/train/stability_tracks_nmi" in results:
        rows.append(
            ["rank correlation of stability and nmi", results["cluster/train/stability_tracks_nmi"]]
        )
    if monitor.nothing_helped():
        rows.append(["advice", "halving did not help: --base-dim 512 is worth a run"])
    found["Monitor"] = {"header": ["figure", "at the last epoch"], "rows": rows}
    if run.model_spec["stability"]:
        rows = [[name, value] for name, value in run.model_spec["stability"].items()]
        found[f"Metric: {run.model_spec['distance']}"] = {
            "header": ["metric", "stability before training"],
            "rows": rows,
        }
    weights = [[name, weight] for name, weight in run.model_spec["weights"].items()]
    found["Weights of the modalities"] = {"header": ["modality", "weight"], "rows": weights}
    if run.model_spec["estimate"]:
        columns = list(run.model_spec["estimate"][0])
        rows = [[row[column] for column in columns] for row in run.model_spec["estimate"]]
        most = k == run.model_spec["estimate"][-1]["k"]
        why = (
            "the most that was tried: the data gives no number"
            if most
            else "where the gap is largest"
        )
        found[f"Number of clusters: {k}, {why}"] = {"header": columns, "rows": rows}
    times = {
        stage: [line["time"] for line in log.read(run.folder) if line["stage"] == stage]
        for stage in run.stages
    }
    rows = [[stage, seconds[-1] - seconds[0]] for stage, seconds in times.items() if seconds]
    rows.append(["test and findings", run.log.seconds - times["cluster"][-1]])
    found["Seconds of each stage"] = {"header": ["stage", "seconds"], "rows": rows}
    write_json(run.folder / "tables.json", found)
