"""Time the input path: python -m common.data.benchmark --size 224

From JPEG bytes to two normalized SimCLR views. Everything runs in one process on the same generated
images: the usual per-image pipelines and this package's, with its images in files, in a packed
file, and already decoded. The unit is a second of CPU time of all threads together, which is a
second of one core; other processes' work does not count. Rounds take every pipeline in turn, and
ratios are medians over the rounds.
"""

import importlib
import importlib.metadata
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

from common import config
from common.data import augment, pack
from common.data.images import Images, open_image
from common.data.open import open_images
from common.errors import aligned
from common.run.directory import environment

_SIDES = ((256, 256), (300, 400))  # height and width of the generated images, by turns
_STORE = 256  # side of the squares that this package keeps
NORMALIZATION = augment.IMAGENET_MEAN, augment.IMAGENET_STD


class Pipeline(NamedTuple):
    """Whether its resize is antialiased, and what makes the views of an epoch."""

    antialiased: bool
    views: Callable[[int], torch.Tensor]


def jpegs(count: int) -> list[bytes]:
    """`count` smooth random images with some grain, as JPEG files of quality 90."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for number in range(count):
        size = _SIDES[number % len(_SIDES)]
        coarse = torch.rand(1, 3, 9, 12, generator=generator)
        shapes = F.interpolate(coarse, size=size, mode="bicubic")[0]
        grain = 0.04 * torch.randn(3, *size, generator=generator)
        pixels = ((shapes + grain) * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def torchvision_views(size: int) -> v2.Compose:
    """SimCLR's augmentation (appendix A) in torchvision, of PIL images or uint8 tensors."""
    steps = [
        v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    kernel_size = augment.blur_kernel_size(size)
    if kernel_size > 1:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel_size, (0.1, 2.0))], p=0.5))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)])


def our_views(pixels: torch.Tensor, epoch: int, size: int) -> torch.Tensor:
    """Both views (2n, 3, size, size) of uint8 pixels (n, 3, H, W), normalized, channels-last."""
    samples = np.arange(len(pixels))
    stored = tuple(pixels.shape[-2:])
    drawn = [augment.simclr_params(0, epoch, samples, v, stored, size) for v in (0, 1)]
    return augment.make_views(pixels, drawn, size, NORMALIZATION)


def albumentations_views(size: int):
    """The same in albumentations, of HWC arrays: not antialiased, rounded after each step."""
    A = importlib.import_module("albumentations")
    kernel_size = augment.blur_kernel_size(size)
    blur = A.GaussianBlur((kernel_size, kernel_size), (0.1, 2.0), p=0.5)
    return A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
            A.ToGray(p=0.2),
            *([blur] if kernel_size > 1 else []),
            A.Normalize(*NORMALIZATION),
            importlib.import_module("albumentations.pytorch").ToTensorV2(),
        ]
    )


def kornia_views(size: int):
    """The same in kornia, of batches in [0, 1]: bilinear without antialiasing."""
    K = importlib.import_module("kornia.augmentation")
    kernel_size = augment.blur_kernel_size(size)
    blur = K.RandomGaussianBlur((kernel_size, kernel_size), (0.1, 2.0), p=0.5)
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([blur] if kernel_size > 1 else []),
        K.Normalize(*map(torch.tensor, NORMALIZATION)),
        data_keys=["input"],
    )


