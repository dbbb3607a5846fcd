"""train_cluster.py as its users run it, and the pieces of common.discovery and common.models.umc
that it is made of.
"""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_cluster
from common import clustering, deep_cluster
from common.data import synthetic
from common.models import umc
from common.monitor import Monitor
from common.run import checkpoint, log
from common.run.loop import Batch
from common.run.progress import Progress
from tests.data import WORDS, utterance_arrays, utterances_npz, utterances_tsv
from tests.runs import equal_runs, flags, same, summary

SMALL = flags(
    "--device cpu --base-dim 16 --bs 32 --epochs 2 --cluster-bs 32",
    "--cluster-epochs 3 --seed 3 --log-every 1",
)


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return utterances_npz(tmp_path_factory.mktemp("data") / "acts.npz")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return utterances_tsv(tmp_path_factory.mktemp("text") / "acts.tsv")


@pytest.fixture(scope="module")
def whole(acts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_cluster.main([*SMALL, "--data", str(acts), "--out", str(folder)]) == 0
    return folder


def refused(argv, capsys):
    with pytest.raises(SystemExit) as ending:
        train_cluster.main(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_run_leaves_what_the_readme_promises(whole, acts, capsys):
    result = summary(whole)
    for metric in ("nmi", "ami", "ari", "acc", "fmi", "balanced_accuracy", "minority_recall"):
        assert (
            -1 <= result[f"cluster/test/{metric}"] <= 1 and result[f"cluster/test/{metric}_sd"] >= 0
        )
        assert (
            f"kmeans_text/test/{metric}" in result
            and f"kmeans_concatenation/test/{metric}" in result
        )
    assert result["status"] == "finished" and result["cluster/test/nmi"] > 0.8
    epochs = [line for line in log.read(whole) if "cluster/train/stability" in line]
    assert [line["cluster/train/threshold"] for line in epochs] == pytest.approx([0.1, 0.15, 0.2])
    assert {line["cluster/train/floor"] for line in epochs} == {
        round(0.1 * 136 / 4)
    }  # 24 of 160 are held out
    keys = (
        "best_performance",
        "performance_trend",
        "stability_score",
        "total_improvements",
        "total_degradations",
    )
    assert all(f"cluster/monitor/{key}" in epochs[0] for key in keys)
    rows = list(csv.DictReader((whole / "clusters.csv").open()))
    assert len(rows) == 160 and {row["cluster"] for row in rows} == {"0", "1", "2", "3"}
    assert sum(row["split"] == "test" for row in rows) == 24
    assert all(0 <= float(row["confidence"]) <= 1 and float(row["distance"]) >= 0 for row in rows)
    tables = json.loads((whole / "tables.json").read_text())
    assert {
        "Clusters",
        "Monitor",
        "Weights of the modalities",
        "Seconds of each stage",
    } <= tables.keys()
    scores = tables["Test scores, mean and deviation of k-means seeds"]["rows"]
    assert [row[0] for row in scores] == [
        "this run",
        *(f"plain k-means, {name}" for name in ("text", "room", "audio", "concatenation")),
        "this run, last epoch",
    ]
    pair = (
        f"{result[f'cluster/test/{name}']:.3f}"
        for name in ("minority_recall", "minority_recall_sd")
    )
    assert scores[0][-1] == " ± ".join(pair)
    counts = np.array([row[2:] for row in tables["Clusters and labels, test"]["rows"]])
    assert counts.shape == (4, 4) and counts.sum() == 24
    page = (whole / "report.html").read_text()
    assert "nearest to the center" in page and page.count("h0") > 100  # the scatter is in it
    capsys.readouterr()
    assert train_cluster.main([*SMALL, "--data", str(acts), "--out", str(whole)]) == 0
    assert "has finished" in capsys.readouterr().out


def test_labels_enter_neither_weights_nor_clusters(whole, acts, tmp_path):
    """With permuted labels, and with none, every stored weight and every cluster is bitwise the
    same.
    """
    found = utterance_arrays()
    found["label"] = np.random.default_rng(1).permutation(found["label"])
    np.savez(tmp_path / "permuted.npz", **found)
    np.savez(
        tmp_path / "bare.npz",
        **{name: x for name, x in found.items() if name not in ("label", "classes")},
    )
    for name, more in (("permuted", []), ("bare", ["--k", "4"])):
        folder = tmp_path / name
        assert (
            train_cluster.main(flags(SMALL, more, "--data", f"{folder}.npz", "--out", folder)) == 0
        )
        for stage in ("pretrain", "cluster"):
            ours, theirs = (
                checkpoint.load(f / stage / "best.pt")["model"] for f in (whole, folder)
            )
            same(ours, theirs)
        assert (folder / "clusters.csv").read_bytes() == (whole / "clusters.csv").read_bytes()
    assert not any("/nmi" in name for name in summary(tmp_path / "bare"))


@pytest.mark.parametrize("mode", ["default", "umc"])
def test_an_interrupted_run_equals_a_whole_one(mode, whole, acts, tmp_path, monkeypatch, capsys):
    """Steps and evaluations are cut short at random places by a real signal, and the same command
    goes on.
    """
    argv = [*SMALL, "--mode", mode, "--data", str(acts)]
    if mode == "umc":
        whole = tmp_path / "whole"
        assert train_cluster.main([*argv, "--out", str(whole)]) == 0
    rng, calls = random.Random(5), 0
    cuts = sorted(rng.sample(range(2, 34), 6))
    end_step, check_stop = Progress.end_step, Progress.check_stop

    def counted(original):
        def call(self, *args):
            nonlocal calls
            calls += 1
            if cuts and calls >= cuts[0]:
                cuts.pop(0)
                os.kill(os.getpid(), rng.choice([signal.SIGTERM, signal.SIGINT]))
            return original(self, *args)

        return call

    monkeypatch.setattr(Progress, "end_step", counted(end_step))
    monkeypatch.setattr(Progress, "check_stop", counted(check_stop))
    folder, stopped = tmp_path / "run", 0
    while True:
        try:
            assert train_cluster.main([*argv, "--out", str(folder)]) == 0
            break
        except SystemExit as ending:
            assert ending.code == 75
            stopped += 1
    assert stopped == 6
    equal_runs(whole, folder)
    assert (folder / "clusters.csv").read_bytes() == (whole / "clusters.csv").read_bytes()


def test_a_stop_among_the_findings_leaves_the_last_epoch_s_weights(acts, tmp_path, monkeypatch):
    """The chosen epoch is not the last one here, so that whoever stores the chosen weights as the
    last is found out.
    """
    argv, select = [*SMALL, "--data", str(acts)], Progress.select
    monkeypatch.setattr(
        Progress,
        "select",
        lambda self, value, *rest, **more: select(self, -self.epoch, *rest, **more),
    )
    assert train_cluster.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    check_stop, calls = Progress.check_stop, []

    def stop_at_the_second(self):
        if self.stage == "cluster" and self.epoch == 3:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return check_stop(self)

    monkeypatch.setattr(Progress, "check_stop", stop_at_the_second)
    with pytest.raises(SystemExit):
        train_cluster.main([*argv, "--out", str(tmp_path / "run")])
    assert train_cluster.main([*argv, "--out", str(tmp_path / "run")]) == 0
    states = [checkpoint.load(tmp_path / name / "cluster" / "last.pt") for name in ("whole", "run")]
    same(*states)
    best = checkpoint.load(tmp_path / "whole" / "cluster" / "best.pt")
    assert best["epoch"] == 1 and not torch.equal(
        best["model"]["fuse.weight"], states[0]["parts"]["model"]["fuse.weight"]
    )


def test_two_processes_train_the_same_model_as_one(acts, tmp_path):
    argv = [*SMALL, "--data", str(acts), "--dropout", "0", "--epochs", "1", "--max-steps", "2"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
        "OMP_NUM_THREADS": "1"
    }
    env |= {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randrange(20000, 50000)),
    }
    command = [sys.executable, train_cluster.__file__, *argv, "--out", str(tmp_path / "two")]
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=own
        )
        for own in ranks
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    with pytest.raises(SystemExit):
        train_cluster.main([*argv, "--out", str(tmp_path / "one")])
    two, one = (
        checkpoint.load(tmp_path / name / "pretrain" / "last.pt") for name in ("two", "one")
    )
    assert one["place"]["step"] == two["place"]["step"] == 2
    torch.testing.assert_close(two["parts"]["model"], one["parts"]["model"], rtol=1e-4, atol=1e-5)


