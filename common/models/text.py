"""Text to vectors: TF-IDF with a truncated SVD, and encoders of the BERT family.

`lsa` is latent semantic analysis (Deerwester et al. 1990) of words, punctuation and character
n-grams, and needs no file at all. `encode` gives the pooled states of a frozen encoder (Devlin et
al. 2018, arXiv:1810.04805) whose folder the user has.
"""

import contextlib
import hashlib
import string
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import live, reading, weights
from common.data.utterances import tokens
from common.errors import InputError
from common.run.checkpoint import load_weights
from common.run.files import atomic_write


def word_ngrams(text: str, longest: int = 3) -> list[str]:
    """All runs of 1 to `longest` tokens, joined by blanks.

    Longer runs may begin or end with the utterance's own edge (`^`, `$`): how an utterance opens
    and closes tells more of the act than what stands in between.
    """
    words = tokens(text)
    edged = ["^", *words, "$"]
    runs = [edged[i : i + n] for n in range(2, longest + 1) for i in range(len(edged) - n + 1)]
    return words + [" ".join(run) for run in runs]


def char_ngrams(text: str, shortest: int = 2, longest: int = 4) -> list[str]:
    """All runs of `shortest` to `longest` characters of each token with a blank on either side."""
    ngrams = []
    for token in tokens(text):
        padded = f" {token} "
        for n in range(shortest, longest + 1):
            ngrams += [padded[i : i + n] for i in range(len(padded) - n + 1)]
    return ngrams


class Sparse(NamedTuple):
    """A matrix in compressed rows.

    Row i has `values[k]` in column `columns[k]` for starts[i] <= k < starts[i + 1].
    """

    values: np.ndarray  # (nnz,) float64
    columns: np.ndarray  # (nnz,) int64, ascending in each row
    starts: np.ndarray  # (n + 1,) int64
    num_columns: int

    def torch(self) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                *(torch.tensor(a) for a in (self.starts, self.columns, self.values)),
                size=(len(self.starts) - 1, self.num_columns),
                check_invariants=False,  # torch 2.10 refuses matrices without entries
            )

    def transposed(self) -> "Sparse":
        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        order = np.argsort(self.columns, kind="stable")
        starts = _starts(self.columns, self.num_columns)
        return Sparse(self.values[order], rows[order], starts, len(self.starts) - 1)


def _starts(owner: np.ndarray, count: int) -> np.ndarray:
    """Where each of `count` rows starts, (count + 1,), when entries are sorted by `owner`."""
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))])


def tfidf(
    documents: Iterable[list[str]],
    terms: list[str] | None = None,
    idf: np.ndarray | None = None,
    min_df: int = 1,
) -> tuple[Sparse, list[str], np.ndarray]:
    """TF-IDF of documents: (n, V) (1 + ln tf) * idf, rows of norm 1, or 0 without any term.

    idf = 1 + ln((1 + n) / (1 + df)).

    Args:
        documents: n lists of terms, each gone through once.
        terms, idf: V terms and their weights from an earlier call; None: the sorted terms of these
            documents.
        min_df: terms that stand in fewer documents are left out of new ones.

    Returns:
        The matrix, its columns' terms and their (V,) weights.
    """
    if terms is None:
        number: dict[str, int] = {}
        rows = [
            [number.setdefault(term, len(number)) for term in document] for document in documents
        ]
    else:
        number = {term: i for i, term in enumerate(terms)}
        rows = [[number[term] for term in document if term in number] for document in documents]
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    columns = np.fromiter((i for row in rows for i in row), np.int64, len(owner))
    pairs, tf = np.unique(owner * max(len(number), 1) + columns, return_counts=True)
    owner, columns = np.divmod(pairs, max(len(number), 1))
    if terms is None:
        df = np.bincount(columns, minlength=len(number))
        terms = sorted(term for term, i in number.items() if df[i] >= min_df)
        old = np.array([number[term] for term in terms], np.int64)
        idf = 1 + np.log((1 + len(rows)) / (1 + df[old]))
        new = np.full(len(number), -1)
        new[old] = np.arange(len(terms))
        columns = new[columns]
        order = np.lexsort((columns, owner))
        order = order[columns[order] >= 0]
        owner = owner[order]
        columns = columns[order]
        tf = tf[order]
    values = (1 + np.log(tf)) * idf[columns]
    values /= np.sqrt(np.bincount(owner, values**2, len(rows)))[owner]
    return Sparse(values, columns, _starts(owner, len(rows)), len(terms)), terms, idf


