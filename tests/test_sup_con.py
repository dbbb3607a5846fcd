"""SupCon against its formula, finite differences, another implementation, NT-Xent, other numbers of
processes.
"""

import math
import multiprocessing
import sys

import pytest
import torch
import torch.distributed

import kernels.reference
import kernels.similarity
from kernels import nt_xent_reference, sup_con, sup_con_reference

pytestmark = pytest.mark.kernels


def double_loop(z, labels, temperature, rows=False):
    """Equation 2 of the paper, term by term, over the rows that have positives."""
    z = [row / row.norm() for row in z]
    losses = [torch.zeros(()).double()] * len(z)
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if positives:
            denominator = sum(torch.exp(z[i] @ z[j] / temperature) for j in others)
            mean = sum(z[i] @ z[p] for p in positives) / temperature / len(positives)
            losses[i] = denominator.log() - mean
    if rows:
        return torch.stack(losses)
    return sum(losses) / sum(list(labels).count(label) > 1 for label in labels)


def batch(m, d, classes, dtype=torch.float32, seed=0):
    """Rows around class centers; the first row is alone in its class; labels are neither small nor
    consecutive.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (m,), generator=generator)
    z = torch.randn(classes, d, generator=generator)[labels] + torch.randn(
        m, d, generator=generator
    )
    labels = labels * 1_000_003 - 5
    labels[0] = 17
    return z.to(dtype), labels


def run(fn, z, *args, upstream=1.0, **kwargs):
    z = z.detach().clone().requires_grad_()
    loss = fn(z, *args, **kwargs)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), z)
    assert grad.dtype == z.dtype
    return loss.detach().double(), grad.double()


def relative(x, truth):
    return ((x - truth).norm() / truth.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize(("m", "d", "temperature"), [(7, 3, 0.5), (12, 5, 0.1)])
def test_reference_is_the_papers_formula(m, d, temperature):
    z, labels = batch(m, d, 3, torch.float64)
    for got, truth in zip(
        run(sup_con_reference, z, labels, temperature),
        run(double_loop, z, labels, temperature),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_reference_gradients_are_those_of_finite_differences(normalize):
    z, labels = batch(8, 3, 3, torch.float64)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, t: sup_con_reference(z, labels, t, normalize=normalize),
        (z.requires_grad_(), temperature),
    )


def test_reference_equals_pytorch_metric_learning():
    losses = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pip install pytorch-metric-learning"
    )
    z, labels = batch(20, 8, 4, torch.float64)
    for got, truth in zip(
        run(sup_con_reference, z, labels, 0.2),
        run(losses.SupConLoss(temperature=0.2), z, labels),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_two_views_with_labels_of_their_own_are_nt_xent(impl):
    z, _ = batch(40, 8, 4)
    labels = torch.arange(20).repeat(2)
    loss, grad = run(sup_con, z, labels, 0.2, impl=impl)
    true_loss, true_grad = run(lambda z: nt_xent_reference(z[:20], z[20:], 0.2), z.double())
    assert relative(loss, true_loss) < 1e-6 and relative(grad, true_grad) < 1e-5


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("m", "temperature"), [(5, 0.5), (20, 0.1), (67, 0.02)])
def test_rows_and_their_gradients_are_the_papers_formula(m, temperature, impl):
    """For upstream gradients of any sign and size; a row without positives has no loss."""
    z, labels = batch(m, 6, 4, torch.float64)
    upstream = 1e4 * torch.randn(m, dtype=torch.float64, generator=torch.Generator())
    upstream[1::3] = 0.0
    exact = run(double_loop, z, labels.tolist(), temperature, rows=True, upstream=upstream)
    z = z if impl == "torch" else z.float()
    options = {"reduction": "none", "impl": impl}
    got = run(sup_con, z, labels, temperature, **options, upstream=upstream)
    tolerance = 1e-12 if impl == "torch" else 5e-6 if temperature >= 0.1 else 5e-5
    assert relative(got[0], exact[0]) < tolerance and relative(got[1], exact[1]) < 5 * tolerance
    assert got[0][0] == 0
    alone = run(sup_con, z, torch.arange(m), temperature, **options, upstream=upstream)
    assert not alone[0].any() and not alone[1].any()
    total = run(sup_con, z, labels, temperature, reduction="sum", impl=impl, upstream=-2.0)
    mean = run(sup_con, z, labels, temperature, impl=impl, upstream=-2.0)
    counted = (labels[:, None] == labels).sum(1).gt(1).sum()
    for ours, truth in zip(total, mean, strict=True):
        assert relative(ours, truth * counted) < 5 * tolerance


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("m", [5, 30, 67])
def test_statistics_are_those_of_the_whole_matrix(m, impl, monkeypatch):
    monkeypatch.setattr(kernels.reference, "REFERENCE_TILE", 32)
    z, labels = batch(m, 6, 4)
    expected = run(sup_con, z, labels, 0.2, impl=impl)
    z = z.requires_grad_()
    loss, stats = sup_con(z, labels, 0.2, return_stats=True, impl=impl)
    (grad,) = torch.autograd.grad(loss, z)
    assert (loss - expected[0]).abs() < 2e-6 and relative(grad, expected[1]) < 5e-6
    if impl == "torch":
        assert torch.equal(loss.double(), expected[0]) and torch.equal(grad.double(), expected[1])
    s = torch.nn.functional.normalize(z.detach().double())
    s = (s @ s.T / 0.2).fill_diagonal_(-math.inf)
    same = (labels[:, None] == labels).fill_diagonal_(False)
    torch.testing.assert_close(stats.lse.double(), s.logsumexp(1), rtol=1e-5, atol=1e-5)
    positive = s.masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp_min(1)
    torch.testing.assert_close(stats.positive.double(), positive, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.top1, same[torch.arange(m), s.argmax(1)])
    valid = same.any(1)
    torch.testing.assert_close(stats.loss[valid].mean(), loss.detach())
    assert stats.rank is None and stats.potential is None


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_rows_of_two_classes_are_not_found(impl):
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(3))
    stats = sup_con(row.repeat(40, 1), torch.arange(40) % 2, 0.1, return_stats=True, impl=impl)[1]
    assert not stats.top1.any()
    stats = sup_con(row.repeat(40, 1), torch.zeros(40).long(), 0.1, return_stats=True, impl=impl)[1]
    assert stats.top1.all()


@pytest.mark.gpu
@pytest.mark.parametrize("m", [300, 5000])
def test_rows_and_statistics_on_the_gpu(m):
    z, labels = (x.cuda() for x in batch(m, 128, 20, torch.bfloat16))
    options = {"reduction": "none", "upstream": torch.arange(m).cuda() % 3 - 1.0}
    truth = run(sup_con_reference, z.double(), labels, 0.1, **options)
    got = run(sup_con, z, labels, 0.1, **options, impl="triton")
    assert relative(got[0], truth[0]) < 1e-2 and relative(got[1], truth[1]) < 5e-2
    stats = sup_con(z, labels, 0.1, return_stats=True, impl="triton")[1]
    expected = sup_con_reference(z.double(), labels, 0.1, return_stats=True)[1]
    assert (stats.top1 != expected.top1).float().mean() < 0.02


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("m", "d"), [(1, 4), (5, 3), (32, 16), (67, 33), (120, 8)])
def test_kernel_is_as_exact_as_its_precision_allows(m, d, temperature):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 6e-3), (torch.bfloat16, 5e-2)):
        z, labels = batch(m, d, 5, dtype)
        true_loss, true_grad = run(
            sup_con_reference, z.double(), labels, temperature, upstream=-3.0
        )
        loss, grad = run(sup_con, z, labels, temperature, upstream=-3.0, impl="triton")
        # Logits of size 1 / temperature, rounded to the dtype's precision.
        assert (loss - true_loss).abs() <= 2 * torch.finfo(dtype).eps * (
            true_loss.abs() + 1 / temperature
        )
        assert relative(grad, true_grad) <= tolerance


LABELS = {
    "even": lambda m: torch.arange(m) % 5,
    "long-tailed": lambda m: (torch.arange(m) * 20 // m - 7).clamp_min(0),  # 40 %, then 5 % each
    "two classes": lambda m: (torch.arange(m) < m // 3).long(),
    "zeros and a row alone": lambda m: (torch.arange(m) == 3).long(),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("m", [33, 64])
def test_one_program_tiles_and_sorted_labels_agree(m, kind, monkeypatch, forget_plans):
    """Of few rows one launch, of more a product for the positives beside tiles, of most a sort."""
    z, labels = batch(m, 12, 5)[0], LABELS[kind](m)
    truth = run(sup_con_reference, z.double(), labels, 0.1, upstream=-2.5)
    module = sys.modules["kernels.sup_con"]
    for few, compared, full_grid_rows in ((99, 99, 0), (0, 0, 0), (0, 99, 0), (0, 99, 99)):
        monkeypatch.setattr(module, "FEW_ROWS", few)
        monkeypatch.setattr(module, "COMPARED_ROWS", compared)
        monkeypatch.setattr(kernels.similarity, "FULL_GRID_ROWS", full_grid_rows)
        forget_plans()
        loss, grad = run(sup_con, z, labels, 0.1, upstream=-2.5, impl="triton")
        assert relative(loss, truth[0]) < 1e-6 and relative(grad, truth[1]) < 5e-6
    again = run(sup_con, z, labels, 0.1, upstream=-2.5, impl="triton")
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1])


@pytest.mark.parametrize("span", [2, 8, 512])
def test_no_program_adds_up_a_class_of_any_size_alone(span, monkeypatch):
    module = sys.modules["kernels.sup_con"]
    monkeypatch.setattr(module, "CLASS_SPAN", span)
    launch, parts = module.class_sum_kernel.run, []

    def record(*arguments, SPAN, STEP, **options):
        launch(*arguments, SPAN=SPAN, STEP=STEP, **options)
        if STEP == 1:
            parts.append(arguments[4].clone())

    monkeypatch.setattr(module.class_sum_kernel, "run", record)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([7] * 150 + [-2] * 49 + [3])[torch.randperm(200, generator=generator)]
    keys = torch.randn(200, 5, generator=generator)
    groups = module._groups(labels)
    got = module._triton_positive_sum(keys, keys, labels, labels, *groups)
    truth = module._reference_positive_sum(keys, keys, labels, labels, *groups)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    ordered = keys[groups[2]]
    for start, end in ((0, 49), (49, 50), (50, 200)):
        for first in range(start, end, span):
            part = ordered[first : min(first + span, end)].sum(0)
            torch.testing.assert_close(parts[0][first], part, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(
    ("m", "d"), [(1, 16), (67, 33), (512, 128), (3000, 100), (9000, 64), (17000, 32)]
)  # few rows, more, and many
def test_kernel_on_the_gpu(m, d, temperature, dtype):
    z, labels = (x.cuda() for x in batch(m, d, 5, dtype))
    true_loss, true_grad = run(sup_con_reference, z.double(), labels, temperature, upstream=-3.0)
    loss, grad = run(sup_con, z, labels, temperature, upstream=-3.0, impl="triton")
    # Tensor cores cut fp32 sums off instead of rounding them (Fasi et al. 2021): a bias of some
    # 1e-6 of a logit.
    eps = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (loss - true_loss).abs() <= 2 * eps * (true_loss.abs() + 0.1 / temperature)
    assert (
        relative(grad, true_grad)
        <= {torch.float32: 4e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("m", [512, 5000])
def test_same_bits_graph_and_compile_on_the_gpu(m):
    z, labels = (x.cuda() for x in batch(m, 128, 20, torch.bfloat16))
    z.requires_grad_()

    def step():
        loss = sup_con(z, labels, 0.1, impl="triton")
        return loss.detach(), *torch.autograd.grad(loss, z)

    expected = step()
    for got, truth in zip(step(), expected, strict=True):
        assert torch.equal(got, truth)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    compiled = torch.compile(lambda z: sup_con(z, labels, 0.1, impl="triton"), fullgraph=True)
    loss = compiled(z)
    for result in (captured, (loss.detach(), *torch.autograd.grad(loss, z))):
        for got, truth in zip(result, expected, strict=True):
            assert relative(got.double(), truth.double()) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_extremes(impl):
    z, _ = batch(33, 6, 3)
    alone = torch.arange(33)
    loss, grad = run(sup_con, z, alone, 0.1, impl=impl)  # nobody has a positive
    assert loss == 0 and not grad.any()
    z[3] = 0
    z[4:9] = z[10]
    together = torch.full((33,), -(2**40))
    for temperature in (0.01, 1.0):
        loss, grad = run(sup_con, z, together, temperature, impl=impl)  # one class
        true_loss, _ = run(sup_con_reference, z.double(), together, temperature)
        assert relative(loss, true_loss) < 1e-5 and grad.isfinite().all() and not grad[3].any()
    loss, grad = run(sup_con, z, together, 0.5, normalize=False, impl=impl)
    truth = run(sup_con_reference, z.double(), together, 0.5, normalize=False)
    assert relative(loss, truth[0]) < 1e-4 and relative(grad, truth[1]) < 1e-3


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_processes_with_equal_rows_and_other_labels(impl):
    rows = batch(6, 5, 3)[0]
    z, labels = rows.repeat(2, 1), torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1])
    truth, _ = run(sup_con_reference, z.double(), labels, 0.3)

    def gather(x):
        return (
            labels if x.dtype == torch.int64 else torch.cat((x, x))
        )  # rows are equal; statistics serve the gradient

    losses = [
        sup_con(z[rows], labels[rows], 0.3, gather=gather, impl=impl)
        for rows in (slice(0, 6), slice(6, 12))
    ]
    assert relative(torch.stack(losses).mean().double(), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
def test_labels_that_are_no_integers_are_named(dtype):
    with pytest.raises(ValueError, match="must be .* integers"):
        sup_con(torch.randn(4, 3), torch.ones(4, dtype=dtype), 0.5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("m", [9, 60])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_row_does_not_look_healthy(value, m, impl):
    z, labels = batch(m, 6, 3)
    z[2, 1] = value
    loss, grad = run(sup_con, z, labels, 0.5, impl=impl)
    assert loss.isnan() and grad.isnan().all()
    z, labels = batch(m, 6, 3)

    def gather(x):
        elsewhere = x.flip(0).clone()
        if x.is_floating_point():
            elsewhere.view(len(x), -1)[3, 0] = value
        return torch.cat((x, elsewhere))

    loss, grad = run(sup_con, z, labels, 0.5, gather=gather, impl=impl)
    assert loss.isnan() and grad.isnan().all()


@pytest.mark.parametrize("m", [9, 60])
def test_a_similarity_that_overflows_does_not_look_healthy(m):
    z, labels = batch(m, 6, 3)
    z[2] = z[5] = 1e20
    for got in (
        run(sup_con_reference, z, labels, 0.5, normalize=False),
        run(sup_con, z, labels, 0.5, normalize=False, impl="triton"),
    ):
        assert not any(x.isfinite().all() for x in got)
    with pytest.raises(ValueError, match="temperatures from 0.0001"):
        sup_con(z, labels, 1e-30, impl="triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides_bits_and_second_derivative(impl):
    z, labels = batch(40, 12, 4)
    expected = run(sup_con, z, labels, 0.2, impl=impl)
    for got, truth in zip(
        run(sup_con, z.T.contiguous().T, labels, 0.2, impl=impl), expected, strict=True
    ):
        assert relative(got, truth) < 1e-6
    for got, truth in zip(run(sup_con, z, labels, 0.2, impl=impl), expected, strict=True):
        assert torch.equal(got, truth)
    z = z.requires_grad_()
    (dz,) = torch.autograd.grad(sup_con(z, labels, 0.5, impl=impl), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dz.sum().backward()


@pytest.mark.parametrize("kind", ["torch", "float32"])
def test_registered_op_passes_opcheck(kind):
    z, labels = batch(20, 8, 4)
    u = torch.nn.functional.normalize(z).requires_grad_()
    torch.library.opcheck(
        torch.ops.kernels.sup_con_forward.default, (u, labels, kind, True, 1.4426950408889634)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_ops_of_few_rows_pass_opcheck(dtype):
    z, labels = batch(20, 8, 4, dtype)
    forward, backward = (
        torch.ops.kernels.sup_con_few_rows_forward,
        torch.ops.kernels.sup_con_few_rows_backward,
    )
    torch.library.opcheck(forward.default, (z.requires_grad_(), labels, 0.2))
    with torch.no_grad():
        _, *saved = forward(z, labels, 0.2)
    torch.library.opcheck(backward.default, (torch.tensor(1.5), z.detach(), *saved, 0.2))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_graph_breaks(impl):
    z, labels = batch(24, 8, 4)

    def step(z, labels):
        return sup_con(z * 2 + 0.1, labels, 0.2, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, truth in zip(run(compiled, z, labels), run(step, z, labels), strict=True):
        assert relative(got, truth) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3).long(), 0.1), r"z is \(3,\)"),
        ((torch.zeros(3, 4), torch.zeros(2).long(), 0.1), r"labels are \(2,\)"),
        ((torch.zeros(3, 4), torch.zeros(3), 0.1), "float32"),
        ((torch.zeros(3, 4), torch.zeros(3, dtype=torch.uint16), 0.1), "uint16.*or uint8"),
        ((torch.zeros(3, 4), [0, 1, 0], 0.1), "labels is a list; it must be a torch.Tensor"),
        ((torch.zeros(3, 4), torch.zeros(3).long(), -1.0), "temperature=-1.0"),
        ((torch.zeros(3, 4), torch.zeros(3).long(), None), "temperature=None"),
        ((torch.zeros(3, 4), torch.zeros(3).long(), torch.ones(2)), "2 elements"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sup_con(*arguments)
    with pytest.raises(ValueError, match="reduction=None, allowed are 'mean', 'sum' and 'none'"):
        sup_con(torch.zeros(3, 4), torch.zeros(3).long(), 0.1, reduction=None)


def _gather(x):
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rank(rank, world_size, folder, weight, x, labels, impl, reduction):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/init", rank=rank, world_size=world_size
    )
    weight = weight.clone().requires_grad_()
    rows, labels = x.chunk(world_size)[rank] @ weight, labels.chunk(world_size)[rank]
    loss = sup_con(rows, labels, 0.3, gather=_gather, impl=impl, reduction=reduction)
    if reduction == "none":  # weighted by what a row knows of itself
        loss = (loss * (labels % 3 - 1)).sum()
    (loss * 1.7).backward()
    grad, loss = weight.grad, loss.detach()
    for tensor in (grad, loss):
        torch.distributed.all_reduce(tensor)
    torch.save((loss / world_size, grad / world_size), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-12), ("triton", torch.float32, 5e-6)],
)
def test_processes_together_give_the_gradient_of_one(tmp_path, impl, dtype, tolerance, reduction):
    x, labels = batch(24, 6, 4, dtype)
    labels[7] = 99  # more rows without positives on one process than on another
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = weight.double().clone().requires_grad_()
    loss = double_loop(x.double() @ exact, labels.tolist(), 0.3, rows=reduction == "none")
    if reduction == "none":
        loss = (loss * (labels % 3 - 1)).sum()
    (loss * 1.7).backward()
    context = multiprocessing.get_context("fork")
    for world_size in (1, 2, 4) if impl == "torch" else (2,):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        arguments = (world_size, folder, weight, x, labels, impl, reduction)
        processes = [
            context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for rank, process in enumerate(processes):
            process.join(60)
            assert process.exitcode == 0
            got_loss, got_grad = torch.load(folder / f"{rank}.pt")
            shared = world_size if reduction == "none" else 1  # a sum, averaged over processes
            assert relative(got_loss.double() * shared, loss.detach()) < tolerance
            assert relative(got_grad.double() * shared, exact.grad) < tolerance