def test_a_run_directory_is_one_process_s(acts, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as ending:
            train_cluster.main([*SMALL, "--data", str(acts), "--out", str(tmp_path)])
    assert ending.value.code == 2 and "another process works there" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [".lock"]


def test_a_process_that_leaves_early_ends_the_other_with_75(acts, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
        "OMP_NUM_THREADS": "1"
    }
    env |= {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(random.randrange(20000, 30000)),
    }
    both = []
    for rank, path in enumerate((acts, tmp_path / "none.npz")):
        command = [
            sys.executable,
            train_cluster.__file__,
            *SMALL,
            "--data",
            str(path),
            "--out",
            str(tmp_path / "run"),
        ]
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        both.append(
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=own
            )
        )
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [75, 2], errors
    assert "another rank exited" in errors[0]


def test_eval_repeats_the_test_and_predict_needs_no_labels(whole, acts, tmp_path, capsys):
    assert train_cluster.main(flags("--eval", whole, "--device cpu --out", tmp_path)) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    for metric in ("nmi", "ari", "acc"):
        assert result[f"eval/test/{metric}"] == pytest.approx(
            summary(whole)[f"cluster/test/{metric}"], abs=1e-9
        )
    bare = {
        name: x[:9] for name, x in utterance_arrays().items() if name not in ("label", "classes")
    }
    np.savez(tmp_path / "bare.npz", **bare)
    argv = flags(
        "--predict", tmp_path / "bare.npz", "--resume", whole, "--device cpu --out", tmp_path
    )
    assert train_cluster.main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    known = {row["id"]: row["cluster"] for row in csv.DictReader((whole / "clusters.csv").open())}
    assert [row["class"] for row in rows] == [known[str(i)] for i in range(9)]
    assert all(
        sum(float(row[f"score_{c}"]) for c in range(4)) == pytest.approx(1, abs=1e-5)
        for row in rows
    )
    texts = {name: x for name, x in bare.items() if name != "text"} | {"text": np.array(["hi"] * 9)}
    np.savez(tmp_path / "other.npz", **texts)  # a text instead of the array that was called so
    argv = ["--predict", str(tmp_path / "other.npz"), "--resume", str(whole), "--device", "cpu"]
    assert "the model reads" in refused(argv, capsys)
    np.savez(tmp_path / "other.npz", text=bare["text"][:, :5])
    argv = ["--predict", str(tmp_path / "other.npz"), "--resume", str(whole), "--device", "cpu"]
    assert "the model reads" in refused(argv, capsys)
    argv = flags(
        "--config", whole / "config.json", "--modalities text,room --out", tmp_path / "run"
    )
    assert train_cluster.main(argv) == 0
    capsys.readouterr()
    assert train_cluster.main(["--config", str(tmp_path / "run" / "config.json")]) == 0
    assert "has finished" in capsys.readouterr().out
    argv = flags("--predict", acts, "--resume", whole / "pretrain" / "best.pt", "--device cpu")
    assert "has no clusters yet" in refused(argv, capsys)


