"""Trees of files and arrays that tests read: small, made from fixed seeds, one function each."""

import json
import random
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.data import cytology, synthetic

# Images


def picture(seed, width=20, height=20, mode="RGB") -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_folder(root, names, **size) -> Path:
    """Images of noise under the given names; the k-th is picture(k)."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, **size).save(path)
    return root


def zipped(root, prefix="") -> Path:
    """A .zip beside a folder with all of its files."""
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                file.write(path, prefix + path.relative_to(root).as_posix())
    return archive


def read_pixels(images, indices, workers=2) -> torch.Tensor:
    """The stored pixels of some images, in one batch."""
    return torch.cat(list(images.batches([np.array(indices)], workers)))


def cells_tree(root, per_class=24, classes=("round", "long", "split")) -> Path:
    """Images of 16 px in up to three classes that differ in color."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            pixels[..., k] = pixels[..., k] // 2 + 100
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


def cytology_tree(root) -> Path:
    """The five target labels and 44 others, four to 24 images of 8 px each, colored by label."""
    rng = np.random.default_rng(0)
    names = [*cytology.TARGETS.split(","), *(f"label{k:02d}" for k in range(44))]
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        color = rng.integers(0, 256, 3)
        for i in range(20 if k < 5 else 4 + k % 40 // 2):
            pixels = np.clip(color + rng.integers(-20, 21, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@cache
def sample_cells():
    """Pixels, labels and classes of 400 embedded cells of 32 px."""
    return synthetic.cytology(num_images=400, size=32)


def split_cells(root, labels=None, count=400) -> Path:
    """The first embedded cells as PNG files, three of four in train/, the others in test/."""
    pixels, own_labels, classes = sample_cells()
    labels = own_labels if labels is None else labels
    for i in range(count):
        path = root / ("test" if i % 4 == 0 else "train") / classes[labels[i]] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i].transpose(1, 2, 0)).save(path)
    return root


# Face clips


def write_clip(folder, rng, tint, count=6) -> None:
    """Frames of 32 px whose red is raised by `tint`."""
    folder.mkdir(parents=True)
    for t in range(count):
        pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
        pixels[..., 0] += np.uint8(tint)
        Image.fromarray(pixels).save(folder / f"{t:04d}.png")


def ffpp_tree(root, pairs=(4, 2, 2), count=6) -> Path:
    """FaceForensics++'s layout with two methods whose fakes are redder: each pair of persons gives
    two real videos, and two fake ones a method.
    """
    rng, first = np.random.default_rng(0), 0
    for split, number in zip(("train", "val", "test"), pairs, strict=True):
        listed = [[f"{first + 2 * k:03d}", f"{first + 2 * k + 1:03d}"] for k in range(number)]
        first += 2 * number
        (root / "splits").mkdir(parents=True, exist_ok=True)
        (root / "splits" / f"{split}.json").write_text(json.dumps(listed))
        for a, b in listed:
            for name in (a, b):
                write_clip(root / f"original_sequences/youtube/c23/frames/{name}", rng, 0, count)
            for method, tint in (("Deepfakes", 60), ("FaceSwap", 90)):
                for name in (f"{a}_{b}", f"{b}_{a}"):
                    folder = root / f"manipulated_sequences/{method}/c23/frames/{name}"
                    write_clip(folder, rng, tint, count)
    return root


def clip_folders(root, clips) -> Path:
    """Clips of color fields, root/NAME/NNNN.png, of (name, label, split, colors), and a CSV."""
    lines = ["video_id,label,path,split"]
    for name, label, split, colors in clips:
        (root / name).mkdir(parents=True)
        for t, color in enumerate(colors):
            field = np.full((32, 32, 3), color, np.uint8)
            Image.fromarray(field).save(root / name / f"{t:04d}.png")
        lines.append(f"{name},{label},{name},{split}")
    (root / "videos.csv").write_text("\n".join(lines) + "\n")
    return root


def ordered_clips(root) -> Path:
    """Clips that only their order tells apart: a real one brightens, its fake runs backwards."""
    rng, clips = np.random.default_rng(0), []
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        for k in range(count):
            levels = rng.integers(5, 80) + np.cumsum(rng.integers(20, 45, 4))
            clips.append((f"{split}{k:02d}", "real", split, levels))
            clips.append((f"{split}{k:02d}r", "fake", split, levels[::-1]))
    return clip_folders(root, clips)


def numbered_frames(folder, count=3, value=0, start=0) -> None:
    """Frames whose red is `value` and whose green counts; by name they sort in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", (10, 10), (value, k, 0)).save(folder / f"{start + k}.png")


PAIRS = {
    "train": [["000", "001"], ["002", "003"]],
    "val": [["004", "005"]],
    "test": [["006", "007"]],
}
METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")


def numbered_ffpp(root, pairs=PAIRS, methods=METHODS, compressions=("c23",), splits=True) -> Path:
    """A miniature FaceForensics++: every video's pixels hold (its number, the frame's number)."""
    (root / "splits").mkdir(parents=True)
    number = 0
    for name, listed in pairs.items():
        if splits:
            (root / "splits" / f"{name}.json").write_text(json.dumps(listed))
        for a, b in listed:
            for compression in compressions:
                videos = [f"original_sequences/youtube/{compression}/frames/{v}" for v in (a, b)]
                videos += [
                    f"manipulated_sequences/{method}/{compression}/frames/{video}"
                    for method in methods
                    for video in (f"{a}_{b}", f"{b}_{a}")
                ]
                for video in videos:
                    numbered_frames(root / video, 11, number)
                    number += 1
    return root


# RAER


def _raer_lists(root, lists, faces, bodies, classes) -> None:
    for part, lines in lists.items():
        (root / f"{part}.txt").write_text("".join(lines))
    (root / "face.json").write_text(json.dumps(faces))
    (root / "body.json").write_text(json.dumps(bodies))
    if classes:
        (root / "classes.txt").write_text(classes)


RAER_COUNTS = {"train": (22, 8, 4), "val": (3, 3, 3), "test": (3, 3, 3)}
RAER_CLASSES = ("calm", "glad", "puzzled")


def raer_tree(root, counts=RAER_COUNTS, classes=RAER_CLASSES) -> Path:
    """A miniature RAER of 24 px: 34 training, 9 validation and 9 test clips of three classes that
    differ in color.
    """
    rng = np.random.default_rng(0)
    lists, faces, bodies = {}, {}, {}
    for part, per_class in counts.items():
        lists[part] = []
        for label, count in enumerate(per_class):
            for i in range(count):
                clip, length = f"{part}/clip {label}-{i}", 2 + (label + i) % 4
                for t in range(length):
                    pixels = rng.integers(0, 90, (24, 32, 3), dtype=np.uint8)
                    pixels[..., label] += 120
                    file = root / clip / f"{t:03d}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(file)
                faces[clip] = {f"{t:03d}.png": [8, 2, 24, 18] for t in range(length)}
                bodies[clip] = [2, 0, 30, 24]
                lists[part].append(f"{clip} {length} {label + 1}\n")
    _raer_lists(root, lists, faces, bodies, "".join(f"{c}\ta {c} face\n" for c in classes))
    return root


FACE_BOX, BODY_BOX = [10, 4, 20, 14], [4, 0, 34, 24]
FRAME_SIZE = (40, 24)  # width and height


def numbered_raer_frame(path, value=0, k=0, size=FRAME_SIZE) -> None:
    """A frame whose red is the clip's number, whose green is the frame's, and whose blue tells the
    place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:] = (value, k, 0)
    pixels[..., 2] = np.arange(size[0]) * 5
    Image.fromarray(pixels).save(path)