def side_by_side(blocks: list[tuple[float, Sparse]]) -> Sparse:
    """Blocks of columns of the same rows, each times its weight."""
    owners = []
    values = []
    columns = []
    num_columns = 0
    for weight, block in blocks:
        owners.append(np.repeat(np.arange(len(block.starts) - 1), np.diff(block.starts)))
        values.append(weight * block.values)
        columns.append(block.columns + num_columns)
        num_columns += block.num_columns
    order = np.argsort(np.concatenate(owners), kind="stable")
    starts = np.sum([block.starts for _, block in blocks], 0)
    return Sparse(
        np.concatenate(values)[order], np.concatenate(columns)[order], starts, num_columns
    )


def svd(matrix: Sparse, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The d = min(dim, n, V) largest singular values (d,) and their left vectors (n, d), float64.

    Randomized block Krylov iteration (Musco and Musco 2015, arXiv:1504.05477). The entry of largest
    magnitude in each vector is positive.
    """
    u, s = krylov_svd(matrix.torch(), matrix.transposed().torch(), dim, seed)
    u = u.numpy()
    return u * np.where(u[np.abs(u).argmax(0), np.arange(len(s))] < 0, -1, 1), s.numpy()


def krylov_svd(a: Tensor, at: Tensor, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The left vectors (n, d) and singular values (d,) of `svd` of a (n, V) float64, without signs.

    `at` is the transpose; both may be sparse.
    """
    n, width = a.shape
    dim = min(dim, n, width)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, min(dim + 10, n, width), generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(a @ start)[0]
    blocks = [block]
    for _ in range(3):
        block = torch.linalg.qr(a @ (at @ block))[0]
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    small = at @ basis
    s2, u = torch.linalg.eigh(small.T @ small)
    return basis @ u.flip(1)[:, :dim], s2.flip(0)[:dim].clamp_min(0).sqrt()


class Lsa:
    """Latent semantic analysis fitted to texts; maps n texts to (n, d) float32.

    The terms are runs of one to three tokens, punctuation included, and with a smaller weight the
    characters of each token, for spellings and endings that a corpus shows once. Singular
    directions keep their singular values: unlike whitened ones they weigh what is common more than
    what is rare.

    Attributes:
        state: all of it as plain values and tensors, for a checkpoint; `Lsa(state)` is the same
            map.
    """

    def __init__(self, state: dict):
        self.state = state

    @classmethod
    def fit(cls, texts: list[str], dim: int = 50, char_weight: float = 0.5, seed: int = 0) -> "Lsa":
        """Fit to texts.

        No labels enter, so all utterances may take part, those of the test split too (the usual
        transductive setting of clustering, in which the test utterances are at hand without their
        labels).

        Args:
            texts: n utterances.
            dim: directions; fewer where n or the number of terms is smaller. Further ones hold rare
                words, and k-means on them depends more on its seed.
            char_weight: weight of the character n-grams' part of a row beside the words' part, >=
                0.
            seed: of the randomized SVD.

        Raises:
            InputError: no term stands in two utterances.
        """
        # One text's terms at a time: all of them are a hundred times as large as the texts.
        by_words, words, word_idf = tfidf(map(word_ngrams, texts), min_df=2)
        by_chars, chars, char_idf = tfidf(map(char_ngrams, texts), min_df=2)
        if not words and not chars:
            raise InputError(
                "no word stands in two utterances: nothing to compare them by; check the text"
            )
        matrix = side_by_side([(1.0, by_words), (char_weight, by_chars)])
        u, s = svd(matrix, dim, seed)
        kept = s > s[0] * 1e-9  # the others are rounding
        projection = matrix.transposed().torch() @ torch.from_numpy(u[:, kept])
        return cls(
            {
                "words": words,
                "word_idf": torch.from_numpy(word_idf),
                "chars": chars,
                "char_idf": torch.from_numpy(char_idf),
                "char_weight": char_weight,
                "projection": projection / torch.from_numpy(s[kept]),
            }
        )

    def __call__(self, texts: list[str]) -> np.ndarray:
        state = self.state
        words, chars = map(word_ngrams, texts), map(char_ngrams, texts)
        by_words, _, _ = tfidf(words, state["words"], state["word_idf"].numpy())
        by_chars, _, _ = tfidf(chars, state["chars"], state["char_idf"].numpy())
        matrix = side_by_side([(1.0, by_words), (state["char_weight"], by_chars)])
        return (matrix.torch() @ state["projection"]).float().numpy()


def lsa(texts: list[str], **options) -> np.ndarray:
    """Latent semantic analysis of n texts, fitted to these texts: (n, d) float32.

    `options` are those of `Lsa.fit`.
    """
    return Lsa.fit(texts, **options)(texts)


class WordPiece:
    """The tokenizer of BERT (Devlin et al. 2018).

    It cleans, splits at blanks and punctuation, and takes the longest match first. Names of special
    tokens in a text, such as `[MASK]`, are ordinary text here.

    Args:
        vocab: token -> id; needs [UNK], [CLS], [SEP] and [PAD].
        lower: lower-case and take off accents.
        chinese: put blanks around CJK ideographs.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        lower: bool = True,
        strip_accents: bool | None = None,
        chinese=True,
    ):
        missing = [name for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if name not in vocab]
        if missing:
            raise InputError(
                f"the vocabulary lacks {', '.join(missing)}: not a WordPiece vocabulary of BERT"
            )
        self.vocab = vocab
        self.lower = lower
        self.chinese = chinese
        self.strip_accents = lower if strip_accents is None else strip_accents
        self.unknown = vocab["[UNK]"]
        self.first = vocab["[CLS]"]
        self.last = vocab["[SEP]"]
        self.pad = vocab["[PAD]"]

    @classmethod
    def read(cls, folder: Path) -> "WordPiece":
        """From a folder's `vocab.txt`, and `tokenizer_config.json` where there is one."""
        lines = _read_text(folder / "vocab.txt").removesuffix("\n").split("\n")
        file = folder / "tokenizer_config.json"
        settings = _read_json(file) if file.exists() else {}
        return cls(
            {token: i for i, token in enumerate(lines)},
            lower=bool(settings.get("do_lower_case", True)),
            strip_accents=settings.get("strip_accents"),
            chinese=bool(settings.get("tokenize_chinese_chars", True)),
        )

    def words(self, text: str) -> list[str]:
        """The words and single signs of punctuation of a text, cleaned."""
        text = "".join(" " if c.isspace() else c for c in text if not _vanishes(c))
        if self.chinese:
            text = "".join(f" {c} " if _is_cjk(ord(c)) else c for c in text)
        if self.strip_accents:
            text = "".join(
                c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn"
            )
        if self.lower:
            text = "".join(c.lower() for c in text)  # letter by letter: a final sigma stays a sigma
        return "".join(f" {c} " if _is_punctuation(c) else c for c in text).split()

    def pieces(self, word: str) -> list[int]:
        """Ids of a word's longest pieces, left to right; [UNK] alone where it cannot be spelled."""
        if len(word) > 100:
            return [self.unknown]
        ids = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.vocab), None)
            if end is None:
                return [self.unknown]
            ids.append(self.vocab[prefix + word[start:end]])
            start = end
        return ids

    def __call__(self, text: str, max_length: int) -> list[int]:
        """[CLS], at most max_length - 2 pieces, [SEP]."""
        ids = [i for word in self.words(text) for i in self.pieces(word)]
        return [self.first, *ids[: max_length - 2], self.last]


