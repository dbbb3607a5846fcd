"""Decoding, batches, damaged files and labels of image sets."""

import io
import itertools
import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import ExifTags, Image, ImageFile, PngImagePlugin
from torchvision.transforms.v2 import functional as F

from common.data.images import central_square, reason, upright_size
from common.data.open import open_images, prepare
from common.data.pack import pack
from common.errors import InputError
from tests.data import image_folder, picture, read_pixels, zipped

CLASSES = [f"{name}/{i}.png" for name in ("b", "a", "c") for i in range(4)]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path, suffix):
    root = tmp_path / "set"
    root.mkdir()
    levels = (np.arange(400, dtype=np.uint16).reshape(20, 20) * 164).astype(np.uint16)
    Image.fromarray(levels).save(root / f"0.{suffix}")
    image = read_pixels(open_images(str(root)), [0])[0, 0].numpy()
    assert np.abs(image.astype(int) - levels / 257).max() <= 1 and len(np.unique(image)) > 200
    Image.fromarray(levels.astype(np.float32)).save(root / "0.tiff")
    (root / f"0.{suffix}").unlink(missing_ok=suffix == "png")
    if suffix == "tiff":
        Image.fromarray(levels.astype(np.float32)).save(root / "0.tiff")
    with pytest.raises(InputError, match="32-bit"):
        read_pixels(open_images(str(root)), [0])


@pytest.mark.parametrize(("width", "height"), [(40, 25), (25, 40), (16, 16), (300, 17)])
def test_decoding_resizes_the_shorter_side_and_cuts_the_center(tmp_path, width, height):
    root = image_folder(tmp_path / "set", ["a/0.png", "b/0.png"], width=width, height=height)
    images = open_images(str(root))
    images.resize_store(16)
    image = read_pixels(images, [0])[0]
    scale = 16 / min(width, height)
    size = [max(16, round(height * scale)), max(16, round(width * scale))]
    expected = F.center_crop(
        F.resize(F.pil_to_tensor(picture(0, width, height)), size, antialias=True), [16, 16]
    )
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    # Pillow and torchvision round differently at ties, and odd margins may be cut on either side by
    # one pixel.
    if (size[0] - 16) % 2 == 0 and (size[1] - 16) % 2 == 0:
        assert (image.int() - expected.int()).abs().max() <= 1


