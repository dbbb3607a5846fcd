"""What a run that clusters utterances needs beside its loop.

Rows and targets, scores, and the choices that stability decides.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import clustering, live, metrics
from common.data import synthetic, utterances
from common.errors import InputError
from common.models import umc
from common.models.text import Lsa, encode
from common.monitor import Monitor
from common.rng import uniform
from common.run import log
from common.run.run import Run

FIRST_COMPONENTS = 20  # principal axes that the number of clusters is estimated on
SHRINKAGE = 0.1  # added to the scatter within clusters, in units of its typical variance
ANCHOR = "text"  # the modality that the others are weighed by, where there is one of that name
DISTANCES = ("discriminant", "euclidean")  # that k-means of stage 2 knows
SCORES = ("nmi", "ami", "ari", "acc", "fmi", "balanced_accuracy", "minority_recall")
SHOWN = ("nmi", "ari", "acc")  # on the console
STAGES = {"start": "start", "pretrain": "after stage 1", "cluster": "after stage 2"}
FAR = 0.99  # share of the training rows that are nearer to their centroids than a far one
NEIGHBORS = 10  # least number of neighbors of a row in the graph that is cut
SEEDS = 10  # k-means runs that score a split
BASELINE_SEEDS = 3  # the same for a baseline
STABILITY_ROWS = 2000  # rows that k-means runs on for the stability
STABILITY_RUNS = 5  # k-means runs whose agreement is the stability
METRIC_RUNS = 6  # samples of rows, each with a metric of its own, that --distance auto compares


class Rows:
    """The utterances and what the network reads of them.

    Inputs are tensors on the device by modality, with the lengths of those that are sequences.
    """

    def __init__(
        self,
        table: utterances.Utterances,
        only: list[str] | None,
        lsa: Lsa | None,
        encoded: dict[str, np.ndarray],
        device,
    ):
        arrays = {}
        if lsa is not None:
            arrays["words" if encoded else ANCHOR] = lsa(table.texts)
        self.as_is = set(arrays)
        arrays.update(encoded)
        self.of_text = set(arrays)
        arrays.update(table.modalities)
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
        """(n, D): a modality, a sequence's mean; on the CPU where the device has no float64.

        The mean of all others stands for rows that lack it.
        """
        x = self.inputs[name]
        if name in self.lengths:
            parts = zip(x.split(256), self.lengths[name].split(256), strict=True)
            x = torch.cat([umc.pool(*part) for part in parts])
            missing = self.lengths[name] == 0
            if missing.any():
                x[missing] = x[~missing].mean(0)
        return x.cpu() if x.device.type == "mps" else x

    @staticmethod
    def padding(call: tuple[dict, dict]) -> list[Tensor]:
        """Where the sequences in what `take` gave have ended: a bool mask like each modality."""
        inputs, lengths = call[:2]
        masks = []
        for name, x in inputs.items():
            mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
            if name in lengths:
                steps = torch.arange(x.shape[1], device=x.device)
                mask[steps >= lengths[name][:, None]] = True
            masks.append(mask)
        return masks

    def take(self, indices: np.ndarray) -> tuple[dict, dict]:
        """Inputs and lengths of these rows."""
        rows = torch.from_numpy(indices).to(next(iter(self.inputs.values())).device)
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        lengths = {name: x[rows] for name, x in self.lengths.items()}
        return inputs, lengths


def read_table(
    path: str | tuple[str, ...], max_length: int | None, **options
) -> utterances.Utterances:
    """The utterances of `path`, or the embedded ones (`sample`).

    `options` are those of `open_utterances`.
    """
    if path != "sample":
        return utterances.open_utterances(path, max_length, **options)
    modalities, labels, classes = synthetic.utterances()
    ids = [f"{i:05d}" for i in range(len(labels))]
    name = "sample (embedded, generated)"
    splits = [""] * len(ids)
    return utterances.Utterances(name, ids, labels, classes, splits, modalities=modalities)


def read_rows(
    table: utterances.Utterances, reading: dict, device: torch.device, fitted: dict | None
) -> tuple[Rows, Lsa | None]:
    """The rows of `table`, and its text features where there are any.

    Raw text becomes TF-IDF with SVD, fitted to the training utterances, and with `text_model` also
    an encoder's states. The text features are those that the checkpoint `fitted` holds if that is
    given.
    """
    lsa = None
    encoded = {}
    if reading["text_model"]:
        if table.texts is None:
            raise InputError(f"--text-model: {table.name} has no text to encode; leave it out")
        layers = reading["text_layer"]
        for layer in layers if isinstance(layers, list) else [layers]:
            encoded[f"{ANCHOR}_{layer}" if encoded else ANCHOR] = encode(
                reading["text_model"],
                table.texts,
                layer=layer,
                max_length=reading["max_length"],
                device=device,
                cache=Path("runs") / "texts",
            )
    if table.texts is not None and (encoded or ANCHOR not in table.modalities):
        if fitted is None:
            lsa = Lsa.fit([table.texts[i] for i in utterances.split(table)["train"]])
        elif "text" in fitted:  # a run on features alone has none and heeds no text
            lsa = Lsa(fitted["text"])
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
    k = model_spec["k"]
    floor = round(model_spec["min_select_share"] * len(raw) / k)
    metric = model.metric.cpu()
    centroids = model.centroids.cpu() if model.centroids.any() else None
    with run.current.interruptible():
        if model_spec["distance"] == "discriminant":
            result, metric = umc.discriminant_kmeans(
                raw, k, SHRINKAGE, args.seed, metric, centroids
            )
        else:
            result = clustering.kmeans(raw @ metric, k, seed=args.seed, start=centroids)
        z = raw @ metric
        if args.assign == "partial-ot":
            plan = clustering.partial_transport(
                clustering.relative_costs(z, result.centroids), share
            )
            labels = plan.labels
            selected = plan.weights > 0.5
            for cluster in range(k):
                members = (labels == cluster).nonzero()[:, 0]
                order = plan.weights[members].argsort(descending=True, stable=True)
                selected[members[order[:floor]]] = True
        else:
            labels = result.labels
            if args.assign == "sinkhorn":
                labels = clustering.sinkhorn(clustering.relative_costs(z, result.centroids)).labels
            densest = clustering.select(
                principal(z),
                labels,
                k,
                share,
                floor=floor,
                direction=model_spec["density"],
                umc=args.mode == "umc",
            )
            selected = torch.zeros(len(raw), dtype=torch.bool)
            selected[torch.cat(densest.indices)] = True
    targets.labels = labels
    targets.selected = selected
    targets.share = share
    targets.floor = floor
    model.metric.copy_(metric)
    model.centroids.copy_(result.centroids)


def fused_basis(args, rows: Rows, train: np.ndarray, k: int | None):
    """The axes that training starts from, and the number of clusters.

    Returns (basis, weights, anchor, k, estimate). A modality has k - 1 axes: those hold the relaxed
    solution of k-means (Ding and He 2004).
    """
    inputs = {name: rows.pooled(name)[torch.from_numpy(train)] for name in rows.names}
    anchor = ANCHOR if ANCHOR in inputs else None
    estimate = None
    if k is None:
        first = anchor or rows.names[0]
        x = inputs[first]
        basis, *_ = umc.weighted_basis(
            {first: x}, rows.as_is, first, 2, FIRST_COMPONENTS, args.seed
        )
        estimate = clustering.estimate_k(umc.coordinates(x, *basis[first]).float(), seed=args.seed)
        k = estimate.k
    components = max(min(k - 1, args.base_dim // len(inputs)), 1)
    # TF-IDF features and further layers are the same text once more, not another channel to be
    # checked by it.
    peers = rows.of_text if anchor else frozenset()
    pair = None
    if args.mode != "umc" and {ANCHOR, "words"} < rows.of_text & {*rows.names}:
        # What the first layer and the words share are acts, and the last layer adds topics.
        pair = (ANCHOR, "words")
    basis, weights, anchor = umc.weighted_basis(
        inputs, rows.as_is, anchor, k, components, args.seed, peers=peers, pair=pair
    )
    return basis, weights, anchor, k, estimate


def metric_stability(
    rows: Rows, train: np.ndarray, basis: dict, k: int, seed: int
) -> dict[str, float]:
    """How stable the clusters of the rows `train` are in each distance, on the `basis`.

    Of many rows, it is those of the `clustering.landmarks`.

    Each is the mean of METRIC_RUNS times `stability`, every time in a metric found anew.
    """
    indices = clustering.landmarks(torch.from_numpy(train), clustering.LANDMARKS)
    parts = [
        umc.coordinates(rows.pooled(name)[indices], *modality).cpu().float()
        for name, modality in basis.items()
    ]
    z = torch.cat(parts, 1)
    identity = torch.eye(z.shape[1], dtype=z.dtype)
    runs = {name: [] for name in DISTANCES}
    seeds = range(METRIC_RUNS * seed, METRIC_RUNS * (seed + 1))
    for run_seed in live.progress(seeds, "comparing distances", len(seeds)):
        _, metric = umc.discriminant_kmeans(z, k, SHRINKAGE, run_seed, identity, None)
        runs["discriminant"].append(stability(z @ metric, k, run_seed))
        runs["euclidean"].append(stability(z, k, run_seed))
    return {name: float(np.mean(values)) for name, values in runs.items()}


def principal(z: Tensor) -> Tensor:
    """Rows z (n, d) on their principal axes, without those of next to no variance.

    Distances are the same, and k-means costs less there. Of wide rows the axes cost more.
    """
    return z if z.shape[1] > umc.WIDE else z @ umc.leading_axes(z)


def smooth(z: Tensor, k: int, smoothing: float) -> Tensor:
    """Rows z (n, d) averaged with their nearest, to look for k centers among.

    These are as many as the share `smoothing` of a cluster of n / k rows. Of many rows it is the
    `clustering.landmarks` that are averaged with each other, and no others come back.
    """
    rows = clustering.landmarks(z, clustering.LANDMARKS)
    count = round(smoothing * len(rows) / k)
    return clustering.smooth(rows, clustering.neighbors(rows, count)) if count > 1 else z


def centers(z: Tensor, spec: dict, seed: int, start: Tensor) -> Tensor:
    """The centroids (k, d) that k-means finds among the `smooth` rows z (n, d).

    By default it begins with the means of the clusters into which `clustering.spectral` cuts the
    rows, of many the `clustering.landmarks`; without `neighbors` in `spec` it does with `start`.
    """
    k = spec["k"]
    rows = clustering.landmarks(z, clustering.LANDMARKS)
    joined = max(round(spec["neighbors"] * len(rows) / k), NEIGHBORS) if spec["neighbors"] else 0
    averaged = round(spec["smoothing"] * len(rows) / k)
    if max(joined, averaged) > 1:
        near = clustering.neighbors(principal(rows), max(joined, averaged))
    if joined:
        cut = clustering.spectral(near[:, :joined], k, seed=seed)
        start = torch.stack([rows[cut == cluster].mean(0) for cluster in range(k)])
    if averaged > 1:
        z = clustering.smooth(rows, near[:, :averaged])
    return clustering.kmeans(z, k, start=start).centroids


def stability(z: Tensor, k: int, seed: int) -> float:
    """How well k-means runs from different seeds agree, in [-1, 1].

    They run on a fixed sample of the rows z (n, d).
    """
    z = clustering.landmarks(z, clustering.LANDMARKS)
    order = uniform(seed, 0, np.arange(len(z)), 0, 1)[:, 0].argsort(kind="stable")
    z = principal(z)[order[:STABILITY_ROWS]]
    runs = [clustering.kmeans(z, k, seed=i, restarts=1).labels for i in range(STABILITY_RUNS)]
    return metrics.stability(runs)


def describe(run: Run, z: Tensor, clusters: Tensor, distances: Tensor, targets: Targets) -> dict:
    """What an epoch trained on, its `targets`, and what became of it.

    Distances, silhouette and, where there are labels, NMI of the `clusters` (n,) at its end, whose
    centroids the rows have the `distances` (n,) to: those of the weights that the epoch's stability
    speaks of.
    """
    k = run.model_spec["k"]
    train = run.splits["train"]
    sizes = targets.sizes(k)
    values = {
        "threshold": targets.share,
        "floor": targets.floor,
        "selected": int(sizes.sum()),
        "min_samples": int(sizes.min()),
        "max_share": targets.labels.bincount().max().item() / len(z),
        "far_distance": float(np.quantile(distances, FAR)),
    }
    for name, value in metrics.cluster_distances(z, clusters).items():
        values[f"{name}_distance"] = value
    head = slice(STABILITY_ROWS)
    if 1 < len(clusters[head].unique()) < len(z[head]):
        values["silhouette"] = metrics.silhouette(z[head], clusters[head])
    labels = run.data.table.labels[train]
    known = np.flatnonzero(labels >= 0)
    if len(known) > 1:
        values["nmi"] = metrics.clustering(labels[known], clusters[known])["nmi"]
    return values


def figures(monitor: Monitor) -> dict:
    """The monitor's report as numbers: the trend is 1 improving, 0 stable, -1 declining."""
    report = monitor.report()
    trends = {"improving": 1, "stable": 0, "declining": -1}
    report["performance_trend"] = trends[report["performance_trend"]]
    return report


