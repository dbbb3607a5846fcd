"""NT-Xent against the paper's double loop, finite differences, other implementations, other numbers
of processes.
"""

import functools
import logging
import math
import multiprocessing
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F

import kernels.dispatch
import kernels.reference
import kernels.similarity
import kernels.tiles
from common import metrics
from kernels import nt_xent, nt_xent_reference
from kernels.dispatch import tl
from kernels.similarity import Operands, polynomial_exp2
from kernels.tiles import Tile

pytestmark = pytest.mark.kernels


def double_loop(z_a, z_b, temperature, decoupled=False, rows=False):
    """The formula of the paper, term by term."""
    z = [row / row.norm() for row in (*z_a, *z_b)]
    losses = []
    for i in range(len(z)):
        positive = (i + len(z_a)) % len(z)
        others = [j for j in range(len(z)) if j != i and not (decoupled and j == positive)]
        denominator = sum(torch.exp(z[i] @ z[j] / temperature) for j in others)
        losses.append(torch.log(denominator) - z[i] @ z[positive] / temperature)
    return torch.stack(losses) if rows else sum(losses) / len(z)


def eager(z_a, z_b, temperature):
    """What a user would write, at the inputs' own precision: the yardstick of rounding errors."""
    z = F.normalize(torch.cat((z_a, z_b)).float(), dim=1).to(z_a.dtype)
    logits = ((z @ z.T).float() / temperature).fill_diagonal_(-math.inf)
    n = z_a.shape[0]
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def views(n, d, dtype=torch.float32, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z_a = torch.randn(n, d, generator=generator)
    z_b = z_a + noise * torch.randn(n, d, generator=generator)
    return z_a.to(dtype), z_b.to(dtype)


def run(fn, z_a, z_b, *args, upstream=1.0, **kwargs):
    """Loss and the gradients of both views, side by side in fp64."""
    z_a, z_b = z_a.detach().requires_grad_(), z_b.detach().requires_grad_()
    loss = fn(z_a, z_b, *args, **kwargs)
    grad = torch.autograd.grad((loss * upstream).sum(), (z_a, z_b))
    assert grad[0].dtype == z_a.dtype and grad[1].dtype == z_b.dtype
    return loss.detach().double(), torch.cat(grad).double()


def relative(x, truth):
    return ((x - truth).norm() / truth.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("n", "d", "temperature"), [(2, 3, 0.5), (5, 7, 0.1), (9, 4, 1.0)])
def test_reference_is_the_papers_double_loop(n, d, temperature, decoupled):
    z_a, z_b = views(n, d, torch.float64)
    loss, grad = run(nt_xent_reference, z_a, z_b, temperature, decoupled=decoupled)
    true_loss, true_grad = run(double_loop, z_a, z_b, temperature, decoupled)
    torch.testing.assert_close(loss, true_loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, true_grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_reference_gradients_are_those_of_finite_differences(normalize, decoupled):
    z_a, z_b = (z.requires_grad_() for z in views(4, 3, torch.float64))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = functools.partial(nt_xent_reference, normalize=normalize, decoupled=decoupled)
    assert torch.autograd.gradcheck(loss, (z_a, z_b, temperature))


def test_reference_is_the_same_for_every_tile_size(monkeypatch):
    z_a, z_b = views(37, 8, torch.float64)
    expected = run(nt_xent_reference, z_a, z_b, 0.2)
    for tile in (2, 8, 30, 64, 256):
        monkeypatch.setattr(kernels.reference, "REFERENCE_TILE", tile)
        for got, truth in zip(run(nt_xent_reference, z_a, z_b, 0.2), expected, strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)


def test_it_is_not_the_loss_of_clip():
    """The two values that the docstring of nt_xent gives."""
    z_a, z_b = (
        F.normalize(z) for z in torch.randn(2, 256, 128, generator=torch.Generator().manual_seed(0))
    )
    pairs = torch.arange(256)
    logits = z_a @ z_b.T / 0.1
    clip = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    values = f"{nt_xent_reference(z_a, z_b, 0.1):.2f}, CLIP's {clip:.2f}"
    assert values in nt_xent.__doc__


def test_reference_equals_lightly():
    loss = pytest.importorskip("lightly.loss", reason="pip install lightly")
    z_a, z_b = views(12, 16, torch.float64)
    for decoupled, oracle in (
        (False, loss.NTXentLoss(temperature=0.2)),
        (True, loss.DCLLoss(temperature=0.2)),
    ):
        got = run(nt_xent_reference, z_a, z_b, 0.2, decoupled=decoupled)
        for ours, theirs in zip(got, run(oracle, z_a, z_b), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("n", "temperature"), [(2, 0.5), (9, 0.1), (33, 0.01)])
def test_rows_and_their_gradients_are_the_double_loops(n, temperature, impl, decoupled):
    """For upstream gradients of any sign and size, and where most are zero."""
    z_a, z_b = views(n, 6, torch.float64)
    upstream = 1e4 * torch.randn(2 * n, dtype=torch.float64, generator=torch.Generator())
    upstream[1:-1:2] = 0.0
    exact = run(double_loop, z_a, z_b, temperature, decoupled, rows=True, upstream=upstream)
    options = {"decoupled": decoupled, "reduction": "none", "impl": impl}
    if impl == "triton":
        z_a, z_b = z_a.float(), z_b.float()
    got = run(nt_xent, z_a, z_b, temperature, **options, upstream=upstream)
    assert got[0].shape == (2 * n,)
    tolerance = 1e-12 if impl == "torch" else 2e-6 if temperature >= 0.1 else 2e-5
    assert relative(got[0], exact[0]) < tolerance
    assert relative(got[1], exact[1]) < 5 * tolerance
    assert not run(nt_xent, z_a, z_b, temperature, **options, upstream=0.0)[1].any()
    total = run(nt_xent, z_a, z_b, temperature, **options | {"reduction": "sum"}, upstream=-2.0)
    every = run(nt_xent, z_a, z_b, temperature, **options, upstream=-2.0)
    assert relative(total[0], every[0].sum()) < 5 * tolerance
    assert relative(total[1], every[1]) < 5 * tolerance


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_without_normalization_and_with_a_tensor_temperature(impl):
    z_a, z_b = views(20, 5, torch.float64)
    upstream = torch.randn(40, dtype=torch.float64, generator=torch.Generator())
    results = []
    for dtype in (torch.float64, torch.float64 if impl == "torch" else torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (z_a, z_b, torch.tensor([0.4]))]
        of = "torch" if dtype == torch.float64 else impl
        losses = nt_xent(*inputs, normalize=False, reduction="none", impl=of)
        results.append(torch.autograd.grad((losses * upstream).sum(), inputs))
    for got, truth in zip(*reversed(results), strict=True):
        assert got.shape == truth.shape and relative(got.double(), truth) < 1e-4
    inputs = [x.double().requires_grad_() for x in (z_a[:4], z_b[:4], torch.tensor(0.4))]
    losses = functools.partial(nt_xent_reference, normalize=False, reduction="none")
    assert torch.autograd.gradcheck(losses, inputs)


def scores(stats, temperature):
    """The figures of `metrics.contrastive`, from the rows' statistics."""
    return {
        "top1": stats.top1.double().mean().item(),
        "top5": (stats.rank < 5).double().mean().item(),
        "alignment": 2 - 2 * temperature * stats.positive.mean().item(),
        "uniformity": stats.potential.mean().log().item(),
    }


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)],
)
@pytest.mark.parametrize("n", [1, 9, 40])
def test_statistics_are_those_of_the_whole_matrix(n, impl, dtype, decoupled, monkeypatch):
    monkeypatch.setattr(kernels.reference, "REFERENCE_TILE", 32)
    z_a, z_b = views(n, 6, dtype, noise=1.5)
    loss, stats = nt_xent(z_a, z_b, 0.2, decoupled=decoupled, return_stats=True, impl=impl)
    z = F.normalize(torch.cat((z_a, z_b)).double())
    s = z @ z.T / 0.2
    positive = s.diagonal(n).repeat(2)
    s.fill_diagonal_(-math.inf)
    pairs = torch.arange(2 * n)
    negatives = s.clone()
    negatives[pairs, pairs.roll(n)] = -math.inf
    lse = (negatives if decoupled and n > 1 else s).logsumexp(1)
    if decoupled and n == 1:
        lse = torch.zeros(2).double()
    rank = (negatives >= positive[:, None]).sum(1)
    for got, truth in (
        (stats.loss, lse - positive),
        (stats.lse, lse),
        (stats.positive, positive),
        (stats.loss.mean(), loss),
    ):
        torch.testing.assert_close(got.double(), truth.double(), rtol=1e-5, atol=2e-5)
    assert torch.equal(stats.rank, rank) and torch.equal(stats.top1, rank == 0)
    assert scores(stats, 0.2) == pytest.approx(metrics.contrastive(z_a, z_b), abs=1e-5)
    assert not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 40])
