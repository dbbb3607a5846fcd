"""What a run that clusters utterances needs beside its loop.

Rows and targets, scores, and the choices that stability decides.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import clustering, metrics
from common.data import synthetic, utterances
from common.errors import InputError
from common.models import umc
from common.models.text import Lsa, encode
from common.monitor import Monitor
from common.rng import uniform
from common.run import checkpoint, log
from common.run.run import Run

FIRST_COMPONENTS = 20  # principal axes that the number of clusters is estimated on
SHRINKAGE = 0.1  # added to the scatter within clusters, in units of its typical variance
ANCHOR = "text"  # the modality that the others are weighed by, where there is one of that name
DISTANCES = ("discriminant", "euclidean")  # that k-means of stage 2 knows
SCORES = ("nmi", "ami", "ari", "acc", "fmi", "balanced_accuracy", "minority_recall")
SHOWN = ("nmi", "ari", "acc")  # on the console
SEEDS, BASELINE_SEEDS = 10, 3  # k-means runs that score a split
WATCHED_ROWS, WATCHED_RUNS = 2000, 5  # rows and k-means runs whose agreement is the stability
METRIC_RUNS = 6  # samples of rows, each with a metric of its own, that --distance auto compares


class Rows:
    """The utterances and what the network reads of them.

    Inputs are tensors on the device by modality, with the lengths of those that are sequences.
    """

    def __init__(
        self, table: utterances.Utterances, only: list[str] | None, lsa: Lsa | None, encoded, device
    ):
        arrays = {} if lsa is None else {ANCHOR if encoded is None else "words": lsa(table.texts)}
        self.as_is = set(arrays)
        arrays |= table.modalities if encoded is None else {ANCHOR: encoded} | table.modalities
        names = sorted(arrays, key=lambda name: name != ANCHOR)  # the anchor first, as UMC has it
        unknown = set(only or names) - set(names)
        if unknown:
            raise InputError(
                f"--modalities {','.join(only)}: {table.name} has the modalities {', '.join(names)}"
            )
        self.table = table
        self.names = [name for name in names if only is None or name in only]
        self.inputs = {name: torch.from_numpy(arrays[name]).to(device) for name in self.names}
        self.lengths = {
            name: torch.from_numpy(table.lengths[name]).to(device)
            for name in self.names
            if name in table.lengths
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
        masks = {
            name: torch.zeros(x.shape, dtype=torch.bool, device=x.device)
            for name, x in inputs.items()
        }
        for name in lengths:
            steps = torch.arange(inputs[name].shape[1], device=inputs[name].device)
            masks[name][steps >= lengths[name][:, None]] = True
        return list(masks.values())

    def take(self, indices: np.ndarray) -> tuple[dict, dict]:
        rows = torch.from_numpy(indices).to(next(iter(self.inputs.values())).device)
        return tuple(
            {name: x[rows] for name, x in group.items()} for group in (self.inputs, self.lengths)
        )


def read_rows(
    path: str, reading: dict, device: torch.device, home: Path | None
) -> tuple[Rows, Lsa | None]:
    """The rows of `path`, and its text features where there are any.

    The text features are those of the run in the folder `home` if that is given. Raw text becomes
    TF-IDF with SVD, fitted to the training utterances, and with `text_model` also an encoder's
    states.
    """
    if path == "sample":
        modalities, labels, classes = synthetic.utterances()
        ids = [f"{i:05d}" for i in range(len(labels))]
        name = "sample (embedded, generated)"
        table = utterances.Utterances(
            name, ids, labels, classes, [""] * len(ids), modalities=modalities
        )
    else:
        table = utterances.open_utterances(path, reading["max_length"])
    lsa = encoded = None
    if reading["text_model"]:
        if table.texts is None:
            raise InputError(f"--text-model: {table.name} has no text to encode; leave it out")
        options = dict(layer=reading["text_layer"], max_length=reading["max_length"], device=device)
        encoded = encode(
            reading["text_model"], table.texts, **options, cache=Path("runs") / "texts"
        )
    if table.texts is not None and (encoded is not None or ANCHOR not in table.modalities):
        if home is None:
            lsa = Lsa.fit([table.texts[i] for i in utterances.split(table)["train"]])
        elif (home / "text.pt").exists():  # a run on features alone has none and heeds no text
            lsa = Lsa(checkpoint.load(home / "text.pt"))
    return Rows(table, reading["modalities"], lsa, encoded, device), lsa


class Targets:
    """The pseudo-labels of an epoch of stage 2.

    They are all that a run resumed inside that epoch must know of its start.
    """

    def __init__(self, count: int):
        self.labels = torch.zeros(count, dtype=torch.int64)
        self.selected = torch.zeros(count, dtype=torch.bool)
        self.share = 0.0
        self.floor = 0

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

    k-means goes on from the epoch before. Selected are the densest rows of each cluster: the share
    of them that the epoch takes, but at least the floor; with partial transport those that it
    takes, and the floor by its weights.
    """
    args = run.args
    model_spec = run.model_spec
    k = run.model_spec["k"]
    floor = round(model_spec["min_select_share"] * len(raw) / k)

    def select(labels: Tensor) -> Tensor:
        options = dict(floor=floor, direction=model_spec["density"], umc=args.mode == "umc")
        chosen = torch.zeros(len(raw), dtype=torch.bool)
        chosen[torch.cat(clustering.select(z, labels, k, share, **options).indices)] = True
        return chosen

    metric = model.metric.cpu()
    centroids = model.centroids.cpu() if model.centroids.any() else None
    if model_spec["distance"] == "discriminant":
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
        labels = plan.labels
        chosen = plan.weights > 0.5
        for c in range(k):
            own = (labels == c).nonzero()[:, 0]
            chosen[own[plan.weights[own].argsort(descending=True, stable=True)[:floor]]] = True
    else:
        chosen = select(labels)
    targets.labels = labels
    targets.selected = chosen
    targets.share = share
    targets.floor = floor
    model.centroids.copy_(found.centroids)