def _vanishes(sign: str) -> bool:
    # Control, format and private characters; unassigned ones stay, as in the Rust tokenizers.
    if sign in "\t\n\r":
        return False
    return sign == "\ufffd" or unicodedata.category(sign) in ("Cc", "Cf", "Co", "Cs")


_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_cjk(code: int) -> bool:
    return any(low <= code <= high for low, high in _CJK)


def _is_punctuation(sign: str) -> bool:
    # ASCII signs such as $ and ^ are punctuation to BERT although Unicode calls them symbols.
    return sign in string.punctuation or unicodedata.category(sign)[0] == "P"


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


class Bert(nn.Module):
    """The encoder of BERT and of what shares its shape, such as MiniLM.

    It has Hugging Face's keys, and no pooler. Post-norm layers, exact GELU, learned positions, no
    dropout.

    Args:
        config: the values of the `config.json` beside the weights.
        most_layers: more are refused.
    """

    def __init__(self, config: dict, most_layers: int = 1000):
        super().__init__()
        missing = [name for name in _SIZES if type(config.get(name)) is not int]
        missing += [name for name in _SIZES if name not in missing and not 0 < config[name] < 2**24]
        if missing or not isinstance(config.get("layer_norm_eps", 0.0), float | int):
            raise InputError(
                f"the encoder's config.json lacks {', '.join(missing) or 'layer_norm_eps'}:"
                " not an encoder of the BERT family"
            )
        for name, allowed in (
            ("model_type", "bert"),
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ):
            if config.get(name, allowed) != allowed:
                raise InputError(
                    f"the encoder's config.json has {name} {config[name]!r}; allowed is {allowed}"
                )
        if config["num_hidden_layers"] > most_layers:
            raise InputError(
                f"the encoder's config.json has {config['num_hidden_layers']} layers, its weights"
                f" are of {most_layers} at most"
            )
        width = config["hidden_size"]
        inner = config["intermediate_size"]
        self.num_heads = config["num_attention_heads"]
        self.max_length = config["max_position_embeddings"]
        if width % self.num_heads:
            raise InputError(
                f"hidden_size {width} is not divisible by num_attention_heads {self.num_heads}"
            )
        eps = config.get("layer_norm_eps", 1e-12)
        self.num_layers = config["num_hidden_layers"]
        self.width = width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], width),
                "position_embeddings": nn.Embedding(self.max_length, width),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
                "LayerNorm": nn.LayerNorm(width, eps),
            }
        )
        layers = nn.ModuleList(_layer(width, inner, eps) for _ in range(self.num_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
        """Hidden states (b, l, d) after `layer` layers (0: the embeddings).

        Takes (b, l) ids and the bool mask of tokens.
        """
        parts = self.embeddings
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = parts["word_embeddings"](ids) + parts["position_embeddings"](positions)
        x = parts["LayerNorm"](x + parts["token_type_embeddings"].weight[0])
        for block in self.encoder["layer"][:layer]:
            attention = block["attention"]
            q, k, v = (
                attention["self"][name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )  # (b, h, l, d / h)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            mixed = attention["output"]["dense"](mixed.transpose(1, 2).flatten(2))
            x = attention["output"]["LayerNorm"](mixed + x)
            inner = F.gelu(block["intermediate"]["dense"](x))
            x = block["output"]["LayerNorm"](block["output"]["dense"](inner) + x)
        return x


def _layer(width: int, inner: int, eps: float) -> nn.ModuleDict:
    def output(size):
        return nn.ModuleDict(
            {"dense": nn.Linear(size, width), "LayerNorm": nn.LayerNorm(width, eps)}
        )

    projections = nn.ModuleDict(
        {name: nn.Linear(width, width) for name in ("query", "key", "value")}
    )
    return nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"self": projections, "output": output(width)}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(width, inner)}),
            "output": output(inner),
        }
    )


