"""The tokenizer against open_clip's, ftfy's repairs included; the vocabulary's file, its download
and its faults.
"""

import gzip
import hashlib
import html
import random
import string
import unicodedata
from pathlib import Path

import pytest

from common.errors import InputError
from common.models import bpe
from common.models.bpe import Tokenizer, clean, split


@pytest.fixture(scope="module")
def vocab():
    package = pytest.importorskip("open_clip", reason="pip install -r tests/requirements.txt")
    return Path(package.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def theirs(vocab):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(str(vocab))


@pytest.fixture(scope="module")
def ours(vocab):
    return Tokenizer.read(vocab)


def test_the_vocabulary_is_clips(ours, theirs, vocab):
    assert hashlib.sha256(vocab.read_bytes()).hexdigest() == bpe.VOCAB_SHA256
    assert (ours.vocab_size, ours.start, ours.end) == (49_408, 49_406, 49_407)
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (
        ours.decode([49_406, *ours.encode("It's  a CAF\u00c9!?"), 49_407])
        == "it 's a caf\u00e9 !? "
    )


def test_ascii_prompts_have_open_clips_ids(ours, theirs):
    rng = random.Random(0)
    words = [
        word.removesuffix("</w>")
        for word in theirs.encoder
        if word.endswith("</w>") and word.isascii()
    ]
    different = []
    for i in range(10_000):
        if i % 2:
            joint = rng.choice([" ", ", ", "-", "'s ", "'LL ", " 'd", "\n", " 3"])
            prompt = joint.join(
                rng.choice([str.upper, str.title, str])(w)
                for w in rng.choices(words, k=rng.randint(1, 20))
            )
        else:  # any signs, control characters among them in a fourth of the prompts
            prompt = "".join(
                rng.choices(string.printable[: 100 if i % 4 else 95], k=rng.randint(0, 60))
            )
        if ours.encode(prompt) != theirs.encode(prompt):
            different.append(prompt)
    assert different == []


SCRIPTS = [
    (0x61, 0x7B), (0x391, 0x3CA), (0x410, 0x450), (0x531, 0x557), (0x5D0, 0x5EB),
    (0x620, 0x64B), (0x660, 0x66A), (0x905, 0x93A), (0x966, 0x970), (0xE01, 0xE3A),
    (0x10D0, 0x10FB), (0x1EA0, 0x1EFA), (0x2010, 0x2028), (0x2070, 0x2072), (0x20A0, 0x20C0),
    (0x2150, 0x218A), (0x2190, 0x2300), (0x2460, 0x2500), (0x3000, 0x3020), (0x3041, 0x3097),
    (0x30A1, 0x30FB), (0x4E00, 0x9FA0), (0xAC00, 0xD7A4), (0xFB00, 0xFB07), (0xFF01, 0xFFBF),
    (0x1D400, 0x1D455), (0x1F300, 0x1F650), (0x20000, 0x2A6D0),
]  # fmt: skip
ACCENTS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0327"


def test_unicode_prompts_have_open_clips_ids(ours, theirs):
    rng = random.Random(1)

    def word():
        low, high = rng.choice(SCRIPTS)
        letters = [chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8))]
        if low == 0x61:  # one accented letter, composed or not
            letter = letters[0] + rng.choice(ACCENTS)
            letters[0] = rng.choice([letter, unicodedata.normalize("NFC", letter)])
        return "".join(letters)

    different = 0
    for _ in range(10_000):
        joint = rng.choice(
            [" ", "", ", ", "\u00a0", "\u2019s ", " \u201c", "\u2026", "\u3000", "&amp;"]
        )
        prompt = joint.join(word() for _ in range(rng.randint(1, 10)))
        different += ours.encode(prompt) != theirs.encode(prompt)
    assert different <= 10


def test_every_sign_of_the_first_plane_is_open_clips(ours, theirs):
    different = {
        code
        for code in (*range(0xD800), *range(0xF900, 0x10000))
        if ours.encode(f"a{chr(code)}b") != theirs.encode(f"a{chr(code)}b")
    }
    # Letters of a newer Unicode than this Python's.
    assert (
        all(unicodedata.category(chr(code)) == "Cn" for code in different) and len(different) < 100
    )


