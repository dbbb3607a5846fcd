"""Batched augmentation against torchvision's functional forms and distributions."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from common.data import augment
from common.rng import uniform

SAMPLES = np.arange(20_000)


def random_images(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    images[0, :, : height // 2] = 255  # a flat region: hue and saturation are undefined there
    return images


def some_params(n, height, width, size, **changes):
    """Distinct crops for each of n samples, everything else off but what `changes` names."""
    drawn = augment.simclr_params(3, 1, np.arange(n), 0, (height, width), size)
    return dataclasses.replace(
        augment.identity_params(n, (height, width)), boxes=drawn.boxes, **changes
    )


def crop_with_torchvision(image, box, size):
    top, left, height, width = map(int, box)
    image = image.to(torch.float32) / 255
    return TF.resized_crop(
        image,
        top,
        left,
        height,
        width,
        [size, size],
        interpolation=v2.InterpolationMode.BILINEAR,
        antialias=True,
    )


def view_with_torchvision(image, params, row, size):
    x = crop_with_torchvision(image, params.boxes[row], size)
    if params.flip[row]:
        x = TF.horizontal_flip(x)
    if params.jittered[row]:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for op in params.order[row]:
            x = adjust[op](x, float(params.factors[row, op]))
    if params.grayscale[row]:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if params.sigma[row] > 0:
        k = augment.blur_kernel_size(size)
        x = TF.gaussian_blur(x, [k, k], [float(params.sigma[row])] * 2)
    return x


def assert_equals_torchvision(images, params, size, atol=1e-5):
    views = augment.make_view(images, params, size)
    assert views.shape == (len(images), 3, size, size) and views.dtype == torch.float32
    expected = torch.stack(
        [view_with_torchvision(image, params, i, size) for i, image in enumerate(images)]
    )
    torch.testing.assert_close(views, expected, atol=atol, rtol=0)


def test_uniform_fills_the_unit_interval():
    u = uniform(0, 0, SAMPLES, 0, 4)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    for column in u.T:
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand draws, and these are
        # fixed.
        distance = np.abs(np.sort(column) - (np.arange(len(column)) + 0.5) / len(column)).max()
        assert distance < 1.95 / math.sqrt(len(column))


def test_uniform_is_independent_across_every_key():
    base = uniform(5, 6, SAMPLES, 7, 2)
    others = [
        uniform(6, 6, SAMPLES, 7, 2),
        uniform(5, 7, SAMPLES, 7, 2),
        uniform(5, 6, SAMPLES, 8, 2),
        uniform(5, 6, SAMPLES + 1, 7, 2),
        uniform(5 + 2**32, 6, SAMPLES, 7, 2),
        base[:, ::-1],
    ]
    bound = 4 / math.sqrt(
        len(SAMPLES)
    )  # four standard deviations of a correlation of independent draws
    for other in others:
        assert abs(np.corrcoef(base[:, 0], other[:, 0])[0, 1]) < bound
    for row, nexts in ((base[:-1, 0], base[1:, 0]), (base[:-1, 1], base[1:, 0])):
        assert abs(np.corrcoef(row, nexts)[0, 1]) < bound


def test_uniform_does_not_collide_when_keys_are_swapped():
    keys = range(12)
    draws = {
        (seed, epoch, view): uniform(seed, epoch, np.arange(12), view, 3)
        for seed in keys
        for epoch in keys
        for view in keys
    }
    values = np.concatenate([draw.ravel() for draw in draws.values()])
    assert len(np.unique(values)) == len(values) == 12**4 * 3


def test_uniform_depends_on_the_sample_alone():
    whole = uniform(1, 2, np.arange(100), 3, 5)
    chosen = np.array([42, 7, 7, 99])
    np.testing.assert_array_equal(uniform(1, 2, chosen, 3, 5), whole[chosen])
    np.testing.assert_array_equal(uniform(1, 2, chosen, 3, 2), whole[chosen, :2])
    assert uniform(1, 2, [], 3, 5).shape == (0, 5)


@pytest.mark.parametrize("samples", [np.zeros((2, 2), int), np.array([0.5]), 3])
def test_uniform_refuses_other_samples(samples):
    with pytest.raises(ValueError, match="samples"):
        uniform(0, 0, samples, 0, 1)


def test_simclr_probabilities_and_ranges():
    params = augment.simclr_params(0, 0, SAMPLES, 0, 256, 224)
    for drawn, p in (
        (params.flip, 0.5),
        (params.jittered, 0.8),
        (params.grayscale, 0.2),
        (params.sigma > 0, 0.5),
    ):
        assert abs(drawn.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(SAMPLES))
    low, high = [0.2, 0.2, 0.2, -0.2], [1.8, 1.8, 1.8, 0.2]
    assert (params.factors >= low).all() and (params.factors <= high).all()
    np.testing.assert_allclose(params.factors.min(0), low, atol=2e-3)
    np.testing.assert_allclose(params.factors.max(0), high, atol=2e-3)
    sigma = params.sigma[params.sigma > 0]
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2 and abs(sigma.mean() - 1.05) < 0.02
    codes, counts = np.unique(params.order @ [1000, 100, 10, 1], return_counts=True)
    assert len(codes) == 24 and (np.sort(params.order, axis=1) == np.arange(4)).all()
    expected = len(SAMPLES) / 24
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001
    # What decides one operation must not decide another.
    switches = np.stack([params.flip, params.jittered, params.grayscale, params.sigma > 0])
    assert np.abs(np.corrcoef(switches) - np.eye(4)).max() < 4 / math.sqrt(len(SAMPLES))


@pytest.mark.parametrize(
    "params, expected",
    [
        (augment.simclr_params(3, 5, np.arange(500), 1, (60, 80), 32), "75e085cca5bc768d"),
        (augment.crop_flip_params(3, 5, np.arange(500), 0, 64), "c09ce93b28ae787a"),
    ],
)
def test_the_draws_are_those_of_earlier_versions(params, expected):
    digest = hashlib.sha256()
    for name in ["boxes", "flip", "jittered", "factors", "order", "grayscale", "sigma", "angle"]:
        digest.update(np.ascontiguousarray(getattr(params, name)).tobytes())
    assert digest.hexdigest()[:16] == expected  # of version 0.1.0


ORIENTED = augment.ViewSettings(vertical_flip=True, rotation="90")


def test_orientations_are_equally_likely_and_move_nothing_else():
    plain = augment.simclr_params(0, 0, SAMPLES, 0, 64, 48)
    for settings, codes in (
        (augment.ViewSettings(vertical_flip=True), 4),
        (augment.ViewSettings(rotation="90"), 8),
        (ORIENTED, 8),
    ):
        params = augment.simclr_params(0, 0, SAMPLES, 0, 64, 48, settings)
        drawn = params.flip + 2 * params.flip_rows + 4 * params.transposed
        counts = np.bincount(drawn, minlength=codes)
        assert len(counts) == codes
        expected = len(SAMPLES) / codes
        assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 df, p = 0.001
        for field in dataclasses.fields(params):
            if field.name not in ("flip", "flip_rows", "transposed"):
                kept = getattr(plain, field.name)
                np.testing.assert_array_equal(getattr(params, field.name), kept)
        trained = augment.crop_flip_params(0, 0, SAMPLES, 0, 64, settings=settings)
        np.testing.assert_array_equal(trained.flip_rows, params.flip_rows)
        np.testing.assert_array_equal(trained.transposed, params.transposed)
    switches = np.stack([params.flip_rows, params.transposed, params.jittered, params.grayscale])
    assert np.abs(np.corrcoef(switches) - np.eye(4)).max() < 4 / math.sqrt(len(SAMPLES))


def test_grayscale_angle_and_stain_are_drawn_as_asked():
    settings = augment.ViewSettings(grayscale=0.7, rotation="any", stain=0.3)
    params = augment.simclr_params(0, 0, SAMPLES, 0, 64, 48, settings)
    assert abs(params.grayscale.mean() - 0.7) < 4 * math.sqrt(0.21 / len(SAMPLES))
    assert -180 <= params.angle.min() < -179.9 and 179.9 < params.angle.max() < 180
    assert abs(params.angle.mean()) < 4 * 360 / math.sqrt(12 * len(SAMPLES))
    low, high = [0.7] * 3 + [-0.3] * 3, [1.3] * 3 + [0.3] * 3
    np.testing.assert_allclose(params.stain.min(0), low, atol=1e-3)
    np.testing.assert_allclose(params.stain.max(0), high, atol=1e-3)
    drawn = np.column_stack([params.stain, params.angle, params.factors])
    assert np.abs(np.corrcoef(drawn.T) - np.eye(11)).max() < 5 / math.sqrt(len(SAMPLES))


def assert_same_distribution(ours, theirs):
    # Kolmogorov-Smirnov for two samples at one in ten million (4 to 5 sigma); both are drawn from
    # fixed seeds.
    grid = np.unique(np.concatenate([ours, theirs]))
    gap = np.searchsorted(np.sort(ours), grid, "right") / len(ours)
    gap -= np.searchsorted(np.sort(theirs), grid, "right") / len(theirs)
    assert np.abs(gap).max() < 2.9 * math.sqrt(1 / len(ours) + 1 / len(theirs))


def test_factors_orders_and_sigmas_follow_torchvisions_distribution():
    params = augment.simclr_params(2, 0, SAMPLES, 0, 256, 224)
    torch.manual_seed(0)
    jitter, blur = v2.ColorJitter(0.8, 0.8, 0.8, 0.2), v2.GaussianBlur(23, (0.1, 2.0))
    drawn = [jitter.make_params([]) for _ in range(4000)]
    for op, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        theirs = np.array([float(draw[f"{name}_factor"]) for draw in drawn])
        assert_same_distribution(params.factors[:, op], theirs)
        places = np.array([draw["fn_idx"].tolist().index(op) for draw in drawn])
        assert_same_distribution(params.order.argsort(axis=1)[:, op], places)
    sigmas = np.array([blur.make_params([])["sigma"][0] for _ in range(4000)])
    assert_same_distribution(params.sigma[params.sigma > 0], sigmas)
    spread = np.corrcoef(np.column_stack([params.factors, params.boxes[:, 2:].prod(axis=1)]).T)
    assert np.abs(spread - np.eye(5)).max() < 5 / math.sqrt(len(SAMPLES))


def test_strength_scales_the_jitter():
    small = augment.ViewSettings(color_strength=0.5, blur=0)
    params = augment.simclr_params(0, 0, SAMPLES, 0, 32, 32, small)
    assert params.factors[:, :3].min() >= 0.6 and params.factors[:, :3].max() <= 1.4
    assert np.abs(params.factors[:, 3]).max() <= 0.1 and not params.sigma.any()
    strong = augment.ViewSettings(color_strength=2)
    strong = augment.simclr_params(0, 0, SAMPLES, 0, 32, 32, strong).factors[:, :3]
    assert 0 <= strong.min() < 1e-3 and 2.599 < strong.max() <= 2.6


def test_blur_and_smallest_crop_move_nothing_else():
    before = augment.simclr_params(0, 0, SAMPLES, 0, 256, 224)
    often = augment.simclr_params(0, 0, SAMPLES, 0, 256, 224, augment.ViewSettings(blur=0.8))
    assert abs((often.sigma > 0).mean() - 0.8) < 4 * math.sqrt(0.16 / len(SAMPLES))
    seen = before.sigma > 0
    np.testing.assert_array_equal(often.sigma[seen], before.sigma[seen])
    large = augment.simclr_params(0, 0, SAMPLES, 0, 256, 224, augment.ViewSettings(crop_min=0.6))
    assert 0.58 < (large.boxes[:, 2:].prod(axis=1) / 256**2).min() < 0.62
    for field in dataclasses.fields(before):
        values = getattr(before, field.name)
        if field.name != "sigma":
            np.testing.assert_array_equal(getattr(often, field.name), values)
        if field.name != "boxes":
            np.testing.assert_array_equal(getattr(large, field.name), values)


@pytest.mark.parametrize("crop_min", [0.08, 0.4])
@pytest.mark.parametrize("height, width", [(256, 256), (60, 200)])
def test_boxes_follow_torchvisions_distribution(height, width, crop_min):
    settings = augment.ViewSettings(crop_min=crop_min)
    boxes = augment.simclr_params(1, 0, SAMPLES, 0, (height, width), 224, settings).boxes
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(224, scale=(crop_min, 1.0))
    image = torch.empty(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    reference = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn], float)
    assert (boxes == np.rint(boxes)).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (
        boxes[:, 1] + boxes[:, 3] <= width
    ).all()

    def features(b):
        return {
            "area": b[:, 2] * b[:, 3],
            "log ratio": np.log(b[:, 3] / b[:, 2]),
            "top": b[:, 0],
            "left": b[:, 1],
            "center": b[:, 0] + b[:, 2] / 2,
        }

    ours, theirs = features(boxes), features(reference)
    for name, values in ours.items():
        grid = np.unique(np.concatenate([values, theirs[name]]))
        gap = np.searchsorted(np.sort(values), grid, "right") / len(values)
        gap -= np.searchsorted(np.sort(theirs[name]), grid, "right") / len(theirs[name])
        assert np.abs(gap).max() < 1.95 * math.sqrt(1 / len(values) + 1 / len(theirs[name])), name


@pytest.mark.parametrize("height, width", [(10, 400), (400, 10)])
def test_boxes_fall_back_to_torchvisions_central_crop(height, width):
    boxes = augment.crop_flip_params(
        0, 0, np.arange(50), 0, (height, width), scale=(0.99, 1.0)
    ).boxes
    central = v2.RandomResizedCrop(8, scale=(0.99, 1.0)).make_params(
        [torch.empty(3, height, width)]
    )
    expected = [central[key] for key in ("top", "left", "height", "width")]
    np.testing.assert_array_equal(boxes, np.tile(expected, (50, 1)))


@pytest.mark.parametrize("size", [20, 33])
def test_quarter_turns_and_mirrors_are_exact(size):
    images = random_images(8, 40, 52)
    drawn = augment.simclr_params(5, 0, np.arange(8), 0, (40, 52), size)
    drawn = dataclasses.replace(drawn, jittered=np.zeros(8, bool), sigma=np.zeros(8))
    upright = dataclasses.replace(drawn, flip=np.zeros(8, bool))
    expected = augment.make_view(images, upright, size)
    flips, rows, transposed = (np.arange(8) >> bit & 1 == 1 for bit in range(3))
    turned = dataclasses.replace(drawn, flip=flips, flip_rows=rows, transposed=transposed)
    views = augment.make_view(images, turned, size)
    for code, view in enumerate(expected):
        if code & 1:
            view = view.flip(2)
        if code & 2:
            view = view.flip(1)
        if code & 4:
            view = view.transpose(1, 2)
        torch.testing.assert_close(views[code], view, rtol=0, atol=1e-6)
    alone = augment.make_view(images[:4], turned.take(np.arange(4)), size)  # of them none lies
    assert torch.equal(views[:4], alone)


def test_turns_by_90_degrees_are_rot90():
    images = random_images(64, 24, 24)
    identity = augment.identity_params(64, 24)
    drawn = augment.crop_flip_params(
        1, 0, np.arange(64), 0, 24, settings=augment.ViewSettings(rotation="90")
    )
    plain = augment.crop_flip_params(1, 0, np.arange(64), 0, 24)
    views = augment.make_view(images, dataclasses.replace(drawn, boxes=identity.boxes), 24)
    mirrored = augment.make_view(images, dataclasses.replace(plain, boxes=identity.boxes), 24)
    turns = [
        [k for k in range(4) if torch.equal(view, torch.rot90(before, k, (1, 2)))]
        for view, before in zip(views, mirrored, strict=True)
    ]
    assert all(len(found) == 1 for found in turns) and len(set(map(tuple, turns))) == 4


def test_channel_statistics_are_those_of_all_pixels():
    images = random_images(7, 12, 9)
    images[:, 2] = 51
    mean, std = augment.channel_statistics(images.split(3))
    pixels = images.double() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), atol=1e-6)
    expected = [*pixels.std((0, 2, 3), correction=0).tolist()[:2], 1 / 255]
    np.testing.assert_allclose(std, expected, atol=1e-6)
    assert mean[2] == 0.2 and augment.channel_statistics(images.split(2)) == [mean, std]


def test_any_angle_reflects_beyond_the_border():
    ndimage = pytest.importorskip("scipy.ndimage")
    images = random_images(6, 31, 31)
    params = augment.identity_params(6, 31)
    params.angle = np.array([0.0, 30, -45, 90, 117, 180])
    views = augment.make_view(images, params, 31, beyond="reflection")
    pixels = images.double().numpy() / 255
    for view, image, angle in zip(views, pixels, params.angle, strict=True):
        expected = ndimage.rotate(
            image, angle, (2, 1), reshape=False, order=1, mode="reflect", prefilter=False
        )
        np.testing.assert_allclose(view.numpy(), expected, atol=2e-5)
    assert views[2, :, 0, 0].max() > 0
    assert augment.make_view(images, params, 31)[2, :, 0, 0].max() == 0


# Table of Ruifrok and Johnston as it is used in digital pathology.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def test_stain_jitter_is_the_published_formula():
    images = random_images(5, 20, 20, seed=3).clamp(min=1)
    params = augment.identity_params(5, 20)
    params.stain = np.random.default_rng(0).uniform(-0.2, 0.2, (5, 6)) + augment.NO_STAIN
    params.stain[4] = augment.NO_STAIN
    views = augment.make_view(images, params, 20)
    plain = augment.make_view(images, augment.identity_params(5, 20), 20)
    for view, image, amounts in zip(views, plain.double().numpy(), params.stain, strict=True):
        stains = -np.log10(image.transpose(1, 2, 0)) @ np.linalg.inv(STAINS)
        pixels = 10 ** -((stains * amounts[:3] + amounts[3:]) @ STAINS)
        np.testing.assert_allclose(
            view.numpy(), pixels.clip(0, 1).transpose(2, 0, 1), atol=2e-5, rtol=1e-4
        )
    torch.testing.assert_close(views[4], plain[4], atol=1e-6, rtol=1e-5)
    black = torch.zeros(5, 3, 20, 20, dtype=torch.uint8)
    assert augment.make_view(black, params, 20).max() < 0.1  # neither lit nor colored


def test_stain_jitter_agrees_with_scikit_image():
    color = pytest.importorskip("skimage.color")
    rng = np.random.default_rng(0)
    # Of three stains alone, of which none has less than nothing: the others are cut off there.
    stained = color.hed2rgb(rng.uniform(0.02, 0.1, (4, 24, 24, 3)))
    images = torch.from_numpy(np.rint(255 * stained).astype(np.uint8)).permute(0, 3, 1, 2)
    params = augment.identity_params(4, 24)
    params.stain = np.column_stack([rng.uniform(0.8, 1.2, (4, 3)), rng.uniform(0, 0.1, (4, 3))])
    views = augment.make_view(images.contiguous(), params, 24).permute(0, 2, 3, 1).numpy()
    for view, image, amounts in zip(views, images.permute(0, 2, 3, 1), params.stain, strict=True):
        # Its densities are counted in six decades.
        stains = color.rgb2hed(image.numpy()) * amounts[:3] + amounts[3:] / 6
        np.testing.assert_allclose(view, color.hed2rgb(stains), atol=5e-3)


def test_crop_flip_changes_crop_and_flip_only():
    params = augment.crop_flip_params(0, 0, SAMPLES, 0, 128)
    area = params.boxes[:, 2] * params.boxes[:, 3] / 128**2
    assert (
        0.48 < area.min() < 0.52 and 0.95 < area.max() <= 1 and abs(params.flip.mean() - 0.5) < 0.02
    )
    plain = augment.identity_params(len(SAMPLES), 128)
    for name in ("jittered", "factors", "order", "grayscale", "sigma"):
        np.testing.assert_array_equal(getattr(params, name), getattr(plain, name))


@pytest.mark.parametrize(
    "height, width, size",
    [(32, 32, 16), (37, 29, 23), (24, 40, 64), (50, 50, 7), (5, 3, 4), (40, 40, 1)],
)
def test_crop_resize_and_flip_equal_torchvision(height, width, size):
    images = random_images(6, height, width)
    params = some_params(6, height, width, size, flip=np.arange(6) % 2 == 1)
    assert_equals_torchvision(images, params, size)


def test_identity_keeps_the_pixels():
    images = random_images(3, 21, 21)
    views = augment.make_view(images, augment.identity_params(3, 21), 21)
    torch.testing.assert_close(views, images / 255, atol=1e-6, rtol=0)
    flipped = dataclasses.replace(augment.identity_params(3, 21), flip=np.ones(3, bool))
    torch.testing.assert_close(
        augment.make_view(images, flipped, 21), (images / 255).flip(3), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("op", [0, 1, 2, 3])
def test_each_jitter_operation_equals_torchvision(op):
    n = 7
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (n, 1))
    factors[:, op] = np.linspace(-0.5, 0.5, n) if op == 3 else np.linspace(0, 2.2, n)
    params = some_params(n, 33, 31, 19, jittered=np.arange(n) != 2, factors=factors)
    images = random_images(n, 33, 31)
    assert_equals_torchvision(images, params, 19)
    off = dataclasses.replace(params, jittered=np.zeros(n, bool))
    changed = (
        (augment.make_view(images, params, 19) - augment.make_view(images, off, 19))
        .abs()
        .amax(dim=(1, 2, 3))
    )
    assert changed[2] == 0 and (changed[[0, 1, 6]] > 0.05).all()


def test_grayscale_equals_torchvision():
    params = some_params(5, 20, 20, 15, grayscale=np.arange(5) % 2 == 0)
    assert_equals_torchvision(random_images(5, 20, 20), params, 15)


@pytest.mark.parametrize("size", [20, 41, 64, 75])
def test_blur_equals_torchvision(size):
    sigma = np.array([0.0, 0.1, 0.7, 1.3, 2.0])
    assert_equals_torchvision(
        random_images(5, 50, 50), some_params(5, 50, 50, size, sigma=sigma), size
    )


def test_blur_kernel_is_odd_and_a_tenth_of_the_side():
    sizes = {size: augment.blur_kernel_size(size) for size in (224, 96, 64, 32, 20, 19)}
    assert sizes == {224: 23, 96: 9, 64: 7, 32: 3, 20: 3, 19: 1}
    assert not augment.simclr_params(0, 0, np.arange(99), 0, 32, 19).sigma.any()


@pytest.mark.parametrize("height, width, size", [(48, 48, 40), (45, 61, 33)])
def test_whole_views_equal_torchvision(height, width, size):
    params = augment.simclr_params(9, 2, np.arange(48), 1, (height, width), size)
    # Looser: contrast and saturation of up to 1.8 in a row enlarge the rounding of the resize.
    assert_equals_torchvision(random_images(48, height, width), params, size, atol=3e-5)


def test_a_view_does_not_depend_on_its_batch():
    samples = np.arange(100, 124)
    images = random_images(24, 40, 40)
    params = augment.simclr_params(0, 4, samples, 0, 40, 32)
    views = augment.make_view(images, params, 32)
    for chosen in ([5], [23, 5, 11], list(range(23, -1, -1))):
        alone = augment.simclr_params(0, 4, samples[chosen], 0, 40, 32)
        for field in dataclasses.fields(alone):
            np.testing.assert_array_equal(
                getattr(alone, field.name), getattr(params, field.name)[chosen]
            )
        torch.testing.assert_close(
            augment.make_view(images[chosen], alone, 32), views[chosen], atol=1e-6, rtol=0
        )
    torch.testing.assert_close(augment.make_view(images, params, 32), views, atol=0, rtol=0)


def test_epochs_and_views_differ():
    draws = [
        augment.simclr_params(0, epoch, np.arange(9), view, 64, 48)
        for epoch in (0, 1)
        for view in (0, 1)
    ]
    assert len({draw.factors.tobytes() for draw in draws}) == 4


def test_repeat_gives_every_frame_the_clips_row():
    params = augment.simclr_params(0, 0, np.arange(2), 0, 32, 24)
    frames = params.repeat(3)
    assert len(frames) == 6
    image = random_images(2, 32, 32)
    views = augment.make_view(image.repeat_interleave(3, dim=0), frames, 24).view(2, 3, 3, 24, 24)
    expected = augment.make_view(image, params, 24)[:, None].expand_as(views)
    torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)


def test_source_images_are_left_alone():
    images = random_images(4, 16, 16)
    before = images.clone()
    augment.make_view(images, augment.simclr_params(0, 0, np.arange(4), 0, 16, 16), 16)
    assert torch.equal(images, before)
    noncontiguous = images.transpose(2, 3)
    params = augment.identity_params(4, 16)
    torch.testing.assert_close(
        augment.make_view(noncontiguous, params, 16), noncontiguous / 255, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("height, width, size", [(40, 40, 24), (31, 45, 24), (12, 12, 30)])
def test_resize_equals_torchvision(height, width, size):
    images = random_images(3, height, width)
    expected = TF.resize(images / 255, [size, size], antialias=True)
    torch.testing.assert_close(augment.resize(images, size), expected, atol=1e-6, rtol=0)
    drawn = augment.make_view(images, augment.identity_params(3, (height, width)), size)
    torch.testing.assert_close(augment.resize(images, size), drawn, atol=1e-5, rtol=0)


def test_normalize_equals_torchvision():
    x = torch.rand(2, 3, 5, 7)
    with torch.inference_mode():
        augment.normalize(x.double())
    y = x.double().requires_grad_()
    expected = TF.normalize(x.double(), list(augment.IMAGENET_MEAN), list(augment.IMAGENET_STD))
    torch.testing.assert_close(augment.normalize(y), expected)
    augment.normalize(y).sum().backward()
    assert augment.normalize(x).dtype == torch.float32
    torch.testing.assert_close(augment.denormalize(augment.normalize(x)), x)


def test_bad_input_is_refused():
    images = random_images(2, 8, 8)
    params = augment.identity_params(2, 8)
    with pytest.raises(ValueError, match="uint8"):
        augment.make_view(images.float(), params, 8)
    with pytest.raises(ValueError, match="rows"):
        augment.make_view(images[:1], params, 8)
    with pytest.raises(ValueError, match="size"):
        augment.make_view(images, params, 0)
    for boxes in ([0, 0, 9, 8], [-1, 0, 8, 8], [0, 0, 8, 0], [0.5, 0, 4, 4]):
        moved = dataclasses.replace(params, boxes=np.tile(np.array(boxes, float), (2, 1)))
        with pytest.raises(ValueError, match="whole pixels"):
            augment.make_view(images, moved, 8)
    for setting, value in (
        ("color_strength", 3),
        ("blur", 2),
        ("crop_min", 0),
        ("grayscale", -0.1),
        ("stain", 1.1),
        ("rotation", "45"),
    ):
        with pytest.raises(ValueError, match=setting):
            augment.ViewSettings(**{setting: value})
    with pytest.raises(ValueError, match="scale"):
        augment.crop_flip_params(0, 0, [0], 0, 8, scale=(1.0, 0.5))
    with pytest.raises(ValueError, match="size_in"):
        augment.identity_params(1, 0)


EVERY_WAY = pytest.mark.parametrize(
    "settings",
    [
        augment.ViewSettings(),
        augment.ViewSettings(vertical_flip=True, rotation="90", stain=0.1),
        augment.ViewSettings(rotation="any", stain=0.1),
    ],
    ids=["paper", "quarter turns", "any angle"],
)


@EVERY_WAY
def test_make_view_never_reads_the_device_and_does_not_loop_over_samples(settings):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    counts = []
    for n in (64, 192):
        calls = []
        # A meta tensor takes the way of a device and has no values: reading one would raise.
        images = torch.empty((n, 3, 24, 24), dtype=torch.uint8, device="meta")
        params = augment.simclr_params(0, 0, np.arange(n), 0, 24, 24, settings)
        with Record():
            views = augment.make_view(images, params, 24, "reflection")
        assert views.device.type == "meta" and views.shape == (n, 3, 24, 24)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 50


@EVERY_WAY
@pytest.mark.parametrize("at_once", [1, 2, 7, 24])
def test_views_do_not_depend_on_how_many_a_cpu_makes_at_once(monkeypatch, at_once, settings):
    images = random_images(24, 40, 40)
    params = augment.simclr_params(0, 4, np.arange(24), 0, 40, 32, settings)
    monkeypatch.setattr(augment, "_CPU_VALUES", 24 * 3 * 32 * 32)
    whole = augment.make_view(images, params, 32)
    monkeypatch.setattr(augment, "_CPU_VALUES", at_once * 3 * 32 * 32 // torch.get_num_threads())
    for run in (1, 2**14, 2**30):  # samples of one operation: run by run, as it is, gathered
        monkeypatch.setattr(augment, "_CPU_RUN", run)
        torch.testing.assert_close(augment.make_view(images, params, 32), whole, atol=1e-6, rtol=0)


def test_an_empty_batch_has_no_views():
    views = augment.make_view(
        torch.empty((0, 3, 8, 8), dtype=torch.uint8), augment.identity_params(0, 8), 5
    )
    assert views.shape == (0, 3, 5, 5)


def test_take_keeps_the_rows_that_are_named():
    params = augment.simclr_params(0, 0, np.arange(9), 0, 32, 24)
    for field in dataclasses.fields(params):
        expected = getattr(params, field.name)[[7, 2, 2]]
        np.testing.assert_array_equal(
            getattr(params.take(np.array([7, 2, 2])), field.name), expected
        )


@pytest.mark.gpu
@EVERY_WAY
def test_a_gpu_makes_the_same_views_without_synchronizing(settings):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    images = random_images(16, 45, 61)
    params = augment.simclr_params(9, 2, np.arange(16), 1, (45, 61), 40, settings)
    expected = augment.normalize(augment.make_view(images, params, 40))
    on_device = images.cuda()
    augment.normalize(augment.make_view(on_device, params, 40))
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = augment.normalize(augment.make_view(on_device, params, 40))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(views.cpu(), expected, atol=2e-4, rtol=0)


@EVERY_WAY
def test_autocast_does_not_touch_the_pixels(settings):
    images = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8)
    params = augment.simclr_params(0, 0, np.arange(4), 0, 20, 16, settings)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment.make_view(images, params, 16)
    assert (
        torch.equal(inside, augment.make_view(images, params, 16)) and inside.dtype == torch.float32
    )


def clip_with_torchvision(frames, params, row, size):
    """torchvision's functional forms on a video, which all frames share."""
    top, left, height, width = map(int, params.boxes[row])
    bilinear = v2.InterpolationMode.BILINEAR
    x = frames.float() / 255
    x = TF.resized_crop(
        x, top, left, height, width, [size, size], interpolation=bilinear, antialias=True
    )
    if params.flip[row]:
        x = TF.horizontal_flip(x)
    x = TF.rotate(x, float(params.angle[row]), interpolation=bilinear)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for op in params.order[row]:
        x = adjust[op](x, float(params.factors[row, op]))
    return x


