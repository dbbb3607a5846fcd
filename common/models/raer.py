"""Face and context clips against classes that are texts or learned vectors.

    frames (n, 2, T, 3, s, s) -> shared image tower -> (n, 2, T, d)
    -> a temporal transformer for each stream -> fusion -> z (n, d)
    logits = scale * cos(z, class) for classes (K, d)

After CLIP-CAER (arXiv:2507.00586) and DFER-CLIP (arXiv:2308.13382). With pretrained text a class is
the text tower's feature of learnable context (CoOp, arXiv:2109.01134) before the class's
descriptor, and z starts from the mean of the frames' features, which the text tower's features
already fit. Without one a class is a learned vector.
"""

import copy
import math
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.errors import InputError, printable
from common.models import build_backbone, input_size, load_published, published_weights
from common.models.bpe import Tokenizer
from common.models.clip import (
    CLIP,
    CLIP_MEAN,
    CLIP_STD,
    OPENAI,
    VARIANTS,
    TextTower,
    build_clip,
    build_image_tower,
    cosine_logits,
    read_clip,
)
from common.run import checkpoint
from common.weights import locate, read

TUNES = ("none", "adapter", "full")
WITHOUT_TEXT = ("tau-norm", "linear-probe")  # methods whose classes are learned vectors, always
STREAMS = {"both": ("face", "context"), "face": ("face",)}
# Around the name of a class, for CLIP's own answer by several texts.
TEMPLATES = (
    "a photo of {}.",
    "a photo of a face that shows {}.",
    "a close-up photo of an expression of {}.",
    "a photo of a person in a state of {}.",
    "a frame of a video of {}.",
)
_START_SCALE = 1 / 0.07  # what CLIP's own training starts from