def test_ties_and_nan_count_against_a_row(n, dtype, impl):
    """Equal rows are equal also where their products are rounded in another order."""
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    stats = nt_xent(row.repeat(n, 1), row.repeat(n, 1), 0.1, return_stats=True, impl=impl)[1]
    assert (stats.rank == 2 * n - 2).all() and not stats.top1.any()
    z_a, z_b = views(n, 33, dtype, noise=0.01)
    stats = nt_xent(z_a, z_b, 0.1, return_stats=True, impl=impl)[1]
    assert stats.top1.all()
    z_a[1, 0] = math.nan
    stats = nt_xent(z_a, z_b, 0.1, return_stats=True, impl=impl)[1]
    assert not stats.top1.any() and (stats.rank <= 2 * n - 2).all()
    assert stats.rank[1] == 2 * n - 2


@pytest.mark.parametrize("gather", [None, lambda x: torch.cat((x.flip(0), x))])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("n", [9, 40])
def test_statistics_leave_loss_and_gradient_alone(n, impl, gather):
    z_a, z_b = views(n, 8)
    options = {"gather": gather, "impl": impl}
    expected = run(nt_xent, z_a, z_b, 0.2, **options)
    got = run(lambda *z: nt_xent(*z, 0.2, **options, return_stats=True)[0], z_a, z_b)
    rows = run(
        lambda *z: nt_xent(*z, 0.2, **options, reduction="none", return_stats=True)[0], z_a, z_b
    )
    assert relative(rows[0].mean(), expected[0]) < 1e-6
    for ours, truth in zip(got, expected, strict=True):
        assert torch.equal(ours, truth) if impl == "torch" else relative(ours, truth) < 1e-6


