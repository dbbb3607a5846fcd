"""Imports point one way: the rooms of `common` from the ground up, `kernels` apart, scripts on top.

The same floors stand in CONTRIBUTING.md, one line a room.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
# From the ground up: a file imports only from floors below its own, and within its floor as long as
# no circle closes. A name without a dot is a file, one that ends with a dot a room.
FLOORS = (
    ("errors", "live"),
    ("rng", "retry", "reading"),
    ("search", "losses", "logistic", "optim", "metrics", "monitor"),
    ("amp", "clustering"),
    ("config",),
    ("run.",),
    ("data.",),
    ("weights", "distill", "features"),
    ("models.",),
    ("longtail", "deep_cluster", "recipe"),
    ("report.",),
    ("linear_eval", "export", "features.__main__"),
    ("check.",),
)
# What a flag asks for and requirements.txt does not hold.
OPTIONAL = {"torch.utils.tensorboard", "torchcodec.decoders"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for package in ("common", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, known) -> set[str]:
    """The modules of ours that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if name in ("common", "kernels") else name.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return {one for one in found if one.split(".")[0] in ("common", "kernels", *SCRIPTS)}


def parse(path: Path, version: tuple[int, int]) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=version)


@pytest.mark.parametrize("package", ["common", "kernels"])
def test_an_older_python_is_refused_in_one_line(package, monkeypatch, capsys):
    # Before anything that an older one could not import: docstring, `import sys`, the question.
    head = parse(Path(package, "__init__.py"), (3, 7)).body[:3]
    assert [type(node) for node in head] == [ast.Expr, ast.Import, ast.If]
    code = compile(ast.Module(head, []), package, "exec")
    exec(code)  # this Python is new enough
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit) as ending:
        exec(code)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert error == "error: Python 3.11 or newer is needed, this is 3.10.13\n"


@pytest.mark.parametrize("script", [*(f"{name}.py" for name in SCRIPTS), "tests/fifth_script.py"])
def test_a_script_asks_for_the_version_first(script):
    docstring, first, *_ = parse(Path(script), (3, 7)).body
    assert ast.unparse(first) == "import common"


MODULES = modules()
ARROWS = {name: imports(name, tree, MODULES) - {name} for name, tree in MODULES.items()}


def floor(name: str) -> int:
    path = name.removeprefix("common.")
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if path == room.rstrip(".") or (room.endswith(".") and path.startswith(room)):
                return number
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS and to CONTRIBUTING.md")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_points_up(name):
    for target in sorted(ARROWS[name]):
        assert target not in SCRIPTS, f"{name} imports the script {target}"
        assert target.split(".")[0] == name.split(".")[0], f"{name} imports {target}"
        if name.startswith("common."):
            assert floor(target) <= floor(name), f"{name} imports {target}, which stands above it"


def test_no_imports_form_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(ARROWS.get(name, ())):
            visit(target)
        done.add(path.pop())

    for name in sorted(MODULES):
        visit(name)


@pytest.mark.parametrize("name", sorted([*MODULES, *SCRIPTS]))
def test_only_optional_packages_are_imported_inside_a_function(name):
    tree = MODULES.get(name) or ast.parse((ROOT / f"{name}.py").read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for imported in names:
                assert imported in OPTIONAL, (
                    f"{name}:{node.lineno} imports {imported} in a function"
                )


def test_importing_the_scripts_does_no_work():
    code = f"import {', '.join(SCRIPTS)}, torch; assert not torch.cuda.is_initialized()"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_kernels_need_torch_and_triton_alone():
    for name, tree in MODULES.items():
        if not name.startswith("kernels.") or name == "kernels.benchmark":
            continue
        for node in ast.walk(tree):
            names = (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for imported in names:
                root = imported.split(".")[0]
                standard = root in sys.stdlib_module_names
                assert standard or root in ("torch", "triton"), f"{name} imports {imported}"
