"""The rows that an evaluation computes, batch by batch; a run that stops inside keeps them."""

import contextlib
import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from common import live
from common.run import checkpoint, dist
from common.run.progress import Progress


class Evaluation(contextlib.ExitStack):
    """What an evaluation of `batches` of items has computed, a row an item.

        with Evaluation(progress, model, batches) as done:
            for batch in fetch(run, done.left):
                done.add(model(batch))
        rows = done.rows(count)

    A state that is stored meanwhile has the batches that were done, under a digest of the weights
    and of this rank's items: the resumed run finds them where it evaluates the same again, and
    computes what is `left`. They are forgotten at the next step. Inside, nothing of the stage's
    state may change.

    Args:
        progress: of the stage; None, where nothing is trained: nothing is kept.
        model: whose weights make the rows; None: no weights do.
        batches: this rank's, (b,) items each, equally many on all ranks.
        kind: sets apart what else one model gives for the same items; it is shown meanwhile.
    """

    def __init__(
        self,
        progress: Progress | None,
        model: nn.Module | None,
        batches: list[np.ndarray],
        kind: str = "",
    ):
        super().__init__()
        self.progress = progress
        self.parts: list[Tensor] = []
        self.left = batches
        self.total = sum(map(len, batches))
        self.what = kind or "evaluation"
        if progress is None:
            return
        self.what = f"{progress.stage} {self.what}"
        weights = checkpoint.weights_digest(model.state_dict()) if model else ""
        hasher = hashlib.blake2b(f"{weights} {kind}".encode(), digest_size=7)
        for items in batches:
            hasher.update(np.ascontiguousarray(items).tobytes() + b"|")
        self.parts = progress.evaluated_rows(int.from_bytes(hasher.digest(), "big"))
        self.left = batches[len(self.parts) :]

    def __enter__(self) -> "Evaluation":
        found = self.total - sum(map(len, self.left))
        with contextlib.ExitStack() as entered:  # and left again where a signal comes meanwhile
            self.shown = entered.enter_context(live.Progress(self.what, self.total, found))
            if self.progress:
                entered.enter_context(self.progress.interruptible())
            self.push(entered.pop_all())
        return self

    def add(self, rows: Tensor) -> None:
        """Take the rows (b, ...) of the next batch, and stop or save where it is time."""
        self.parts.append(rows)
        self.shown.add(len(rows))
        if self.progress:
            self.progress.check_stop()

    def rows(self, count: int | None = None) -> Tensor:
        """All rows on the CPU, where they are kept.

        Args:
            count: of the items of all ranks, whose shares (`dist.shard`) the batches are; None:
                every rank does all of them.
        """
        device = self.progress.world.device if self.progress else self.parts[0].device
        rows = torch.cat([part.cpu() for part in self.parts])
        self.parts[:] = rows.split([len(part) for part in self.parts])  # one copy of them
        return rows if count is None else dist.unshard(rows.to(device), count).cpu()
