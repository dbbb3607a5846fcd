"""Frozen features: computed once, kept in features.npz, and how good they are without training."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import amp, metrics, monitor
from common.data import sampling
from common.data.groups import groups_of
from common.live import digits
from common.retry import retried
from common.run import dist, log
from common.run.content import content_of
from common.run.files import atomic_write
from common.run.run import Run

KNN_BANK = 4096  # items among which neighbors are sought, at most
KNN_QUERIES = 1024  # items whose neighbors are sought, at most
LOSS = "pretrain/train/loss_over_chance"
WARNED = "pretrain/warn/"
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

    They are read from the run directory's features.npz, or computed and kept there; those of
    embedded data, which have no bytes to verify, are also taken from the runs beside it. The file
    holds `features`, `id`, `label` (-1: none), `split` ("": in no part), `classes`.

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
    if "normalization" in run.model_spec:
        made_of += f" {run.model_spec['normalization']}"
    key = f"{made_of} {form}"

    def digests() -> np.ndarray:
        return content.verified(run.world) if content else np.zeros(0, np.int64)

    rows = _read_features(file, key, digests(), run.log.say)
    # A rank that reads while another computes would wait for it without end.
    missing = torch.tensor(int(rows is None), device=run.world.device)
    if not dist.all_reduce(missing, "max"):
        return rows
    rows = None
    if content is None and run.world.world_size == 1:
        for other in sorted(run.folder.parent.glob(f"*/{file.name}")):
            rows = _read_features(other, key, digests(), lambda _: None) if rows is None else rows
    rows = compute() if rows is None else rows
    read = digests()  # of all that was read for them
    if run.world.is_main:
        splits = np.full(len(items), "", dtype="<U5")
        for part, name in _SPLITS.items():
            splits[run.splits.get(part, [])] = name
        write_features(file, rows, items, split=splits, key=key, content=read)
    return rows


def write_features(file: Path, rows: Tensor, items, **columns) -> None:
    """Write features (n, d) of all `items`, their ids and labels, and what else is given, as .npz.

    Raises:
        OSError: the disk is full or not writable.
    """

    def store():
        with atomic_write(file, "wb", stream=True) as stored:
            np.savez(
                stored,
                features=rows.numpy(),
                id=np.array(items.ids),
                label=items.labels,
                classes=np.array(items.classes, dtype=str),
                **columns,
            )

    retried(store, file, was_there=True)


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
    run: Run,
    outputs: Callable[[np.ndarray], Tensor],
    queries: str,
    prefix: str,
    bank: str = "all_train",
) -> dict:
    """How good features are without training: kNN accuracy and effective rank.

    Neighbors are sought among at most KNN_BANK training items, for at most KNN_QUERIES queries, the
    same ones every time. Without labels of two classes there is the effective rank alone. In a test
    the accuracy has its interval.

    Args:
        outputs: gives the features (n, d) of items.
        queries: the part of the data that the features are judged by.
        prefix: what the metrics are named by, as `pretrain/test`.
        bank: the part with the neighbors; `all_train` is `train` where no labels are left out.

    Raises:
        Diverged: a feature is not finite.
    """
    items = run.data
    labels = items.labels

    def sample(part: str, most: int) -> np.ndarray:
        indices = run.splits[part if part in run.splits else "train"]
        share = min(1.0, most / max(len(indices), 1))
        return sampling.hold_out(items.ids, labels, indices, share, "knn")

    of_classes = len(items.classes) > 1
    labeled = of_classes and len(run.splits[queries]) > 1 and len(run.splits["train"])
    of_bank = sample(bank, KNN_BANK) if labeled else []
    asked = sample(queries if labeled else "rest", KNN_QUERIES)
    rows = outputs(np.concatenate([of_bank, asked]).astype(np.int64))
    amp.require_finite(rows, "features")
    if not labeled:
        return {f"{prefix}/effective_rank": metrics.effective_rank(rows)}
    in_bank = rows[: len(of_bank)]
    of_queries = rows[len(of_bank) :]
    hits = metrics.knn_hits(in_bank, labels[of_bank], of_queries, labels[asked], len(items.classes))
    values = {f"{prefix}/knn_accuracy": float(hits.mean())}
    if queries == "test":
        low, high = metrics.mean_interval(hits, units=groups_of(items, asked))
        values |= {f"{prefix}/knn_accuracy_low": low, f"{prefix}/knn_accuracy_high": high}
    return values | {f"{prefix}/effective_rank": metrics.effective_rank(of_queries)}


def contrast(z: Tensor) -> dict:
    """Figures of the embeddings z (2n, d) of a batch on all ranks, view a above view b."""
    return metrics.contrastive(*(dist.all_gather_rows(view) for view in z.float().chunk(2)))


def say_if_not_learning(run: Run, values: dict, epoch: int) -> dict:
    """Warn once where the pretraining does not learn, see `monitor.contrastive_problem`.

    It goes by what log.jsonl has, so that a resumed run warns as one that never stopped.

    Args:
        values: the metrics of an epoch with its evaluation; in the first one also
            `pretrain/start/knn_accuracy`.
        epoch: of these, from 1.

    Returns:
        The event as a metric for the log, `pretrain/warn/NAME`; nothing where all is well or it was
        said before, and on ranks that have no log.
    """
    if not run.log.main:
        return {}
    lines = [line for line in log.read(run.folder) if line["stage"] == "pretrain"]
    said = {name: value for line in lines for name, value in line.items()} | values
    if any(f"{WARNED}{name}" in said for name in monitor.PROBLEMS) or "alignment" not in said:
        return {}
    stage = run.stages["pretrain"]
    start, now = (said.get(f"pretrain/{split}/knn_accuracy") for split in ("start", "val"))
    ratio = said[LOSS]
    problem = monitor.contrastive_problem(
        epoch / stage.epochs,
        bs=stage.bs,
        loss_over_chance=ratio,
        first_loss=next(line[LOSS] for line in [*lines, values] if LOSS in line),
        alignment=said["alignment"],
        uniformity=said["uniformity"],
        effective_rank=said["pretrain/val/effective_rank"],
        knn_gain=None if start is None or now is None else now - start,
    )
    if problem is None:
        return {}
    wrong, cure = monitor.PROBLEMS[problem]
    knn = "" if start is None else f", kNN accuracy {digits(now)}, {digits(start)} at the start"
    run.log.say(
        f"WARN pretrain: {wrong} (after epoch {epoch}: loss over chance {digits(ratio)}, alignment"
        f" {digits(said['alignment'])}, uniformity {digits(said['uniformity'])}{knn}). What to try,"
        f" if it is not so yet: {cure}"
    )
    return {f"{WARNED}{problem}": 1.0}
