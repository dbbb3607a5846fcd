"""A run directory as the reports read it."""

import functools
from pathlib import Path

from common.report.curves import charts_of, curves_of
from common.run import log
from common.run.files import read_config, read_json

LIMIT = 1_000_000  # bytes of a report
# Of a run that has none, as those of earlier versions.
NO_CARD = {"about": "", "items": "items", "headlines": {}, "chance": {}}


def interval_text(scores: dict, name: str) -> str:
    """A metric, with its interval or deviation where the run has one.

    As `0.5900 (0.5400 to 0.6300)` or `0.2500 ± 0.0100`.
    """
    value = scores.get(name)
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    stem = name.removesuffix("_last_epoch")
    suffix = name.removeprefix(stem)
    low, high, deviation = (scores.get(f"{stem}_{end}{suffix}") for end in ("low", "high", "sd"))
    if low is not None and high is not None:
        return f"{value:.4f} ({low:.4f} to {high:.4f})"
    if deviation is not None:
        return f"{value:.4f} ± {deviation:.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def state_text(status: str, lines: list[dict], settings: dict, seconds: float | None) -> str:
    """How a run stands, in one sentence: finished, or where it is and how long its stage still
    takes.
    """
    if status == "finished":
        return f"finished after {log.duration(seconds)}"
    where = ""
    if lines:
        last = lines[-1]
        stage = settings["resolved"].get(last["stage"].split("_")[0])
        planned = f" of {stage['epochs']}" if isinstance(stage, dict) else ""
        where = f" in {last['stage']}, step {last['step']}, epoch {last['epoch']}{planned}"
        where += f", after {log.duration(last.get('time', 0))}"
        eta = next((line["eta_s"] for line in reversed(lines) if "eta_s" in line), None)
        if status in ("running", "not ended") and eta is not None:
            where += f"; this stage takes about {log.duration(eta)} more"
    if status == "not ended":
        return f"running or killed{where}"
    return f"{status}{where}"


class Record:
    """The files of a run directory, as far as they are there.

    Attributes:
        settings: config.json; env: env.json; summary: summary.json, None before the run has ended.
        card: what its script says of itself (common.run.card), with the loss of a guess in each
            stage as `chance`: stage -> (name, loss).
        lines, resumes: of log.jsonl and resumes.jsonl; check: check.json.
        scores: the summary's metrics, or of a run that goes on the last value of each in the log.
        status: `finished`, `stopped`, ..., `running`, or `not ended` where nobody says.
    """

    def __init__(self, folder: Path, status: str | None = None):
        self.folder = Path(folder)
        self.settings = read_config(self.folder)
        self.env = read_json(self.folder / "env.json") or {}
        self.summary = read_json(self.folder / "summary.json")
        self.check = read_json(self.folder / "check.json")
        if self.settings is None:  # --check was there before any run
            self.settings = {"resolved": {}, "card": self.check.get("card")}
            self.env = {"command": self.check["command"]}
            status = "checked, not trained"
        self.card = NO_CARD | (self.settings.get("card") or {})
        self.lines = self._lines("log.jsonl")
        self.resumes = self._lines(log.RESUMES)
        summary = self.summary if status is None else None
        self.status = status or (summary["status"] if summary else "not ended")
        self.seconds = summary["seconds"] if summary else None
        if summary:
            self.scores = {name: value for name, value in summary.items() if "/" in name}
        else:
            self.scores = {
                name: value
                for line in self.lines
                for name, value in line.items()
                if name.count("/") == 2
            }

    def _lines(self, name: str) -> list[dict]:
        return log.read(self.folder, name) if (self.folder / name).exists() else []

    @functools.cached_property
    def curves(self) -> dict[str, dict[str, dict]]:
        return curves_of(self.lines)

    def charts(self, detail: float) -> dict[str, dict[str, str]]:
        return charts_of(self.curves, self.lines, self.resumes, self.card, detail)

    @property
    def state(self) -> str:
        return state_text(self.status, self.lines, self.settings, self.seconds)
