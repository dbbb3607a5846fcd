"""CLIP's tokenizer from the standard library.

It is byte-pair encoding of words' bytes (Sennrich et al. 2016, arXiv:1508.07909).

Texts are cleaned before they are split. The original cleans them with the package ftfy, whose plain
steps stand here: HTML entities, surrogates, C1 controls as Windows-1252, control characters, Latin
ligatures, characters of other width, curly quotes, line ends, NFC. Not here is its repair of text
that was decoded wrongly (the two signs of U+00C3 U+00A9 instead of one accented e) and of terminal
escapes: such text gets other ids than the original's.

Names of special tokens in a text are ordinary text.
"""

import gzip
import html
import itertools
import re
import unicodedata
import zlib
from pathlib import Path

import torch
from torch import Tensor

from common import reading, weights
from common.errors import InputError

VOCAB_URL = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_MERGES = 48_894  # of the file's 262,144 lines; with them there are 49,408 ids
_MAX_BYTES = 32_000_000  # of an unpacked vocabulary; the official one has 3.2 million

# Bytes stand in the vocabulary as characters: printable ones as themselves, the others in order
# from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_SIGNS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(_OTHERS)
}
_END = "</w>"

_SUFFIX = re.compile("'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_RUN = re.compile("L+|N|O+")


def clean(text: str) -> str:
    """Lower-case text with single blanks; what else changes stands at the head of this file."""
    text = html.unescape(html.unescape(text))
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_REPAIRS)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def _repairs() -> dict[int, str]:
    control = (*range(32), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    blank = (9, 10, 12, 13)
    wide = (0x3000, *range(0xFF01, 0xFFF0))
    digraphs = (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))
    ligatures = range(0xFB00, 0xFB07)
    table = dict.fromkeys(control, "") | dict.fromkeys(blank, " ")
    for code in range(0x80, 0xA0):
        table[code] = bytes([code]).decode("cp1252", "ignore") or chr(code)
    for code in (*wide, *digraphs, *ligatures):
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table[0xFB05] = "\u017ft"  # with a long s, which compatibility forms would lose
    quotes = dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'")
    quotes.update(dict.fromkeys(range(0x201C, 0x2020), '"'))
    return {code: text.translate(quotes) for code, text in table.items()} | quotes


_REPAIRS = _repairs()


def _kind(sign: str) -> str:
    # Letters and numbers by Unicode's categories, which the patterns of `re` cannot name. The mark
    # U+0345 vanishes: the original ignores case, and by its capital, a letter, no run takes it.
    if sign in " \u0345":
        return " "
    category = unicodedata.category(sign)[0]
    return category if category in "LN" else "O"


def split(text: str) -> list[str]:
    """The words of a cleaned text.

    These are English suffixes such as `'s`, runs of letters, single digits, runs of the rest.
    """
    kinds = "".join(map(_kind, text))
    words = []
    i = 0
    while i < len(text):
        match = _SUFFIX.match(text, i) or _RUN.match(kinds, i)
        if match:
            words.append(text[i : match.end()])
        i = match.end() if match else i + 1
    return words


class Tokenizer:
    """Texts to token ids.

    There are 256 ids of bytes, 256 of bytes that end a word, one a merge, the start and the end
    token.

    Args:
        merges: pairs of pieces, the most frequent first.

    Attributes:
        vocab_size: number of ids; 49,408 with the official vocabulary, 514 without merges.
        start, end: ids of the start and end tokens, the two highest.
    """

    def __init__(self, merges: list[tuple[str, str]]):
        pieces = list(_SIGNS.values())
        pieces += [sign + _END for sign in pieces] + [a + b for a, b in merges]
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._ranks = {pair: i for i, pair in enumerate(merges)}
        self._words: dict[str, list[int]] = {}
        self.start = len(pieces)
        self.end = len(pieces) + 1
        self.vocab_size = len(pieces) + 2

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The vocabulary without merges, for towers without pretrained weights: 514 ids."""
        return cls([])

    @classmethod
    def read(cls, path: str | Path | None = None) -> "Tokenizer":
        """From a file of merges, plain or gzipped; None: the official one, see `weights.fetch`.

        Raises:
            InputError: the file cannot be read or holds something else, or could not be fetched.
        """
        if path is None:
            path = weights.fetch(VOCAB_URL, VOCAB_SHA256, "--clip-vocab")
        path = Path(path)
        try:
            with reading.pending(path), reading.open_file(path) as file:
                packed = path.suffix == ".gz"
                data = (gzip.GzipFile(fileobj=file) if packed else file).read(_MAX_BYTES)
            lines = data.decode("utf-8").split("\n")[1 : _MERGES + 1]
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise InputError(f"--clip-vocab {path} cannot be read: {error}") from None
        merges = [tuple(line.split()) for line in lines if line.strip()]
        wrong = next((i for i, pair in enumerate(merges) if len(pair) != 2), None)
        if wrong is not None or not merges:
            fault = "no merges"
            if wrong is not None:
                fault = f"{len(merges[wrong])} pieces in line {wrong + 2}"
            raise InputError(
                f"--clip-vocab {path} is no vocabulary of merges: {fault};"
                " expected two pieces a line"
            )
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start and end."""
        return [i for word in split(clean(text)) for i in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._words:
            pieces = [_SIGNS[byte] for byte in word.encode()]
            pieces[-1] += _END
            while len(pieces) > 1:
                pairs = itertools.pairwise(pieces)
                first, second = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
                if (first, second) not in self._ranks:
                    break
                merged = []
                i = 0
                while i < len(pieces):
                    both = pieces[i : i + 2] == [first, second]
                    merged.append(first + second if both else pieces[i])
                    i += 2 if both else 1
                pieces = merged
            self._words[word] = [self._ids[piece] for piece in pieces]
        return self._words[word]

    def decode(self, ids: list[int]) -> str:
        """The cleaned text of ids, a blank behind each word; start and end vanish."""
        pieces = list(self._ids)
        text = "".join(pieces[i] for i in ids if i < len(pieces)).replace(_END, " ")
        signs = {sign: byte for byte, sign in _SIGNS.items()} | {" ": 32}
        return bytes(signs[sign] for sign in text).decode("utf-8", "replace")

    def __call__(self, texts: list[str], context: int = 77) -> Tensor:
        """(n, context) int64: start, ids, end, zeros.

        A longer text is cut and still ends with the end token.
        """
        rows = [[self.start, *self.encode(text)[: context - 2], self.end] for text in texts]
        return torch.tensor([row + [0] * (context - len(row)) for row in rows])