def test_text_is_read_clustered_and_explained(lines, tmp_path):
    folder = tmp_path / "run"
    assert train_cluster.main([*SMALL, "--data", str(lines), "--out", str(folder)]) == 0
    assert summary(folder)["cluster/test/nmi"] > 0.6
    rows = json.loads((folder / "tables.json").read_text())["Clusters"]["rows"]
    own = [set(words.split()) for _, _, _, words, _ in rows]
    assert sum(any(word in words for words in own) for word in ("?", "thanks", "hi", "week")) >= 3
    assert all("(u" in nearest for *_, nearest in rows)
    bare = tmp_path / "bare.tsv"
    bare.write_text("text\n" + "\n".join(WORDS.values()) + "\n")
    argv = flags("--predict", bare, "--resume", folder, "--device cpu --out", tmp_path)
    assert train_cluster.main(argv) == 0
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5


def test_the_number_of_clusters_is_estimated_without_labels(tmp_path):
    rng = np.random.default_rng(0)
    centers = 9 * rng.normal(size=(5, 12))
    text = centers[rng.integers(0, 5, 300)] + rng.normal(size=(300, 12))
    np.savez(tmp_path / "bare.npz", text=text.astype(np.float32))
    assert (
        train_cluster.main(flags(SMALL, "--data", tmp_path / "bare.npz", "--out", tmp_path / "run"))
        == 0
    )
    titles = json.loads((tmp_path / "run" / "tables.json").read_text())
    assert "Number of clusters: 5, where the gap is largest" in titles
    assert not any(title.startswith("Test scores") for title in titles)  # there are no labels


