"""Watch a score over the epochs: trend, stability, alarms, plateaus and early stopping; and whether
contrastive pretraining learns.

All figures are functions of the scores and actions so far, so a resumed run that restores these
goes on exactly.
"""

import itertools
import math
from dataclasses import dataclass, field
from statistics import median

PATIENCE = 10  # epochs without a gain that raise the alarm
WINDOW = 2 * PATIENCE  # epochs that trend and stability look at
LEAST_STABILITY = 0.3
_SURE = 2.0  # standard deviations that the trend test asks for
_MOST_ACTIONS = 2  # on one plateau

# What `contrastive_problem` goes by: chosen on 34 small runs, 13 of them broken on purpose, whose
# figures are in tests/test_monitor.py; its errors on runs not seen before are in docs/simclr.md.
WARMED_UP = 0.5  # of the epochs; before, healthy runs may look collapsed
LEARNS_BY = 0.75  # of the epochs; before, healthy runs may be near chance
NEAR_CHANCE = 0.98  # loss over chance
FAR_ABOVE_CHANCE = 2.0
# Share of its first epoch's mean by which the loss falls: near chance are also short runs on strong
# augmentation, which learn. Without labels there is less to go by.
LEAST_FALL = 0.03
LEAST_FALL_UNLABELED = 0.01
KNN_GAIN = 0.05  # a gain of the kNN accuracy over its start shows learning, whatever the loss is
LEAST_NEGATIVES = 14  # of a row: those of a batch of 8
COLLAPSED = -1.4  # uniformity; of points spread at random it is near -4
LOW_RANK = 8.0  # effective rank of the features; runs that learn have it or COLLAPSED, not both
LEAST_RANK = 1.5
ALIKE = 0.01  # alignment, the squared distance of two views on the unit sphere
# What is wrong, and what to try.
PROBLEMS = {
    "no_number": (
        "the data gives no number of clusters; taken is the most that was tried",
        "--k with a number of your own",
    ),
    "few_negatives": (
        "a batch this small has hardly any negatives to tell an image from",
        "a larger --bs, 64 or more; --accum computes it in chunks",
    ),
    "views_alike": (
        "both views of an image have the same embedding: there is nothing to learn",
        "--augment simclr, or a higher --color-strength",
    ),
    "collapsed": (
        "the embeddings have collapsed: those of different images lie close together",
        "a lower --lr or more --warmup-epochs, a lower --wd, a larger --bs, a lower"
        " --color-strength, and whether the images differ at all",
    ),
    "far_above_chance": (
        "the loss is far above that of a guess: the temperature is too low for a network to follow",
        "a --temperature from 0.1 to 0.5",
    ),
    "near_chance": (
        "the loss is still near that of a guess, and nearest neighbors are no better than at the"
        " start",
        "more --epochs, or a higher --lr where these are few; --optimizer adamw, whose rate needs"
        " fewer steps than that of lars; a --color-strength of 0.5 or less, where the distortions"
        " are too strong for the images; a larger --bs",
    ),
}


def contrastive_problem(
    share: float,
    *,
    bs: int,
    loss_over_chance: float,
    first_loss: float,
    alignment: float,
    uniformity: float,
    effective_rank: float,
    knn_gain: float | None,
) -> str | None:
    """The name in PROBLEMS of what keeps a contrastive pretraining from learning; None: it learns.

    Args:
        share: of the epochs that are done.
        bs: images of a batch, over all processes and chunks.
        loss_over_chance, first_loss: mean loss of the epoch, and of the first one, over that of a
            guess.
        alignment, uniformity: of a batch's embeddings, see `metrics.contrastive`.
        effective_rank: of the features.
        knn_gain: kNN accuracy less that of the network at its start; None: there are no labels.
    """
    if share < WARMED_UP:
        return None
    if 2 * bs - 2 < LEAST_NEGATIVES:
        return "few_negatives"
    if uniformity > COLLAPSED and loss_over_chance > 1:
        return "collapsed"
    if knn_gain is not None and knn_gain >= KNN_GAIN:
        return None
    if effective_rank < (LOW_RANK if uniformity > COLLAPSED else LEAST_RANK):
        return "collapsed"
    if alignment < ALIKE:
        return "views_alike"
    if loss_over_chance > FAR_ABOVE_CHANCE:
        return "far_above_chance"
    least_fall = LEAST_FALL_UNLABELED if knn_gain is None else LEAST_FALL
    fell = 1 - loss_over_chance / first_loss >= least_fall
    is_near = share >= LEARNS_BY and loss_over_chance > NEAR_CHANCE and not fell
    return "near_chance" if is_near else None


def slope(scores: list[float]) -> float:
    """Median slope over all pairs of epochs (Theil 1950, Sen 1968); 0 for a single one.

    Up to 29 % of outliers do not move it far.
    """
    if len(scores) < 2:
        return 0.0
    pairs = itertools.combinations(enumerate(scores), 2)
    return median([(b - a) / (j - i) for (i, a), (j, b) in pairs])


def trend(scores: list[float]) -> str:
    """`improving`, `stable` or `declining` over the last WINDOW scores.

    Not stable is a slope that the Mann-Kendall test tells from noise: the rising pairs outnumber
    the falling ones, or the reverse, by more than two standard deviations of what scores in random
    order give. It needs 5 scores.
    """
    recent = scores[-WINDOW:]
    n = len(recent)
    surplus = sum((b > a) - (b < a) for a, b in itertools.combinations(recent, 2))
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    if abs(surplus) - 1 <= _SURE * deviation or slope(recent) * surplus <= 0:
        return "stable"
    return "improving" if surplus > 0 else "declining"


