"""What a run says at its end: its figures beside what they have to beat, and what to do next."""

import shlex
import sys
from pathlib import Path

from common.errors import aligned, first_few, say
from common.live import digits, duration
from common.run.files import read_config, read_json

_MOST = 3  # figures
_ROWS = 20  # of a search's table
_WIDTH = 100


def is_number(value) -> bool:
    """Whether a value of a summary is one that can be shown: anybody may have changed the file."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) < 1e300


def spread_of(scores: dict, name: str) -> tuple[float, ...]:
    """The ends of a metric's interval, or its deviation alone, where the run has one."""
    stem = name.removesuffix("_last_epoch")
    suffix = name.removeprefix(stem)
    low, high, deviation = (scores.get(f"{stem}_{end}{suffix}") for end in ("low", "high", "sd"))
    if is_number(low) and is_number(high):
        return low, high
    return (deviation,) if is_number(deviation) else ()


def baselines_of(scores: dict, name: str) -> dict[str, float]:
    """What a metric `STAGE/SPLIT/METRIC` of a run has to beat, of the same run or known for any."""
    stage, split, metric = name.split("/")
    of_run = (
        ("raw pixels", f"{stage}_pixels/{split}/{metric}"),
        ("random weights", f"{stage}_random/{split}/{metric}"),
        ("CLIP untrained", f"{stage}/{split}/zero_shot_{metric}"),
        ("CLIP untrained, several texts", f"{stage}/{split}/zero_shot_templates_{metric}"),
        ("majority class", f"{stage}/{split}/majority_{metric}"),
        ("majority class", f"majority{name.removeprefix('linear')}"),
    )
    majority = f"{stage}/{split}/majority_{metric}"
    if stage == "finetune" and scores.get(majority) == scores.get(f"majority/{split}/{metric}"):
        # The linear protocol's, on the same images: the majority class has the same share of both.
        of_run += (
            ("raw pixels", f"linear_pixels/{split}/{metric}"),
            ("random weights", f"linear_random/{split}/{metric}"),
        )
    found = {label: scores[key] for label, key in of_run if is_number(scores.get(key))}
    untrained = {
        key.split("/")[0].removeprefix("kmeans_"): value
        for key, value in scores.items()
        if key.startswith("kmeans_") and key.endswith(f"/{split}/{metric}") and is_number(value)
    }
    if untrained:
        best = max(untrained, key=untrained.get)
        found[f"untrained k-means ({best})"] = untrained[best]
    if metric == "loss_over_chance":
        found["a guess"] = 1.0
    elif metric.endswith("auc"):
        found["a guess"] = 0.5
    return found


def is_baseline(name: str) -> bool:
    """Whether a metric is of what runs have to beat."""
    stage, metric = name.partition("/")[0], name.rpartition("/")[2]
    return (
        stage == "majority"
        or stage.startswith("kmeans_")
        or stage.endswith(("_pixels", "_random"))
        or metric.startswith(("majority_", "zero_shot_"))
    )


def compared(scores: dict, name: str) -> str:
    """The baselines of a metric in words, the hardest first, and which of them it does not beat.

    A gain in accuracy whose paired interval, where the run has one, reaches below 0 is not sure.
    """
    stem = name.removesuffix("accuracy")
    sign = -1 if "/loss" in name else 1
    words = {"worse than ": [], "no better than ": [], "not surely better than ": [], "": []}
    baselines = baselines_of(scores, name)
    for label in sorted(baselines, key=lambda label: sign * baselines[label], reverse=True):
        gain = sign * (scores[name] - baselines[label])
        paired = [spread_of(scores, f"{stem}gain_over_{word}") for word in label.split()]
        beaten = "not surely better than " if any(ends and ends[0] <= 0 for ends in paired) else ""
        kind = "worse than " if gain < 0 else "no better than " if gain == 0 else beaten
        words[kind].append(f"{label} {digits(baselines[label])}")
    parts = [kind + ", ".join(texts) for kind, texts in words.items() if texts]
    return "; ".join(parts) or "no baseline"


