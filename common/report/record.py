"""A run directory as the reports read it."""

import functools
from pathlib import Path

from common.report.curves import charts_of, curves_of
from common.run import log
from common.run.files import read_json

LIMIT = 1_000_000  # bytes of a report
HEADLINES = {
    "finetune/test/accuracy": "accuracy on the test split, fine-tuned",
    "linear/test/accuracy": "accuracy on the test split, linear layer on frozen features",
    "pretrain/test/knn_accuracy": "kNN accuracy on the test split",
    "train/test/video_auc": "AUC of the test videos",
    "train/test/video_accuracy": "accuracy on the test videos",
    "train/test/uar": "UAR on the test clips",
    "train/test/war": "WAR on the test clips",
    "cluster/test/nmi": "NMI with the test labels",
    "cluster/test/acc": "accuracy of the clusters, matched to labels",
    "cluster/train/stability": "stability of the clusters, last epoch",
    "pretrain/train/loss_over_chance": "contrastive loss over its chance level",
}


def interval_text(scores: dict, name: str) -> str:
    """A metric with its interval or deviation where the run has one: `0.59 (0.54 to 0.63)`, `0.25 ±
    0.01`.
    """
    value = scores.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-" if value is None else str(value)
    stem, last = (
        (name.removesuffix("_last_epoch"), "_last_epoch")
        if name.endswith("_last_epoch")
        else (name, "")
    )
    low, high, spread = (scores.get(f"{stem}_{end}{last}") for end in ("low", "high", "sd"))
    if low is not None and high is not None:
        return f"{value:.4f} ({low:.4f} to {high:.4f})"
    return (
        f"{value:.4f} ± {spread:.4f}"
        if spread is not None
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )


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
        where += f", after {log.duration(last['time'])}"
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
        lines, resumes: of log.jsonl and resumes.jsonl; check: check.json.
        scores: the summary's metrics, or of a run that goes on the last value of each in the log.
        status: `finished`, `stopped`, ..., `running`, or `not ended` where nobody says.
    """

    def __init__(self, folder: Path, status: str | None = None):

        self.folder = Path(folder)
        self.settings, self.env, self.summary, self.check = (
            read_json(self.folder / f"{name}.json")
            for name in ("config", "env", "summary", "check")
        )
        if self.settings is None:  # --check was there before any run
            self.settings = {"resolved": {"script": self.check["script"]}}
            self.env, status = {"command": self.check["command"]}, "checked, not trained"
        self.env = self.env or {}
        self.lines, self.resumes = (
            log.read(self.folder, name) if (self.folder / name).exists() else []
            for name in ("log.jsonl", log.RESUMES)
        )
        ended = self.summary if status is None else None
        self.status = status or (ended["status"] if ended else "not ended")
        self.scores = {
            name: value
            for line in self.lines
            for name, value in line.items()
            if name.count("/") == 2
        }
        if ended:
            self.scores = {name: value for name, value in ended.items() if "/" in name}
        self.seconds = ended["seconds"] if ended else None

    @functools.cached_property
    def curves(self) -> dict[str, dict[str, dict]]:
        return curves_of(self.lines)

    def charts(self, detail: float) -> dict[str, dict[str, str]]:
        return charts_of(self.lines, self.settings, self.resumes, detail, self.curves)

    @property
    def state(self) -> str:
        return state_text(self.status, self.lines, self.settings, self.seconds)