@pytest.mark.parametrize("assign", ["sinkhorn", "partial-ot"])
def test_every_assignment_finds_the_classes(assign, acts, tmp_path):
    argv = flags(
        SMALL, "--assign", assign, "--select-share 0.5 --data", acts, "--out", tmp_path / "run"
    )
    assert train_cluster.main(argv) == 0
    assert summary(tmp_path / "run")["cluster/test/nmi"] > 0.8


def test_the_method_beats_every_modality_and_their_concatenation_on_the_embedded_data(tmp_path):
    argv = flags("--demo --device cpu --epochs 1 --cluster-epochs 5 --out", tmp_path / "run")
    assert train_cluster.main(argv) == 0
    result = summary(tmp_path / "run")
    plain = max(
        result[f"kmeans_{name}/test/nmi"] for name in ("text", "audio", "video", "concatenation")
    )
    assert result["cluster/test/nmi"] > plain + 0.1


def test_the_embedded_data_is_as_imbalanced_as_promised_and_pure():
    modalities, labels, classes = synthetic.utterances()
    counts = np.bincount(labels)
    assert len(classes) == len(counts) == 12 and counts.max() / counts.min() == pytest.approx(
        38.8, abs=1
    )
    again = synthetic.utterances()
    assert np.array_equal(labels, again[1]) and all(
        np.array_equal(x, again[0][n]) for n, x in modalities.items()
    )
    with pytest.raises(ValueError, match="num_utterances=100"):
        synthetic.utterances(100)


def fusion(padded_last, basis=None, seed=0):
    torch.manual_seed(seed)
    model = umc.Fusion(
        {"text": 4, "audio": 3}, ["audio"], 8, 2, dropout=0.5, padded_last=padded_last, basis=basis
    )
    return model.eval()


def test_lengths_hide_the_padding_and_umc_reads_it():
    """At a sequence's own last step the state depends neither on the padding nor on its amount;
    UMC's state does.
    """
    x, audio = torch.randn(2, 4), torch.randn(2, 6, 3)
    lengths = {"audio": torch.tensor([2, 6])}
    noisy = audio.clone()
    noisy[0, 2:] = 9.0
    inputs = [{"text": x, "audio": a} for a in (audio, noisy)]
    ours, theirs = fusion(False), fusion(True)
    assert torch.equal(ours(inputs[0], lengths)[0], ours(inputs[1], lengths)[0])
    alone = ours({"text": x[:1], "audio": audio[:1, :2]}, {"audio": torch.tensor([2])})[0]
    torch.testing.assert_close(ours(inputs[0], lengths)[0][:1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs(inputs[0], lengths)[0][0], theirs(inputs[1], lengths)[0][0])


def test_fusion_is_the_published_formula():
    model, x, audio = fusion(True), torch.randn(3, 4), torch.randn(3, 5, 3)
    keep = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    z, h = model({"text": x, "audio": audio}, {"audio": torch.tensor([1, 2, 5])}, keep)
    t = x @ model.project["text"].weight.T + model.project["text"].bias
    mask = torch.triu(torch.full((5, 5), -math.inf), 1)
    a = model.temporal["audio"](model.project["audio"](audio), src_mask=mask)[:, -1]
    joined = torch.cat([t * keep[:, :1], a * keep[:, 1:]], 1)
    expected = torch.nn.functional.gelu(joined) @ model.fuse.weight.T + model.fuse.bias
    torch.testing.assert_close(z, expected)
    head = expected.relu() @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(h, head / head.norm(dim=1, keepdim=True))


def test_training_starts_from_the_basis():
    """With a basis z is its coordinates: those of scikit-learn's PCA of the standardized columns,
    up to their signs.
    """
    decomposition = pytest.importorskip("sklearn.decomposition", reason="pip install scikit-learn")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)) * [1, 5, 0.1, 2] + rng.normal(size=(200, 1))
    audio = rng.normal(size=(200, 3))
    rows = {"text": torch.from_numpy(x).float(), "audio": torch.from_numpy(audio).float()}
    basis, weights, anchor = umc.weighted_basis(rows, set(), "text", 3, 2, 0)
    assert anchor == "text" and weights["text"] == 1 and 0 <= weights["audio"] < 0.1
    model = umc.Fusion(
        {"text": 4, "audio": 3}, [], 8, 3, dropout=0.0, padded_last=False, basis=basis
    ).eval()
    z, h = model(rows, {})
    pca = decomposition.PCA(2).fit_transform((x - x.mean(0)) / x.std(0))
    pca /= np.sqrt(pca.var(0).sum())
    np.testing.assert_allclose(z[:, :2].abs().detach().numpy(), np.abs(pca), atol=1e-4)
    assert z[:, 4:].abs().max() == 0 and torch.allclose(h.norm(dim=1), torch.ones(200))
    assert z[:, 2:4].var(0, unbiased=False).sum().item() == pytest.approx(
        weights["audio"] ** 2, abs=1e-4
    )