def levels16(path, top, seed=0, **options):
    levels = np.random.default_rng(seed).integers(0, top + 1, (20, 20)).astype(np.uint16)
    levels[0, 0] = top
    Image.fromarray(levels).save(path, **options)
    return levels.astype(int)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(
    ("tops", "white"), [((4000, 900), 4095), ((200, 90), 255), ((900, 5000), 65535)]
)
def test_sixteen_bits_are_scaled_by_the_range_of_the_set(tmp_path, suffix, tops, white):
    stored = [levels16(tmp_path / f"{k}.{suffix}", top, k) for k, top in enumerate(tops)]
    picture(0).save(tmp_path / "8bit.png")
    images = open_images(str(tmp_path))
    for levels, k in zip(stored, (0, 1), strict=True):
        assert np.array_equal(images.decode(k)[1].numpy(), levels * 255 // white)
    assert (f"16-bit pixels scaled by {white}: none is above" in images.describe()) == (
        white < 65535
    )


def test_sixteen_bits_are_scaled_by_what_a_tiff_says(tmp_path):
    # MaxSampleValue: of 12 bits, of all, and wrong.
    for name, top, value in (
        ("a", 900, 4095),
        ("b", 900, 65535),
        ("c", 5000, 4095),
    ):
        levels = levels16(tmp_path / f"{name}.tiff", top, tiffinfo={281: value})
        image = open_images(str(tmp_path)).decode("abc".index(name))
        white = 4095 if name == "a" else 65535
        assert np.array_equal(image[0].numpy(), levels * 255 // white), name
    assert "by the 4095 that their files name" in open_images(str(tmp_path)).describe()


def test_a_pgm_of_sixteen_bits_is_read(tmp_path):
    levels = np.arange(400, dtype=">u2").reshape(20, 20) * 10
    for top in (4095, 65535):
        (tmp_path / "0.pgm").write_bytes(b"P5 20 20 %d\n" % top + levels.astype(">u2").tobytes())
        image = open_images(str(tmp_path)).decode(0)[0].numpy()
        assert np.abs(image - levels.astype(int) * 255 / top).max() <= 1


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_strip_takes_no_gigabytes_and_gives_the_same_square():
    def square(width, height, side):
        strip = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        return central_square(pixels_of(strip), side)

    for width, height in ((2, 20000), (20000, 2)):
        assert square(width, height, 256).shape == (3, 256, 256)
    shape = (11, 600)  # both ways, at a whole scale
    strips = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*s, 3), np.uint8))
        for s in (shape, shape[::-1])
    ]
    for strip in strips:
        cut = central_square(pixels_of(strip), 22)
        whole = strip.resize([2 * n for n in strip.size], Image.Resampling.BILINEAR)
        left, top = ((n - 22) // 2 for n in whole.size)
        expected = np.array(whole.crop((left, top, left + 22, top + 22)))
        assert np.abs(cut.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


ORIENTATIONS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # the camera turned what is shown turned back
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def photograph(path, image, orientation, **options):
    """An image as a camera stores it that is held that way."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turn = ORIENTATIONS[orientation]
    (image if turn is None else image.transpose(turn)).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        ("png", "RGB"),
        ("png", "P"),
        ("png", "I;16"),
        ("tiff", "RGB"),
        ("tiff", "I;16"),
        ("webp", "RGB"),
        ("jpg", "RGB"),
    ],
)
def test_a_photograph_is_turned_upright(tmp_path, orientation, suffix, mode):
    if mode == "I;16":
        noise = np.random.default_rng(0).integers(0, 65536, (24, 40), dtype=np.uint16)
        image = Image.fromarray(noise)
    else:  # smooth, or a JPEG that was turned would differ
        image = picture(0, 3, 2).resize((40, 24), Image.Resampling.BICUBIC).convert(mode)
    for name in ("plain", "turned", "packed"):
        (tmp_path / name).mkdir()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(
        suffix, {}
    )
    image.save(tmp_path / "plain" / f"0.{suffix}", **options)
    photograph(tmp_path / "turned" / f"0.{suffix}", image, orientation, **options)
    plain, turned = (open_images(str(tmp_path / name)) for name in ("plain", "turned"))
    assert plain.native_size == turned.native_size == 24
    with Image.open(io.BytesIO(turned.read(0))) as opened:
        assert upright_size(opened) == (40, 24)
    for images in (plain, turned):
        images.resize_store(9)  # a JPEG's draft of half its size is enough
    pack(turned, tmp_path / "packed" / "0.packed", default_size=9, left_out=[], workers=1)
    expected = plain.decode(0).int()
    packed = open_images(str(tmp_path / "packed" / "0.packed"))
    for images in (turned, open_images(str(zipped(tmp_path / "turned"))), packed):
        images.resize_store(9)
        assert (images.decode(0).int() - expected).abs().max() <= (4 if suffix == "jpg" else 0)


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path):
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n4\nno digits")
    picture(0).save(tmp_path / "0.png", pnginfo=profile)
    picture(0).save(tmp_path / "1.webp", lossless=True, exif=b"no TIFF header")
    picture(0).save(tmp_path / "2.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    images = open_images(str(tmp_path))
    for i, path in enumerate(sorted(tmp_path.iterdir())):
        with Image.open(path) as opened:
            assert upright_size(opened) == (20, 20)
        assert np.array_equal(images.decode(i).permute(1, 2, 0), np.asarray(picture(0)))


def test_sizes_come_from_headers(tmp_path, monkeypatch):
    for suffix in ("png", "jpg", "webp", "tiff"):
        photograph(tmp_path / f"turned.{suffix}", picture(0, 40, 25), 6)
        picture(0, 40, 25).save(tmp_path / f"plain.{suffix}")

    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    assert open_images(str(tmp_path)).native_size == 25
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as opened:
            assert upright_size(opened) == (40, 25), path
    assert not decoded


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    root = tmp_path / "set"
    root.mkdir()
    for i in range(2):
        picture(i).convert("L" if mode == "LA" else mode).convert(mode).save(root / f"{i}.{suffix}")
    assert read_pixels(open_images(str(root)), [0, 1]).shape == (2, 3, 20, 20)


def test_batches_do_not_depend_on_threads_or_on_the_cache(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "set", CLASSES)
    order = [np.array([3, 1, 4]), np.array([1, 5, 9]), np.array([2, 6, 5]), np.array([3, 5, 8])]
    cached = list(open_images(str(root)).batches(order, 3))
    monkeypatch.setattr("common.data.images._CACHE_BYTES", 0)
    single = open_images(str(root))
    decoded = list(single.batches(order, 1))
    assert all(torch.equal(a, b) for a, b in zip(cached, decoded, strict=True))
    assert single._cache is None


def jpegs():
    """Contents by name: every kind that is common, and damaged ones."""
    for mode in ("RGB", "L", "CMYK"):
        for width, height in ((1, 1), (16, 16), (33, 19), (130, 95)):
            for subsampling, progressive in itertools.product((0, 1, 2), (False, True)):
                image = picture(width, width, height).convert(mode)
                exif = image.getexif()
                exif[274] = 1 + width % 8 if subsampling == 1 else 1  # orientation
                options = {"subsampling": subsampling, "progressive": progressive, "exif": exif}
                file = io.BytesIO()
                image.save(file, "JPEG", **options)
                name = f"{mode} {width} {subsampling} {progressive}"
                yield name, file.getvalue()
                if mode == "RGB" and width == 130:
                    content = file.getvalue()
                    yield f"{name} cut", content[:-40]
                    yield f"{name} longer", content + b"more"
                    for place in range(len(content) // 2, len(content), len(content) // 9):
                        extra = content[:place] + b"\xff\x00extra" + content[place:]
                        yield f"{name} extra at {place}", extra


def test_a_jpeg_is_what_pillow_makes_of_it(tmp_path, monkeypatch):
    """The same pixels, and the same refusals of damaged files."""
    contents = dict(jpegs())
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    by_torchvision = []
    decode_jpeg = torchvision.io.decode_jpeg

    def counted(*args, **options):
        pixels = decode_jpeg(*args, **options)
        by_torchvision.append(1)
        return pixels

    monkeypatch.setattr(torchvision.io, "decode_jpeg", counted)

    def outcomes():
        images = open_images(str(tmp_path))
        for index, name in enumerate(images.ids):
            try:
                yield name, images.decode(index)
            except InputError as error:
                yield name, str(error)

    found = dict(outcomes())
    assert len(by_torchvision) > len(contents) / 3
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    refused = 0
    for name, pixels in outcomes():
        if isinstance(pixels, str):
            refused += 1
            assert found[name] == pixels
        else:
            assert torch.equal(found[name], pixels), name
    assert refused >= 6


def test_what_speeds_reading_up_is_named(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "set", CLASSES)
    images = open_images(str(root))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    packing, smaller = "python -m common.data pack", "--store-size below 20"
    assert images.faster(2) == [packing, "--workers 6", smaller]
    assert images.faster(6) == [packing, smaller]
    pack(images, tmp_path / "set.packed", default_size=20, workers=1)
    assert open_images(str(tmp_path / "set.packed")).faster(5) == ["--workers 6"]


def damaged(root):
    image_folder(root, [f"{c}/{i:03d}.png" for c in "xy" for i in range(100)])
    whole = io.BytesIO()
    picture(0, 60, 60).save(whole, "JPEG")
    (root / "x" / "cut.jpg").write_bytes(whole.getvalue()[:-200])
    return root


@pytest.mark.parametrize("pack", [False, True])
def test_a_damaged_image_is_named(tmp_path, pack):
    root = damaged(tmp_path / "set")
    images = open_images(str(zipped(root) if pack else root))
    with pytest.raises(InputError, match=r"x/cut\.jpg in set"):
        read_pixels(images, range(len(images)))


def test_a_reason_is_one_line_for_people():
    error = RuntimeError("SingleStreamDecoder, /src/_core/SingleStreamDecoder.cpp:70, Failed: x\ny")
    assert reason(error) == "Failed: x" and reason(ValueError()) == "ValueError"
    assert (
        reason(ValueError("no <Image object at 0x7f> there, a.cpp:1, b")) == "no there, a.cpp:1, b"
    )


def test_damaged_images_are_left_out_and_counted_up_to_one_percent(tmp_path):
    root = damaged(tmp_path / "set")
    said = []
    images = prepare(str(root), store_size=8, on_bad_item="skip", workers=2, say=said.append)
    assert len(images) == 200 and not any("cut" in name for name in images.ids)
    assert "left out 1 damaged image, the first is x/cut.jpg" in said[0]
    assert read_pixels(images, range(200)).shape == (200, 3, 8, 8)
    for i in range(2):
        (root / "y" / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(
        InputError,
        match=r"3 of 203 images are damaged .* more than --on-bad-item skip allows \(1%\)",
    ):
        prepare(str(root), store_size=None, on_bad_item="skip", workers=2)


def test_labels_are_renumbered_to_the_models_classes(tmp_path):
    images = open_images(str(image_folder(tmp_path / "set", ["b/0.png", "b/1.png", "a/0.png"])))
    assert images.labels_in(["z", "b", "a"]).tolist() == [2, 1, 1]
    assert images.labels_in(["b"]).tolist() == [-1, 0, 0]
    every = np.arange(3)
    assert images.labels_in(["z", "b", "a"], every).tolist() == [2, 1, 1]
    assert images.labels_in(["b"], every[1:]).tolist() == [-1, 0, 0]
    with pytest.raises(InputError, match="has the class 'a', the model has b"):
        images.labels_in(["b"], every)
