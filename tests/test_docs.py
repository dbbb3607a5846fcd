"""README and docs are true: links lead somewhere, flags exist, command lines parse."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_simclr
from common import export
from common.check.runner import chosen_items
from common.data.open import open_images
from tests import pages
from tests.data import cells_tree, read_pixels
from tests.runs import flags, summary

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# By page, without what programs print (```text): running text and blocks of code by turns.
PARTS = {
    page: re.split(
        r"^```.*\n",
        re.sub(r"^```text\n.*?^```\n", "", page.read_text(), flags=re.MULTILINE | re.DOTALL),
        flags=re.MULTILINE,
    )
    for page in PAGES
}
PROSE = {page: "\n".join(parts[::2]) for page, parts in PARTS.items()}
TOOLS = [
    "common.data.__main__", "common.data.benchmark", "common.features.__main__",
    "common.report.__main__", "kernels.benchmark", "tests.test_kernels_aot",
    "tests.torture",
]  # fmt: skip
OF_OTHERS = {  # sbatch, srun and pip
    "--index-url", "--account", "--gres",
    "--array", "--dependency", "--open-mode", "--parsable", "--partition",
    "--pty", "--requeue", "--signal", "--time",
}  # fmt: skip
# Bash expands the loops of a page. Nothing runs: there is no PATH, and what would start Python
# writes its words to file descriptor 3 instead.
STUBS = """
exec 3>&1 >/dev/null 2>&1
PATH= SLURM_ARRAY_TASK_ID=0 SLURM_CPUS_PER_TASK=1
python() { printf '%s\\t' "$@" >&3; echo >&3; }
exec() { "$@"; }
srun() { while [[ $1 == -* ]]; do shift; done; "$@"; }
sbatch() { while [[ $1 == -* ]]; do shift; done; . "$@"; }
"""


@cache
def flags_of(module: str) -> set[str]:
    """The flags that a script's or a tool's --help lists, so without hidden aliases."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return {"--help", *re.findall(r"^  (--[\w-]+)", shown.getvalue(), re.MULTILINE)}


def commands() -> list[list[str]]:
    """The words of each Python command in the blocks and in the running text of the pages."""
    programs = []
    for page, parts in PARTS.items():
        programs += [block for block in parts[1::2] if re.search(r"\b(python|sbatch) ", block)]
        for span in re.findall(r"`((?:python )?train_[a-z]+\.py\s+--[^`]*)`", PROSE[page]):
            programs.append(f"python {span.removeprefix('python ')}".replace("\n", " "))
    lines = []
    for program in programs:
        done = subprocess.run(["bash", "-c", STUBS + program], cwd=ROOT, stdout=subprocess.PIPE)
        assert done.returncode != 2, f"bash cannot read {program}"
        lines += done.stdout.decode().splitlines()
    return [line.rstrip("\t").split("\t") for line in dict.fromkeys(lines)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", PROSE[page]):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
        assert not anchor or anchor in slugs, f"{target}#{anchor}"
    for path in re.findall(r"`((?:common|kernels|tests|slurm|docs)/[\w./]*)`", PROSE[page]):
        assert (ROOT / path).exists(), path


def test_every_flag_is_known_to_some_parser():
    known = OF_OTHERS.union(*map(flags_of, [*pages.SCRIPTS, *TOOLS]))
    for page, prose in PROSE.items():
        if page.name == "flags.md":  # the parsers' own words, which name other projects' flags
            continue
        assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) - known, page


def test_the_page_of_flags_says_what_the_parsers_do():
    page = (ROOT / "docs" / "flags.md").read_text()
    assert page == pages.flags_page(), "python -m tests.pages flags writes it anew"


