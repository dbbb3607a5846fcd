"""What a run that clusters utterances needs beside its loop: its rows and targets, its scores, and its findings."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import augment, checkpoint, clustering, findings, log, metrics, sample
from common.config import InputError
from common.datasets import utterances
from common.models import umc
from common.models.text import Lsa, encode, tokens
from common.monitor import Monitor
from common.run import Run, write_json

FIRST_COMPONENTS = 20  # principal axes that the number of clusters is estimated on
SHRINKAGE = 0.1  # added to the scatter within clusters, in units of its typical variance
ANCHOR = "text"  # the modality that the others are weighed by, where there is one of that name
METRICS = ("discriminant", "euclidean")  # that k-means of stage 2 knows
SCORES = ("nmi", "ami", "ari", "acc", "fmi", "balanced_accuracy", "minority_recall")
SHOWN = ("nmi", "ari", "acc")  # on the console
SEEDS, BASELINE_SEEDS = 10, 3  # k-means runs that score a split
WATCHED_ROWS, WATCHED_RUNS = 2000, 5  # rows and k-means runs whose agreement is the stability
METRIC_RUNS = 6  # samples of rows, each with a metric of its own, that --metric auto compares


class Rows:
    """The utterances and what the network reads of them: tensors on the device and lengths by modality."""

    def __init__(self, table: utterances.Utterances, only: list[str] | None, lsa: Lsa | None, encoded, device):
        arrays = {} if lsa is None else {ANCHOR if encoded is None else "words": lsa(table.texts)}
        self.as_is = set(arrays)
        arrays |= table.modalities if encoded is None else {ANCHOR: encoded} | table.modalities
        names = sorted(arrays, key=lambda name: name != ANCHOR)  # the anchor first, as UMC has it
        unknown = set(only or names) - set(names)
        if unknown:
            raise InputError(f"--only {','.join(only)}: {table.name} has the modalities {', '.join(names)}")
        self.table, self.names = table, [name for name in names if only is None or name in only]
        self.inputs = {name: torch.from_numpy(arrays[name]).to(device) for name in self.names}
        self.lengths = {
            name: torch.from_numpy(table.lengths[name]).to(device) for name in self.names if name in table.lengths
        }

    def __len__(self) -> int:
        return len(self.table)

    def pooled(self, name: str) -> Tensor:
        """(n, D): a modality, a sequence's mean."""
        x = self.inputs[name]
        if name not in self.lengths:
            return x
        parts = zip(x.split(256), self.lengths[name].split(256), strict=True)
        return torch.cat([umc.pool(*part) for part in parts])

    @staticmethod
    def padding(call: tuple[dict, dict]) -> list[Tensor]:
        """Of each modality in what `take` gave: where a sequence has ended, bool like the modality."""
        inputs, lengths = call[:2]
        masks = {name: torch.zeros(x.shape, dtype=torch.bool, device=x.device) for name, x in inputs.items()}
        for name in lengths:
            steps = torch.arange(inputs[name].shape[1], device=inputs[name].device)
            masks[name][steps >= lengths[name][:, None]] = True
        return list(masks.values())

    def take(self, indices: np.ndarray) -> tuple[dict, dict]:
        rows = torch.from_numpy(indices).to(next(iter(self.inputs.values())).device)
        return tuple({name: x[rows] for name, x in group.items()} for group in (self.inputs, self.lengths))