def score(
    prefix: str,
    z: Tensor,
    labels: np.ndarray,
    k: int,
    smoothing: float = 0.0,
    *,
    seeds: int = SEEDS,
    fitted: Tensor | None = None,
) -> dict:
    """Metrics of k-means, of rows z (n, d), as `PREFIXnmi` and `PREFIXnmi_sd`.

    They are the mean and the deviation over seeds. The centroids are those of the rows `fitted`
    (m, d), unset of z itself, which are `smooth`; each row of z belongs to the nearest.

    Rows without a label are clustered and left out of the score; without any label there is none.
    """
    known = np.flatnonzero(labels >= 0)
    if len(known) < 2:
        return {}
    fitted = z if fitted is None else fitted
    if z.shape[1] <= umc.WIDE:
        axes = umc.leading_axes(fitted)
        z, fitted = z @ axes, fitted @ axes
    rows = smooth(fitted, k, smoothing)
    scores = []
    for seed in range(seeds):
        centroids = clustering.kmeans(rows, k, seed=seed).centroids
        clusters = clustering.nearest(z, centroids)[0].numpy()
        scores.append(metrics.clustering(labels[known], clusters[known]))
    results = {}
    for name in scores[0]:
        values = [by_name[name] for by_name in scores]
        results[f"{prefix}{name}"] = float(np.mean(values))
        results[f"{prefix}{name}_sd"] = float(np.std(values, ddof=1))
    return results


