"""A schedule of training as one table of phases: what is drawn, what the loss holds, and the learning rate, by epoch.

A table is written for a number of epochs and scaled to any other: a boundary b of E becomes round(b * E' / E).
"""

import json
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from common.config import InputError, nearest

SAMPLERS = ("random", "weighted")


@dataclass(frozen=True)
class Phase:
    """The settings from epoch `start` (counted from 0) to the next phase's start.

    Attributes:
        sampler: "random", every item once, or "weighted", drawn with the class weight min(N / (K n_c), cap).
        cap: of "weighted"; None: no cap, all classes equally often.
        tau: of the logit adjustment.
        temperature, smoothing: of the smoothed targets.
        mi, dc: weights of the two losses on the classes' features.
        ramp: epochs over which mi and dc rise from 0 in their first to their value in their last; 0: at once.
        lr: factor of the learning rates.
        weights: "none", or "effective", the class weights of deferred re-weighting.
        trains: "all", or "classes", the classifier alone, drawn anew after a phase of "all", on frozen features.
    """

    start: int
    sampler: str = "random"
    cap: float | None = None
    tau: float = 0.0
    temperature: float = 0.15
    smoothing: float = 0.0
    mi: float = 0.0
    dc: float = 0.0
    ramp: int = 0
    lr: float = 1.0
    weights: str = "none"
    trains: str = "all"


_ALLOWED = {"sampler": SAMPLERS, "weights": ("none", "effective"), "trains": ("all", "classes")}
_NUMBERS = {"start": int, "ramp": int}


@dataclass(frozen=True)
class Schedule:
    """Phases in the order of their starts, the first at 0, over `epochs` epochs."""

    epochs: int
    phases: tuple[Phase, ...]

    def index(self, epoch: int) -> int:
        """Which phase an epoch belongs to; one beyond the end to the last."""
        return max(i for i, phase in enumerate(self.phases) if phase.start <= epoch)

    def at(self, epoch: int) -> Phase:
        """The settings of an epoch: its phase's, with mi and dc as far as they have risen."""
        phase = self.phases[self.index(epoch)]
        risen = 1.0 if phase.ramp < 2 else min(1.0, (epoch - phase.start) / (phase.ramp - 1))
        return replace(phase, mi=phase.mi * risen, dc=phase.dc * risen)

    def scaled(self, epochs: int, constant: bool = False) -> "Schedule":
        """The same table over another number of epochs, or with one rate for all (`constant`); a phase that no epoch is
        left for is dropped."""

        def scale(boundary: int) -> int:
            return round(boundary * epochs / self.epochs)

        phases = [replace(p, start=scale(p.start), ramp=scale(p.ramp)) for p in self.phases]
        phases = [replace(p, lr=1.0) for p in phases] if constant else phases
        ends = [p.start for p in phases[1:]] + [epochs]
        return Schedule(epochs, tuple(p for p, end in zip(phases, ends, strict=True) if p.start < end))

    def cells(self) -> list[list[str]]:
        """The table for people: a header, then a row a phase; constant columns left out."""
        names = [f.name for f in fields(Phase)][1:]
        rows = [asdict(phase) for phase in self.phases]
        # A column that no phase uses says nothing; the sampler always does.
        default = asdict(Phase(0))
        names = [n for n in names if n == "sampler" or any(row[n] != default[n] for row in rows)]
        ends = [phase.start for phase in self.phases[1:]] + [self.epochs]
        found = [["epochs", *names]]
        for row, end in zip(rows, ends, strict=True):
            cells = [f"{row[n]:g}" if isinstance(row[n], (int, float)) else str(row[n] or "none") for n in names]
            found.append([f"[{row['start']}, {end})", *cells])
        return found

    def describe(self) -> str:
        """`cells` as lines of text."""
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def read_schedule(path: str) -> Schedule:
    """A schedule from a TOML or JSON file: `epochs` and `phases`, a list of tables with the attributes of `Phase`.

    Raises:
        InputError: it cannot be read, or says something that no schedule has.
    """
    place = Path(path)
    if place.suffix not in (".toml", ".json"):
        raise InputError(f"--schedule {path}: allowed are .toml and .json")
    try:
        text = place.read_text()
        table = tomllib.loads(text) if place.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"--schedule {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--schedule {path}: {error}") from None
    if not isinstance(table, dict) or table.keys() != {"epochs", "phases"} or not isinstance(table["phases"], list):
        raise InputError(f"--schedule {path}: expected epochs, a number, and phases, a list of tables")
    if type(table["epochs"]) is not int or table["epochs"] < 1 or not table["phases"]:
        raise InputError(f"--schedule {path}: epochs must be an integer >= 1, and phases must not be empty")
    phases = tuple(_phase(row, f"--schedule {path}, phase {i}") for i, row in enumerate(table["phases"]))
    starts = [phase.start for phase in phases]
    if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= table["epochs"]:
        raise InputError(f"--schedule {path}: starts must rise from 0 and stay below epochs, received {starts}")
    return Schedule(table["epochs"], phases)


def _phase(row, where: str) -> Phase:
    known = [f.name for f in fields(Phase)]
    if not isinstance(row, dict) or "start" not in row:
        raise InputError(f"{where}: expected a table with start and any of {', '.join(known[1:])}")
    for name, value in row.items():
        if name not in known:
            raise InputError(f"{where}: unknown setting {name!r}{nearest(name, known)}")
        if name in _ALLOWED:
            if value not in _ALLOWED[name]:
                raise InputError(f"{where}: {name} is {value!r}, allowed {', '.join(_ALLOWED[name])}")
            continue
        if name == "cap" and value is None:
            continue
        kind = _NUMBERS.get(name, (int, float))
        positive = name in ("cap", "temperature")
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 1e6 or (positive and value == 0):
            wanted = "an integer" if kind is int else "a number"
            raise InputError(f"{where}: {name} is {value!r}, allowed {wanted} {'> 0' if positive else '>= 0'}")
    phase = Phase(**row)
    if phase.smoothing > 1:
        raise InputError(f"{where}: smoothing is {phase.smoothing}, allowed 0 to 1")
    if phase.sampler == "random" and phase.cap is not None:
        raise InputError(f"{where}: cap has no effect with sampler random; give sampler weighted")
    return phase