def test_statistics_count_all_processes_rows():
    z_a, z_b = views(6, 5, torch.float64)

    def gather(x):  # of two processes: rows 0 to 2 and 3 to 5 of both views
        if x.dim() == 1:  # the rows' sums
            return torch.cat((x, x))
        return everybody

    one = []
    nt_xent(z_a, z_b, 0.2, gather=lambda x: one.append(x.clone()) or x)
    everybody = one[0]
    stats = nt_xent(z_a[:3], z_b[:3], 0.2, gather=gather, return_stats=True)[1]
    every = nt_xent(z_a, z_b, 0.2, return_stats=True)[1]
    own = [0, 1, 2, 6, 7, 8]
    for got, truth in zip(stats, every, strict=True):
        torch.testing.assert_close(got, truth[own])


# Blocks are 32 rows in the interpreter: less than one, exactly one, then 2, 4 and 5 of them, ragged
# (the half grid treats an even and an odd number differently); D below, at and above a power of
# two.
SHAPES = [(1, 3), (2, 16), (16, 5), (24, 33), (60, 16), (65, 20)]


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5, 1.0])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_kernel_fp32_is_as_exact_as_fp32_allows(n, d, temperature):
    z_a, z_b = views(n, d)
    for decoupled in (False, True):
        true_loss, true_grad = run(
            nt_xent_reference,
            z_a.double(),
            z_b.double(),
            temperature,
            decoupled=decoupled,
            upstream=-2.5,
        )
        loss, grad = run(
            nt_xent, z_a, z_b, temperature, decoupled=decoupled, upstream=-2.5, impl="triton"
        )
        same_precision = run(
            nt_xent_reference, z_a, z_b, temperature, decoupled=decoupled, upstream=-2.5
        )
        tolerance = 1e-6 if temperature >= 0.07 else 1e-5
        # A loss near zero is a difference of logits of size 1 / temperature, which fp32 holds to
        # about 1e-6.
        scale = true_loss.abs().clamp_min(0.1)
        assert (loss - true_loss).abs() <= (same_precision[0] - true_loss).abs() + tolerance * scale
        assert (grad - true_grad).norm() <= (
            same_precision[1] - true_grad
        ).norm() + 3 * tolerance * true_grad.norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
@pytest.mark.parametrize(("n", "d"), [(2, 16), (24, 33), (65, 20)])
def test_kernel_16_bit_is_no_worse_than_eager(n, d, temperature, dtype):
    # bf16 rows are rounded as on a GPU and multiplied in fp32: the interpreter has no bf16 product.
    z_a, z_b = views(n, d, dtype)
    true_loss, true_grad = run(
        nt_xent_reference, z_a.double(), z_b.double(), temperature, upstream=3.0
    )
    loss, grad = run(nt_xent, z_a, z_b, temperature, upstream=3.0, impl="triton")
    eager_loss, eager_grad = run(eager, z_a, z_b, temperature, upstream=3.0)
    eps = torch.finfo(dtype).eps
    assert (loss - true_loss).abs() <= (eager_loss - true_loss).abs() + eps * true_loss.abs()
    assert (grad - true_grad).norm() <= (eager_grad - true_grad).norm() + eps * true_grad.norm()


def test_passes_over_the_half_grid_change_nothing(monkeypatch, forget_plans):
    for n in (60, 90):  # 4 and 6 blocks
        z_a, z_b = views(n, 8)
        expected = run(nt_xent, z_a, z_b, 0.2, impl="triton")
        with monkeypatch.context() as patch:
            patch.setattr(kernels.tiles, "SLOT_BYTES", 4 * 192)
            forget_plans()
            got = run(nt_xent, z_a, z_b, 0.2, impl="triton")
        assert relative(got[0], expected[0]) < 1e-6 and relative(got[1], expected[1]) < 1e-6


@pytest.mark.parametrize("n", [33, 40, 64, 65, 70])
def test_blocks_narrower_than_the_padding_leave_no_padded_row_in_the_sums(
    monkeypatch, n, forget_plans
):
    """A GPU pads to 128 rows and often works on 64 at a time: then the ragged block is not the last
    of the buffer.
    """
    monkeypatch.setattr(kernels.tiles, "BLOCK", 64)
    monkeypatch.setattr(kernels.tiles, "tile", lambda *_: Tile(16, 32, 1, 1))
    z_a, z_b = views(n, 20)
    loss, grad = run(nt_xent, z_a, z_b, 0.5, impl="triton")
    true_loss, true_grad = run(nt_xent_reference, z_a.double(), z_b.double(), 0.5)
    assert relative(loss, true_loss) < 1e-6 and relative(grad, true_grad) < 1e-5