def pipelines(folder: Path, size: int) -> dict[str, Pipeline]:
    """name -> what makes all views once; those of others first."""
    images = open_images(str(folder / "files"))
    everything = [np.arange(len(images))]
    paths = [folder / "files" / name for name in images.ids]

    def pil(path):
        return open_image(path.read_bytes()).convert("RGB")

    def per_image(decode, transform):
        def run(epoch):
            images = (decode(path) for path in paths)
            return torch.stack([view for image in images for view in transform(image)])

        return run

    def twice(transform, *prepare):
        def run(image):
            for step in prepare:
                image = step(image)
            return transform(image), transform(image)

        return run

    def opencv(path):
        content = np.frombuffer(path.read_bytes(), np.uint8)
        pixels = cv2.imdecode(content, cv2.IMREAD_COLOR)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def kornias(epoch):
        pixels = decoded.float() / 255
        return torch.cat([batched(pixels), batched(pixels)])

    def from_images(path):
        images: Images = open_images(str(path))
        images.keeps = False

        def run(epoch):
            pixels = next(images.batches(everything, 1))
            return our_views(pixels, epoch, size)

        return run

    decoded = next(images.batches(everything, 1))
    compose = torchvision_views(size)
    candidates = {
        "torchvision, PIL images": Pipeline(True, per_image(pil, twice(compose))),
        "torchvision, uint8 tensors": Pipeline(
            True, per_image(pil, twice(compose, v2.functional.pil_to_tensor))
        ),
    }
    try:
        lightly = importlib.import_module("lightly.transforms")
        candidates["lightly"] = Pipeline(
            True, per_image(pil, lightly.SimCLRTransform(input_size=size))
        )
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(0)
        of_arrays = albumentations_views(size)

        def one(image):
            return of_arrays(image=image)["image"]

        candidates["albumentations, OpenCV"] = Pipeline(False, per_image(opencv, twice(one)))
        candidates["albumentations, Pillow"] = Pipeline(
            False, per_image(pil, twice(one, np.asarray))
        )
        batched = kornia_views(size)
        candidates["kornia, decoded before"] = Pipeline(False, kornias)
    except ImportError as error:
        print(f"the peers from here on are not compared: {error} (tests/requirements.txt)")
    candidates["ours, files"] = Pipeline(True, from_images(folder / "files"))
    candidates["ours, packed file"] = Pipeline(True, from_images(folder / "images.packed"))
    candidates["ours, decoded before"] = Pipeline(
        True, lambda epoch: our_views(decoded, epoch, size)
    )
    return candidates


def parts(folder: Path, size: int) -> dict[str, Callable[[], object]]:
    """name -> one part of "ours, files" for all images: reading and decoding, then the views'."""
    images = open_images(str(folder / "files"))
    images.keeps = False
    everything = [np.arange(len(images))]
    pixels = next(images.batches(everything, 1))
    stored = tuple(pixels.shape[-2:])
    drawn = [augment.simclr_params(0, 1, everything[0], v, stored, size) for v in (0, 1)]
    none = np.zeros(len(images), bool)
    steps = {"crop": {}, "color": {"jittered", "grayscale"}, "blur": {"sigma"}}

    def views(kept, statistics=None):
        switched = ("jittered", "grayscale", "sigma")
        off = [
            replace(params, **{n: none * getattr(params, n) for n in switched if n not in kept})
            for params in drawn
        ]
        return lambda: augment.make_views(pixels, off, size, statistics)

    so_far = set()
    made = {"decode": lambda: next(images.batches(everything, 1))}
    for name, switches in steps.items():
        so_far = so_far | set(switches)
        made[name] = views(so_far)
    return made | {"normalize": views(so_far, NORMALIZATION)}


def measure_cpu(size: int, count: int, repeats: int, folder: Path) -> list[dict]:
    """Rows of pairs and views per second of CPU time, and the ratios to the pipelines of others."""
    (folder / "files").mkdir(exist_ok=True)
    for number, content in enumerate(jpegs(count)):
        (folder / "files" / f"{number:05d}.jpg").write_bytes(content)
    images = open_images(str(folder / "files"))
    images.resize_store(_STORE)
    pack.pack(images, folder / "images.packed", default_size=images.store_size, workers=1)

    candidates = pipelines(folder, size)
    stages = parts(folder, size)
    seconds = {name: [] for name in (*candidates, *stages)}
    images.keeps = False
    clock = {1: [], 2: []}  # of that many threads
    for epoch in range(repeats + 1):
        for name, (_, run) in candidates.items():
            begun = time.process_time()
            views = run(epoch)
            seconds[name].append(time.process_time() - begun)
            assert views.shape == (2 * count, 3, size, size) and views.dtype == torch.float32
        for name, run in stages.items():
            begun = time.process_time()
            run()
            seconds[name].append(time.process_time() - begun)
        for threads, times in clock.items():
            begun = time.perf_counter()
            next(images.batches([np.arange(count)], threads))
            times.append(time.perf_counter() - begun)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    print(f"\n{size} px, {count} images, {repeats} rounds, per second of CPU time, one thread each")
    peers = [name for name in candidates if not name.startswith("ours")]
    fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
    lines = [["pipeline", "antialiased", "pairs/s", f"x {fastest}"]]
    rows = []
    for name, (antialiased, _) in candidates.items():
        rate = count / statistics.median(seconds[name])
        ratios = {
            peer: statistics.median(
                a / b for a, b in zip(seconds[peer], seconds[name], strict=True)
            )
            for peer in peers
        }
        said = "yes" if antialiased else "no"
        lines.append([name, said, f"{rate:.0f}", f"{ratios[fastest]:.2f}"])
        rows.append(
            {
                "size": size,
                "pipeline": name,
                "antialiased": antialiased,
                "pairs_per_s": rate,
                "seconds": seconds[name],
                "ratio_to": ratios,
            }
        )
    print(aligned(lines))
    spent = [1e3 * statistics.median(seconds[name]) / count for name in stages]
    decode, crop, *later = spent
    added = [decode, crop, *np.diff([crop, *later])]
    each = ", ".join(f"{name} {ms:.2f}" for name, ms in zip(stages, added, strict=True))
    print(f"ours, ms a picture (both views): {each}")
    scaling = statistics.median(clock[1][1:]) / statistics.median(clock[2][1:])
    print(f"two threads decode {scaling:.2f} times as fast as one, by the clock")
    ms = dict(zip(stages, added, strict=True))
    return [*rows, {"size": size, "ms_a_picture": ms, "two_threads": scaling}]


