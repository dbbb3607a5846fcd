"""Frozen features: computed once, kept in features.npz, and how good they are without training."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import amp, metrics
from common.data import sampling
from common.retry import retried
from common.run import dist
from common.run.content import content_of
from common.run.files import atomic_write
from common.run.run import Run

KNN_BANK = 4096  # items among which neighbors are sought, at most
KNN_QUERIES = 1024  # items whose neighbors are sought, at most
# What features.npz calls the parts of the data, a later one over an earlier one.
_SPLITS = {
    "rest": "train",
    "train": "train",
    "finetune_train": "train",
    "dev": "val",
    "finetune_dev": "val",
    "val": "val",
    "test": "test",
    "finetune_test": "test",
}


def stored_features(run: Run, weights: str, compute: Callable[[], Tensor]) -> Tensor:
    """Features (n, d) float32 of all items in their order.

    They are read from the run directory's features.npz, or computed and kept there. The file holds
    `features`, `id`, `label` (-1: none), `split` ("": in no part), `classes`.

    Args:
        weights: the digest of the weights that make them: features of other weights, items, bytes
            or sizes are not reused.
        compute: gives the features.
    """
    file = run.folder / "features.npz"
    items = run.data
    content = content_of(items)
    form = content.form if content else ""
    made_of = f"{weights} {items.fingerprint} {items.store_size} {run.model_spec['image_size']}"
    key = f"{made_of} {form}"

    def digests() -> np.ndarray:
        return content.verified(run.world) if content else np.zeros(0, np.int64)

    rows = _read_features(file, key, digests(), run.log.say)
    # A rank that reads while another computes would wait for it without end.
    missing = torch.tensor(int(rows is None), device=run.world.device)
    if not dist.all_reduce(missing, "max"):
        return rows
    rows = compute()
    read = digests()  # of all that was read for them
    if run.world.is_main:
        splits = np.full(len(items), "", dtype="<U5")
        for part, name in _SPLITS.items():
            splits[run.splits.get(part, [])] = name

        def store():
            with atomic_write(file, "wb", stream=True) as stored:
                np.savez(
                    stored,
                    features=rows.numpy(),
                    id=np.array(items.ids),
                    label=items.labels,
                    split=splits,
                    classes=np.array(items.classes, dtype=str),
                    key=key,
                    content=read,
                )

        retried(store, file, was_there=True)
    return rows


def _read_features(file: Path, key: str, digests: np.ndarray, say) -> Tensor | None:
    # Of another key, or made of other bytes than are there now: None.
    if not file.exists():
        return None
    try:
        with np.load(file) as stored:
            read = stored["content"]
            same = str(stored["key"]) == key and ((read == 0) | (read == digests)).all()
            return torch.from_numpy(stored["features"]) if same else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        say(f"{file} is damaged ({str(error) or type(error).__name__}): computing it again")
        return None


def representation(
    run: Run, outputs: Callable[[np.ndarray], Tensor], queries: str, prefix: str
) -> dict:
    """How good features are without training: kNN accuracy and effective rank.

    Neighbors are sought among at most KNN_BANK training items, for at most KNN_QUERIES queries, the
    same ones every time. Without labels of two classes there is the effective rank alone. In a test
    the accuracy has its interval.

    Args:
        outputs: gives the features (n, d) of items.
        queries: the part of the data that the features are judged by.
        prefix: what the metrics are named by, as `pretrain/test`.

    Raises:
        Diverged: a feature is not finite.
    """
    items = run.data
    labels = items.labels

    def sample(part: str, most: int) -> np.ndarray:
        indices = run.splits[part]
        share = min(1.0, most / max(len(indices), 1))
        return sampling.hold_out(items.ids, labels, indices, share, "knn")

    of_classes = len(items.classes) > 1
    labeled = of_classes and len(run.splits[queries]) > 1 and len(run.splits["train"])
    bank = sample("train", KNN_BANK) if labeled else []
    asked = sample(queries if labeled else "rest", KNN_QUERIES)
    rows = outputs(np.concatenate([bank, asked]).astype(np.int64))
    amp.require_finite(rows, "features")
    if not labeled:
        return {f"{prefix}/effective_rank": metrics.effective_rank(rows)}
    in_bank = rows[: len(bank)]
    of_queries = rows[len(bank) :]
    accuracy = metrics.knn_accuracy(
        in_bank, labels[bank], of_queries, labels[asked], len(items.classes)
    )
    values = {f"{prefix}/knn_accuracy": accuracy}
    if queries == "test":
        is_right = np.arange(len(asked)) < round(accuracy * len(asked))
        low, high = metrics.mean_interval(is_right)
        values |= {f"{prefix}/knn_accuracy_low": low, f"{prefix}/knn_accuracy_high": high}
    return values | {f"{prefix}/effective_rank": metrics.effective_rank(of_queries)}


def contrast(stats, temperature: float) -> dict[str, float]:
    """Figures of a batch on all ranks, as of `metrics.contrastive`, from the loss's statistics.

    Args:
        stats: rank, positive and potential of the rows of this rank, as `kernels.nt_xent` returns
            them.
        temperature: of the loss.
    """
    values = {
        "top1": (stats.rank < 1).float(),
        "top5": (stats.rank < 5).float(),
        "alignment": 2 - 2 * temperature * stats.positive,
        "uniformity": stats.potential,
    }
    means = {name: dist.mean(value.mean()).item() for name, value in values.items()}
    return means | {"uniformity": float(np.log(means["uniformity"]))}