@pytest.mark.parametrize(
    ("tile", "ahead", "polynomial"),
    [
        *((tile, ahead, 0) for tile in [(16, 32), (32, 16), (64, 16)] for ahead in (False, True)),
        ((16, 32), False, 2),
        ((32, 16), True, 4),
    ],
)
def test_backward_tiles_mask_the_diagonal_and_the_ragged_end_and_nothing_else(
    monkeypatch, tile, ahead, polynomial, forget_plans
):
    """Ranges of keys in which the diagonal's blocks are all, some, none or the ragged one."""
    monkeypatch.setattr(kernels.tiles, "BLOCK", 64)
    monkeypatch.setattr(kernels.tiles, "tile", lambda *_: Tile(*tile, 1, 1, ahead, polynomial))
    generator, worst = torch.Generator().manual_seed(sum(tile)), 0.0
    for num_rows, num_keys in [(2, 2), (34, 98), (64, 64), (66, 66)]:
        for pair_shift, shift in ((0, 12.0), (1, 12.0), (1, None)):
            forget_plans()
            keys = torch.zeros(kernels.tiles.padded(num_keys), 16)  # zeros beyond the keys
            keys[:num_keys] = torch.randn(num_keys, 16, generator=generator)
            u = keys[: kernels.tiles.padded(num_rows)]
            lse = 5 + torch.rand(num_keys, generator=generator)
            operands = Operands(u, keys, num_rows, num_keys, pair_shift, False, shift)
            got = kernels.similarity.weighted_sums(operands, lse[:num_rows], lse)
            exact = keys[:num_keys].double() * math.log(2) ** 0.5  # base 2 to base e
            natural = lse.double() * math.log(2)
            truth = kernels.reference.reference_weighted_sum(
                exact[:num_rows], exact, natural[:num_rows], natural, pair_shift
            )
            truth = truth / math.log(2) ** 0.5
            error = relative(got.double().sum(0)[:num_rows], truth)
            assert error < (7.5e-5 if polynomial and shift else 1e-5)
            worst = max(worst, error)
    assert (worst > 1e-5) == (polynomial > 0)


@kernels.dispatch.jit
def apply(x_ptr, y_ptr):
    offs = tl.arange(0, 65536)
    tl.store(y_ptr + offs, polynomial_exp2(tl.load(x_ptr + offs)))


@pytest.mark.skipif(not kernels.dispatch.INTERPRETED, reason="in Triton's interpreter")
def test_the_polynomial_is_the_best_of_its_degree_and_each_operation_numpys():
    x = torch.linspace(-126, 127, 65536)
    x[0] = math.nan
    got = torch.empty_like(x)
    apply[(1,)](x, got)
    one, big = np.float32(1), np.float32(1.5 * 2**23)
    terms = [np.float32(getattr(kernels.similarity, f"_EXP2_{i}")) for i in range(4)]
    n = x.numpy() + big
    rest = x.numpy() - (n - big)
    power = rest * (rest * (rest * terms[3] + terms[2]) + terms[1]) + terms[0]
    expected = power * np.ldexp(one, np.nan_to_num(n - big).astype(int))
    assert expected.dtype == np.float32 and np.isnan(expected[0])
    assert np.array_equal(got.numpy(), expected, equal_nan=True)
    error = (got.double() / x.double().exp2() - 1)[1:].abs().max().item()
    assert error < 7.6e-5 < torch.finfo(torch.float16).eps / 4  # half a unit of a weight
    # Chebyshev: of degree 3 none is better that errs five times as much, by turns to either side.
    rest = np.linspace(-0.5, 0.5, 10001)
    errors = np.polynomial.polynomial.polyval(rest, np.float64(terms)) / np.exp2(rest) - 1
    turns = np.flatnonzero(np.diff(np.sign(np.diff(errors)))) + 1
    extremes = errors[[0, *turns, -1]] * [1, -1, 1, -1, 1]
    np.testing.assert_allclose(extremes, extremes[0], rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.01281, 0.02, 1.0])
def test_the_polynomial_takes_antipodes_at_every_shifted_temperature(
    temperature, monkeypatch, forget_plans
):
    """All weights of the first row are of its antipodes."""
    tile = Tile(16, 32, 1, 1, polynomial=2)
    monkeypatch.setattr(kernels.tiles, "tile", lambda *_: tile)
    rows = views(32, 8)[0]
    rows = F.normalize(rows[0] + 0.1 * rows)
    rows[0] *= -1
    natural = rows.double() / temperature**0.5
    lse = kernels.reference.reference_lse(natural, natural, 0)
    truth = kernels.reference.reference_weighted_sum(natural, natural, lse, lse, 0)
    u = torch.zeros(32, 16)
    u[:, :8] = natural / math.log(2) ** 0.5
    shift = kernels.tiles.shift_of(temperature, True)
    operands = Operands(u, u, 32, 32, pair_shift=0, split=False, shift=shift)
    of_rows = (lse / math.log(2)).float()
    got = kernels.similarity.weighted_sums(operands, of_rows, of_rows).sum(0)[:, :8]
    got = got.double() * math.log(2) ** 0.5
    for which in (slice(1), slice(1, None)):
        assert 1e-6 < relative(got[which], truth[which]) < 1e-4


def not_finite(results):
    return [(x.isnan(), x.isposinf(), x.isneginf()) for x in results]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("n", [9, 40])