def test_agreement_weighs_a_modality_and_names_the_anchor():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    near, far = (5 * rng.normal(size=(3, 6))[labels] + rng.normal(size=(300, 6)) for _ in range(2))
    rows = {"noise": rng.normal(size=(300, 6)), "near": near, "far": far}
    rows = {name: torch.from_numpy(x).float() for name, x in rows.items()}
    _, weights, anchor = umc.weighted_basis(rows, set(), None, 3, 6, 0)
    assert (
        anchor in ("near", "far")
        and weights["noise"] < 0.05
        and min(weights["near"], weights["far"]) > 0.9
    )


def test_a_second_encoding_of_the_text_weighs_as_much_as_the_first():
    rng = np.random.default_rng(0)
    rows = {name: torch.from_numpy(rng.normal(size=(90, 4))) for name in ("text", "words", "audio")}
    _, weights, anchor = umc.weighted_basis(rows, {"words"}, "text", 3, 2, 0, peers={"words"})
    assert anchor == "text" and weights["text"] == weights["words"] == 1 and weights["audio"] < 0.2
    alone = umc.weighted_basis(rows, {"words"}, "text", 3, 2, 0)[1]
    assert alone["words"] < 0.2 and alone["audio"] == weights["audio"]


@pytest.mark.parametrize("spread, expected", [(4, "discriminant"), (1, "euclidean")])
def test_the_metric_is_that_of_the_more_stable_clusters(spread, expected):
    """Four clusters on two axes: four wide ones hide them from the plain metric, which needs no
    learning otherwise.
    """
    rng, n = np.random.default_rng(0), 600
    corners = 4 * np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]])[np.arange(n) % 4]
    z = np.concatenate([corners + rng.normal(size=(n, 2)), spread * rng.normal(size=(n, 4))], 1)
    rows = SimpleNamespace(pooled=lambda name: torch.from_numpy(z).float())
    basis = {"text": (torch.zeros(6), torch.ones(6), torch.eye(6))}
    found = deep_cluster.metric_stability(rows, np.arange(n), basis, 4, 0)
    assert max(found, key=found.get) == expected and set(found) == set(deep_cluster.DISTANCES)
    few = deep_cluster.metric_stability(rows, np.arange(500), basis, 4, 0)
    z[500:] = 1e3  # the test split
    assert deep_cluster.metric_stability(rows, np.arange(500), basis, 4, 0) == few


@pytest.mark.parametrize("metric", deep_cluster.DISTANCES)
def test_auto_is_the_metric_it_names(metric, acts, tmp_path, monkeypatch, capsys):
    """Bitwise, and said on the console, in the summary, the report and the checkpoint."""
    scores = {name: 0.875 if name == metric else 0.25 for name in deep_cluster.DISTANCES}
    monkeypatch.setattr(deep_cluster, "metric_stability", lambda *_: scores)
    for name, argv in (("auto", []), ("given", ["--distance", metric])):
        assert train_cluster.main(flags(SMALL, argv, "--data", acts, "--out", tmp_path / name)) == 0
        said = f"metric: {metric}, by the stability of clusters before training: discriminant"
        assert (said in capsys.readouterr().out) == (name == "auto")
    auto, given = (
        checkpoint.load(tmp_path / name / "cluster" / "best.pt") for name in ("auto", "given")
    )
    same(auto["model"], given["model"])
    identity = torch.equal(auto["model"]["metric"], torch.eye(16))
    assert identity == (metric == "euclidean") and auto["model_spec"]["distance"] == metric
    found = {
        name: value
        for name, value in summary(tmp_path / "auto").items()
        if name.endswith("train/stability")
    }
    assert {
        f"kmeans_{name}/train/stability": value for name, value in scores.items()
    }.items() <= found.items()
    assert f"Metric: {metric}" in json.loads((tmp_path / "auto" / "tables.json").read_text())
    assert not any("kmeans" in name and "stability" in name for name in summary(tmp_path / "given"))


