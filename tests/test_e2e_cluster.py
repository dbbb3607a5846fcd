"""train_cluster.py as its users run it: whole runs, processes, use of a model, bad input."""

import csv
import json
import os
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch

import train_cluster
from common import deep_cluster
from common.run import checkpoint, log
from common.run.progress import Progress
from tests.data import WORDS, sequences_npz, utterance_arrays, utterances_npz, utterances_tsv
from tests.runs import ended, flags, next_after, refused, same, start_ranks, succeed, summary

pytestmark = pytest.mark.e2e

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


def test_a_run_leaves_what_the_readme_promises(whole, acts, capsys):
    result = summary(whole)
    for metric in ("nmi", "ami", "ari", "acc", "fmi", "balanced_accuracy", "minority_recall"):
        assert -1 <= result[f"cluster/test/{metric}"] <= 1
        assert result[f"cluster/test/refit_{metric}_sd"] >= 0
        assert (
            f"kmeans_text/test/{metric}" in result
            and f"kmeans_concatenation/test/{metric}" in result
        )
    assert result["status"] == "finished" and result["cluster/test/nmi"] > 0.8
    start, *epochs = [line for line in log.read(whole) if "cluster/train/stability" in line]
    assert start["epoch"] == 0 and start["cluster/train/threshold"] == 0.1
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
    scores = {row[0]: row[1:] for row in tables["Test scores"]["rows"]}
    afresh = "this run, k-means afresh on the test split"
    assert list(scores) == [
        "this run",
        "this run, last epoch",
        afresh,
        f"{afresh}, last epoch",
        *(f"plain k-means, {name}" for name in ("text", "room", "audio", "concatenation")),
    ]
    assert scores["this run"][-1] == f"{result['cluster/test/minority_recall']:.3f}"
    pair = (
        f"{result[f'cluster/test/refit_{name}']:.3f}"
        for name in ("minority_recall", "minority_recall_sd")
    )
    assert scores[afresh][-1] == " ± ".join(pair)
    counts = np.array([row[2:] for row in tables["Clusters and labels, test"]["rows"]])
    assert counts.shape == (4, 4) and counts.sum() == 24
    page = (whole / "report.html").read_text()
    assert "nearest to the center" in page and page.count("h0") > 100  # the scatter is in it
    capsys.readouterr()
    assert train_cluster.main([*SMALL, "--data", str(acts), "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "already finished" in printed and "untrained k-means" in printed
    args, _ = train_cluster.parse_args(next_after(printed, whole, train_cluster.CARD))
    assert args.predict == ["PATH"] and args.resume == str(whole)


def test_what_is_scored_is_what_is_left_behind(whole):
    """The clusters of clusters.csv and of embeddings.npz, by scikit-learn's own NMI."""
    score = pytest.importorskip("sklearn.metrics").normalized_mutual_info_score
    rows = list(csv.DictReader((whole / "clusters.csv").open()))
    labels = dict(zip(map(str, range(160)), utterance_arrays()["label"].tolist(), strict=True))
    test = [row for row in rows if row["split"] == "test"]
    nmi = score([labels[row["id"]] for row in test], [row["cluster"] for row in test])
    assert summary(whole)["cluster/test/nmi"] == pytest.approx(nmi)
    found = np.load(whole / "embeddings.npz")
    assert found["id"].tolist() == [row["id"] for row in rows]
    distances = np.linalg.norm(found["embedding"][:, None] - found["centroids"], axis=2)
    assert found["cluster"].tolist() == distances.argmin(1).tolist()
    assert [int(row["cluster"]) for row in rows] == distances.argmin(1).tolist()
    far = [row["split"] for row in rows if row["far"] == "yes"]
    assert 1 <= far.count("train") <= 2  # of 136, one in a hundred
    cards = json.loads((whole / "tables.json").read_text())["Clusters"]
    counts = np.array([row[1:3] for row in cards["rows"]])  # all rows, and those trained on
    sizes = np.bincount([int(row["cluster"]) for row in rows])
    assert counts[:, 0].tolist() == sizes.tolist() and (counts[:, 1] <= sizes).all()
    lines = map(json.loads, (whole / "log.jsonl").read_text().splitlines())
    taken = [x["cluster/train/selected"] for x in lines if "cluster/train/selected" in x]
    assert counts[:, 1].sum() == taken[-1]
    majority = [row[cards["header"].index("most frequent label")] for row in cards["rows"]]
    assert sorted(name[0] for name in majority) == ["a", "b", "c", "d"]


def test_three_stages_are_compared_and_the_start_may_win(whole, acts, tmp_path, capsys):
    table = json.loads((whole / "tables.json").read_text())["What training brought"]
    assert [row[0] for row in table["rows"]] == ["start", "after stage 1", "after stage 2"]
    result = summary(whole)
    for row, stage in zip(table["rows"], ("start", "pretrain", "cluster"), strict=True):
        assert row[-3] == f"{result[f'{stage}/test/nmi']:.3f}"
        assert row[1] == f"{result[f'{stage}/train/stability']:.3f}"
    argv = flags(SMALL, "--epochs 0 --cluster-epochs 0 --data", acts, "--out", tmp_path / "run")
    assert train_cluster.main(argv) == 0
    assert "training brought nothing: the start is kept" in capsys.readouterr().out
    start = summary(tmp_path / "run")
    assert start["cluster/test/nmi"] == start["start/test/nmi"] == result["start/test/nmi"]
    argv = flags(SMALL, "--lr 0.01 --cluster-lr 0.01 --data", acts, "--out", tmp_path / "moved")
    assert train_cluster.main([*argv, "--select-epoch", "last"]) == 0
    moved = summary(tmp_path / "moved")
    assert (
        moved["cluster/train/change"] > 0.1 and moved["start/test/nmi"] == start["start/test/nmi"]
    )
    assert f"{moved['cluster/train/moved']:.1%} of the training" in capsys.readouterr().out
    more = flags(SMALL, "--data", acts, "--force-resume --out", tmp_path / "run")
    assert train_cluster.main(more) == 0  # from no epochs to some; its dropout draws others
    lines = log.read(tmp_path / "run")
    for stage, count in (("pretrain", 2), ("cluster", 3)):
        assert {line["epoch"] for line in lines if line["stage"] == stage} == {*range(count + 1)}
    assert summary(tmp_path / "run")["start/test/nmi"] == start["start/test/nmi"]


def test_the_analysis_is_of_this_run(whole):
    tables = json.loads((whole / "tables.json").read_text())
    assert {"Data", "Classes", "State", "Trajectory", "What to try", "Checklist"} <= tables.keys()
    assert sum(row[1] for row in tables["Classes"]["rows"]) == 160
    state = dict(tables["State"]["rows"])
    lines = [line for line in log.read(whole) if "cluster/train/threshold" in line]
    best = max(lines, key=lambda line: line["cluster/train/nmi"])
    nmi = f"{best['cluster/train/nmi']:.4f}, epoch {best['epoch']} of 3"
    assert state["best NMI, training utterances"] == nmi
    base, _ = train_cluster.parse_args([*SMALL, "--data", "x.npz"])
    changes = ({"cluster_lr"}, {"select_share", "select_growth"}, {"base_dim"})
    for row, changed in zip(tables["What to try"]["rows"], changes, strict=True):
        given, _ = train_cluster.parse_args(shlex.split(row[-1])[2:])
        own = {name for name in vars(given) if vars(given)[name] != vars(base)[name]}
        assert own - {"data", "log_every", "device"} == changed
    boxes = {row[1]: row[0] for row in tables["Checklist"]["rows"]}
    assert boxes["every cluster is trained on"] == "x" and boxes["no gain"] == ""


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
        for file in ("clusters.csv", "embeddings.npz"):
            assert (folder / file).read_bytes() == (whole / file).read_bytes()
    assert not any("nmi" in name for name in summary(tmp_path / "bare"))


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
    assert best["epoch"] == 0 and not torch.equal(
        best["model"]["fuse.weight"], states[0]["parts"]["model"]["fuse.weight"]
    )


def test_two_processes_train_the_same_model_as_one(acts, tmp_path):
    argv = [*SMALL, "--data", str(acts), "--dropout", "0", "--epochs", "1", "--max-steps", "2"]
    succeed(*start_ranks(train_cluster, 2 * [flags(argv, "--out", tmp_path / "two")]))
    assert ended(train_cluster.main, flags(argv, "--out", tmp_path / "one")) == 0
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
    argv = flags(SMALL, "--out", tmp_path / "run", "--data")
    both = start_ranks(train_cluster, [flags(argv, acts), flags(argv, tmp_path / "none.npz")])
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
    out = capsys.readouterr().out
    assert "the classifier of cluster (" in out and "of 9 are far from every cluster" in out
    bare["text"] = bare["text"] + 50
    np.savez(tmp_path / "away.npz", **bare)
    argv[1] = str(tmp_path / "away.npz")
    assert train_cluster.main(argv) == 0
    away = list(csv.DictReader((tmp_path / "predictions-2.csv").open()))
    assert [row["far"] for row in away] == ["yes"] * 9
    argv[1] = str(tmp_path / "bare.npz")
    shutil.copy(tmp_path / "bare.npz", tmp_path / "more.npz")
    argv = flags("--predict", tmp_path / "more.npz", tmp_path / "bare.npz", argv[2:])
    assert train_cluster.main(argv) == 0
    more = csv.DictReader((tmp_path / "predictions-3.csv").open())
    names = [str(tmp_path / f"{name}.npz") for name in ("more", "bare")]
    assert list(more) == [row | {"id": f"{name}/{row['id']}"} for name in names for row in rows]
    texts = {name: x for name, x in bare.items() if name != "text"} | {"text": np.array(["hi"] * 9)}
    np.savez(tmp_path / "other.npz", **texts)  # a text instead of the array that was called so
    argv = ["--predict", str(tmp_path / "other.npz"), "--resume", str(whole), "--device", "cpu"]
    refused(train_cluster.main, argv, capsys, "text")
    np.savez(tmp_path / "other.npz", text=bare["text"][:, :5])
    argv = ["--predict", str(tmp_path / "other.npz"), "--resume", str(whole), "--device", "cpu"]
    refused(train_cluster.main, argv, capsys, "text")
    argv = flags(
        "--config", whole / "config.json", "--modalities text,room --out", tmp_path / "run"
    )
    assert train_cluster.main(argv) == 0
    capsys.readouterr()
    assert train_cluster.main(["--config", str(tmp_path / "run" / "config.json")]) == 0
    assert "already finished" in capsys.readouterr().out
    argv = flags("--predict", acts, "--resume", whole / "pretrain" / "best.pt", "--device cpu")
    refused(train_cluster.main, argv, capsys, "pretrain")


def test_text_is_read_clustered_and_explained(lines, tmp_path):
    folder = tmp_path / "run"
    assert train_cluster.main([*SMALL, "--data", str(lines), "--out", str(folder)]) == 0
    assert summary(folder)["cluster/test/nmi"] > 0.6
    rows = json.loads((folder / "tables.json").read_text())["Clusters"]["rows"]
    own = [set(words.split()) for _, _, _, words, *_ in rows]
    assert sum(any(word in words for words in own) for word in ("?", "thanks", "hi", "week")) >= 3
    assert all("(u" in row[4] for row in rows)
    named = {row["name"] for row in csv.DictReader((folder / "clusters.csv").open())}
    assert len(named) == 4 and all(set(name.split()) & set.union(*own) for name in named)
    bare = tmp_path / "bare.tsv"
    bare.write_text("text\n" + "\n".join(WORDS.values()) + "\n")
    argv = flags("--predict", bare, "--resume", folder, "--device cpu --out", tmp_path)
    assert train_cluster.main(argv) == 0
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("number", [5, 60])
def test_the_number_of_clusters_is_estimated_without_labels(number, tmp_path, capsys):
    rng = np.random.default_rng(0)
    centers = 9 * rng.normal(size=(number, 12))
    text = centers[rng.integers(0, number, 300)] + rng.normal(size=(300, 12))
    np.savez(tmp_path / "bare.npz", text=text.astype(np.float32))
    argv = flags(SMALL, "--base-dim 32 --data", tmp_path / "bare.npz", "--out", tmp_path / "run")
    assert train_cluster.main(argv) == 0
    titles = json.loads((tmp_path / "run" / "tables.json").read_text())
    found = number < 30  # the most that is tried
    why = "where the gap is largest" if found else "the most that was tried: the data gives no"
    assert any(f"Number of clusters: {min(number, 30)}, {why}" in title for title in titles)
    assert "Test scores" not in titles  # there are no labels
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert ("WARN the data gives no number of clusters" in printed) != found
    assert ("Before pretrain: the data gives no number of clusters" in page) != found


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


@pytest.mark.parametrize("flag", ["--smoothing", "--neighbors"])
def test_what_finds_the_centers_reaches_those_that_a_run_leaves(flag, whole, acts, tmp_path):
    argv = [*SMALL, flag, "0", "--data", str(acts), "--out", str(tmp_path / "run")]
    assert train_cluster.main(argv) == 0
    default, plain = (
        checkpoint.load(f / "cluster" / "last.pt")["parts"]["model"]
        for f in (whole, tmp_path / "run")
    )
    assert (default["centroids"] - plain["centroids"]).abs().max() > 1e-3


BAD = {  # flags -> the flag, file or value that the refusal names
    "missing file": ("--data {tmp}/absent.npz", "absent.npz"),
    "more clusters than rows": ("--k 30", "in 30 clusters; give a --k of at most"),
    "unknown modality": ("--modalities text,vidio", "text, room, audio"),
    "text model without text": ("--text-model {tmp}", "text"),
    "layer without a model": ("--text-layer 3", "--text-layer"),
    "a layer twice": ("--text-model {tmp} --text-layer 3,3", "each layer once"),
    "no column of a table": ("--label-column act", "--label-column is for a .tsv"),
    "a column of no table": ("--data sample --text-column x", "--text-column has no effect"),
    "no encoding": ("--encoding base64", "--encoding"),
    "no layer": ("--text-model {tmp} --text-layer 3,", "--text-layer"),
    "width not divisible": ("--base-dim 12", "--base-dim 12"),
    "batch larger than the data": ("--bs 200", "lower --bs"),
    "second stage's batch larger than the data": ("--cluster-bs 200", "lower --cluster-bs"),
    "plateau without a score": ("--select-epoch last --on-plateau share", "--on-plateau"),
    "direction of a transport": ("--assign partial-ot --density largest", "--density"),
    "unknown mode": ("--mode ums", "umc"),
    "no growth": ("--mode umc --select-growth 0", "--select-growth 0"),
    "accumulation": ("--accum 2", "--accum"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, acts, tmp_path, capsys):
    text, name = BAD[case]
    base = SMALL[:8] if case == "no growth" else SMALL
    argv = flags(base, "--data", acts, "--out", tmp_path / "out", text.format(tmp=tmp_path))
    refused(train_cluster.main, argv, capsys, name)
    assert not (tmp_path / "out").exists()


def test_two_classes_and_one_column(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 160)
    text = (5 * label + rng.normal(size=160))[:, None].astype(np.float32)
    np.savez(tmp_path / "two.npz", text=text, label=label)
    argv = flags(SMALL, "--data", tmp_path / "two.npz", "--out", tmp_path / "run")
    assert train_cluster.main(argv) == 0
    assert summary(tmp_path / "run")["cluster/test/nmi"] > 0.8


def test_missing_features_and_other_columns(lines, tmp_path, capsys):
    found = {**np.load(sequences_npz(tmp_path / "some.npz"))}
    name = next(name for name in found if name.endswith("_len")).removesuffix("_len")
    found[f"{name}_len"][[3, 8]] = 0
    np.savez(tmp_path / "some.npz", **found)
    argv = flags(SMALL, "--data", tmp_path / "some.npz", "--out", tmp_path / "run")
    refused(train_cluster.main, [*argv, "--allow-missing", "0"], capsys, "--allow-missing 0.")
    assert train_cluster.main(argv) == 0
    assert f"{name} is missing: 2 utterances" in capsys.readouterr().out
    header, rest = lines.read_text().split("\n", 1)
    columns = header.replace("text", "Utterance").replace("label", "DA")
    (tmp_path / "acts.tsv").write_text(f"{columns}\n{rest}")
    argv = flags(SMALL, "--text-column Utterance --label-column DA --data", tmp_path / "acts.tsv")
    assert train_cluster.main(flags(argv, "--out", tmp_path / "columns")) == 0
    assert summary(tmp_path / "columns")["cluster/test/nmi"] > 0.6
    (tmp_path / "new.tsv").write_text("Utterance\n" + "\n".join(WORDS.values()) + "\n")
    predict = flags("--predict", tmp_path / "new.tsv", "--resume", tmp_path / "columns")
    assert train_cluster.main(flags(predict, "--device cpu --out", tmp_path)) == 0
    assert train_cluster.main(flags("--eval", tmp_path / "columns", "--device cpu")) == 0


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
        refused(train_cluster.main, [*argv, k], capsys, "--k")
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
    refused(train_cluster.main, argv, capsys, "room")
    (tmp_path / "flat.tsv").write_text("text\n" + "thanks so much\n" * 80)
    for k in ("2", "auto"):
        argv = flags(SMALL, "--data", tmp_path / "flat.tsv", "--k", k, "--out", tmp_path / "run")
        refused(train_cluster.main, argv, capsys, "text")


def test_values_that_are_not_finite_are_refused_by_row(tmp_path, capsys):
    found = utterance_arrays()
    found["text"][7, 2] = np.nan
    np.savez(tmp_path / "bad.npz", **found)
    refused(
        train_cluster.main,
        flags(SMALL, "--data", tmp_path / "bad.npz", "--out", tmp_path / "out"),
        capsys,
        "7",
    )