class Temporal(nn.Module):
    """Features of T frames (n, T, d) to one (n, d).

    It is the output of a class token in a pre-norm transformer. Features of one tower lie in a
    narrow cone, most of each is the same for all images, so BatchNorm takes that off first: a
    LayerNorm would keep it.
    """

    def __init__(self, dim: int, num_frames: int, layers: int, dropout: float):
        super().__init__()
        self.token = nn.Parameter(dim**-0.5 * torch.randn(dim))
        # As large as what BatchNorm gives: a smaller one leaves the order of the frames unseen at
        # first.
        self.position = nn.Parameter(torch.randn(1 + num_frames, dim))
        layer = nn.TransformerEncoderLayer(
            d_model=dim,
            nhead=max(1, dim // 64),
            dim_feedforward=2 * dim,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm_in = nn.BatchNorm1d(dim)
        self.norm_out = nn.LayerNorm(dim)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = torch.cat([self.token.expand(x.shape[0], 1, -1), x], 1) + self.position
        return self.norm_out(self.encoder(x)[:, 0])


class MeanOfFrames(nn.Module):
    """Features of T frames (n, T, d), standardized, to their mean (n, d)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


class Adapter(nn.Module):
    """A residual bottleneck on features (..., d) that starts as the identity.

    CLIP-Adapter, arXiv:2110.04544.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.down = nn.Linear(dim, max(8, dim // 4))
        self.up = nn.Linear(max(8, dim // 4), dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class Prompts(nn.Module):
    """Class features (K, d) of a frozen text tower.

    Learnable context stands before the words of each descriptor.

    Args:
        tower: `common.models.clip.TextTower`; its parameters are frozen here.
        ids: (K, l) int64 of the descriptors: start token, words, end token, zeros.
        num_context: learnable vectors of each class, between the start token and the words.

    Attributes:
        fixed: (K, d) the descriptors' own features, without context: what the prompts are compared
            with.

    Raises:
        InputError: a descriptor leaves no room for the context.
    """

    def __init__(self, tower: TextTower, ids: Tensor, num_context: int):
        super().__init__()
        longest = int(ids.argmax(1).max()) + 1
        room = len(tower.positional_embedding)
        if longest + num_context > room:
            raise InputError(
                f"--num-context {num_context}: the longest descriptor has {longest} tokens,"
                f" together at most {room}; shorten it or give less context"
            )
        self.tower = tower.requires_grad_(False).eval()
        self.num_context = num_context
        width = tower.token_embedding.embedding_dim
        self.context = nn.Parameter(torch.empty(len(ids), num_context, width))
        self.reset()
        self.register_buffer("ids", ids[:, :longest], persistent=False)
        with torch.no_grad():
            self.register_buffer("fixed", tower(self.ids), persistent=False)

    def reset(self) -> None:
        """Draw the context anew, as CoOp does."""
        nn.init.normal_(self.context, std=0.02)

    def train(self, mode: bool = True):
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self) -> Tensor:
        return self.tower(self.ids, self.context)


class FixedPrompts(nn.Module):
    """`Prompts` that train no more: their class features (K, d), without the text tower."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.register_buffer("features", features)

    def forward(self) -> Tensor:
        return self.features


class RaerModel(nn.Module):
    """Clips of two streams to logits (n, K) and the classes' features (K, d).

    Args:
        image: frames (m, 3, s, s) to features (m, width).
        width: d.
        num_classes: K.
        num_frames: T.
        streams: a key of STREAMS, those that there are.
        tune: "none" (the tower is frozen), "adapter" (frozen, with a trainable residual behind it)
            or "full".
        prompts: `Prompts`, or None: the classes are learned vectors.
        scale: of the cosines, fixed: CLIP's own where there is one. None: no cosine, the logits are
            inner products.
        probe: nothing but a linear layer reads the frames' mean features.
        layers, dropout: of the temporal transformers.

    Attributes:
        taken: what it has from the run that it starts from, in words.
    """

    def __init__(
        self,
        image: nn.Module,
        width: int,
        num_classes: int,
        *,
        num_frames: int,
        streams: str = "both",
        tune: str,
        prompts: Prompts | None = None,
        scale: float | None,
        probe: bool = False,
        layers: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        if tune not in TUNES:
            raise ValueError(f"tune={tune!r}, allowed are {', '.join(TUNES)}")
        self.image = image
        self.tune = tune
        self.scale = scale
        self.num_classes = num_classes
        self.adapter = Adapter(width) if tune == "adapter" else None
        temporal = partial(Temporal, width, num_frames, layers, dropout)
        if probe:
            temporal = partial(MeanOfFrames, width)
        self.temporal = nn.ModuleDict({name: temporal() for name in STREAMS[streams]})
        joint = len(self.temporal) * width
        self.fusion = nn.Identity()
        if not probe:
            self.fusion = nn.Sequential(
                nn.Linear(joint, width),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(width, width),
            )
        self.prompts = prompts
        self.taken = ""
        self.classes = None
        if prompts is None:
            self.classes = nn.Linear(joint if probe else width, num_classes, bias=probe)
        self.choose_trained(only_classes=False)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.tune != "full" or self.only_classes:
            self.image.eval()  # what is frozen must not follow the batches through its BatchNorm
        if self.only_classes:
            for part in (self.temporal, self.fusion):
                part.eval()
        return self

    def parts(self) -> dict[str, list[nn.Module]]:
        """The modules by the learning rate that they train with."""
        temporal = (self.temporal, self.fusion, self.adapter, self.classes)
        return {
            "temporal": [part for part in temporal if part is not None],
            "image": [self.image],
            "prompts": [self.prompts] if self.prompts else [],
        }

    def choose_trained(self, only_classes: bool) -> None:
        """Let everything train that `tune` says, or only what decides where the classes lie.

        The latter happens on fixed features.
        """
        self.only_classes = only_classes
        self.requires_grad_(not only_classes)
        if self.tune != "full":
            self.image.requires_grad_(False)
        if self.prompts is None:
            self.classes.requires_grad_(True)
        else:
            self.prompts.tower.requires_grad_(False)
            self.prompts.context.requires_grad_(True)
        self.train(self.training)

    def is_frozen(self, name: str) -> bool:
        """Whether the parameter of that name stays as it is in every phase."""
        return name.startswith("prompts.tower.") or (
            name.startswith("image.") and self.tune != "full"
        )

    def reset_classes(self, optimizer: torch.optim.Optimizer) -> None:
        """Draw anew what decides where the classes lie.

        What `optimizer` has gathered about it is forgotten.
        """
        if self.prompts is None:
            self.classes.reset_parameters()
            parameter = self.classes.weight
        else:
            self.prompts.reset()
            parameter = self.prompts.context
        # Kept at zero: a masked first step must find its buffers.
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor):
                value.zero_()

    def class_features(self) -> Tensor:
        """(K, d), in float32."""
        return (self.classes.weight if self.prompts is None else self.prompts()).float()

    def encode(self, frames: Tensor) -> Tensor:
        """Features (n, 2, T, d) of frames (n, 2, T, 3, s, s) by the image tower.

        Without gradient if the tower is frozen.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tune == "full"):
            return self.image(frames.flatten(0, 2)).unflatten(0, frames.shape[:3])

    def clip_features(self, x: Tensor) -> Tensor:
        """z (n, d) of frames (n, 2, T, 3, s, s), or of what `encode` gave for them."""
        x = self.encode(x) if x.ndim == 6 else x
        x = self.adapter(x) if self.adapter else x
        streams = [temporal(x[:, i]) for i, temporal in enumerate(self.temporal.values())]
        z = self.fusion(torch.cat(streams, 1))
        if self.prompts is None:
            return z
        return z + math.sqrt(z.shape[1]) * F.normalize(x.float().mean((1, 2)), dim=1)

    def mean_features(self, x: Tensor) -> Tensor:
        """The image tower's own features of clips, (n, d): the mean of all frames."""
        return (self.encode(x) if x.ndim == 6 else x).float().mean((1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.clip_features(x).float()
        classes = self.class_features()
        if self.scale is None:
            bias = self.classes.bias
            return z @ classes.T + (0 if bias is None else bias), classes
        return cosine_logits(z, classes, self.scale), classes

    def describe(self) -> str:
        """One line: parameters and those of them that train, what classes are, and the logits."""
        count = sum(p.numel() for p in self.parameters()) / 1e6
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad) / 1e6
        classes = "learned vectors"
        if self.prompts is not None:
            classes = f"texts with {self.prompts.num_context} learnable tokens"
        logits = "inner products" if self.scale is None else f"cosines times {self.scale:.4g}"
        return (
            f"{count:.2f} million parameters, {trained:.2f} million of them trained;"
            f" classes are {classes}; {logits}{self.taken}"
        )

    def take_over(self, other: "RaerModel", classes: bool) -> None:
        """Take the parts behind the towers from another model, those that fit, the rest stays anew.

        Args:
            classes: whether both have the same ones, and what tells them apart is taken, too.
        """
        ours, theirs = self.state_dict(), other.state_dict()
        parts = {"temporal.": True, "fusion.": True, "adapter.": True}
        parts |= {"classes.": classes, "prompts.context": classes}
        fates: dict[bool, list[str]] = {True: [], False: []}
        for part, allowed in parts.items():
            here, there = (
                {name: tensor for name, tensor in state.items() if name.startswith(part)}
                for state in (ours, theirs)
            )
            fits = {n: t.shape for n, t in here.items()} == {n: t.shape for n, t in there.items()}
            if here:
                fates[allowed and fits].append(part.rstrip("."))
            if allowed and fits:
                ours |= there
        self.load_state_dict(ours)
        texts = {True: "taken over", False: "begins anew"}
        self.taken = "".join(f"; {texts[fate]}: {', '.join(x)}" for fate, x in fates.items() if x)


def normalization(model_spec: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the pixels in [0, 1] that a tower expects.

    CLIP's own, and for SimCLR's ResNet ImageNet's.
    """
    if not model_spec.get("normalized", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    of_imagenet = model_spec["backbone"] == "resnet18"
    return (IMAGENET_MEAN, IMAGENET_STD) if of_imagenet else (CLIP_MEAN, CLIP_STD)


def streams_of(model_spec: dict) -> tuple[str, ...]:
    """The streams that a model sees."""
    return STREAMS[model_spec.get("streams", "both")]


def tuned_part(args) -> str:
    """--tune; unset, all of a tower of CLIP that has no --weights, unless it must stay as it is."""
    random_tower = not args.weights and args.backbone in OPENAI
    fixed = args.cache_features or args.method == "linear-probe"
    return args.tune or ("full" if random_tower and not fixed else "none")


def describe_random_tower(args, bs: int) -> str:
    """What becomes of an image tower without --weights: it trains, or it never will."""
    tune = tuned_part(args)
    frames = len(STREAMS[args.streams]) * bs * args.num_frames
    others = "" if args.backbone == "vit_tiny" else "; --weights starts from trained ones"
    if tune == "full":
        return (
            f"no --weights: all of {args.backbone} trains from random ones (--tune full), forward"
            f" and backward of {frames} frames a step{others}"
        )
    warn = "" if args.demo else "WARN "
    return (
        f"{warn}no --weights and --tune {tune}: the image tower is random and stays so, only what"
        f" follows it learns; --tune full trains it{others}"
    )


def start(
    args, store_size: int, classes: list[str], descriptions: list[str]
) -> tuple[nn.Module | None, dict, str | None]:
    """Read `--weights`, and gather the facts from which a checkpoint rebuilds the model.

    Returns the published model (None without `--weights`; a `RaerModel` where a run's is given),
    these facts, and what was done.

    Args:
        args: backbone, weights, image_size, activation, clip_vocab, logit_scale, num_context and
            method.
        store_size: side of the stored frames in pixels.
        descriptions: a sentence for each of `classes`.

    Raises:
        InputError: the weights are of another architecture, or the size is one that the tower does
            not take.
    """
    model_spec = {
        "activation": None,
        "tokens": None,
        "stem": None,
        "scale": args.logit_scale or _START_SCALE,
    }
    is_resnet = args.backbone == "resnet18"
    file = None
    if args.weights:
        openai = {"openai": OPENAI[args.backbone]} if args.backbone in OPENAI else {}
        named = published_weights(args.backbone) if is_resnet else openai
        file = locate(args.weights, args.backbone, named)
    if file and (run := _read_run(file)):
        published, note = _start_run(args, file, run, classes, descriptions, model_spec)
    elif is_resnet:
        published, note = _start_resnet(args, file, store_size, model_spec)
    else:
        published, note = _start_clip(args, file, store_size, classes, descriptions, model_spec)
    if args.method in WITHOUT_TEXT:
        model_spec["scale"] = None
    model_spec["weights"] = checkpoint.weights_digest(published.state_dict()) if published else None
    return published, model_spec, note


def _read_run(file) -> dict | None:
    # The selected model of a run of this script, a folder or a file of it; None for other files.
    state = None
    if os.path.isdir(file) or checkpoint.is_marked(Path(file)):
        state = checkpoint.load_selected(file) if os.path.isdir(file) else checkpoint.load(file)
    spec = state.get("model_spec") if state else None
    if not isinstance(spec, dict) or spec.get("script") != "raer":
        return None
    return checkpoint.load_selected(file)


def _start_run(
    args, file, run: dict, classes: list[str], descriptions: list[str], model_spec: dict
) -> tuple[nn.Module, str]:
    # Adds what the run's model_spec says of the towers to `model_spec`.
    spec = run["model_spec"]
    for name in ("backbone", "image_size", "activation"):
        given = getattr(args, name)
        if given not in (None, spec[name]):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"--weights {file} is a run with {flag} {spec[name]}, received {given};"
                " give the run's"
            )
    with checkpoint.foreign(file):
        published = build_raer(spec, 0.0)
    checkpoint.load_weights(published, run["model"], file)
    published.trained_on = spec["classes"]
    names = ("activation", "stem", "image_size", "normalized")
    model_spec |= {name: spec[name] for name in names if name in spec}
    model_spec["scale"] = args.logit_scale or spec["scale"] or _START_SCALE
    if published.prompts is not None and args.method not in WITHOUT_TEXT:
        tokenizer = Tokenizer.read(args.clip_vocab)
        model_spec["tokens"] = _tokens(tokenizer, args, published.prompts.tower, descriptions)
    note = f"started from the run {file} (epoch {run.get('epoch')})"
    if classes != spec["classes"]:
        note += f"; its classes are {', '.join(spec['classes'])}"
    return published, printable(note)


def _tokens(tokenizer: Tokenizer, args, tower: nn.Module, descriptions: list[str]) -> list:
    ids = tokenizer(descriptions)
    Prompts(copy.deepcopy(tower), ids, args.num_context)  # refuses what is too long
    return ids.tolist()


@torch.no_grad()
def own_classes(published: nn.Module | None) -> dict[str, Tensor]:
    """CLIP's own features (K, d) of classes, untrained, by the name of the figures that they give.

    "zero_shot" is of the descriptions, "zero_shot_templates" the mean of unit features over
    TEMPLATES. Empty where `start` read no texts for CLIP: without a text tower, from a run, and for
    methods that have learned vectors.
    """
    texts = getattr(published, "own_texts", {})
    return {
        name: sum(F.normalize(published.text(ids).float(), dim=1) for ids in rows)
        for name, rows in texts.items()
    }


def _start_resnet(
    args, file, store_size: int, model_spec: dict
) -> tuple[nn.Module | None, str | None]:
    # Adds `stem` and `image_size` to `model_spec`.
    name = args.backbone
    tensors = read(file).values() if file else ()
    # Of all convolutions the first one alone takes the three channels of an image.
    kernel = next((t for t in tensors if t.ndim == 4 and t.shape[1] == 3), None)
    small = store_size < 64 if kernel is None else kernel.shape[-1] == 3
    stem = "cifar" if small else "imagenet"
    model_spec["stem"] = stem
    model_spec["image_size"] = input_size(name, stem, args.image_size, store_size)
    if not file:
        return None, None
    published = build_backbone(name, stem)
    return published, load_published(published, file)


def _start_clip(
    args, file, store_size: int, classes: list[str], descriptions: list[str], model_spec: dict
) -> tuple[nn.Module | None, str | None]:
    # Adds `image_size` to `model_spec`, and with weights their activation, scale and tokens.
    name = args.backbone
    if file and not VARIANTS[name].text_width:
        raise InputError(
            f"--weights: no weights of {name} are published; leave it out, or another --backbone"
        )
    patch = VARIANTS[name].patch
    largest = 224 if file else min(224, store_size)
    size = args.image_size or max(patch, largest // patch * patch)
    model_spec["image_size"] = size
    if not file:
        build_image_tower(name, size)  # refuses a size that the tower does not take
        return None, None
    published, note = read_clip(file, name, size, args.activation)
    model_spec["activation"] = published.activation
    model_spec["scale"] = args.logit_scale or published.logit_scale.exp().item()
    if not published.normalized:
        model_spec["normalized"] = False
    if published.text is not None and args.method not in WITHOUT_TEXT:
        tokenizer = Tokenizer.read(args.clip_vocab)
        model_spec["tokens"] = _tokens(tokenizer, args, published.text, descriptions)
        several = [[template.format(name) for name in classes] for template in TEMPLATES]
        texts = {"zero_shot": [descriptions], "zero_shot_templates": several}
        published.own_texts = {name: list(map(tokenizer, rows)) for name, rows in texts.items()}
    return published, note


def build_raer(model_spec: dict, dropout: float, published: nn.Module | None = None) -> RaerModel:
    """The model of `model_spec`, with the weights of `published` where they are given.

    Args:
        published: CLIP, a ResNet-18 or the model of another run, which is copied; None: random
            weights.
    """
    name = model_spec["backbone"]
    size = model_spec["image_size"]
    prompts = None
    published = copy.deepcopy(published)
    run = published if isinstance(published, RaerModel) else None
    if run is not None and name == "resnet18":
        published = run.image
    elif run is not None:
        published = CLIP(run.image, run.prompts and run.prompts.tower)
    if name == "resnet18":
        image = published or build_backbone(name, model_spec["stem"])
        width = image.num_features
    elif model_spec["tokens"] is None:
        if published:
            image = published.visual
        else:
            image = build_image_tower(name, size, model_spec["activation"])
        width = image.num_features
    else:
        clip = published or build_clip(name, size, model_spec["activation"])
        image = clip.visual
        width = image.num_features
        prompts = Prompts(clip.text, torch.tensor(model_spec["tokens"]), model_spec["num_context"])
    model = RaerModel(
        image,
        width,
        len(model_spec["classes"]),
        num_frames=model_spec["num_frames"],
        streams=model_spec.get("streams", "both"),
        tune=model_spec["tune"],
        prompts=prompts,
        scale=model_spec["scale"],
        probe=model_spec["method"] == "linear-probe",
        layers=model_spec["temporal_layers"],
        dropout=dropout,
    )
    if run is not None:
        model.take_over(run, model_spec["classes"] == run.trained_on)
    return model