@pytest.mark.parametrize("size", [20, 33])
def test_two_streams_of_a_clip_share_one_draw_and_equal_torchvision(size):
    streams = [random_images(24, 24, 24, seed).unflatten(0, (6, 4)) for seed in (0, 1)]
    params = augment.clip_params(
        3, 1, np.arange(6), 0, 24, spread=(0.3, 0.3, 0.3, 0.1), scale=(0.4, 1.0), degrees=15
    )
    assert 0 < params.flip.sum() < 6
    for frames in streams:
        views = augment.make_view(frames.flatten(0, 1), params.repeat(4), size).unflatten(0, (6, 4))
        for row in range(6):
            expected = clip_with_torchvision(frames[row], params, row, size)
            # The contrast and the hue of nearly gray pixels magnify rounding at a rotation's
            # border.
            torch.testing.assert_close(views[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [12, 15])
def test_rotation_equals_torchvision(size):
    images = random_images(7, size, size)
    params = augment.identity_params(7, size)
    params.angle = np.array([0.0, 15, -15, 7.3, 90, 180, -0.01])
    views = augment.make_view(images, params, size)
    for image, angle, view in zip(images, params.angle, views, strict=True):
        expected = TF.rotate(image / 255, float(angle), interpolation=v2.InterpolationMode.BILINEAR)
        torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def test_clips_are_cropped_and_rotated_in_the_given_ranges():
    spread = (0.3, 0.3, 0.3, 0.1)
    params = augment.clip_params(0, 0, SAMPLES, 0, 64, spread=spread, scale=(0.5, 1.0), degrees=15)
    # The crop and the mirror image of supervised training, whose distributions are torchvision's.
    crops = augment.crop_flip_params(0, 0, SAMPLES, 0, 64, scale=(0.5, 1.0))
    np.testing.assert_array_equal(params.boxes, crops.boxes)
    np.testing.assert_array_equal(params.flip, crops.flip)
    assert np.abs(params.angle).max() <= 15 and abs(params.angle.mean()) < 4 * 15 / np.sqrt(
        3 * len(SAMPLES)
    )
    np.testing.assert_allclose(params.angle.std(), 15 / np.sqrt(3), rtol=0.02)
    bound = 4 / math.sqrt(len(SAMPLES))
    for other in (params.flip, *params.factors.T, *params.boxes.T):
        assert abs(np.corrcoef(params.angle, other)[0, 1]) < bound
    # Without them the draws of the rest are the same.
    plain = augment.clip_params(0, 0, SAMPLES, 0, 64, spread=spread)
    np.testing.assert_array_equal(plain.factors, params.factors)
    np.testing.assert_array_equal(plain.flip, params.flip)
    assert not plain.angle.any() and (plain.boxes == [0, 0, 64, 64]).all()
    for degrees in (-1, 181):
        with pytest.raises(ValueError, match="degrees"):
            augment.clip_params(0, 0, SAMPLES, 0, 64, degrees=degrees)
    with pytest.raises(ValueError, match="scale"):
        augment.clip_params(0, 0, SAMPLES, 0, 64, scale=(0.0, 1.0))


def test_rotation_does_not_depend_on_how_many_a_cpu_makes_at_once(monkeypatch):
    images = random_images(24, 40, 40)
    params = augment.clip_params(0, 4, np.arange(24), 0, 40, scale=(0.3, 1.0), degrees=15)
    params.angle[::3] = 0
    whole = augment.make_view(images, params, 32)
    monkeypatch.setattr(augment, "_CPU_VALUES", 5 * 3 * 32 * 32 // torch.get_num_threads())
    torch.testing.assert_close(augment.make_view(images, params, 32), whole, atol=2e-6, rtol=0)