def test_a_diverged_embedding_does_not_look_healthy(n, value, normalize, decoupled):
    """What is not finite is so in loss and gradient of both, few rows, half grid and full grid."""
    z_a, z_b = views(n, 8)
    if value == 1e20:
        z_a[2] = z_b[5] = value  # one similarity overflows; normalized, the rows are zeros
    else:
        z_a[2, 3] = value
    options = {"normalize": normalize, "decoupled": decoupled}
    expected = run(nt_xent_reference, z_a, z_b, 0.5, **options)
    assert expected[0].isfinite() == (value == 1e20 and normalize)
    got = run(nt_xent, z_a, z_b, 0.5, **options, impl="triton")
    for ours, theirs in zip(not_finite(got), not_finite(expected), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_process_does_not_look_healthy_elsewhere(value, decoupled, impl):
    z_a, z_b = views(9, 8)

    def gather(x):
        elsewhere = x.flip(0).clone()
        elsewhere.view(len(x), -1)[3, 0] = value
        return torch.cat((x, elsewhere))

    loss, grad = run(nt_xent, z_a, z_b, 0.5, gather=gather, decoupled=decoupled, impl=impl)
    assert loss.isnan() and grad.isnan().all()


def test_temperatures_that_the_kernels_cannot_take_are_not_theirs():
    z_a, z_b = views(9, 8)
    for temperature in (1e-30, 1e30):
        with pytest.raises(ValueError, match="temperatures from 0.0001 to 10000"):
            nt_xent(z_a, z_b, temperature, impl="triton")
        expected = run(nt_xent_reference, z_a.double(), z_b.double(), temperature)
        got = run(nt_xent, z_a, z_b, temperature)
        assert relative(got[0], expected[0]) < 1e-6 and relative(got[1], expected[1]) < 1e-5
    for temperature in (1e-4, 1e4):
        expected = run(nt_xent_reference, z_a.double(), z_b.double(), temperature)
        got = run(nt_xent, z_a, z_b, temperature, impl="triton")
        assert relative(got[0], expected[0]) < 1e-6 and relative(got[1], expected[1]) < 2e-4
    # Of a tensor nobody knows before the kernel does.
    assert not nt_xent(z_a, z_b, torch.tensor(1e-30), impl="triton").isfinite()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_without_normalization_and_with_large_logits(impl):
    z_a, z_b = views(40, 12, noise=0.5)
    truth = run(nt_xent_reference, z_a.double(), z_b.double(), 0.5, normalize=False)
    loss, grad = run(nt_xent, z_a, z_b, 0.5, normalize=False, impl=impl)
    assert relative(loss, truth[0]) <= 1e-5 and relative(grad, truth[1]) <= 1e-4
    loss, grad = run(nt_xent, z_a * 100, z_b * 100, 0.5, normalize=False, impl=impl)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides_do_not_matter(impl):
    z_a, z_b = views(20, 24)
    expected = run(nt_xent, z_a, z_b, 0.2, impl=impl)
    strided_a = z_a.T.contiguous().T
    strided_b = torch.zeros(40, 50)[::2, 1:49:2].copy_(z_b)
    for got, truth in zip(
        run(nt_xent, strided_a, strided_b, 0.2, impl=impl), expected, strict=True
    ):
        assert torch.equal(got, truth) if impl == "triton" else relative(got, truth) < 1e-6
    # One tensor expanded over rows: strides of zero.
    row = z_a[:1].expand(20, 24)
    for got, truth in zip(
        run(nt_xent, row, z_b, 0.2, impl=impl),
        run(nt_xent, row.clone(), z_b, 0.2, impl=impl),
        strict=True,
    ):
        assert relative(got, truth) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hostile_rows_stay_finite(impl, dtype):
    z_a, z_b = views(18, 8, dtype)
    z_a[0] = 0  # a row without a direction, in one view
    z_a[1] = z_b[1] = 0  # in both
    z_a[2:6] = z_b[2]  # duplicates
    z_b[6] = -z_a[6]  # an antipodal positive: the farthest exponent there is
    z_a[7] = 60000 if dtype == torch.float16 else 1e15  # its square overflows fp16
    z_b[8] = 1e-7 if dtype == torch.float16 else 1e-15
    for temperature in (0.01, 0.1, 1.0):
        loss, grad = run(nt_xent, z_a, z_b, temperature, impl=impl)
        assert loss.isfinite()
        finite = grad.isfinite().all(1)
        finite[18 + 8] = True  # 1 / length is beyond the dtype's range there
        assert finite.all()
        assert not grad[0].any() and not grad[1].any() and not grad[19].any()
        truth = run(nt_xent_reference, z_a.double(), z_b.double(), temperature)[0]
        assert relative(loss, truth) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_image_is_defined(impl):
    z_a, z_b = views(1, 6)
    loss, grad = run(nt_xent, z_a, z_b, 0.1, impl=impl)
    assert loss == 0 and not grad.any()
    loss, grad = run(nt_xent, z_a, z_b, 0.1, decoupled=True, impl=impl)
    truth = run(lambda a, b: -F.cosine_similarity(a, b).mean() / 0.1, z_a, z_b)
    assert relative(loss, truth[0]) < 1e-6 and relative(grad, truth[1]) < 1e-5


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_tensor_temperature_gets_its_gradient(impl, decoupled):
    z_a, z_b = views(21, 10)
    temperature = torch.tensor(0.3, requires_grad=True)
    exact = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (2 * nt_xent(z_a, z_b, temperature, decoupled=decoupled, impl=impl)).backward()
    (2 * nt_xent_reference(z_a.double(), z_b.double(), exact, decoupled=decoupled)).backward()
    assert temperature.grad.item() == pytest.approx(exact.grad.item(), rel=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_second_derivative_raises(impl):
    z_a, z_b = (z.requires_grad_() for z in views(4, 4))
    (dz_a,) = torch.autograd.grad(
        nt_xent(z_a, z_b, 0.5, normalize=False, impl=impl), z_a, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        dz_a.sum().backward()


def test_autocast_does_not_lower_the_reference():
    z_a, z_b = views(30, 16)
    expected = run(nt_xent, z_a, z_b, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        for got, truth in zip(run(nt_xent, z_a, z_b, 0.1), expected, strict=True):
            assert torch.equal(got, truth)


def test_the_kernel_gives_the_same_bits_every_time():
    z_a, z_b = views(70, 16, torch.float16)
    first, second = (run(nt_xent, z_a, z_b, 0.1, impl="triton") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(4, 4), 0.1), r"\(3, 4\).*\(4, 4\).*the same"),
        ((torch.zeros(3, 4), torch.zeros(3, 4).half(), 0.1), "float32.*float16"),
        ((torch.zeros(0, 4), torch.zeros(0, 4), 0.1), "N and D >= 1"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), 0.0), "temperature=0.0"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2)), "2 elements"),
        ((torch.zeros(3, 4).long(), torch.zeros(3, 4).long(), 0.1), "int64.*floating type"),
        (([[0.0]], torch.zeros(1, 1), 0.1), "z_a is a list; it must be a torch.Tensor"),
        ((torch.zeros(3, 4), np.zeros((3, 4)), 0.1), "z_b is a ndarray"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), "0.1"), "temperature='0.1' must be a positive"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), True), "temperature=True"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(*arguments)
    with pytest.raises(ValueError, match="reduction='rows', allowed are 'mean', 'sum' and 'none'"):
        nt_xent(torch.zeros(3, 4), torch.zeros(3, 4), 0.1, reduction="rows")


