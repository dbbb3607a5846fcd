"""A run directory as the reports read it."""

import contextlib
import functools
import reprlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, Stopped, described
from common.report.curves import charts_of, curves_of
from common.run import ending, log
from common.run.files import read_config, read_json

LIMIT = 1_000_000  # bytes of a report
# Of a run that has none, as those of earlier versions.
NO_CARD = {"about": "", "items": "items", "headlines": {}, "chance": {}}

_NUMBER = (int, float)
_NOTHING = type(None)
# What the reports rely on in a run's files, with the types that it may have.
_KEYS = {
    "config.json": {
        "resolved": (dict,),
        "identity": (dict, _NOTHING),
        "card": (dict, _NOTHING),
    },
    "env.json": {"command": (str, _NOTHING), "commit": (str, _NOTHING)},
    "summary.json": {"status": (str,), "seconds": (*_NUMBER, _NOTHING)},
    "check.json": {"command": (str,), "items": (list,), "seconds": _NUMBER},
    "card": {"headlines": (dict,), "chance": (dict,)},
    "eval.json": {},
    "line": {"stage": (str,), "step": _NUMBER, "epoch": _NUMBER},
}


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
    """Name the file, or the folder, that makes our code raise whatever it may be: nobody knows who
    has changed it.

    Raises:
        InputError: instead of it.
    """
    try:
        yield
    except (InputError, MemoryError, Stopped):
        raise
    except OSError as error:
        raise InputError(described(error) if error.filename else f"{path}: {error}") from error
    except Exception as error:
        raise InputError(
            f"{path} cannot be shown ({described(error)}): restore or remove it; if nobody has"
            " changed it, that is a bug"
        ) from error


def checked(path: Path, kind: str, value) -> dict:
    """What was read of a file, where it has the keys and the types of its `kind` in _KEYS.

    Raises:
        InputError: it has not.
    """
    if not isinstance(value, dict):
        found = reprlib.repr(value)
        raise InputError(f"{path} holds {found}, expected an object; restore or remove it")
    for key, types in _KEYS[kind].items():
        if not isinstance(value.get(key), types):
            found = reprlib.repr(value[key]) if key in value else "missing"
            expected = " or ".join(t.__name__ for t in types if t is not _NOTHING)
            raise InputError(f"{path}: {key} is {found}, expected {expected}; restore or remove it")
    return value


def read_part(folder: Path, name: str) -> dict | None:
    """One of a run's JSON files, checked; None where there is none.

    Raises:
        InputError: it cannot be read, or is not as a run writes it.
    """
    path = folder / name
    with naming(path):
        value = read_config(folder) if name == "config.json" else read_json(path)
        return None if value is None else checked(path, name, value)


def interval_text(scores: dict, name: str) -> str:
    """A metric, with its interval or deviation where the run has one.

    As `0.5900 (0.5400 to 0.6300)` or `0.2500 ± 0.0100`.
    """
    value = scores.get(name)
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    spread = ending.spread_of(scores, name)
    if len(spread) == 2:
        return f"{value:.4f} ({spread[0]:.4f} to {spread[1]:.4f})"
    if spread:
        return f"{value:.4f} ± {spread[0]:.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def state_text(status: str, lines: list[dict], settings: dict, seconds: float | None) -> str:
    """How a run stands, in one sentence: finished, or where it is and how long its stage still
    takes.
    """
    if status == "finished" and seconds is not None:
        return f"finished after {log.duration(seconds)}"
    where = ""
    if lines:
        last = lines[-1]
        stage = settings["resolved"].get(last["stage"].split("_")[0])
        planned = f" of {stage['epochs']}" if isinstance(stage, dict) and "epochs" in stage else ""
        where = f" in {last['stage']}, step {last['step']}, epoch {last['epoch']}{planned}"
        where += f", after {log.duration(last['time'])}" if "time" in last else ""
        eta = next((line["eta_s"] for line in reversed(lines) if "eta_s" in line), None)
        if status in ("running", "not ended") and eta is not None:
            where += f"; this stage takes about {log.duration(eta)} more"
    if status == "not ended":
        return f"running or killed{where}"
    return f"{status}{where}"


def evaluations(folder: Path) -> dict:
    """The scores of a run on other data, of eval/DATA/eval.json, as `eval_DATA/test/video_auc`.

    Raises:
        InputError: one of the files is not as --eval writes it.
    """
    scores = {}
    for file in sorted(folder.glob("eval/*/eval.json")):
        with naming(file):
            for name, value in checked(file, "eval.json", read_json(file)).items():
                if name.count("/") == 2:
                    scores[f"eval_{file.parent.name}/{name.split('/', 1)[1]}"] = value
    return scores


class Record:
    """The files of a run directory, as far as they are there.

    Attributes:
        settings: config.json; env: env.json; summary: summary.json, None before the run has ended.
        card: what its script says of itself (common.run.card), with the loss of a guess in each
            stage as `chance`: stage -> (name, loss).
        lines, resumes: of log.jsonl and resumes.jsonl; check: check.json, FAIL and WARN first.
        scores: the summary's metrics, or of a run that goes on the last value of each in the log.
        status: `finished`, `stopped`, ..., `running`, or `not ended` where nobody says.
        state: the same in a sentence, see `state_text`.

    Raises:
        InputError: one of the files is not as a run writes it.
    """

    def __init__(self, folder: Path, status: str | None = None):
        self.folder = Path(folder)
        self.settings = read_part(self.folder, "config.json")
        self.env = read_part(self.folder, "env.json") or {}
        self.summary = read_part(self.folder, "summary.json")
        self.check = read_part(self.folder, "check.json")
        if self.check:
            rank = {"FAIL": 0, "WARN": 1}
            with naming(self.folder / "check.json"):
                self.check["items"].sort(key=lambda item: rank.get(item["status"], 2))
        if self.settings is None:  # --check was there before any run
            self.settings = {"resolved": {}, "card": self.check.get("card")}
            self.env = {"command": self.check["command"]}
            status = "checked, not trained"
        card = NO_CARD | (self.settings.get("card") or {})
        self.card = checked(self.folder / "config.json", "card", card)
        self.lines = self._lines("log.jsonl")
        self.resumes = self._lines(log.RESUMES)
        summary = self.summary if status is None else None
        self.status = status or (summary["status"] if summary else "not ended")
        self.seconds = summary.get("seconds") if summary else None
        with naming(self.folder):
            self.state = state_text(self.status, self.lines, self.settings, self.seconds)
        if summary:
            self.scores = {name: value for name, value in summary.items() if "/" in name}
        else:
            self.scores = {
                name: value
                for line in self.lines
                for name, value in line.items()
                if name.count("/") == 2
            }
        self.scores |= evaluations(self.folder)

    def _lines(self, name: str) -> list[dict]:
        path = self.folder / name
        if not path.exists():
            return []
        with naming(path):
            return [checked(path, "line", line) for line in log.read(self.folder, name)]

    @functools.cached_property
    def curves(self) -> dict[str, dict[str, dict]]:
        return curves_of(self.lines)

    def charts(self, detail: float) -> dict[str, dict[str, str]]:
        with naming(self.folder / "log.jsonl"):
            return charts_of(self.curves, self.lines, self.resumes, self.card, detail)