def test_cleaning():
    assert (
        clean("  \u201cHi\u201d \u2018x\u2019 \ufb01t\t\uff26\uff35LL \x93ok\x94\x07 &amp;lt; ")
        == '"hi" \'x\' fit full "ok" <'
    )
    assert clean("e\u0301 \ud83d\ude00 \ud800") == "\u00e9 \U0001f600 \ufffd"
    assert clean(html.escape("<b> & 'c'")) == "<b> & 'c'"


def test_splitting():
    assert split("they'll it's 'so !'s x2\u00b2y_z") == [
        "they", "'ll", "it", "'s", "'s", "o", "!'", "s", "x", "2", "\u00b2", "y", "_", "z",
    ]  # fmt: skip
    assert split("") == []


def test_names_of_special_tokens_are_ordinary_text(ours):
    assert max(ours.encode("<end_of_text> <|endoftext|> <start_of_text>")) < ours.start


def test_rows_are_open_clips_also_when_they_are_cut(ours, theirs):
    texts = ["", "a cat", "very long " * 60, "one " * 75, "one " * 76, "\U0001f600" * 50]
    for context in (77, 20, 3):
        rows = ours(texts, context)
        assert (
            rows.tolist() == theirs(texts, context).tolist() and rows.dtype == theirs(texts).dtype
        )
    assert rows[2, -1] == ours.end


def test_without_merges_every_byte_has_an_id(theirs):
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (514, 512, 513)
    ids = tokenizer.encode("no \u00e9\U0001f600")
    assert len(ids) == 8 and tokenizer.decode(ids) == "no \u00e9 \U0001f600 "
    pieces = ["n", "o</w>"]
    for sign in "\u00e9\U0001f600":
        pieces += [theirs.byte_encoder[byte] for byte in sign.encode()]
        pieces[-1] += "</w>"
    assert ids == [theirs.encoder[piece] for piece in pieces]
    assert tokenizer(["x"], 5).tolist() == [[512, theirs.encoder["x</w>"], 513, 0, 0]]


def test_an_unpacked_vocabulary_and_a_smaller_one(tmp_path, vocab, ours):
    lines = gzip.decompress(vocab.read_bytes()).decode()
    (tmp_path / "vocab.txt").write_text(lines, encoding="utf-8")
    assert Tokenizer.read(tmp_path / "vocab.txt").encode("an unusual prompt") == ours.encode(
        "an unusual prompt"
    )
    (tmp_path / "vocab.txt").write_text("#version: 0.2\ni n\nt h\nin g</w>\n")
    small = Tokenizer.read(tmp_path / "vocab.txt")
    assert (
        small.vocab_size == 517
        and small.encode("thing")[0] == 513
        and small.decode(small.encode("thing")) == "thing "
    )


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("v.txt", b"", "no merges"),
        ("v.txt", b"#version\na b\nabc\n", "1 pieces in line 3; expected two pieces a line"),
        ("v.txt", b"#version\n\xff\xfe\n", "cannot be read"),
        ("v.txt.gz", b"plain", "cannot be read"),
        (
            "v.txt.gz",
            gzip.compress(b"#version\n" + b"a b\n" * 999, mtime=0)[:-20],
            "cannot be read",
        ),
        (
            "v.txt.gz",
            gzip.compress(b"#version\na b\n", mtime=0)[:14] + b"\xff" * 20,
            "cannot be read",
        ),
        ("v.txt", None, "No such file"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        Tokenizer.read(tmp_path / name)
    assert "--clip-vocab" in str(error.value) and "\n" not in str(error.value)


def test_the_official_vocabulary_is_fetched_once(tmp_path, vocab, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(bpe, "VOCAB_URL", vocab.as_uri())
    assert Tokenizer.read().vocab_size == 49_408
    kept = tmp_path / "hub" / "checkpoints" / vocab.name
    assert kept.read_bytes() == vocab.read_bytes()
    gone = (tmp_path / "gone" / vocab.name).as_uri()
    monkeypatch.setattr(bpe, "VOCAB_URL", gone)
    assert Tokenizer.read().vocab_size == 49_408
    kept.unlink()
    with pytest.raises(InputError, match="could not be fetched") as error:
        Tokenizer.read()
    for part in (gone, bpe.VOCAB_SHA256, str(kept), "--clip-vocab FILE"):
        assert part in str(error.value)