def read_rows(path: str, reading: dict, device: torch.device, home: Path | None) -> tuple[Rows, Lsa | None]:
    """The rows of `path` and its text features where there are any; of the run `home` if that is given.

    Raw text becomes TF-IDF with SVD, fitted to the training utterances, and with `text_model` also an encoder's states.
    """
    if path == "sample":
        modalities, labels, classes = sample.utterances()
        ids, name = [f"{i:05d}" for i in range(len(labels))], "sample (embedded, generated)"
        table = utterances.Utterances(name, ids, labels, classes, [""] * len(ids), modalities=modalities)
    else:
        table = utterances.open_utterances(path, reading["max_length"])
    lsa = encoded = None
    if reading["text_model"]:
        if table.texts is None:
            raise InputError(f"--text-model: {table.name} has no text to encode; leave it out")
        options = dict(layer=reading["text_layer"], max_length=reading["max_length"], device=device)
        encoded = encode(reading["text_model"], table.texts, **options, cache=Path("runs") / "texts")
    if table.texts is not None and (encoded is not None or ANCHOR not in table.modalities):
        if home is None:
            lsa = Lsa.fit([table.texts[i] for i in utterances.split(table)["train"]])
        elif (home / "text.pt").exists():  # a run on features alone has none and heeds no text
            lsa = Lsa(checkpoint.load(home / "text.pt"))
    return Rows(table, reading["only"], lsa, encoded, device), lsa


class Targets:
    """The pseudo-labels of an epoch of stage 2: all that a run resumed inside that epoch must know of its start."""

    def __init__(self, count: int):
        self.labels = torch.zeros(count, dtype=torch.int64)
        self.selected = torch.zeros(count, dtype=torch.bool)
        self.share, self.floor = 0.0, 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def sizes(self, k: int) -> np.ndarray:
        """(k,) how many rows of each cluster are selected."""
        return np.bincount(self.labels[self.selected].numpy(), minlength=k)


@torch.no_grad()
def assign(run: Run, model: umc.Fusion, targets: Targets, raw: Tensor, share: float) -> None:
    """Give the training rows, whose z is `raw` (n, base_dim), the pseudo-labels of an epoch.

    Sets the model's metric and centroids on the way.

    k-means goes on from the epoch before. Selected are the densest rows of each cluster: the share of them that the
    epoch takes, but at least the floor; with partial transport those that it takes, and the floor by its weights.
    """
    args, meta, k = run.args, run.meta, run.meta["k"]
    floor = round(meta["min_share"] * len(raw) / k)

    def select(labels: Tensor) -> Tensor:
        options = dict(floor=floor, direction=meta["direction"], umc=args.mode == "umc")
        chosen = torch.zeros(len(raw), dtype=torch.bool)
        chosen[torch.cat(clustering.select(z, labels, k, share, **options).indices)] = True
        return chosen

    metric, centroids = model.metric.cpu(), model.centroids.cpu() if model.centroids.any() else None
    if meta["metric"] == "discriminant":
        found, metric = umc.discriminant_kmeans(raw, k, SHRINKAGE, args.seed, metric, centroids)
        model.metric.copy_(metric)
    else:
        found = clustering.kmeans(raw @ metric, k, seed=args.seed, start=centroids)
    z = raw @ metric
    labels = found.labels
    if args.assign == "sinkhorn":
        labels = clustering.sinkhorn(clustering.relative_costs(z, found.centroids)).labels
    if args.assign == "partial-ot":
        plan = clustering.partial_transport(clustering.relative_costs(z, found.centroids), share)
        labels, chosen = plan.labels, plan.weights > 0.5
        for c in range(k):
            own = (labels == c).nonzero()[:, 0]
            chosen[own[plan.weights[own].argsort(descending=True, stable=True)[:floor]]] = True
    else:
        chosen = select(labels)
    targets.labels, targets.selected, targets.share, targets.floor = labels, chosen, share, floor
    model.centroids.copy_(found.centroids)


