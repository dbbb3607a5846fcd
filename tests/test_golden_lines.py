"""The lines that users meet most, word for word; other tests assert codes, names and numbers."""

import errno
import re

import pytest

import train_cluster
from common.errors import AuditFailed, Diverged, InputError, Stopped, exit_codes, plural
from common.run.files import FORMAT, check_format
from tests.data import utterances_npz
from tests.runs import ended, flags

SMALL = flags(
    "--device cpu --base-dim 16 --bs 32 --epochs 2 --cluster-bs 32",
    "--cluster-epochs 3 --seed 3 --log-every 1",
)
AGAIN = "Run the same command again: it resumes from the last checkpoint"


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return utterances_npz(tmp_path_factory.mktemp("data") / "acts.npz")


def printed(argv, capsys, code=0):
    """The lines of a run on stdout and on stderr."""
    capsys.readouterr()
    assert ended(train_cluster.main, argv) == code
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def holds(lines, pattern):
    """One of the lines is, from end to end, what the pattern says."""
    assert any(re.fullmatch(pattern, line) for line in lines), "\n".join([pattern, *lines])


@pytest.mark.e2e
def test_lines_of_a_run_that_stops_goes_on_and_finishes(acts, tmp_path, capsys):
    folder = re.escape(str(tmp_path / "run"))
    argv = flags(SMALL, "--data", acts, "--out", tmp_path / "run")
    out, err = printed([*argv, "--max-steps", "3"], capsys)
    holds(out, rf"run directory {folder}; device cpu, 1 process, .*")
    holds(
        out,
        r"pretrain step 1/8 \| loss \d\.\d+ \| lr 3e-05 \| grad_norm \d+\.\d+"
        r" \| [\d.]+ utterance/s \| eta \S+",
    )
    out, err = printed(argv, capsys)
    holds(out, r"pretrain: resuming from step 3, epoch 1")
    holds(out, rf"finished in \d+s: {folder}/report\.html")
    holds(
        out,
        r"  NMI with the test labels: [\d.]+ \(((worse|no better) than )?untrained k-means \(\w+\)"
        r" [\d.]+\)",
    )
    following = f"  next: python train_cluster.py --predict PATH --resume {tmp_path / 'run'}"
    assert following in out
    ending = out[-5:]
    out, err = printed(argv, capsys)
    again = "already finished; --resume none starts anew"
    more = f", --resume {tmp_path / 'run'} --epochs MORE trains on"
    assert out[-6:] == [*ending, again + more] and err == []
    (tmp_path / "run" / "report.html").unlink()
    out, err = printed(argv, capsys)
    lost = f"without its report.html: python -m common.report {folder} writes it again"
    holds(out, rf"finished in \d+s: {folder}, {lost}")
    out, err = printed([*argv, "--seed", "4"], capsys, code=2)
    assert err == [
        f"error: {tmp_path / 'run'} holds another run: seed is 3 there and 4 here. Another --out,"
        f" --resume {tmp_path / 'run'} for more epochs, or --force-resume"
    ]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--bachsize 3", "unknown flag --bachsize"),
        ("--mode ums", "did you mean umc?"),
        ("--data nowhere.npz", "no such file or folder"),
        ("--accum 2", "--accum has no effect"),
    ],
)
def test_lines_of_what_is_refused(argv, line, capsys):
    out, err = printed(flags(argv), capsys, code=2)
    assert len(err) == 1 and err[0].startswith("error: ") and line in err[0]


@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        (InputError("--k 0: at least 1"), 2, "error: --k 0: at least 1"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: No space left on device; make room and run the same command again",
        ),
        (Diverged("the loss is not finite"), 3, "diverged: the loss is not finite"),
        (AuditFailed("head.bias is dead"), 4, "audit failed: head.bias is dead"),
        (Stopped(f"stopped. {AGAIN}", 75), 75, f"stopped. {AGAIN}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_ending_has_its_code_and_its_line(ending, code, line, capsys):
    with pytest.raises(SystemExit) as ended_with, exit_codes():
        raise ending
    assert ended_with.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_the_line_of_another_format():
    with pytest.raises(InputError) as refusal:
        check_format({}, "runs/simclr/x")
    assert str(refusal.value) == (
        f"runs/simclr/x is of run format 1, this version reads and writes format {FORMAT}: use"
        " the version that wrote it (CHANGELOG.md), or start anew with another --out"
    )


def test_counts_have_their_nouns():
    counted = [plural(1, "video"), plural(2, "epoch"), plural(3, "modality"), plural(2, "batch")]
    assert counted == ["1 video", "2 epochs", "3 modalities", "2 batches"]