def _read_text(path: Path) -> str:
    try:
        return reading.read_bytes(path, reading.CONFIG_BYTES).decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; an encoder's folder needs it") from None


def _read_json(path: Path) -> dict:
    try:
        value = reading.parse_json(_read_text(path).encode(), path)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a table of settings, received {type(value).__name__}")
    return value


def _weights_file(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: no model.safetensors or pytorch_model.bin there; name an encoder's folder"
    )


def read_bert(folder: str | Path) -> Bert:
    """The encoder of a Hugging Face folder.

    It reads `config.json` and `model.safetensors` or `pytorch_model.bin`. Keys may have the prefix
    `bert.`; a pooler and pretraining heads are left out.

    Raises:
        InputError: a file is missing, damaged, or of another family.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    path = _weights_file(folder)
    state = weights.read(path)
    # What the settings declare is not allocated before it is known to fit the weights.
    held = sum(tensor.numel() for tensor in state.values())
    with torch.device("meta"):
        model = Bert(config, most_layers=len(state))
    if sum(p.numel() for p in model.parameters()) > 2 * held:
        raise InputError(f"{folder / 'config.json'} describes a larger encoder than {path} holds")
    model.to_empty(device="cpu")
    if any(key.startswith("bert.") for key in state):
        state = {
            key.removeprefix("bert."): value
            for key, value in state.items()
            if key.startswith("bert.")
        }
    # The first published checkpoints name a LayerNorm's parameters as TensorFlow does.
    names = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    encoder = {}
    for key, value in state.items():
        if key.startswith(("embeddings.", "encoder.")) and not key.endswith("position_ids"):
            for old, new in names.items():
                if key.endswith(old):
                    key = key.removesuffix(old) + new
            encoder[key] = value.float()
    load_weights(model, encoder, path)
    return model.eval()


def middle_and_last(folder: str | Path) -> list[int]:
    """The layers of an encoder's folder that tell most together: the last one is best on topics,
    one in the middle on what is done with words. One where it has a single one.
    """
    count = _layer_count(_read_json(Path(folder) / "config.json"))
    return sorted({max(count // 2, 1), count}) if count > 0 else [0]


def _layer_count(config: dict) -> int:
    count = config.get("num_hidden_layers")
    return count if type(count) is int else 0  # refused where it is built


@torch.no_grad()
def encode(
    folder: str | Path,
    texts: list[str],
    layer: int | None = None,
    pooling: str = "mean",
    max_length: int | None = None,
    batch: int = 64,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
) -> np.ndarray:
    """The states of a frozen encoder after one of its layers, pooled over tokens: (n, d) float32.

    Each distinct text is encoded once, in batches of like length, so that a text's vector does not
    depend on where it stands in the list.

    Args:
        folder: `config.json`, `vocab.txt` and the weights, as Hugging Face publishes them.
        texts: n texts.
        layer: 0 for the embeddings, K for the states after layer K, None for the last layer. Middle
            layers often separate acts better than the last one, which is trained for another task.
        pooling: "mean" over all tokens, [CLS] and [SEP] included, or "cls", the state of [CLS].
        max_length: tokens of a text that are read, at most the encoder's positions; None: all of
            these.
        batch: texts encoded together.
        device: where the encoder runs.
        cache: folder in which the result is kept under a name that stands for the weights,
            vocabulary, texts and settings, and read again.

    Raises:
        InputError: the folder holds no such encoder, or it has no such layer.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    tokenizer = WordPiece.read(folder)
    num_layers = _layer_count(config)
    layer = num_layers if layer is None else layer
    if not 0 <= layer <= num_layers:
        raise InputError(
            f"--text-layer {layer}: {folder} has the layers 0 (embeddings) to {num_layers}"
        )
    if pooling not in ("mean", "cls"):
        raise ValueError(f"pooling must be mean or cls, got {pooling!r}")
    cached = None
    if cache is not None:
        names = ("config.json", "vocab.txt", "tokenizer_config.json")
        files = [*(folder / name for name in names), _weights_file(folder)]
        contents = []
        for file in filter(Path.exists, files):
            with reading.open_file(file) as content:
                contents.append(hashlib.file_digest(content, "sha256").hexdigest())
        key = repr((contents, texts, layer, pooling, max_length)).encode()
        cached = Path(cache) / f"text-{hashlib.sha256(key).hexdigest()[:16]}.npy"
        # A missing or damaged file is made anew.
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(cached, allow_pickle=False)
    model = read_bert(folder).to(device)
    longest = min(max_length or model.max_length, model.max_length)
    read = live.progress(texts, "splitting texts into tokens", len(texts))
    ids_of = {text: tokenizer(text, longest) for text in read}
    order = sorted(ids_of, key=lambda text: (len(ids_of[text]), text))
    position = {text: i for i, text in enumerate(order)}
    pooled = []
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    for names in live.progress(batches, "encoding batches of texts", len(batches)):
        rows = [torch.tensor(ids_of[text]) for text in names]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad)
        ids = ids.to(device)
        sizes = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < sizes[:, None]
        x = model(ids, mask, layer)
        x = x[:, 0] if pooling == "cls" else (x * mask[..., None]).sum(1) / sizes[:, None]
        pooled.append(x.float().cpu())
    features = torch.cat(pooled).numpy()[[position[text] for text in texts]]
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cached, "wb") as file:
            np.save(file, features)
    return features