def test_every_command_line_parses():
    lines = commands()
    assert len(lines) > 100
    for program, *words in lines:
        module = words.pop(0) if program == "-m" else program.removesuffix(".py")
        module = module.replace("tests.benchmark_", "train_")
        module = module + ".__main__" if f"{module}.__main__" in TOOLS else module
        flags = {word for word in words if word.startswith("--")}
        assert flags <= flags_of(module), (program, words)
        if module in pages.SCRIPTS and "--help" not in words:
            importlib.import_module(module).parse_args(words)


def test_items_of_check_exist():
    for page in PAGES:
        for names in re.findall(r"--check\s+([a-z][a-z,-]+)", page.read_text()):
            assert chosen_items(names)


def test_every_paper_that_the_code_names_is_listed():
    files = [path for room in ("common", "kernels") for path in (ROOT / room).rglob("*.py")]
    texts = [path.read_text() for path in [*files, *ROOT.glob("train_*.py"), *PAGES]]
    named = set(re.findall(r"arXiv:\d{4}\.\d{5}", " ".join(texts)))
    assert len(named) > 40
    assert not named - set(re.findall(r"arXiv:\S+", (ROOT / "docs" / "references.md").read_text()))


@pytest.mark.parametrize("script", pages.SCRIPTS)
def test_what_a_search_draws_is_listed(script):
    table = (ROOT / "docs" / "check.md").read_text().split("| script | ranges |")[1]
    row = next(line for line in table.splitlines() if line.startswith(f"| `{script}.py` |"))
    search = importlib.import_module(script).SEARCH
    for ranges in [search] if "lr" in search else search.values():
        for name, (low, high) in ranges.items():
            assert f"`--{name.replace('_', '-')}`" in row
            assert f"{low:g} to {high:g}".replace("e-0", "e-") in row, (name, low, high)


@pytest.mark.e2e
def test_the_snippets_on_a_run_s_products_work(tmp_path, monkeypatch):
    data, run = cells_tree(tmp_path / "cells", per_class=12), tmp_path / "run"
    argv = flags(
        "--backbone resnet18 --stem cifar --image-size 16 --device cpu --stage all --bs 8",
        "--epochs 2 --finetune-bs 8 --finetune-epochs 2",
    )
    assert train_simclr.main(flags(argv, "--data", data, "--out", run)) == 0
    assert train_simclr.main(flags("--predict", data, "--resume", run, "--device cpu")) == 0
    assert export.main([str(run), str(run / "model.pt2")]) == 0
    monkeypatch.chdir(run)
    sent = []
    wandb = SimpleNamespace(init=lambda **about: SimpleNamespace(log=sent.append, about=about))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    page = ROOT / "docs" / "products.md"
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 6
    names: dict = {}
    for snippet in snippets:
        if "tensorboard" not in snippet or find_spec("tensorboard"):
            exec(snippet, names)

    images = open_images(str(data))
    pixels = read_pixels(images, range(len(images)))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        features = names["model"].eval()((pixels / 255 - mean) / std)
    np.testing.assert_allclose(features, names["rows"], rtol=1e-4, atol=1e-4)
    labeled = zip(names["ids"][names["train"]], names["train_names"], strict=True)
    assert all(id.split("/")[0] == name for id, name in labeled)
    assert len(names["train_rows"]) == len(names["train_names"]) > 20
    scores = names["program"](pixels)
    classes = names["facts"]["classes"]
    assert names["first"] == (images.ids[0], classes[int(scores[0].argmax())])
    wanted = dict(zip(classes, scores[0].tolist(), strict=True))
    assert names["scores"] == pytest.approx(wanted, abs=1e-5)
    assert len(names["answers"]) == 5 and set(names["answers"]) <= set(classes)
    assert [epoch for epoch, _ in names["curve"]] == [1, 2]
    result = summary(run)
    assert sent == names["values"]
    logged = {name: value for line in sent for name, value in line.items()}
    assert logged["finetune/test/accuracy"] == result["finetune/test/accuracy"]
    assert {"pretrain/loss", "finetune/lr", "linear/step"} <= logged.keys()
    assert not find_spec("tensorboard") or list((run / "board").iterdir())