def fused_basis(args, rows: Rows, train: np.ndarray, k: int | None):
    """The axes that training starts from, and the number of clusters.

    Returns (basis, weights, anchor, k, estimate). A modality has k - 1 axes: those hold the relaxed
    solution of k-means (Ding and He 2004).
    """
    own = {name: rows.pooled(name)[torch.from_numpy(train)] for name in rows.names}
    anchor = ANCHOR if ANCHOR in own else None
    estimate = None
    if k is None:
        first = anchor or rows.names[0]
        found, *_ = umc.weighted_basis(
            {first: own[first]}, rows.as_is, first, 2, FIRST_COMPONENTS, args.seed
        )
        mean, scale, axes = found[first]
        estimate = clustering.estimate_k(
            ((own[first] - mean) / scale @ axes).float(), seed=args.seed
        )
        k = estimate.k
    components = max(min(k - 1, args.base_dim // len(own)), 1)
    # TF-IDF features beside an encoder's states are the same text once more, not another channel to
    # be checked by it.
    peers = rows.as_is if anchor else frozenset()
    return (
        *umc.weighted_basis(own, rows.as_is, anchor, k, components, args.seed, peers=peers),
        k,
        estimate,
    )


def metric_stability(
    rows: Rows, train: np.ndarray, basis: dict, k: int, seed: int
) -> dict[str, float]:
    """How stable the clusters of the rows `train` are in each distance, on the `basis`.

    Each is the mean of METRIC_RUNS times `stability`, every time in a metric found anew.
    """
    some = torch.from_numpy(train)
    parts = (
        ((rows.pooled(n)[some] - mean) / scale @ axes).cpu()
        for n, (mean, scale, axes) in basis.items()
    )
    z = torch.cat([part.float() for part in parts], 1)
    found = {name: [] for name in DISTANCES}
    for own_seed in range(METRIC_RUNS * seed, METRIC_RUNS * (seed + 1)):
        _, metric = umc.discriminant_kmeans(
            z, k, SHRINKAGE, own_seed, torch.eye(z.shape[1], dtype=z.dtype), None
        )
        for name, rows_in in (("discriminant", z @ metric), ("euclidean", z)):
            found[name].append(stability(rows_in, k, own_seed))
    return {name: float(np.mean(values)) for name, values in found.items()}


def principal(z: Tensor) -> Tensor:
    """Rows z (n, d) on their principal axes, without those of next to no variance.

    Distances are the same, and k-means costs less there.
    """
    values, axes = torch.linalg.eigh(torch.cov(z.double().T).reshape(z.shape[1], -1))
    return z @ axes[:, values > 1e-6 * values[-1]].to(z.dtype)


def smooth(z: Tensor, k: int, smoothing: float) -> Tensor:
    """Rows z (n, d) averaged with their nearest.

    These are as many as the share `smoothing` of a cluster of n / k rows.
    """
    return clustering.smooth(z, max(round(smoothing * len(z) / k), 1))


def stability(z: Tensor, k: int, seed: int) -> float:
    """How well k-means runs from different seeds agree, in [-1, 1].

    They run on a fixed sample of the rows z (n, d).
    """
    some = uniform(seed, 0, np.arange(len(z)), 0, 1)[:, 0].argsort(kind="stable")[:WATCHED_ROWS]
    z = principal(z)[some]
    runs = [clustering.kmeans(z, k, seed=i, restarts=1).labels for i in range(WATCHED_RUNS)]
    return metrics.stability(runs)


def describe(run: Run, z: Tensor, clusters: Tensor, targets: Targets) -> dict:
    """What an epoch trained on, its `targets`, and what became of it.

    Distances, silhouette and, where there are labels, NMI of the `clusters` (n,) at its end: those
    of the weights that the epoch's stability speaks of.
    """
    k = run.model_spec["k"]
    train = run.splits["train"]
    some = slice(WATCHED_ROWS)
    sizes = targets.sizes(k)
    values = {"threshold": targets.share, "floor": targets.floor, "selected": int(sizes.sum())}
    values |= {
        "min_samples": int(sizes.min()),
        "max_share": targets.labels.bincount().max().item() / len(z),
    }
    values |= {
        f"{name}_distance": value for name, value in metrics.cluster_distances(z, clusters).items()
    }
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
    found["performance_trend"] = {"improving": 1, "stable": 0, "declining": -1}[
        found["performance_trend"]
    ]
    return found


def score(
    prefix: str, z: Tensor, labels: np.ndarray, k: int, smoothing: float = 0.0, seeds: int = SEEDS
) -> dict:
    """Metrics of k-means on rows z (n, d), as `PREFIX/nmi` and `PREFIX/nmi_sd`.

    They are the mean and the deviation over seeds. The centroids are those of `smooth` rows; each
    row, as it is, belongs to the nearest.

    Rows without a label are clustered and left out of the score; without any label there is none.
    """
    known = np.flatnonzero(labels >= 0)
    if len(known) < 2:
        return {}
    z = principal(z)
    rows = smooth(z, k, smoothing)
    runs = [clustering.kmeans(rows, k, seed=seed).centroids for seed in range(seeds)]
    found = [
        metrics.clustering(labels[known], clustering.nearest(z, c)[0].numpy()[known]) for c in runs
    ]
    values = {}
    for name in found[0]:
        own = [one[name] for one in found]
        values |= {
            f"{prefix}/{name}": float(np.mean(own)),
            f"{prefix}/{name}_sd": float(np.std(own, ddof=1)),
        }
    return values


def baselines(run: Run) -> dict:
    """The scores of k-means on the test rows without any training.

    It runs on each modality alone and on all of them side by side; with them comes the stability
    that the choice of a distance rests on.
    """
    train = run.splits["train"]
    test = run.splits["test"]
    k = run.model_spec["k"]
    parts = {}
    for name in run.data.names:
        x = run.data.pooled(name).cpu()
        spread = x[train].std(0)
        scale = (
            spread.square().sum().sqrt()
            if name in run.data.as_is
            else torch.where(spread > 0, spread, torch.inf)
        )
        parts[name] = ((x - x[train].mean(0)) / scale)[test]
    if len(parts) > 1:
        parts["concatenation"] = torch.cat(list(parts.values()), 1)
    labels = run.data.table.labels[test]
    found = {
        f"kmeans_{name}/train/stability": value
        for name, value in (run.model_spec["stability"] or {}).items()
    }
    for name, x in parts.items():
        found |= score(f"kmeans_{name}/test", x, labels, k, seeds=BASELINE_SEEDS)
    return found


def tracking(run: Run) -> float | None:
    """Rank correlation of the stability with the NMI over the epochs of stage 2.

    It tells how well choosing by the first serves the second. None where there are no labels or
    fewer than 3 epochs.
    """
    names = ("cluster/train/stability", "cluster/train/nmi")
    lines = log.read(run.folder) if run.world.is_main else []
    pairs = np.array(
        [[line[name] for name in names] for line in lines if all(name in line for name in names)]
    )
    if len(pairs) < 3 or not (pairs.max(0) > pairs.min(0)).all():
        return None
    ranks = np.stack(
        [[(column < x).mean() + (column <= x).mean() for x in column] for column in pairs.T]
    )
    return float(np.corrcoef(ranks)[0, 1])


def membership(z: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the rows z (n, d) belong among the centroids (k, d).

    Returns the nearest centroid, its distance, the confidence 1 - distance / distance to the next,
    and shares (n, k) that add up to 1 and fall with the squared distance in units of its mean.
    """
    distances = torch.cdist(z.double(), centroids.double())
    near, clusters = distances.topk(2, dim=1, largest=False)
    shares = (-distances.square() / near[:, 0].square().mean().clamp(min=1e-30)).softmax(1)
    return clusters[:, 0], near[:, 0], 1 - near[:, 0] / near[:, 1].clamp(min=1e-30), shares