def fused_basis(args, rows: Rows, train: np.ndarray, k: int | None):
    """(basis, weights, anchor, k, estimate): the axes that training starts from, and the number of clusters.

    A modality has k - 1 axes: those hold the relaxed solution of k-means (Ding and He 2004).
    """
    own = {name: rows.pooled(name)[torch.from_numpy(train)] for name in rows.names}
    anchor, estimate = ANCHOR if ANCHOR in own else None, None
    if k is None:
        first = anchor or rows.names[0]
        found, *_ = umc.weighted_basis({first: own[first]}, rows.as_is, first, 2, FIRST_COMPONENTS, args.seed)
        mean, scale, axes = found[first]
        estimate = clustering.estimate_k(((own[first] - mean) / scale @ axes).float(), seed=args.seed)
        k = estimate.k
    components = max(min(k - 1, args.base_dim // len(own)), 1)
    # TF-IDF features beside an encoder's states are the same text once more, not another channel to be checked by it.
    peers = rows.as_is if anchor else frozenset()
    return *umc.weighted_basis(own, rows.as_is, anchor, k, components, args.seed, peers=peers), k, estimate


def metric_stability(rows: Rows, train: np.ndarray, basis: dict, k: int, seed: int) -> dict[str, float]:
    """By metric, how stable the clusters are of the rows `train` in their coordinates on the `basis`: the mean of
    METRIC_RUNS times `stability`, each in a metric found anew."""
    some = torch.from_numpy(train)
    parts = (((rows.pooled(n)[some] - mean) / scale @ axes).cpu() for n, (mean, scale, axes) in basis.items())
    z = torch.cat([part.float() for part in parts], 1)
    found = {name: [] for name in METRICS}
    for own_seed in range(METRIC_RUNS * seed, METRIC_RUNS * (seed + 1)):
        _, metric = umc.discriminant_kmeans(z, k, SHRINKAGE, own_seed, torch.eye(z.shape[1], dtype=z.dtype), None)
        for name, rows_in in (("discriminant", z @ metric), ("euclidean", z)):
            found[name].append(stability(rows_in, k, own_seed))
    return {name: float(np.mean(values)) for name, values in found.items()}


def principal(z: Tensor) -> Tensor:
    """Rows z (n, d) on their principal axes, without those of next to no variance: k-means costs less there, and
    distances are the same."""
    values, axes = torch.linalg.eigh(torch.cov(z.double().T).reshape(z.shape[1], -1))
    return z @ axes[:, values > 1e-6 * values[-1]].to(z.dtype)


def smooth(z: Tensor, k: int, smoothing: float) -> Tensor:
    """Rows z (n, d) averaged with their nearest: so many as are the share `smoothing` of a cluster of n / k rows."""
    return clustering.smooth(z, max(round(smoothing * len(z) / k), 1))


def stability(z: Tensor, k: int, seed: int) -> float:
    """How well k-means runs from different seeds agree on a fixed sample of the rows z (n, d), in [-1, 1]."""
    some = augment.uniform(seed, 0, np.arange(len(z)), 0, 1)[:, 0].argsort(kind="stable")[:WATCHED_ROWS]
    z = principal(z)[some]
    runs = [clustering.kmeans(z, k, seed=i, restarts=1).labels for i in range(WATCHED_RUNS)]
    return metrics.stability(runs)


def describe(run: Run, z: Tensor, clusters: Tensor, targets: Targets) -> dict:
    """What an epoch trained on, its `targets`, and what became of it: distances, silhouette and, where there are
    labels, NMI of the `clusters` (n,) at its end: those of the weights that the epoch's stability speaks of."""
    k, train = run.meta["k"], run.splits["train"]
    some = slice(WATCHED_ROWS)
    sizes = targets.sizes(k)
    values = {"threshold": targets.share, "floor": targets.floor, "selected": int(sizes.sum())}
    values |= {"min_samples": int(sizes.min()), "max_share": targets.labels.bincount().max().item() / len(z)}
    values |= {f"{name}_distance": value for name, value in metrics.cluster_distances(z, clusters).items()}
    if 1 < len(clusters[some].unique()) < len(z[some]):
        values["silhouette"] = metrics.silhouette(z[some], clusters[some])
    labels = run.data.table.labels[train]
    if (labels >= 0).sum() > 1:
        known = np.flatnonzero(labels >= 0)
        values["nmi"] = metrics.clustering(labels[known], clusters[known])["nmi"]
    return values


def figures(monitor: Monitor) -> dict:
    """The monitor's report as numbers: the trend is 1 improving, 0 stable, -1 declining."""
    found = monitor.report()
    found["performance_trend"] = {"improving": 1, "stable": 0, "declining": -1}[found["performance_trend"]]
    return found


def score(prefix: str, z: Tensor, labels: np.ndarray, k: int, smoothing: float = 0.0, seeds: int = SEEDS) -> dict:
    """Metrics of k-means on rows z (n, d), mean and deviation over seeds, as `PREFIX/nmi` and `PREFIX/nmi_sd`.

    The centroids are those of `smooth` rows; each row, as it is, belongs to the nearest.

    Rows without a label are clustered and left out of the score; without any label there is none.
    """
    known = np.flatnonzero(labels >= 0)
    if len(known) < 2:
        return {}
    z = principal(z)
    rows = smooth(z, k, smoothing)
    runs = [clustering.kmeans(rows, k, seed=seed).centroids for seed in range(seeds)]
    found = [metrics.clustering(labels[known], clustering.nearest(z, c)[0].numpy()[known]) for c in runs]
    values = {}
    for name in found[0]:
        own = [one[name] for one in found]
        values |= {f"{prefix}/{name}": float(np.mean(own)), f"{prefix}/{name}_sd": float(np.std(own, ddof=1))}
    return values


def baselines(run: Run) -> dict:
    """The scores of k-means on the test rows of each modality alone and of all of them side by side, and the stability
    that the choice of a metric rests on."""
    train, test, k = run.splits["train"], run.splits["test"], run.meta["k"]
    parts = {}
    for name in run.data.names:
        x = run.data.pooled(name).cpu()
        spread = x[train].std(0)
        scale = spread.square().sum().sqrt() if name in run.data.as_is else torch.where(spread > 0, spread, torch.inf)
        parts[name] = ((x - x[train].mean(0)) / scale)[test]
    if len(parts) > 1:
        parts["concatenation"] = torch.cat(list(parts.values()), 1)
    labels = run.data.table.labels[test]
    found = {f"kmeans_{name}/train/stability": value for name, value in (run.meta["stability"] or {}).items()}
    for name, x in parts.items():
        found |= score(f"kmeans_{name}/test", x, labels, k, seeds=BASELINE_SEEDS)
    return found


def tracking(run: Run) -> float | None:
    """Rank correlation of the stability with the NMI over the epochs of stage 2: how well choosing by the first serves
    the second. None where there are no labels or fewer than 3 epochs."""
    names = ("cluster/train/stability", "cluster/train/nmi")
    lines = log.read(run.folder) if run.facts.main else []
    pairs = np.array([[line[name] for name in names] for line in lines if all(name in line for name in names)])
    if len(pairs) < 3 or not (pairs.max(0) > pairs.min(0)).all():
        return None
    ranks = np.stack([[(column < x).mean() + (column <= x).mean() for x in column] for column in pairs.T])
    return float(np.corrcoef(ranks)[0, 1])


def membership(z: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows z (n, d): the nearest of the centroids (k, d), its distance, the confidence 1 - distance / distance to
    the next, and shares (n, k) that add up to 1 and fall with the squared distance in units of its mean."""
    distances = torch.cdist(z.double(), centroids.double())
    near, clusters = distances.topk(2, dim=1, largest=False)
    shares = (-distances.square() / near[:, 0].square().mean().clamp(min=1e-30)).softmax(1)
    return clusters[:, 0], near[:, 0], 1 - near[:, 0] / near[:, 1].clamp(min=1e-30), shares


def distinctive_words(texts: list[str], clusters: np.ndarray, k: int, count: int = 8) -> list[list[str]]:
    """The words of each cluster that set it apart: the largest z-scores of the log-odds against the other clusters, the
    corpus as prior (Monroe, Colaresi and Quinn 2008)."""
    own = [Counter() for _ in range(k)]
    for text, cluster in zip(texts, clusters, strict=True):
        own[cluster].update(tokens(text))
    total = sum(own, Counter())
    words = [word for word, times in total.items() if times > 1]
    prior = np.array([total[word] for word in words], float)
    counts = np.array([[mine[word] for word in words] for mine in own], float).reshape(k, len(words))
    found = []
    for mine in counts:
        rest = prior - mine
        with np.errstate(divide="ignore", invalid="ignore"):
            odds = [np.log((c + prior) / (c.sum() + prior.sum() - c - prior)) for c in (mine, rest)]
        z = (odds[0] - odds[1]) / np.sqrt(1 / (mine + prior) + 1 / (rest + prior))
        found.append([words[i] for i in np.argsort(-z, kind="stable")[:count] if z[i] > 0])
    return found


def scatter(run: Run, z: Tensor, clusters: np.ndarray, centroids: Tensor) -> None:
    """Leave rows z (n, d) on the two axes along which the centroids (k, d) differ most for the report."""
    centred = centroids.double() - centroids.double().mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    points = (z.double() @ axes.T).float().numpy()
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 1)))
    text = (
        "Each point is an utterance, each colour and shape a cluster, whose number stands at its middle. The two axes"
        " are those along which the clusters' centres differ most; clusters that overlap here may lie apart on others."
    )
    findings.put(
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


def say_choices(run: Run) -> None:
    """How the modalities are weighed and, where the data decides it, in which metric k-means works."""
    meta = run.meta
    shown = ", ".join(f"{name} {weight:.3f}" for name, weight in meta["weights"].items())
    run.log.say(f"modalities by their agreement with {meta['anchor']}: {shown}")
    if meta["stability"]:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in meta["stability"].items())
        run.log.say(f"metric: {meta['metric']}, by the stability of clusters before training: {shown}")


def say_scores(run: Run, results: dict) -> None:
    """One line for each test score among `results`: of the run and of each baseline."""
    for name in [name.removesuffix("/nmi") for name in results if name.endswith("/test/nmi")]:
        values = (f"{key} {results[f'{name}/{key}']:.4f} ± {results[f'{name}/{key}_sd']:.4f}" for key in SHOWN)
        run.log.say(f"{name}: {', '.join(values)}")


def scores_table(results: dict) -> dict:
    """The test scores among `results`, a row for the chosen epoch, the last one and each baseline, as the report's."""
    rows = []
    for key in [key for key in results if key.removesuffix("_last_epoch").endswith("/test/nmi")]:
        last = "_last_epoch" * key.endswith("_last_epoch")
        stem = key.removesuffix(last).removesuffix("nmi")
        name = "this run" if stem == "cluster/test/" else f"plain k-means, {stem.split('/')[0].removeprefix('kmeans_')}"
        metric = [(results[f"{stem}{m}{last}"], results[f"{stem}{m}_sd{last}"]) for m in SCORES]
        rows.append([f"{name}, last epoch" if last else name, *(f"{mean:.3f} ± {sd:.3f}" for mean, sd in metric)])
    rows.sort(key=lambda row: row[0] != "this run")
    return {"header": ["clusters of", *(m.replace("_", " ") for m in SCORES)], "rows": rows}


def mistakes(table: utterances.Utterances, known: np.ndarray, clusters, confidence, matched: dict[int, int]) -> dict:
    """The labelled utterances `known` whose cluster is matched to another label, the most confident ones, and the least
    certain utterances of all, as a table of the report."""
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
            rows.append([kind, said, table.classes[table.labels[i]], f"{c} ({of})", float(confidence[i])])
    text = f"{len(wrong)} of {len(known)} labelled test utterances lie in a cluster that is matched to another label."
    header = ["", "utterance", "label", "cluster (matched)", "confidence"]
    return {"Worst utterances, test": {"header": header, "rows": rows, "text": text}} if rows else {}


def explain(run: Run, z: Tensor, centroids: Tensor, monitor: Monitor, targets: Targets, results: dict) -> None:
    """Write what a person looks at: clusters.csv, figures/scatter.json, and the tables of the report.

    z (n, base_dim) are all utterances as the chosen model gives them, `results` the run's metrics.
    """
    table, k = run.data.table, run.meta["k"]
    clusters, distance, confidence, _ = membership(z, centroids)
    names, test = clusters.numpy(), run.splits["test"]
    part = np.full(len(table), "train", dtype=object)
    part[test] = "test"
    with open(run.folder / "clusters.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "cluster", "confidence", "distance"])
        for row in zip(table.ids, part, names, confidence.tolist(), distance.tolist(), strict=True):
            writer.writerow([*row[:3], *(f"{value:.6f}" for value in row[3:])])
    some = np.arange(len(z))[:: -(-len(z) // findings.POINTS)]
    scatter(run, z[some], names[some], centroids)
    words = [[]] * k if table.texts is None else distinctive_words(table.texts, names, k)
    rows = []
    for c in range(k):
        own = np.flatnonzero(names == c)
        nearest = own[np.argsort(distance[own].numpy(), kind="stable")[:5]]
        shown = [table.ids[i] if table.texts is None else f"{table.texts[i]} ({table.ids[i]})" for i in nearest]
        rows.append([c, len(own), int(targets.sizes(k)[c]), " ".join(words[c]), " | ".join(shown)])
    scores = scores_table(results)
    scores["part"], scores["text"] = (
        "results",
        (
            "Agreement with the labels, which training has not seen; 1 is best. nmi, ami, ari and fmi compare the two"
            " partitions, acc and the recalls give each cluster one label. Plain k-means is the baseline to beat."
        ),
    )
    found = {"Test scores, mean and deviation of k-means seeds": scores} if scores["rows"] else {}
    header = ["cluster", "utterances", "selected, last epoch", "words", "nearest to the centre"]
    said = (
        "What each cluster holds: how many utterances, how many of them the last epoch trained on, the words that set"
    )
    said += " it apart from the others, and its most typical utterances."
    found["Clusters"] = {"as": "cards", "header": header, "rows": rows, "text": said}
    labels = table.labels[test]
    known = test[labels >= 0]
    if len(known):
        counts = np.zeros((k, len(table.classes)), np.int64)
        np.add.at(counts, (names[known], table.labels[known]), 1)
        matched = metrics.match_clusters(table.labels[known], names[known])
        rows = [[c, table.classes[matched[c]] if c in matched else "-", *counts[c].tolist()] for c in range(k)]
        said = (
            "How many test utterances of each label lie in each cluster; the darker, the larger its share of the row."
        )
        header = ["cluster", "matched", *table.classes]
        found["Clusters and labels, test"] = {"as": "matrix", "header": header, "rows": rows, "text": said}
        found |= mistakes(table, known, names, confidence.numpy(), matched)
    rows = [[name.replace("_", " "), value] for name, value in monitor.report().items()]
    rows += [["action after epoch " + str(done), name] for done, name in monitor.actions]
    rows += [["alarm", alarm] for alarm in monitor.alarms()]
    if "cluster/train/stability_tracks_nmi" in results:
        rows.append(["rank correlation of stability and nmi", results["cluster/train/stability_tracks_nmi"]])
    if monitor.nothing_helped():
        rows.append(["advice", "halving did not help: --base-dim 512 is worth a run"])
    found["Monitor"] = {"header": ["figure", "at the last epoch"], "rows": rows}
    if run.meta["stability"]:
        rows = [[name, value] for name, value in run.meta["stability"].items()]
        found[f"Metric: {run.meta['metric']}"] = {"header": ["metric", "stability before training"], "rows": rows}
    weights = [[name, weight] for name, weight in run.meta["weights"].items()]
    found["Weights of the modalities"] = {"header": ["modality", "weight"], "rows": weights}
    if run.meta["estimate"]:
        columns = list(run.meta["estimate"][0])
        rows = [[row[column] for column in columns] for row in run.meta["estimate"]]
        most = k == run.meta["estimate"][-1]["k"]
        why = "the most that was tried: the data gives no number" if most else "where the gap is largest"
        found[f"Number of clusters: {k}, {why}"] = {"header": columns, "rows": rows}
    times = {stage: [line["time"] for line in log.read(run.folder) if line["stage"] == stage] for stage in run.stages}
    rows = [[stage, seconds[-1] - seconds[0]] for stage, seconds in times.items() if seconds]
    rows.append(["test and findings", run.log.seconds - times["cluster"][-1]])
    found["Seconds of each stage"] = {"header": ["stage", "seconds"], "rows": rows}
    write_json(run.folder / "tables.json", found)