def test_scores(run: Run, name: str, z: Tensor, centroids: Tensor) -> dict:
    """Test metrics of a model whose rows of all utterances are z (n, base_dim).

    `NAME/test/nmi` is of the clusters that its `centroids` give, those of clusters.csv and of
    --predict; of the run's model `cluster/test/refit_nmi` is of k-means fitted to the test rows, as
    it is published.
    """
    test = run.splits["test"]
    labels = run.data.table.labels[test]
    known = np.flatnonzero(labels >= 0)
    if len(known) < 2:
        return {}
    spec = run.model_spec
    results = {}
    if centroids.any():  # stage 1 has none
        clusters, _ = clustering.nearest(z[test], centroids)
        scores = metrics.clustering(labels[known], clusters[known])
        results = {f"{name}/test/{key}": value for key, value in scores.items()}
    if name == "cluster":
        prefix = "cluster/test/refit_"
        results |= score(prefix, z[test], labels, spec["k"], spec["smoothing"])
    return results


def compared(values: dict) -> dict:
    """Those of the metrics `values` of a model that the report compares with the run's."""
    kept = {"stability", "silhouette", "change", "agreement", "moved", *SHOWN}
    return {name: value for name, value in values.items() if name.split("/")[-1] in kept}


def changes(name: str, start: Tensor, found: Tensor, z: Tensor, clusters: Tensor) -> dict:
    """How far the training rows have moved from the `start` (n, d), where their clusters were
    `found` (n,).

    `NAME/train/change` is how far z (n, d) has moved, relative to its length; `agreement` the
    adjusted mutual information of the two partitions; `moved` the share of rows in another cluster.
    """
    alike = metrics.clustering(found, clusters)
    return {
        f"{name}/train/change": ((z - start).norm() / start.norm()).item(),
        f"{name}/train/agreement": alike["ami"],
        f"{name}/train/moved": 1 - alike["acc"],
    }