def lines(folder: Path, config: dict, summary: dict, report: Path | None = None) -> list[str]:
    """How long a finished run took, where its report is, its figures and the next command.

    Args:
        config, summary: as config.json and summary.json have them.
        report: what was written of it; unset: what is there.
    """
    if report is None:
        report = folder / "report.html"
        if not report.exists():
            again = f"python -m common.report {shlex.quote(str(folder))}"
            report = f"{folder}, without its report.html: {again} writes it again"
    seconds = summary.get("seconds")
    taken = f" in {duration(seconds)}" if is_number(seconds) else ""
    texts = [f"finished{taken}: {report}"]
    titles = config["card"]["headlines"]
    for name in [name for name in titles if is_number(summary.get(name))][:_MOST]:
        spread = spread_of(summary, name)
        shown = ", ".join(map(digits, spread))
        shown = {0: "", 1: f" ± {shown}", 2: f" [{shown}]"}[len(spread)]
        beside = compared(summary, name)
        texts.append(f"  {titles[name]}: {digits(summary[name])}{shown} ({beside})")
    return [*texts, f"  next: {next_command(folder, config, summary)}"]


def next_command(folder: Path, config: dict, summary: dict) -> str:
    """The command to follow a finished run, by the `following` of its script's card."""
    card = config["card"]
    stage = [name for name in card["stages"] if name in config["resolved"]][-1]
    labeled = any("/test/" in name and name in summary for name in card["headlines"])
    words = []
    for word in card.get("following", {}).get(stage, "--predict PATH --resume RUN").split():
        name = word.strip("{}")
        if word == "RUN":
            words.append(str(folder))
        elif word == name:
            words.append(word)
        elif name in config["identity"]:  # as the run was given it
            value = config[name] if labeled or name != "data" else "LABELED"
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(["python", script_of(card), *words])


def script_of(card: dict) -> str:
    """The path of a script, as it was called where this process is of it."""
    name = f"train_{card['name']}.py"
    return sys.argv[0] if Path(sys.argv[0]).name == name else name


def search_lines(trials: list[tuple[int, list[str], Path | None]], argv: list[str]) -> list[str]:
    """The trials of a search as a table, the best first, and the commands of the best one.

    Args:
        trials: of each its number, the flags that it has drawn with their values, and its
            directory.
        argv: the flags that all of them share.
    """
    rows = []
    for number, flags, folder in trials:
        summary = (folder and read_json(folder / "summary.json", say=say)) or {}
        status = summary.get("status", "not trained")
        value = summary.get("best_value") if status == "finished" else None
        rows.append((value if is_number(value) else None, number, status, flags, folder, summary))
    lowest = any(row[-1].get("best_is") == "lowest" for row in rows)
    rows.sort(key=lambda row: (row[0] is None, (row[0] or 0) * (1 if lowest else -1), row[1]))
    header = ["trial", "status", "best_value", *(flag[2:] for flag in rows[0][3][::2])]
    cells = [
        [number, status, "-" if value is None else digits(value), *flags[1::2]]
        for value, number, status, flags, *_ in rows[:_ROWS]
    ]
    for count in range(len(header), 2, -1):
        table = aligned([row[:count] for row in [header, *cells]]).split("\n")
        if max(map(len, table)) <= _WIDTH:
            break
    left_out = header[count:] + [f"trial {row[1]}" for row in rows[_ROWS:]]
    texts = [f"best first, by the {'lowest' if lowest else 'highest'} best_value:"]
    texts += [f"  {line}" for line in table]
    if left_out:
        texts.append(f"  left out here: {first_few(left_out)}")
    value, number, status, flags, folder, summary = rows[0]
    if value is None:
        hint = ": lower the high ends of --ranges" if status == "diverged" else ""
        return [*texts, f"no trial has finished{hint}"]
    config = read_config(folder)
    command = shlex.join(["python", script_of(config["card"]), *argv, *flags])
    return [
        *texts,
        f"best: trial {number}, {folder}; its settings as a run without --search:",
        f"  {command}",
        f"  next: {next_command(folder, config, summary)}",
    ]