def test_umc_compares_no_metrics(acts, tmp_path, monkeypatch):
    monkeypatch.delattr(deep_cluster, "metric_stability")
    argv = [*SMALL, "--mode", "umc", "--data", str(acts), "--out", str(tmp_path / "run")]
    assert train_cluster.main(argv) == 0
    state = checkpoint.load(tmp_path / "run" / "cluster" / "best.pt")
    assert state["model_spec"]["distance"] == "euclidean" and torch.equal(
        state["model"]["metric"], torch.eye(16)
    )


def test_the_metric_undoes_the_scatter_within_clusters():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    z = rng.normal(size=(4, 6))[labels] + rng.normal(size=(500, 6)) * [3, 2, 1, 1, 0.5, 0.1]
    metric = umc.discriminant(torch.from_numpy(z), torch.from_numpy(labels), 0.5)[0].numpy()
    own = np.concatenate([z[labels == c] - z[labels == c].mean(0) for c in range(4)])
    within = own.T @ own / len(own)
    shrunk = within + 0.5 * np.trace(within @ within) / np.trace(within) * np.eye(6)
    product = metric.T @ shrunk @ metric
    np.testing.assert_allclose(product, product[0, 0] * np.eye(6), atol=1e-8 * product[0, 0])
    assert (z @ metric).var(0).sum() == pytest.approx(z.var(0).sum())


def fake_run(views="all", names=("text", "audio", "video"), seed=0, weights=(1, 1, 1)):
    world = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_main=True)
    return SimpleNamespace(
        model_spec={"views": views, "k": 2, "weights": dict(zip(names, weights, strict=True))},
        data=SimpleNamespace(names=list(names)),
        args=SimpleNamespace(seed=seed),
        world=world,
    )


def masks(run, items, epoch):
    return train_cluster.masks(run, Batch(None, items, None, epoch))


def test_views_are_umc_s_or_functions_of_seed_epoch_and_utterance():
    fixed = masks(fake_run("anchored"), np.arange(2), 0)
    assert [view[0].tolist() for view in fixed] == [[1, 0, 1], [1, 1, 0], [1, 1, 1]]
    ids = np.arange(500)
    first, second = masks(fake_run(), ids, 3)
    assert (
        (first.sum(1) > 0).all()
        and 0.15 < 1 - first.mean() < 0.25
        and not torch.equal(first, second)
    )
    assert torch.equal(masks(fake_run(), ids[::-1].copy(), 3)[0], first.flip(0))
    assert not torch.equal(masks(fake_run(), ids, 4)[0], first)
    assert not torch.equal(masks(fake_run(seed=1), ids, 3)[0], first)


def test_a_view_lacks_the_anchor_only_as_far_as_another_modality_agrees_with_it():
    ids, masked = np.arange(4000), {}
    for weights in ((1, 0.5, 0.1), (1, 0, 0)):
        views = masks(fake_run(weights=weights), ids, 0)
        masked[weights] = [round(1 - torch.cat(views)[:, i].mean().item(), 2) for i in range(3)]
    assert masked[1, 0.5, 0.1] == pytest.approx([0.1, 0.2, 0.2], abs=0.02)
    assert masked[1, 0, 0] == pytest.approx([0, 0.2, 0.2], abs=0.02)
    assert masks(fake_run(names=["text"], weights=[1]), ids, 0)[0].min() == 1


def test_tracking_is_spearman_s_correlation(tmp_path):
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    rng = np.random.default_rng(0)
    pairs = np.round(rng.random((12, 2)), 1)
    with open(tmp_path / "log.jsonl", "w") as file:
        for stable, nmi in pairs.tolist():
            line = {
                "stage": "cluster",
                "step": 0,
                "epoch": 0,
                "cluster/train/stability": stable,
                "cluster/train/nmi": nmi,
            }
            file.write(json.dumps(line) + "\n")
    run = SimpleNamespace(folder=tmp_path, world=SimpleNamespace(is_main=True))
    assert deep_cluster.tracking(run) == pytest.approx(stats.spearmanr(*pairs.T).statistic)


