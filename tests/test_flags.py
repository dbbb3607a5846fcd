"""The flags of all four scripts: what --help shows, other spellings, and hints for unknown ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import config
from common.data.cytology import CELLS
from tests.runs import flags

SCRIPTS = {
    "simclr": train_simclr,
    "tsm": train_tsm,
    "raer": train_raer,
    "cluster": train_cluster,
}
# A value of each flag that is not its default; True stands for a switch.
SHARED = {
    "--bad-images": ("--on-bad-item", "skip"),
    "--batch-size": ("--bs", 8),
    "--fork": ("--force-resume", True),
    "--learning-rate": ("--lr", 0.25),
    "--lr-scheduler": ("--lr-schedule", "constant"),
    "--output-dir": ("--out", "somewhere"),
    "--weight-decay": ("--wd", 0.125),
}
OWN = {
    "simclr": {"--cell": ("--grid-index", 3)},
    "tsm": {},
    "raer": {},
    "cluster": {
        "--choose": ("--select-epoch", "last"),
        "--delta": ("--select-growth", 0.25),
        "--direction": ("--density", "largest"),
        "--inputs": ("--input-weighting", "raw"),
        "--lengths": ("--last-step", "padded"),
        "--metric": ("--distance", "euclidean"),
        "--min-share": ("--min-select-share", 0.25),
        "--only": ("--modalities", "text,timing"),
        "--thres": ("--select-share", 0.25),
    },
}
ALIASES = [
    (script, old, flag, value)
    for script in SCRIPTS
    for old, (flag, value) in (SHARED | OWN[script]).items()
]


def parser_of(script: str) -> config.Parser:
    return SCRIPTS[script].parse_args([])[1]


def help_of(script: str, capsys) -> str:
    with pytest.raises(SystemExit) as ending:
        SCRIPTS[script].parse_args(["--help"])
    assert ending.value.code == 0
    return capsys.readouterr().out


def flag_help(text: str, flag: str) -> str:
    """What --help says of one flag, on one line."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {flag} "))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" " * 8))
    return " ".join(" ".join(lines[start:end]).split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_alias_is_in_these_tables(script):
    expected = {old: flag for old, (flag, _) in (SHARED | OWN[script]).items()}
    assert parser_of(script).aliases == expected


@pytest.mark.parametrize(("script", "old", "flag", "value"), ALIASES)
def test_an_alias_means_its_flag_on_the_command_line(script, old, flag, value):
    parser = parser_of(script)
    given = [] if value is True else [str(value)]
    args = parser.parse_args([flag, *given])
    assert args != parser.parse_args([])
    assert parser.parse_args([old, *given]) == args
    if value is not True:
        assert parser.parse_args([f"{old}={value}"]) == args


@pytest.mark.parametrize("suffix", ["json", "toml"])
@pytest.mark.parametrize(("script", "old", "flag", "value"), ALIASES)
def test_an_alias_means_its_flag_in_a_config_file(script, old, flag, value, suffix, tmp_path):
    file = tmp_path / f"flags.{suffix}"
    parser = parser_of(script)
    typed = parser.parse_args([flag] if value is True else [flag, str(value)])
    literal = json.dumps(value)
    for spelling in (flag, old, old.replace("-", "_")):
        name = spelling.strip("-_")
        file.write_text(f"{name} = {literal}\n" if suffix == "toml" else f'{{"{name}": {literal}}}')
        args = config.parse(parser, ["--config", str(file)], {})
        assert vars(args) | {"config": None} == vars(typed)


def test_an_alias_reaches_the_script_as_its_flag(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text("cell = 3\n")
    for argv in (["--cell", "3"], ["--cell=3"], ["--config", str(file)]):
        args, _ = train_simclr.parse_args(argv)
        assert args.grid_index == 3
        assert args.backbone == CELLS[3]["backbone"]
    file.write_text("thres = 0.5\ndelta = 0.25\nmode = 'umc'\n")
    args, _ = train_cluster.parse_args(["--config", str(file)])
    typed, _ = train_cluster.parse_args(flags("--mode umc --select-share 0.5 --select-growth 0.25"))
    assert vars(args) | {"config": None} == vars(typed)


def test_help_names_no_alias_but_those_of_the_published_procedure(capsys):
    for script in SCRIPTS:
        text = help_of(script, capsys)
        shown = {old for old in SHARED | OWN[script] if f"{old} " in text or f"{old}\n" in text}
        assert shown == ({"--thres", "--delta"} if script == "cluster" else set()), script
    text = help_of("cluster", capsys)
    assert "--thres" in flag_help(text, "--select-share")
    assert "--delta" in flag_help(text, "--select-growth")


EXPECTED_DEFAULTS = {
    "simclr": {
        "--epochs": "100; linear 100; finetune 50",
        "--bs": "256",
        "--lr": "lars 1.2 * sqrt(bs / 256), sgd 0.05 * bs / 256, adamw 0.001; linear 0.2;"
        " finetune 0.0001",
        "--wd": "0.0001; linear 0.0; finetune 0.0001",
        "--linear-wd": "0.0",
        "--seed": "0",
    },
    "tsm": {
        "--epochs": "30",
        "--bs": "64",
        "--lr": "0.0003",
        "--wd": "0.01",
        "--seed": "0",
    },
    "raer": {
        "--epochs": "60",
        "--bs": "32",
        "--lr": "0.01",
        "--wd": "0.0001",
        "--warmup-epochs": "0.0",
        "--seed": "0",
    },
    "cluster": {
        "--epochs": "3; umc 100",
        "--bs": "512; umc 128",
        "--lr": "3e-05; umc 2e-05",
        "--wd": "0.01",
        "--cluster-epochs": "12; umc (1 - select-share) / select-growth",
        "--cluster-lr": "3e-05; umc 0.0002",
        "--smoothing": "0.1; umc 0.0",
        "--neighbors": "0.04; umc 0.0",
        "--seed": "0",
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_defaults_that_everybody_looks_for(script, capsys):
    text = help_of(script, capsys)
    for flag, default in EXPECTED_DEFAULTS[script].items():
        assert f"(default: {default})" in flag_help(text, flag)


def test_the_learning_rate_that_help_shows_is_the_one_that_is_used():
    for optimizer, factor in (("lars", 1.2 * (64 / 256) ** 0.5), ("sgd", 0.05 * 64 / 256)):
        args, _ = train_simclr.parse_args(["--bs", "64", "--optimizer", optimizer])
        assert train_simclr.settings(args)["pretrain"].lr == pytest.approx(factor)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_examples_and_speaks_of_one_script(script, capsys):
    text = help_of(script, capsys)
    lines = text.splitlines()
    assert lines[0] == f"usage: python train_{script}.py [flags]"
    assert text.index("--demo") < text.index("options:")
    assert not any(f"train_{other}" in text for other in SCRIPTS if other != script)
    for action in parser_of(script)._actions:
        assert action.help, action.dest


def test_help_hides_flags_that_the_script_refuses(capsys):
    assert "--impl" not in help_of("raer", capsys)
    text = help_of("cluster", capsys)
    for flag in ("--accum", "--ensemble", "--eval-every", "--on-bad-item", "--teacher"):
        assert flag not in text


# A flag that is not here, and what the error names instead.
ELSEWHERE = [
    ("--model", "--backbone"),
    ("--arch", "--backbone"),
    ("--num-workers", "--workers"),
    ("--num_workers", "--workers"),
    ("--gpus", "--device; torchrun starts one process for each GPU"),
    ("--fp16", "--precision fp16"),
    ("--amp", "--precision"),
    ("--grad-clip", "--clip-grad"),
    ("--max-grad-norm", "--clip-grad"),
    ("--max-epochs", "--epochs"),
    ("--max_epochs", "--epochs"),
    ("--warmup-steps", "--warmup-epochs"),
    ("--checkpoint", "--resume PATH, or --eval CHECKPOINT"),
    ("--data-dir", "--data"),
    ("--data-path", "--data"),
    ("--pretrained", "--weights FILE"),
    ("--output", "--out"),
    ("--log-interval", "--log-every"),
    ("--img-size", "--image-size"),
    ("--batch_size", "--bs"),
    ("--opt", "--optimizer"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flag", "hint"), ELSEWHERE)
def test_a_flag_of_another_project_names_ours(script, flag, hint, capsys):
    ours = hint.split()[0].strip(",;")
    known = ours in parser_of(script).flags()
    assert known or (script, ours) in {
        ("cluster", "--backbone"),
        ("cluster", "--weights"),
        ("cluster", "--image-size"),
        ("cluster", "--optimizer"),
        ("tsm", "--optimizer"),
    }
    for argv in ([flag, "3"], [f"{flag}=3"]):
        with pytest.raises(SystemExit) as ending:
            SCRIPTS[script].parse_args(argv)
        error = capsys.readouterr().err
        assert ending.value.code == 2
        assert error.startswith(f"error: unknown flag {flag}")
        assert error.count("\n") == 1
        assert (f"; here it is {hint} (see --help)" in error) == known
        assert known or ours not in error


def test_no_hint_is_a_flag_that_the_script_refuses(capsys):
    for flag in ("--patience", "--worker", "--ensembles"):
        with pytest.raises(SystemExit):
            train_cluster.parse_args([flag, "3"])
        error = capsys.readouterr().err
        assert error.startswith(f"error: unknown flag {flag}")
        assert all(f"mean --{name}?" not in error for name in ("teacher", "workers", "ensemble"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_no_flag_at_all_says_why(script, capsys):
    for flag, reason in (("--momentum", "fixed"), ("--num-classes", "counted in the data")):
        with pytest.raises(SystemExit):
            SCRIPTS[script].parse_args([flag, "3"])
        error = capsys.readouterr().err
        assert reason in error
        assert "here it is" not in error
        assert "did you mean" not in error


def test_every_name_of_another_project_leads_to_a_flag_of_some_script():
    known = {flag for script in SCRIPTS for flag in parser_of(script).flags()}
    for name, ours in config.NAMES_ELSEWHERE.items():
        assert name not in known
        assert ours.split()[0].strip(",;") in known, name


def test_a_config_file_gets_the_same_hints(tmp_path, capsys):
    file = tmp_path / "flags.toml"
    file.write_text("max_epochs = 3\n")
    with pytest.raises(SystemExit):
        train_tsm.parse_args(["--config", str(file)])
    assert "unknown flag 'max_epochs'; here it is --epochs" in capsys.readouterr().err


def test_help_imports_little_beyond_torch_and_torchvision():
    """What costs time at the start is what is imported."""
    code = (
        "import sys, torch, torchvision\n"
        "before = set(sys.modules)\n"
        "import train_simclr\n"
        "try:\n"
        "    train_simclr.parse_args(['--help'])\n"
        "except SystemExit:\n"
        "    print(*(set(sys.modules) - before), file=sys.stderr)\n"
    )
    root = Path(__file__).parents[1]
    ending = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ending.returncode == 0, ending.stderr
    packages = {name.split(".")[0] for name in ending.stderr.split()} - sys.stdlib_module_names
    assert packages == {"common", "kernels", "train_simclr", "PIL"}  # which torchvision needs
