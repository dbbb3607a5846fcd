"""Runs started, refused and compared: what the tests of the four scripts share."""

import json
import os
import random
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.run import checkpoint, log


def flags(*parts) -> list[str]:
    """The words of a command line: text that begins with "--" is split, lists are spliced in,
    and anything else is one word.
    """
    words = []
    for part in parts:
        if isinstance(part, (list, tuple)):
            words += part
        elif isinstance(part, str) and part.startswith("--"):
            words += part.split()
        else:
            words.append(str(part))
    return words


def ended(main, argv) -> int:
    """The exit code of main(argv), returned or raised."""
    try:
        return main(argv)
    except SystemExit as ending:
        return ending.code


def refused(main, argv, capsys, *names) -> str:
    """main(argv) ends with code 2 and one line that holds each of `names`: the line."""
    capsys.readouterr()
    code = ended(main, argv)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for name in names:
        assert str(name) in error, error
    return error


def start(script, argv, env=None) -> subprocess.Popen:
    """A script in a process of its own, outside of Slurm."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"OMP_NUM_THREADS": "1"} | (env or {})
    command = [sys.executable, script.__file__, *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def start_ranks(script, argvs, more=None) -> list[subprocess.Popen]:
    """One process of a distributed run for each command line, with `more` environment."""
    env = {"WORLD_SIZE": str(len(argvs)), "MASTER_ADDR": "127.0.0.1"} | (more or {})
    env["MASTER_PORT"] = str(random.randrange(20000, 30000))  # below the ephemeral ones
    return [
        start(script, argv, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, argv in enumerate(argvs)
    ]


def succeed(*processes) -> list[str]:
    """What processes printed that must end with code 0."""
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out)
    return printed


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def next_after(printed: str, folder, card) -> list[str]:
    """The flags of the command that the end of a run says is next.

    The end names the report, and its figures are those of summary.json, each with its baselines.
    """
    result = summary(folder)
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("finished in "))
    assert lines[first].endswith(f": {folder / 'report.html'}")
    titles = [card.headlines[name] for name in card.headlines if name in result]
    values = [result[name] for name in card.headlines if name in result]
    shown = lines[first + 1 : first + 1 + min(len(titles), 3)]
    known = [value for value in result.values() if isinstance(value, (int, float))]
    for line, title, value in zip(shown, titles, values, strict=False):
        text, brackets, beside = line.removeprefix(f"  {title}: ").rpartition(" (")
        assert brackets, line
        assert float(text.split()[0]) == pytest.approx(value, rel=5e-4), line
        numbers = re.findall(r"(?<!\S)[-+]?[\d.]+(?:e[-+]\d+)?(?![\w.])", f"{text} {beside}")
        for number in numbers:
            near = (float(number) == pytest.approx(other, rel=5e-4) for other in known)
            assert any(near) or f"a guess {number}" in line, line
        assert all(len(number.strip("0").replace(".", "")) <= 4 for number in numbers), line
    command = shlex.split(lines[first + 1 + len(shown)].removeprefix("  next: "))
    assert command[:2] == ["python", f"train_{card.name}.py"]
    return command[2:]


def equal_runs(a, b):
    """Every stored tensor, metric, feature and log line of two runs is the same, times and rates
    apart.
    """
    stored = [
        {p.relative_to(f) for name in ("last.pt", "best.pt", "backbone.pt") for p in f.rglob(name)}
        for f in (a, b)
    ]
    assert stored[0] == stored[1] and stored[0]
    for file in stored[0]:
        same(checkpoint.load(a / file), checkpoint.load(b / file), str(file))
    timing = {"seconds", "best_model_path"}
    ours, theirs = ({k: v for k, v in summary(f).items() if k not in timing} for f in (a, b))
    assert ours == theirs
    lines = [
        [{k: v for k, v in line.items() if k not in log.TIMING} for line in log.read(f)]
        for f in (a, b)
    ]
    assert lines[0] == lines[1]
    assert (a / "features.npz").exists() == (b / "features.npz").exists()
    if (a / "features.npz").exists():
        with np.load(a / "features.npz") as x, np.load(b / "features.npz") as y:
            assert x.files == y.files and all(np.array_equal(x[name], y[name]) for name in x.files)


def same(x, y, where=""):
    if isinstance(x, dict):
        assert x.keys() == y.keys(), (where, x.keys() ^ y.keys())
        other_place = {"data"} if where.endswith("/config") else set()  # copies are the same data
        for key in x.keys() - {"seconds"} - other_place:
            same(x[key], y[key], f"{where}/{key}")
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y), where
        for i, pair in enumerate(zip(x, y, strict=True)):
            same(*pair, f"{where}/{i}")
    elif torch.is_tensor(x):
        assert x.dtype == y.dtype and torch.equal(x, y), where
    else:
        assert x == y, where