def test_an_epoch_is_described_by_the_clusters_it_ends_with(monkeypatch):
    """The stability that chooses an epoch is of its last weights; the NMI beside it must not be of
    those before.
    """
    z = torch.cat(
        [torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) + 9 * c for c in (0, 1)]
    )
    labels = np.arange(40) // 20
    table = SimpleNamespace(labels=labels)
    run = SimpleNamespace(
        model_spec={"k": 2, "smoothing": 0.2},
        splits={"train": np.arange(40)},
        data=SimpleNamespace(table=table),
        args=SimpleNamespace(seed=0),
    )
    monkeypatch.setattr(train_cluster, "evaluate", lambda *_: z)
    targets = deep_cluster.Targets(40)
    targets.labels[::2] = 1  # what it trained on
    model = SimpleNamespace(centroids=torch.zeros(2, 8))
    model.centroids[1] = 9
    values = train_cluster.eval_stability(run, "cluster", model, None, targets)[1]
    assert values["cluster/train/nmi"] == 1 and values["cluster/train/silhouette"] > 0.5
    assert values["cluster/train/max_share"] == 0.5


def test_centers_are_those_of_smooth_rows_and_rows_are_looked_up_as_they_are():
    metrics_of = pytest.importorskip("sklearn.metrics")
    rng, values = np.random.default_rng(0), []
    labels = rng.choice(3, 300, p=[0.7, 0.2, 0.1])
    z = (2 * np.eye(3, 6)[labels] + rng.normal(size=(300, 6))).astype(np.float32)
    for smoothing, neighbors in ((0.0, 1), (0.004, 1), (0.2, 20)):
        near = np.argsort(((z[:, None] - z) ** 2).sum(2), 1, kind="stable")[:, :neighbors]
        runs = [
            clustering.kmeans(torch.from_numpy(z[near].mean(1)), 3, seed=seed).centroids.numpy()
            for seed in (0, 1)
        ]
        clusters = [((z[:, None] - centroids) ** 2).sum(2).argmin(1) for centroids in runs]
        expected = np.mean([metrics_of.normalized_mutual_info_score(labels, c) for c in clusters])
        values.append(
            deep_cluster.score("x", torch.from_numpy(z), labels, 3, smoothing, seeds=2)["x/nmi"]
        )
        assert values[-1] == pytest.approx(expected, abs=1e-6)
    assert values[0] == values[1] and abs(values[2] - values[0]) > 1e-3


def test_smoothing_reaches_the_centers_that_a_run_leaves(whole, acts, tmp_path):
    argv = [*SMALL, "--smoothing", "0", "--data", str(acts), "--out", str(tmp_path / "run")]
    assert train_cluster.main(argv) == 0
    smooth, plain = (
        checkpoint.load(f / "cluster" / "last.pt")["parts"]["model"]
        for f in (whole, tmp_path / "run")
    )
    assert (smooth["centroids"] - plain["centroids"]).abs().max() > 1e-3


def test_monitor_figures_are_numbers():
    monitor = Monitor()
    for value in range(8):
        monitor.add(float(value))
    assert deep_cluster.figures(monitor)["performance_trend"] == 1
    assert all(isinstance(value, (int, float)) for value in deep_cluster.figures(monitor).values())


def test_a_mode_is_the_default_of_flags_that_can_be_set_alone():
    for argv, expected in (([], "auto"), (["--mode", "umc"], "euclidean")):
        args, _ = train_cluster.parse_args(argv)
        assert train_cluster.mode_default(args, "distance") == expected
    args, _ = train_cluster.parse_args(
        flags("--mode umc --distance discriminant --min-select-share 0")
    )
    assert (
        train_cluster.mode_default(args, "distance") == "discriminant"
        and train_cluster.mode_default(args, "min_select_share") == 0
    )
    assert train_cluster.mode_default(args, "smoothing") == 0
    stages = train_cluster.settings(args)
    assert (stages["pretrain"].epochs, stages["cluster"].epochs, stages["cluster"].lr) == (
        100,
        18,
        2e-4,
    )