def test_impl_is_resolved_said_and_refused(monkeypatch, caplog):
    z_a, z_b = views(3, 4)
    with caplog.at_level(logging.INFO, logger="kernels"):
        nt_xent(z_a, z_b, 0.1)
        nt_xent(z_a, z_b, 0.1)
    assert len([r for r in caplog.records if "nt_xent" in r.message]) <= 1
    with pytest.raises(ValueError, match="'cuda'.*allowed"):
        nt_xent(z_a, z_b, 0.1, impl="cuda")
    with pytest.raises(ValueError, match="float64.*impl='auto'"):
        nt_xent(z_a.double(), z_b.double(), 0.1, impl="triton")
    monkeypatch.setattr(kernels.dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="on cpu.*TRITON_INTERPRET=1"):
        nt_xent(z_a, z_b, 0.1, impl="triton")


def _gather(x):
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rank(rank, world_size, folder, weight, images, options):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/init", rank=rank, world_size=world_size
    )
    calls = []

    def gather(x):
        calls.append(tuple(x.shape))
        return _gather(x)

    weight = weight.clone().requires_grad_()
    x_a, x_b = (x.chunk(world_size)[rank] for x in images)
    loss = nt_xent(
        x_a @ weight, x_b @ weight, options["temperature"], gather=gather, **options["kwargs"]
    )
    assert len(calls) == 2 and calls[1] == (2 * len(x_a),)
    if "rows" in options:
        views = options["rows"].view(2, -1).chunk(world_size, 1)
        loss = (loss * views[rank].flatten()).sum()
    (loss * 1.7).backward()
    assert len(calls) == 2 + ("rows" in options)
    grad, loss = weight.grad, loss.detach()
    for x in (grad, loss):
        torch.distributed.all_reduce(x)
    torch.save((loss / world_size, grad / world_size), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def over_processes(world_size, folder, *args):
    """Loss and gradient, averaged over processes as DistributedDataParallel averages them, as each
    process has them.
    """
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, world_size, folder, *args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-12), ("triton", torch.float32, 2e-6)],
)
def test_processes_together_give_the_gradient_of_one(tmp_path, impl, dtype, tolerance, decoupled):
    generator = torch.Generator().manual_seed(1)
    weight, x_a, x_b = (torch.randn(n, 6, generator=generator).to(dtype) for n in (6, 16, 16))
    options = {"temperature": 0.3, "kwargs": {"impl": impl, "decoupled": decoupled}}
    exact = weight.double().clone().requires_grad_()
    loss = nt_xent_reference(x_a.double() @ exact, x_b.double() @ exact, 0.3, decoupled=decoupled)
    (loss * 1.7).backward()
    for world_size in (1, 2, 4) if impl == "torch" else (4,):
        for got_loss, got_grad in over_processes(
            world_size, tmp_path / str(world_size), weight, (x_a, x_b), options
        ):
            assert relative(got_loss.double(), loss.detach()) < tolerance
            assert relative(got_grad.double(), exact.grad) < tolerance


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-12), ("triton", torch.float32, 3e-6)],
)
def test_row_gradients_of_processes_are_those_of_one(tmp_path, impl, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    weight, x_a, x_b = (torch.randn(n, 6, generator=generator).to(dtype) for n in (6, 8, 8))
    upstream = torch.randn(16, generator=generator).to(dtype)
    options = {"temperature": 0.3, "kwargs": {"impl": impl, "reduction": "none"}, "rows": upstream}
    exact = weight.double().clone().requires_grad_()
    losses = double_loop(x_a.double() @ exact, x_b.double() @ exact, 0.3, rows=True)
    loss = (losses * upstream.double()).sum() / 2
    (loss * 1.7).backward()
    for got_loss, got_grad in over_processes(2, tmp_path / "2", weight, (x_a, x_b), options):
        assert relative(got_loss.double(), loss.detach()) < tolerance
        assert relative(got_grad.double(), exact.grad) < tolerance


def test_processes_with_equal_rows_agree(tmp_path):
    """The own block is found by its values: equal blocks are interchangeable."""
    generator = torch.Generator().manual_seed(2)
    weight, x_a, x_b = (torch.randn(6, 6, generator=generator).double() for _ in range(3))
    images = (x_a.repeat(2, 1), x_b.repeat(2, 1))
    exact = weight.clone().requires_grad_()
    loss = nt_xent_reference(images[0] @ exact, images[1] @ exact, 0.3)
    (loss * 1.7).backward()
    options = {"temperature": 0.3, "kwargs": {}}
    for got_loss, got_grad in over_processes(2, tmp_path / "2", weight, images, options):
        assert relative(got_loss, loss.detach()) < 1e-12 and relative(got_grad, exact.grad) < 1e-12


def test_a_wrong_gather_is_named():
    z_a, z_b = views(4, 4)
    with pytest.raises(ValueError, match=r"gather returned \(9, 4\)"):
        nt_xent(z_a, z_b, 0.1, gather=lambda x: torch.cat((x, x[:1])))


@pytest.mark.parametrize("decoupled", [False, True])
def test_registered_ops_pass_opcheck(decoupled):
    z_a, z_b = (z.requires_grad_() for z in views(20, 8))
    temperature = torch.tensor(0.3, requires_grad=True)
    forward = torch.ops.kernels.nt_xent_forward.default
    torch.library.opcheck(forward, (z_a, z_b, None, 0.3, True, decoupled))
    torch.library.opcheck(forward, (z_a, z_b, temperature, 1.0, True, decoupled))
    u, pos = torch.randn(12, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.kernels.nt_xent_reference_forward.default, (u, pos, decoupled))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_graph_breaks(impl):
    z_a, z_b = views(20, 8)

    def step(z_a, z_b):
        return nt_xent(z_a * 2 + 0.1, z_b.sin(), 0.2, impl=impl) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, truth in zip(run(compiled, z_a, z_b), run(step, z_a, z_b), strict=True):
        assert relative(got, truth) < 1e-6


def test_a_learnable_temperature_compiles():
    z_a, z_b = views(20, 8)
    compiled = torch.compile(nt_xent, fullgraph=True, backend="aot_eager")
    grads = []
    for step in (nt_xent, compiled):
        temperature = torch.tensor([0.3], requires_grad=True)
        step(z_a, z_b, temperature, impl="triton").backward()
        grads.append(temperature.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("n", [9, 40])
def test_few_rows_full_grid_and_half_grid_agree(n, decoupled, monkeypatch, forget_plans):
    z_a, z_b = views(n, 20)
    truth = run(
        nt_xent_reference, z_a.double(), z_b.double(), 0.1, decoupled=decoupled, upstream=-2.5
    )
    module = sys.modules["kernels.nt_xent"]
    for few_rows, full_grid_rows in ((1000, 0), (0, 1000), (0, 0)):
        monkeypatch.setattr(module, "FEW_ROWS", few_rows)
        monkeypatch.setattr(kernels.similarity, "FULL_GRID_ROWS", full_grid_rows)
        forget_plans()
        loss, grad = run(nt_xent, z_a, z_b, 0.1, decoupled=decoupled, upstream=-2.5, impl="triton")
        assert relative(loss, truth[0]) < 1e-6 and relative(grad, truth[1]) < 3e-6


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(("n", "forward", "both"), [(16, 2, 3), (32, 3, 5), (60, 3, 5)])
def test_at_most_three_forward_and_two_backward_launches(n, forward, both, stats, monkeypatch):
    """With statistics, too: they take no second pass."""
    launches = []
    kind = type(kernels.similarity.half_kernel)
    launcher = kind.__getitem__
    monkeypatch.setattr(
        kind, "__getitem__", lambda self, grid: launches.append(self) or launcher(self, grid)
    )
    z_a, z_b = (z.requires_grad_() for z in views(n, 8))
    loss = nt_xent(z_a, z_b, 0.1, return_stats=stats, impl="triton")
    one_more = stats and forward == 2  # few rows go the way of many
    assert len(launches) == forward + one_more
    (loss[0] if stats else loss).backward()
    assert len(launches) == both + one_more


def gpu_views(n, d, dtype, noise=1.0):
    return [z.cuda() for z in views(n, d, dtype, noise)]


@pytest.mark.gpu
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.07, 0.5, 1.0])
@pytest.mark.parametrize(
    ("n", "d"),
    [
        (1, 16),
        (2, 3),
        (63, 64),
        (64, 128),
        (65, 128),
        (80, 256),
        (500, 128),
        (1024, 200),
        (300, 512),
    ],
)
def test_kernel_on_the_gpu(n, d, temperature, dtype, decoupled):
    if dtype == torch.float32 and d > 128:
        pytest.skip("fp32 is fused up to D=128")
    z_a, z_b = gpu_views(n, d, dtype)
    truth = run(
        nt_xent_reference,
        z_a.double(),
        z_b.double(),
        temperature,
        decoupled=decoupled,
        upstream=-2.5,
    )
    got = run(nt_xent, z_a, z_b, temperature, decoupled=decoupled, upstream=-2.5, impl="triton")
    eps = (
        torch.finfo(dtype).eps if dtype != torch.float32 else 3e-6 if temperature >= 0.07 else 3e-5
    )
    assert (got[0] - truth[0]).abs() <= 2 * eps * (truth[0].abs() + 0.1 / temperature)
    allowed = 4 * eps * truth[1].norm() + 1e-9
    if dtype != torch.float32:
        # Rounding both rows moves a logit by up to eps / temperature, and its exponential by that
        # share. With many rows that averages out, with four it does not.
        allowed = allowed + eps / (2 * temperature) * truth[1].norm() / (n / 2) ** 0.5
        if not decoupled:
            allowed = (
                allowed + (run(eager, z_a, z_b, temperature, upstream=-2.5)[1] - truth[1]).norm()
            )
    assert (got[1] - truth[1]).norm() <= allowed