def numbered_raer(root, lists, *, faces=None, bodies=None, classes=None, length=3) -> Path:
    """A miniature RAER: `lists` gives (clip, label) by part, each clip has `length` frames and both
    boxes, which `faces` and `bodies` may change.
    """
    root.mkdir(parents=True, exist_ok=True)
    face_boxes, body_boxes = {}, {}
    clips = dict.fromkeys(line for lines in lists.values() for line in lines)
    for number, (clip, _) in enumerate(clips):
        names = [f"{k}.png" for k in range(8, 8 + length)]  # 10.png comes after 9.png
        for k, name in enumerate(names):
            numbered_raer_frame(root / clip / name, number, k)
        face_boxes[clip] = dict.fromkeys(names, FACE_BOX)
        body_boxes[clip] = BODY_BOX
    lines = {
        part: [f"{clip} {length} {label}\n" for clip, label in listed]
        for part, listed in lists.items()
    }
    face_boxes = faces(face_boxes) if faces else face_boxes
    body_boxes = bodies(body_boxes) if bodies else body_boxes
    _raer_lists(root, lines, face_boxes, body_boxes, classes)
    return root


# Utterances

WORDS = {
    "ask": "what are you doing ?",
    "tell": "i was there last week .",
    "greet": "hi , hello !",
    "thank": "thanks so much",
}


def utterance_arrays(seed=0, count=160) -> dict[str, np.ndarray]:
    """Four classes in three modalities, one of them sequences."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    lengths = rng.integers(1, 6, count)
    audio = rng.normal(size=(count, 5, 6)).astype(np.float32) + 3 * np.eye(4, 6)[labels][:, None]
    text = rng.normal(size=(count, 8)) + 4 * np.eye(4, 8)[labels]
    room = rng.normal(size=(count, 3))
    return {
        "text": text.astype(np.float32),
        "room": room.astype(np.float32),
        "audio": audio,
        "audio_len": lengths,
        "label": labels,
        "classes": np.array(["a", "b", "c", "d"]),
    }


def utterances_npz(path, **changes) -> Path:
    """utterance_arrays as a file."""
    np.savez(path, **utterance_arrays() | changes)
    return path


def utterances_tsv(path, words=None, num_words=3) -> Path:
    """A .tsv of 120 utterances whose classes have words of their own, `num_words` in each line."""
    rng, words = random.Random(0), words or WORDS
    rows = ["id\ttext\tlabel"]
    for i in range(120):
        label = list(words)[i % len(words)]
        line = rng.sample(words[label].split(), num_words)
        rows.append(f"u{i}\t{' '.join([*line, f'name{i % 7}'])}\t{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


def sequences_npz(path) -> Path:
    """160 utterances in four classes: a modality of rows, one of sequences padded with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 4
    rows = rng.normal(size=(4, 16))[labels] + 0.3 * rng.normal(size=(160, 16))
    steps = rng.normal(size=(4, 1, 8))[labels] + 0.3 * rng.normal(size=(160, 6, 8))
    lengths = rng.integers(2, 6, 160)
    np.savez(
        path, text=rows.astype("f4"), audio=steps.astype("f4"), audio_len=lengths, label=labels
    )
    return path


def rows_npz(path) -> Path:
    """200 utterances in four classes: two modalities of rows."""
    rng = np.random.default_rng(0)
    label = np.arange(200) % 4
    centers = rng.normal(size=(4, 16))
    text = centers[label] + rng.normal(size=(200, 16))
    timing = centers[label, :8] + 2 * rng.normal(size=(200, 8))
    np.savez(path, text=text.astype("f4"), timing=timing.astype("f4"), label=label)
    return path
