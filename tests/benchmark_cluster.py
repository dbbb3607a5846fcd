"""Clusterings of scikit-learn, and UMAP with HDBSCAN, on the features of train_cluster.py.

  pip install scikit-learn umap-learn
  python -m tests.benchmark_cluster --data acts.tsv --text-model minilm/

Flags are those of train_cluster.py; the labels give the number of clusters, but to HDBSCAN. Fitted
are at most ROWS training utterances; each test utterance belongs to the nearest mean of a cluster.
Prints a table of test NMI / ARI / accuracy in percent: a row for each modality, standardized, for
all side by side, and for the axes that training starts from.
"""

import sys
import warnings

import numpy as np
import torch
from sklearn import cluster
from umap import UMAP

import train_cluster
from common import clustering, deep_cluster, metrics
from common.data import utterances
from common.models import umc
from common.run import dist

ROWS = 3000


def with_hdbscan(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Clusters of density in ten dimensions; -1 is none. Their number is HDBSCAN's own."""
    low = UMAP(n_components=10, n_neighbors=15, min_dist=0.0, random_state=seed).fit_transform(x)
    least = max(round(0.1 * len(x) / k), 5)
    return cluster.HDBSCAN(min_cluster_size=least, copy=True).fit(low).labels_


METHODS = {
    "k-means": lambda x, k, seed: cluster.KMeans(k, n_init=10, random_state=seed).fit(x).labels_,
    "Ward": lambda x, k, seed: cluster.AgglomerativeClustering(k).fit(x).labels_,
    "spectral": lambda x, k, seed: (
        cluster.SpectralClustering(
            k,
            affinity="nearest_neighbors",
            n_neighbors=15,
            assign_labels="cluster_qr",
            random_state=seed,
        )
        .fit(x)
        .labels_
    ),
    "UMAP + HDBSCAN": with_hdbscan,
}


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    args, _ = train_cluster.parse_args(argv)
    world = dist.Dist(0, 1, torch.device("cpu"))
    reading = {name: getattr(args, name) for name in train_cluster.READING}
    rows, _ = train_cluster.build_data(args, args.data, reading, world)
    splits, labels = utterances.split(rows.table), rows.table.labels
    train, k = (
        clustering.landmarks(torch.from_numpy(splits["train"]), ROWS),
        len(rows.table.classes),
    )
    test = torch.from_numpy(splits["test"][labels[splits["test"]] >= 0])
    basis, *_ = deep_cluster.fused_basis(args, rows, train.numpy(), k)
    axes = [umc.coordinates(rows.pooled(name), *basis[name]) for name in rows.names]
    features = {}
    for name in rows.names:
        x = rows.pooled(name).double()
        spread = x[train].std(0)
        scale = spread.norm() if name in rows.as_is else spread * len(spread) ** 0.5
        features[name] = (x - x[train].mean(0)) / scale.clamp(min=1e-9)
    if len(features) > 1:
        features["side by side"] = torch.cat(list(features.values()), 1)
    features["axes"] = torch.cat(axes, 1)
    print("|", "|", " | ".join(METHODS), "|")
    for name, x in features.items():
        x = x.float()
        cells = []
        for method in METHODS.values():
            found = method(x[train].numpy(), k, args.seed)
            numbers = np.unique(found[found >= 0])
            means = torch.stack([x[train][torch.from_numpy(found == c)].mean(0) for c in numbers])
            clusters = clustering.nearest(x[test], means)[0].numpy()
            scores = metrics.clustering(labels[test.numpy()], clusters)
            cell = " / ".join(f"{100 * scores[key]:.1f}" for key in ("nmi", "ari", "acc"))
            cells.append(cell + (f" ({len(numbers)})" if len(numbers) != k else ""))
        print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
