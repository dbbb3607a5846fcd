"""What --eval reads and --predict writes."""

import csv
from types import SimpleNamespace

import pytest
import torch

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common.errors import InputError
from common.run import checkpoint, dist
from common.run.files import FORMAT
from common.run.inference import LoadedRun, load_run, names_of_data, predictions_text


def test_predictions_hold_id_class_and_scores():
    scores = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    text = predictions_text(["x,1", "y"], ["cat", "dog"], scores)
    rows = list(csv.reader(text.splitlines()))
    assert rows == [
        ["id", "class", "score_cat", "score_dog"],
        ["x,1", "dog", "0.200000", "0.800000"],
        ["y", "cat", "0.600000", "0.400000"],
    ]


@pytest.mark.parametrize("data", ["there/cells", "sample"])
def test_a_model_whose_data_are_not_here_asks_for_them(data, tmp_path, monkeypatch):
    config = {"data": data}
    state = {"format": FORMAT, "model": {}, "model_spec": {"script": "tsm"}, "config": config}
    file = tmp_path / "m.pt"
    checkpoint.save(file, state)
    args = SimpleNamespace(eval=str(file), predict=None, data=None, out=None, resume="auto")
    if data == "sample":
        assert load_run(args, SimpleNamespace(name="tsm")).path == "sample"
    else:
        with pytest.raises(InputError, match="trained on there/cells.* give --data"):
            load_run(args, SimpleNamespace(name="tsm"))


@pytest.mark.parametrize("script", [train_cluster, train_raer, train_simclr, train_tsm])
def test_data_are_the_runs_own_only_where_none_are_given(script, tmp_path):
    (tmp_path / "own").mkdir()
    config = {"data": str(tmp_path / "own")}
    spec = {"script": script.CARD.name}
    file = tmp_path / "m.pt"
    checkpoint.save(file, {"format": FORMAT, "model": {}, "model_spec": spec, "config": config})
    for given, path in (([], config["data"]), (["--data", "sample"], "sample")):
        args, _ = script.parse_args(["--eval", str(file), *given])
        assert load_run(args, script.CARD).path == path


def state(script="tsm", **spec):
    spec = {"script": script, "stage": "train"} | spec
    return {"format": FORMAT, "model": {}, "model_spec": spec, "epoch": 7}


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["a", "./a/"], "./a/ is the same as a: "),
        (["b", "a/x", "a"], "a/x lies in a, "),
        (["a/x", ".", "b"], "a/x lies in ., "),
        (["a", "sample"], "sample: .* embedded data stand alone"),
    ],
)
def test_paths_that_would_be_answered_twice_are_refused(paths, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "m.pt", state())
    args = SimpleNamespace(eval=None, predict=paths, data="sample", out=None, resume="m.pt")
    with pytest.raises(InputError, match=said):
        load_run(args, SimpleNamespace(name="tsm"))


def test_what_is_read_is_a_path_or_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "m.pt", state())
    args = SimpleNamespace(eval=None, predict=None, data="sample", out=None, resume="m.pt")
    for paths, path in (
        (["a"], "a"),
        (["sample"], "sample"),
        (["a", "ab", "/b", "a/x.zip"], ("a", "ab", "/b", "a/x.zip")),
    ):
        args.predict = paths
        assert load_run(args, SimpleNamespace(name="tsm")).path == path
    args.out = "m.pt"
    with pytest.raises(InputError, match="--out m.pt is a file"):
        load_run(args, SimpleNamespace(name="tsm"))


def test_it_is_said_who_answers_and_how_to_ask_the_others(tmp_path, capsys):
    for stage in ("linear", "finetune"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "best.pt").write_text("")
    world = dist.Dist(0, 1, torch.device("cpu"))
    said = []
    for source in (tmp_path, tmp_path / "linear", tmp_path / "linear" / "best.pt"):
        stage = "finetune" if source == tmp_path else "linear"
        loaded = LoadedRun(state("simclr", stage=stage), str(source), tmp_path, "x")
        loaded.say_who_answers(world, list("abcde"), stages=["linear", "finetune", "gone"])
        said.append(capsys.readouterr().out.splitlines())
    who = "epoch 7, 5 classes: a, b, c and 2 more) answers"
    assert said == [
        [
            f"the classifier of finetune ({tmp_path}, {who}",
            f"--resume {tmp_path}/linear asks that of linear",
        ],
        [f"the classifier of linear ({tmp_path}/linear, {who}"],
        [f"the classifier of linear ({tmp_path}/linear/best.pt, {who}"],
    ]


def test_every_prediction_gets_a_file_of_its_own(tmp_path, capsys):
    world = dist.Dist(0, 1, torch.device("cpu"))
    loaded = LoadedRun(state(), "m.pt", tmp_path, "x")
    for name in ("x", "y"):
        loaded.write_predictions(world, [name], ["a", "b"], torch.eye(2)[:1])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"1 prediction in {tmp_path}/predictions.csv"
    assert second == f"1 prediction in {tmp_path}/predictions-2.csv"
    for file, name in (("predictions.csv", "x"), ("predictions-2.csv", "y")):
        with open(tmp_path / file, newline="") as lines:
            assert [row["id"] for row in csv.DictReader(lines)] == [name]


def test_data_sets_have_names_that_tell_them_apart():
    assert names_of_data(("a/ffpp.zip",)) == ["ffpp"] and names_of_data(("x/df.v1", "x/df.v2")) == [
        "df.v1",
        "df.v2",
    ]
    assert names_of_data(("a/test", "b/test")) == ["a-test", "b-test"]
    assert names_of_data(("x/a", "x/a.zip")) == ["a", "a.zip"]
    with pytest.raises(InputError, match=r"--data a b \./a: one data set is there twice"):
        names_of_data(("a", "b", "./a"))