def stability(scores: list[float]) -> float:
    """How little the last WINDOW scores jump, in [0, 1].

    It is 1 less ten times their noise relative to their level. The noise is the robust deviation of
    each score from the line through its two neighbors, so neither a rise nor its bend counts as
    unrest. The level is the median, at least 0.1: a score near 0 has no relative noise.
    """
    recent = scores[-WINDOW:]
    if len(recent) < 3:
        return 1.0
    bends = [abs(b - (a + c) / 2) for a, b, c in zip(recent, recent[1:], recent[2:], strict=False)]
    # 1.4826 makes a median a deviation, 1.5 is the variance of such a bend among independent
    # scores.
    noise = 1.4826 * median(bends) / math.sqrt(1.5)
    return max(0.0, 1.0 - 10 * noise / max(median(map(abs, recent)), 0.1))


@dataclass
class Monitor:
    """The scores of a run and what was done on its plateaus.

    Attributes:
        min_epochs: before these are done nothing stops.
        scores: one an epoch; higher is better.
        actions: (epochs done, name of the action).
    """

    min_epochs: int = 20
    scores: list[float] = field(default_factory=list)
    actions: list[tuple[int, str]] = field(default_factory=list)

    def add(self, score: float) -> None:
        """Take in the score of one more epoch.

        Raises:
            ValueError: it is not finite.
        """
        if not math.isfinite(score):
            raise ValueError(f"the score of epoch {len(self.scores)} must be finite, got {score}")
        self.scores.append(float(score))

    @property
    def best_epoch(self) -> int:
        """Index of the first epoch with the best score; -1 before any."""
        return max(range(len(self.scores)), key=self.scores.__getitem__, default=-1)

    @property
    def epochs_without_gain(self) -> int:
        return len(self.scores) - 1 - self.best_epoch if self.scores else 0

    def report(self) -> dict:
        """The figures of the epoch: numbers, and `performance_trend` as a word.

        `best_epoch` counts from 1. An improvement is a new best after the first epoch; a
        degradation a score more than 5 % below the best so far.
        """
        best = list(itertools.accumulate(self.scores, max))
        return {
            "best_performance": best[-1] if best else math.nan,
            "best_epoch": self.best_epoch + 1,
            "performance_trend": trend(self.scores),
            "slope": slope(self.scores[-WINDOW:]),
            "stability_score": stability(self.scores),
            "total_improvements": sum(b > a for a, b in itertools.pairwise(best)),
            "total_degradations": sum(
                s < b - 0.05 * abs(b) for s, b in zip(self.scores, best, strict=True)
            ),
            "epochs_without_gain": self.epochs_without_gain,
        }

    def alarms(self) -> list[str]:
        """One sentence for each thing that asks for attention."""
        sentences = []
        if self.epochs_without_gain >= PATIENCE:
            sentences.append(f"no gain for {self.epochs_without_gain} epochs")
        stability_score = stability(self.scores)
        if stability_score < LEAST_STABILITY:
            sentences.append(
                f"the score jumps: its steadiness {stability_score:.3g} is below {LEAST_STABILITY}"
            )
        if trend(self.scores) == "declining":
            sentences.append("the score is declining")
        return sentences

    def stalled(self) -> bool:
        """Whether the score is on a plateau.

        It is where PATIENCE epochs since the best score and since the last action brought no gain.
        A noisy score can rise and yet have no new best for a while: the trend has the last word.
        """
        since_action = len(self.scores) - (self.actions[-1][0] if self.actions else 0)
        waited = min(self.epochs_without_gain, since_action)
        return waited >= PATIENCE and trend(self.scores) != "improving"

    def advice(self, on_plateau: str) -> str | None:
        """What to do now under `--on-plateau lr|share|none`: `lr` or `share` (halve it), or None.

        At most two actions on one plateau: what did not help twice will not help a third time.

        Raises:
            ValueError: another word.
        """
        if on_plateau not in ("lr", "share", "none"):
            raise ValueError(f"on_plateau must be lr, share or none, got {on_plateau!r}")
        if on_plateau == "none" or not self.stalled() or self._tried() >= _MOST_ACTIONS:
            return None
        return on_plateau

    def act(self, name: str) -> None:
        """Note that advice was followed after the last epoch added."""
        self.actions.append((len(self.scores), name))

    def _tried(self) -> int:
        """Actions since the best score."""
        return sum(done > self.best_epoch for done, _ in self.actions)

    def should_stop(self, on_plateau: str = "none") -> bool:
        """Whether to stop: stalled, nothing left to try, and `min_epochs` done.

        A rising score never stops.
        """
        return (
            len(self.scores) >= self.min_epochs
            and self.stalled()
            and self.advice(on_plateau) is None
        )

    def nothing_helped(self) -> bool:
        """Whether actions were taken and none was followed by a new best.

        Then a larger `--base-dim` is worth a run.
        """
        return self._tried() > 0 and self._tried() == len(self.actions)

    def state_dict(self) -> dict:
        """Scores and actions, for a checkpoint."""
        return {"scores": list(self.scores), "actions": [list(action) for action in self.actions]}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.scores = list(state["scores"])
        self.actions = [tuple(action) for action in state["actions"]]