def baselines(run: Run) -> dict:
    """The scores of k-means without any training, fitted to the training rows as the run is.

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
        if name in run.data.as_is:
            scale = spread.square().sum().sqrt()
        else:
            scale = torch.where(spread > 0, spread, torch.inf)
        parts[name] = (x - x[train].mean(0)) / scale
    if len(parts) > 1:
        parts["concatenation"] = torch.cat(list(parts.values()), 1)
    labels = run.data.table.labels[test]
    results = {
        f"kmeans_{name}/train/stability": value
        for name, value in (run.model_spec["stability"] or {}).items()
    }
    fitted = clustering.landmarks(torch.from_numpy(train), clustering.LANDMARKS)
    for name, x in parts.items():
        prefix = f"kmeans_{name}/test/"
        results |= score(prefix, x[test], labels, k, seeds=BASELINE_SEEDS, fitted=x[fitted])
    return results


def tracking(run: Run) -> float | None:
    """Rank correlation of the stability with the NMI over the epochs of stage 2.

    It tells how well choosing by the first serves the second. None where there are no labels or
    fewer than 3 epochs.
    """
    names = ("cluster/train/stability", "cluster/train/nmi")
    lines = log.read(run.folder) if run.world.is_main else []
    complete = [line for line in lines if all(name in line for name in names)]
    pairs = np.array([[line[name] for name in names] for line in complete])
    if len(pairs) < 3 or not (pairs.max(0) > pairs.min(0)).all():
        return None
    ranks = [[(column < x).mean() + (column <= x).mean() for x in column] for column in pairs.T]
    return float(np.corrcoef(ranks)[0, 1])


def membership(z: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the rows z (n, d) belong among the centroids (k, d).

    Returns the nearest centroid, its distance, the confidence 1 - distance / distance to the next,
    and shares (n, k) that add up to 1 and fall with the squared distance in units of its mean.
    """
    blocks = z.split(2**14)  # in fp64 all rows at once would be the most that a run takes
    distances = torch.cat([torch.cdist(rows.double(), centroids.double()) for rows in blocks])
    two, clusters = distances.topk(2, dim=1, largest=False)
    nearest, second = two.unbind(1)
    confidence = 1 - nearest / second.clamp(min=1e-30)
    shares = (-distances.square() / nearest.square().mean().clamp(min=1e-30)).softmax(1)
    return clusters[:, 0], nearest, confidence, shares


def far_rows(distances: Tensor, values: dict) -> tuple[list[str], str]:
    """`yes` or `no` for each of the `distances` (n,) of rows to their centroids: whether it is
    above that of the share FAR of the training rows, which is among a model's metrics `values`.

    Empty where a checkpoint of an earlier version does not tell. Returns them with a note of how
    many there are.
    """
    limit = values.get("cluster/train/far_distance")
    if limit is None:
        return [""] * len(distances), "; which are far from every cluster, this run does not know"
    far = ["yes" if distance > limit else "no" for distance in distances.tolist()]
    count = far.count("yes")
    share = f"farther from its centroid than {FAR:.0%} of the training utterances"
    return far, f"; {count} of {len(far)} are far from every cluster: {share}"