def measure_step(device: str, size: int, repeats: int, pairs: int) -> dict:
    """Milliseconds of a batch's augmentation and of a ResNet-50 step, bf16 and channels_last."""
    model = torchvision.models.resnet50().to(device, memory_format=torch.channels_last).train()
    pixels = torch.randint(0, 256, (pairs, 3, _STORE, _STORE), dtype=torch.uint8, device=device)

    def augmentation():
        return our_views(pixels, 0, size)

    views = augmentation()

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = model(views).float().square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()

    def wait():
        if device != "cpu":
            torch.accelerator.synchronize()

    def milliseconds(call):
        times = []
        for _ in range(repeats + 3):
            wait()
            begun = time.perf_counter()
            call()
            wait()
            times.append(1e3 * (time.perf_counter() - begun))
        return statistics.median(times[3:])  # the first ones warm up

    augmentation_ms = milliseconds(augmentation)
    step_ms = milliseconds(step)
    share = augmentation_ms / (augmentation_ms + step_ms)
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"\n{size} px, {pairs} pairs on {where}")
    print(
        f"augmentation {augmentation_ms:.2f} ms, {1e3 * pairs / augmentation_ms:.0f} pairs/s;"
        f" forward and backward {step_ms:.2f} ms"
    )
    print(f"augmentation is {100 * share:.1f} % of augmentation, forward and backward")
    return {
        "size": size,
        "pairs": pairs,
        "augmentation_ms": augmentation_ms,
        "step_ms": step_ms,
        "share": share,
    }


def main(argv: list[str] | None = None) -> int:
    parser = config.Parser(prog="python -m common.data.benchmark", description=__doc__)
    parser.add_argument(
        "--size",
        type=config.number(int, low=8),
        nargs="+",
        default=[96, 224],
        help="sides of the views, pixels",
    )
    parser.choice(
        "--device",
        ["cpu", "cuda"],
        "cpu",
        "where the augmentation's share of a ResNet-50 step is measured",
    )
    parser.number(
        "--pairs", int, None, "pairs of that step; unset: 256 on a GPU, on a CPU no step", low=2
    )
    parser.number("--images", int, 64, "images a round", low=2)
    parser.number("--repeats", int, 5, "rounds that count", low=1)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    pairs = args.pairs or {"cuda": 256}.get(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        facts = environment() | {
            "pillow": PIL.__version__,
            "cpu": _cpu_name(),
            **{name: _version(name) for name in ("lightly", "albumentations", "kornia")},
        }
        print("  ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
        rows = []
        for size in args.size:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure_cpu(size, args.images, args.repeats, Path(folder))
            if pairs:
                rows.append(measure_step(args.device, size, args.repeats, pairs))
    finally:
        torch.set_num_threads(threads)
    print(json.dumps(facts | {"rows": rows}))
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), None
    )


if __name__ == "__main__":
    sys.exit(main())