@pytest.mark.gpu
def test_full_grid_on_the_gpu():
    z_a, z_b = gpu_views(500, 128, torch.bfloat16)
    truth = run(nt_xent_reference, z_a.double(), z_b.double(), 0.5, normalize=False)
    got = run(nt_xent, z_a, z_b, 0.5, normalize=False, impl="triton")
    assert relative(got[0], truth[0]) < 1e-3 and relative(got[1], truth[1]) < 2e-2
    temperature = torch.tensor(0.1, device="cuda", requires_grad=True)
    nt_xent(z_a, z_b, temperature, impl="triton").backward()
    exact = torch.tensor(0.1, device="cuda", dtype=torch.float64, requires_grad=True)
    nt_xent_reference(z_a.double(), z_b.double(), exact).backward()
    assert temperature.grad.item() == pytest.approx(exact.grad.item(), rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [256, 4096, 40000])
def test_same_bits_and_no_waiting_on_the_gpu(n):
    z_a, z_b = gpu_views(n, 128, torch.bfloat16)
    first = run(nt_xent, z_a, z_b, 0.1, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        z_a.requires_grad_()
        (dz_a,) = torch.autograd.grad(nt_xent(z_a, z_b, 0.1, impl="triton"), z_a)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(dz_a.double(), first[1][:n])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [65, 500, 3000])
