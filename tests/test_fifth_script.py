"""A script that the project has never seen runs, resumes, reports and evaluates without an edit in
`common`; and `common` names no script of its own.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_tsm
from tests.runs import equal_runs, refused, summary

ROOT = Path(__file__).resolve().parents[1]
# The modules of one task, which may name their script.
OF_ONE_TASK = re.compile(
    r"common/(data/(cytology|faceforensics|raer|utterances)|models/(raer|tsm|umc)|deep_cluster"
    r"|features/__main__|longtail|report/cluster(s|_analysis))\.py"
)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A function that starts the script, in a folder that is not the project's, with flags."""
    folder = tmp_path_factory.mktemp("elsewhere")
    file = folder / "train_fifth.py"
    shutil.copy(ROOT / "tests" / "fifth_script.py", file)

    def start(*flags):
        command = [sys.executable, str(file), *map(str, flags), "--device", "cpu"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


@pytest.mark.e2e
def test_a_fifth_script_runs_resumes_reports_and_evaluates(script, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script("--out", whole)
    script("--out", cut, "--max-steps", "7")
    assert "resuming from step 7" in script("--out", cut)
    equal_runs(whole, cut)
    found = summary(whole)
    assert found["status"] == "finished"
    # The largest class holds a sixth; pixels tell the classes only partly apart, on purpose.
    assert found["train/test/accuracy"] > 0.25
    page = (whole / "report.html").read_text()
    assert "Which class is an image of" in page and "accuracy on the test split" in page
    assert "images a second" in page and "a guess" in page
    script("--eval", whole)
    scores = json.loads((whole / "eval.json").read_text())
    assert scores["eval/test/accuracy"] == found["train/test/accuracy"]
    assert "already finished" in script("--out", whole)


@pytest.mark.e2e
def test_its_run_is_not_taken_for_another_script_s(script, tmp_path, capsys):
    script("--out", tmp_path / "run", "--max-steps", "1")
    refused(train_tsm.main, ["--eval", str(tmp_path / "run" / "last.pt")], capsys, "train_fifth.py")


@pytest.mark.parametrize("file", sorted((ROOT / "common").rglob("*.py")), ids=lambda f: f.stem)
def test_common_names_no_script(file):
    name = file.relative_to(ROOT).as_posix()
    if OF_ONE_TASK.fullmatch(name):
        return
    source = file.read_text()
    texts = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)]
    assert not {"simclr", "tsm", "raer", "cluster"} & {t for t in texts if isinstance(t, str)}
    assert not re.search(r"train_(simclr|tsm|raer|cluster)\.py", source)