BAD = {
    "missing file": (["--data", "{tmp}/absent.npz"], "no such file or folder"),
    "more clusters than rows": (["--k", "30"], "--k 30: there are 24 test utterances"),
    "unknown modality": (["--modalities", "text,vidio"], "has the modalities text, room, audio"),
    "text model without text": (["--text-model", "{tmp}"], "has no text to encode"),
    "layer without a model": (["--text-layer", "3"], "--text-layer has no" " effect without" " --text-model"),
    "width not divisible": (["--base-dim", "12"], "not a multiple of 8"),
    "batch larger than the data": (["--bs", "200"], "larger than the 136 training items"),
    "plateau without a score": (flags("--select-epoch last --on-plateau share"), "no effect with" " --select-epoch last"),
    "direction of a" " transport": (flags("--assign partial-ot --density largest"), "no effect with" " --assign"),
    "unknown mode": (["--mode", "ums"], "did you mean umc?"),
    "no growth": (["--mode", "umc", "--select-growth", "0"], "--select-growth 0"),
    "accumulation": (["--accum", "2"], "--accum has no effect"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, acts, tmp_path, capsys):
    argv, said = BAD[case]
    argv = flags(
        SMALL if case != "no growth" else SMALL[:8], "--data", acts, "--out", tmp_path / "out", argv
    )
    assert said in refused([a.format(tmp=tmp_path) for a in argv], capsys)
    assert not (tmp_path / "out").exists()


def test_one_class_is_no_number_of_clusters(tmp_path):
    np.savez(
        tmp_path / "one.npz",
        **utterance_arrays() | {"label": np.zeros(160, int), "classes": np.array(["a"])},
    )
    assert (
        train_cluster.main(flags(SMALL, "--data", tmp_path / "one.npz", "--out", tmp_path / "run"))
        == 0
    )
    assert len(json.loads((tmp_path / "run" / "tables.json").read_text())["Clusters"]["rows"]) > 1


def test_test_utterances_limit_the_clusters_only_where_they_are_scored(tmp_path, capsys):
    """Also where the number of clusters is an estimate; the refusal comes before anything is
    written.
    """
    found = utterance_arrays() | {"split": np.array(["train"] * 157 + ["test"] * 3)}
    np.savez(tmp_path / "few.npz", **found)
    argv = flags(
        SMALL, "--modalities text --data", tmp_path / "few.npz", "--out", tmp_path / "run", "--k"
    )
    for k in ("4", "auto"):
        assert ": there are 3 test utterances" in refused([*argv, k], capsys)
        assert not (tmp_path / "run").exists()
    np.savez(
        tmp_path / "few.npz",
        **{name: x for name, x in found.items() if name not in ("label", "classes")},
    )
    assert train_cluster.main([*argv, "4"]) == 0


def test_a_modality_that_says_nothing_is_refused(tmp_path, capsys):
    found = utterance_arrays()
    np.savez(tmp_path / "flat.npz", **found | {"room": np.full((160, 3), 0.1, np.float32)})
    argv = [*SMALL, "--data", str(tmp_path / "flat.npz"), "--out", str(tmp_path / "run")]
    assert "modality room is the same for all training utterances" in refused(argv, capsys)
    (tmp_path / "flat.tsv").write_text("text\n" + "thanks so much\n" * 80)
    for k in ("2", "auto"):
        argv = flags(SMALL, "--data", tmp_path / "flat.tsv", "--k", k, "--out", tmp_path / "run")
        assert "modality text is the same" in refused(argv, capsys)


def test_columns_of_any_scale_count_and_constant_ones_do_not():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [1e8 * rng.normal(size=(90, 1)), rng.normal(size=(90, 2)), np.full((90, 1), 1e6)], 1
    )
    basis, *_ = umc.weighted_basis({"text": torch.from_numpy(x)}, set(), "text", 2, 4, 0)
    assert basis["text"][1].isinf().tolist() == [False, False, False, True]


def test_runs_of_neighboring_seeds_share_no_start(monkeypatch):
    seeds, kmeans = [], umc.clustering.kmeans
    monkeypatch.setattr(
        umc.clustering,
        "kmeans",
        lambda *args, **more: (seeds.append(more.get("seed")), kmeans(*args, **more))[1],
    )
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 4)))
    for seed in range(3):
        umc.discriminant_kmeans(z, 3, 0.1, seed, torch.eye(4, dtype=z.dtype), None)
    found = [seed for seed in seeds if seed is not None]
    assert len(found) == len(set(found)) == 3 * umc.STARTS


def test_values_that_are_not_finite_are_refused_by_row(tmp_path, capsys):
    found = utterance_arrays()
    found["text"][7, 2] = np.nan
    np.savez(tmp_path / "bad.npz", **found)
    assert "7" in refused(
        flags(SMALL, "--data", tmp_path / "bad.npz", "--out", tmp_path / "out"), capsys
    )