def test_rows_and_statistics_on_the_gpu(n, dtype):
    z_a, z_b = gpu_views(n, 128, dtype)
    upstream = torch.randn(2 * n, generator=torch.Generator()).cuda()
    truth = run(nt_xent_reference, z_a.double(), z_b.double(), 0.1, reduction="none")
    got = run(nt_xent, z_a, z_b, 0.1, reduction="none", impl="triton")
    assert relative(got[0], truth[0]) < 1e-2 and relative(got[1], truth[1]) < 5e-2
    options = {"upstream": upstream, "reduction": "none"}
    truth = run(nt_xent_reference, z_a.double(), z_b.double(), 0.1, **options)
    got = run(nt_xent, z_a, z_b, 0.1, **options, impl="triton")
    assert relative(got[1], truth[1]) < 5e-2
    loss, stats = nt_xent(z_a, z_b, 0.1, return_stats=True, impl="triton")
    torch.testing.assert_close(loss, nt_xent(z_a, z_b, 0.1, impl="triton"), rtol=1e-5, atol=1e-5)
    expected = metrics.contrastive(z_a.float(), z_b.float())
    assert scores(stats, 0.1) == pytest.approx(expected, abs=2e-2)
    stats = nt_xent(z_a[:1].repeat(n, 1), z_a[:1].repeat(n, 1), 0.1, return_stats=True)[1]
    assert (stats.rank == 2 * n - 2).all()


@pytest.mark.gpu
def test_65536_pairs_need_at_most_200_megabytes():
    z_a, z_b = (z.requires_grad_() for z in gpu_views(65536, 128, torch.bfloat16))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = nt_xent(z_a, z_b, 0.1, impl="triton")
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= 200e6
    assert loss.item() == pytest.approx(
        nt_xent_reference(z_a.detach(), z_b.detach(), 0.1).item(), rel=1e-3
    )


@pytest.mark.gpu
def test_cuda_graph_and_compile_on_the_gpu():
    z_a, z_b = (z.requires_grad_() for z in gpu_views(256, 128, torch.bfloat16))

    def step(z_a, z_b):
        loss = nt_xent(z_a, z_b, 0.1, impl="triton")
        # Detached: a graph kept alive would tie the leaves to the stream of its forward, not the
        # one that is captured.
        return loss.detach(), *torch.autograd.grad(loss, (z_a, z_b))

    expected = step(z_a, z_b)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(z_a, z_b)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(z_a, z_b)
    graph.replay()
    for got, truth in zip(captured, expected, strict=True):
        assert torch.equal(got, truth)
    compiled = torch.compile(lambda a, b: nt_xent(a, b, 0.1, impl="triton"), fullgraph=True)
    loss = compiled(z_a, z_b)
    for got, truth in zip((loss, *torch.autograd.grad(loss, (z_a, z_b))), expected, strict=True):
        assert torch.equal(got, truth)


def test_without_triton_the_references_remain():
    """On macOS there is no triton to install."""
    program = (
        "import sys; sys.modules['triton'] = None; import torch, kernels\n"
        "z = torch.randn(8, 4, requires_grad=True); kernels.nt_xent(z, 2 * z, 0.1).backward()\n"
        "kernels.sup_con(z, torch.arange(8) // 2, 0.1).backward(); x = torch.randn(8, 8, 2, 2)\n"
        "kernels.temporal_shift(x, 4); kernels.shift_conv1x1(x, torch.randn(4, 8), None, 4)\n"
        "try:\n    kernels.nt_xent(z, z, 0.1, impl='triton')\n"
        "except ValueError as error:\n    print(error)"
    )
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout
