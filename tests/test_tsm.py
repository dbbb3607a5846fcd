"""The clip model: what moves and how far it reaches, the head, frozen layers, checkpointing,
memory, streams.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from common.errors import InputError
from common.models.heads import TemporalHead
from common.models.mobilenet_v4 import VARIANTS, build_mobilenet_v4, shift_sites
from common.models.tsm import ClipModel, Shift, Stream, freeze_bn, grad_cam, training_memory
from kernels import shift_conv1x1, shift_step, temporal_shift

KERNELS = {"residual": temporal_shift, "expand": shift_conv1x1, "none": None}


def make(
    placement="residual",
    name="conv_small_035",
    *,
    n_segment=4,
    fold_div=4,
    direction="both",
    padding="zero",
    **head,
):
    """A clip model whose attention, statistics and layer scales are not those of a new one."""
    torch.manual_seed(0)
    shift = Shift(placement, KERNELS[placement], n_segment, fold_div, direction, padding)
    head = {"aggregate": "attention", "dropout": 0.0, "dropout2d": False, "num_classes": 1} | head
    model = ClipModel(build_mobilenet_v4(name), shift, **head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, 0.3)
    if model.head.attention is not None:
        nn.init.normal_(model.head.attention.weight, std=0.1)
    return model


def slices(x, n_segment, fold_div, direction):
    """The shift of Lin et al. as slices that are copied, zeros beyond the clip."""
    clips = x.unflatten(0, (-1, n_segment))
    fold, out = clips.shape[2] // fold_div, torch.zeros_like(clips)
    if direction == "both":
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    else:
        out[:, 1:, :fold] = clips[:, :-1, :fold]
        out[:, :, fold:] = clips[:, :, fold:]
    return out.flatten(0, 1)


def eager(model, frames, n_segment):
    """Logits by hooks on an untouched backbone: every site's branch is computed again from the
    shifted map.
    """
    s = model.shift
    move = partial(slices, n_segment=n_segment, fold_div=s.fold_div, direction=s.direction)
    handles = []
    for site in shift_sites(model.backbone).values():
        first = (
            site.dw_start
            if s.placement == "residual" and site.dw_start is not None
            else site.pw_exp
        )
        handles.append(
            first.conv.register_forward_pre_hook(lambda module, inputs: (move(inputs[0]),))
        )
    features = model.backbone(frames).unflatten(0, (-1, n_segment))
    for handle in handles:
        handle.remove()
    weights = torch.softmax(features @ model.head.attention.weight[0], 1)
    return model.head.classifier((weights.unsqueeze(2) * features).sum(1)), weights


@pytest.mark.parametrize(
    ("placement", "direction", "name"),
    [
        ("residual", "both", "conv_small"),
        ("residual", "past", "hybrid_medium"),
        ("expand", "both", "hybrid_medium"),
        ("expand", "past", "conv_small"),
    ],
)
def test_the_model_is_the_paper_s_with_an_unshifted_shortcut(placement, direction, name):
    model = make(placement, name, direction=direction, fold_div=8).eval()
    clips = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        for got, expected in zip(model(clips), eager(model, clips.flatten(0, 1), 4), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("placement", ["residual", "expand"])
def test_gradients_are_those_of_the_paper_s_slices(placement):
    model, clips = (
        make(placement).train().double(),
        torch.randn(2, 4, 3, 64, 64, dtype=torch.float64),
    )
    gradients = []
    for logits, _ in (model(clips), eager(model, clips.flatten(0, 1), 4)):
        gradients.append(torch.autograd.grad(logits.sum(), list(model.parameters())))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


def test_frames_without_the_clip_s_dimension_are_clips_of_n_segment():
    model = make(n_segment=3).eval()
    clips = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        for a, b in zip(model(clips), model(clips.flatten(0, 1)), strict=True):
            assert torch.equal(a, b)
        assert model(clips[:, :2])[1].shape == (2, 2)  # another T than in training
    with pytest.raises(ValueError, match="n_segment=3 must divide the number of frames, 4"):
        model(torch.zeros(4, 3, 32, 32))


@pytest.mark.parametrize("placement", ["residual", "expand"])
def test_the_shortcut_of_a_site_keeps_its_own_frame(placement):
    """Shifting the shortcut's memory too raises nothing and trains badly
    (mit-han-lab/temporal-shift-module#105).
    """
    model = make(placement).eval()
    site = next(iter(shift_sites(model.backbone).values()))
    nn.init.zeros_(site.pw_proj.bn.weight)
    nn.init.zeros_(site.pw_proj.bn.bias)
    x = torch.randn(4, 48, 4, 4).relu()[:, : site.pw_proj.conv.out_channels]
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(site(x, *model.shift.hooks(4)), before) and torch.equal(x, before)


@pytest.mark.parametrize(("direction", "reach"), [("both", {-1, 0, 1}), ("past", {-1, 0})])
@pytest.mark.parametrize("placement", ["residual", "expand"])
def test_one_site_reads_one_frame_further_and_all_of_them_only_so_far(placement, direction, reach):
    model = make(placement, direction=direction, aggregate="mean").eval().double()
    hooks, frames = model.shift.hooks(7), 7
    for site in list(shift_sites(model.backbone).values())[::4]:
        x = torch.randn(
            frames, site.pw_proj.conv.out_channels, 4, 4, dtype=torch.float64, requires_grad=True
        )
        (dx,) = torch.autograd.grad(site(x, *hooks)[3].sum(), x)
        assert {t - 3 for t in range(frames) if dx[t].any()} == reach
    x = torch.randn(frames, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(model.frame_features(x, *hooks)[3].sum(), x)
    assert [bool(frame.any()) for frame in dx] == [True] * 4 + [direction == "both"] * 3


def test_without_a_shift_frames_know_nothing_of_each_other():
    model = make("none", aggregate="mean").eval()
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        logits, weights = model(clips)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(clips[:, order])[0], logits)
        assert torch.equal(weights, torch.full((2, 4), 0.25))
        shifted = make("residual", aggregate="mean").eval()
        assert (shifted(clips[:, order])[0] - shifted(clips)[0]).abs().max() > 1e-4


def test_the_shift_changes_no_key_and_says_where_it_sits():
    model = make("expand", "conv_medium", fold_div=8, n_segment=8)
    assert list(model.backbone.state_dict()) == list(build_mobilenet_v4("conv_medium").state_dict())
    text = model.describe()
    assert text == (
        "shift expand at 18 blocks, 8 frames, fold_div 8, direction both, padding zero: 25% of"
        " their channels move"
    )
    assert (
        "50%" in make(fold_div=4).describe()
        and "25%" in make(fold_div=4, direction="past").describe()
    )
    assert make("none").describe() == "shift none"
    sites = shift_sites(make(name="hybrid_medium").backbone)
    assert len(sites) == 19 and not any(
        "attn" in dict(site.named_children()) for site in sites.values()
    )
    with pytest.raises(ValueError, match="'inplace', allowed are residual, expand, none"):
        ClipModel(
            model.backbone,
            Shift("inplace", None, 8, 8, "both", "zero"),
            aggregate="mean",
            dropout=0,
            dropout2d=False,
            num_classes=1,
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_largest_fold_div_moves_a_channel_of_every_site(name):
    with torch.device("meta"):
        sites = shift_sites(build_mobilenet_v4(name))
    assert min(block.pw_proj.conv.out_channels for block in sites.values()) >= 32


def test_padding_reaches_the_kernel():
    clips = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        logits = [
            make(padding=padding).eval()(clips)[0].item()
            for padding in ("zero", "replicate", "circulant")
        ]
    assert len(set(logits)) == 3


def test_attention_starts_as_the_mean_and_is_the_formula():
    features = torch.randn(3, 5, 16, dtype=torch.float64)
    head = TemporalHead(16, 2, "attention").double()
    _, weights = head(features)
    assert torch.equal(weights, torch.full_like(weights, 0.2))
    nn.init.normal_(head.attention.weight)
    logits, weights = head(features)
    for n in range(3):
        scores = torch.stack([head.attention.weight[0].dot(frame) for frame in features[n]]).exp()
        alpha = scores / scores.sum()
        torch.testing.assert_close(weights[n], alpha)
        mixed = sum(a * frame for a, frame in zip(alpha, features[n], strict=True))
        torch.testing.assert_close(logits[n], head.classifier.weight @ mixed + head.classifier.bias)
    with pytest.raises(ValueError, match="aggregate='max', allowed are attention, mean"):
        TemporalHead(16, 2, "max")


@pytest.mark.parametrize("spatial", [False, True])
def test_dropout_takes_features_or_whole_channels_of_the_last_map(spatial):
    model = make("none", dropout=0.5, dropout2d=spatial)
    model.backbone.eval()
    frames = torch.randn(2, 3, 64, 64)
    seen = []
    model.backbone.conv_head.register_forward_pre_hook(
        lambda m, inputs: seen.append(inputs[0].flatten(1))
    )
    with torch.no_grad():
        dropped, (pooled,) = model.frame_features(frames), seen
        model.eval()
        kept = model.frame_features(frames)
    if spatial:
        alive = pooled != 0
        assert 0.4 < (alive | (seen[1] == 0)).float().mean() < 0.8
        torch.testing.assert_close(pooled[alive], 2 * seen[1][alive])
    else:
        assert torch.equal(pooled, seen[1])
        alive = dropped != 0
        torch.testing.assert_close(dropped[alive], 2 * kept[alive])
        assert 0.4 < alive.sum() / (kept != 0).sum() < 0.6


@pytest.mark.parametrize(
    ("name", "count"),
    [("conv_small", 15), ("conv_medium", 25), ("conv_large", 34), ("hybrid_medium", 32)],
)
def test_a_third_of_the_normalization_is_frozen(name, count):
    with torch.device("meta"):
        model = ClipModel(
            build_mobilenet_v4(name), Shift("none", None, 8, 4, "both", "zero"),
            aggregate="mean", dropout=0.3, dropout2d=False, num_classes=1,
        )  # fmt: skip
    names = freeze_bn(model, 0.33)
    assert (
        len(names) == count
        and names[0] == "backbone.bn1"
        and names[1].startswith("backbone.blocks.0.0.")
    )


def test_frozen_layers_stay_as_they_are_whatever_the_mode():
    model = make("residual")
    names = freeze_bn(model, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model.eval()
        model.train()
        model(torch.randn(2, 4, 3, 32, 32))[0].sum().backward()
        optimizer.step()
    changed = {
        key.rpartition(".")[0]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert names == layers[:23] and not changed & set(names) and changed >= set(layers[23:])
    assert freeze_bn(make("none"), 0.0) == []


@pytest.mark.parametrize(
    ("placement", "name"), [("residual", "conv_small_035"), ("expand", "hybrid_medium")]
)
def test_checkpointed_blocks_give_the_same_gradients_and_statistics_bit_for_bit(placement, name):
    plain = make(placement, name, dropout=0.3)
    freeze_bn(plain, 0.1)
    saving = copy.deepcopy(plain)
    saving.backbone.checkpoint_blocks = True
    clips = torch.randn(1, 2, 3, 32, 32)
    for model in (plain, saving):
        model.train()
        torch.manual_seed(1)
        for _ in range(2):
            model(clips)[0].sum().backward()
    for (key, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), key
    for (key, p), q in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(p, q[1]), key
    assert saving.backbone.norm_head.num_batches_tracked == 2
    assert shift_sites(saving.backbone)["blocks.3.3"].pw_exp.bn.num_batches_tracked == 2


def saved_bytes(module, dtype, *inputs):
    """Bytes that autograd keeps of a forward pass, parameters and buffers excepted; and the pass's
    result.
    """
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, dtype != torch.float32):
        out = module(*inputs)
    for tensor in [*module.parameters(), *module.buffers()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()), out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("placement", "name"), [("residual", "conv_medium"), ("expand", "hybrid_medium")]
)
def test_predicted_memory_is_what_autograd_keeps(placement, name, dtype):
    model = make(placement, name).train()
    clips = torch.randn(1, 4, 3, 128, 128)
    predicted = training_memory(model, 4, 128, dtype)
    measured, _ = saved_bytes(model, dtype, clips)
    if dtype != torch.float32:
        measured += clips.nbytes  # the frames that were cast are alive too, only not for autograd
    assert predicted.activations == pytest.approx(measured, rel=0.1)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert predicted[:3] == (size, size, 2 * size)
    freeze_bn(model, 1.0)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert training_memory(model, 4, 128, dtype)[:3] == (size, trained, 2 * trained)


def test_predicted_memory_of_checkpointed_blocks():
    model = make("residual", "conv_medium").train()
    clips = torch.randn(1, 4, 3, 128, 128)
    whole = training_memory(model, 4, 128, torch.float32).activations
    blocks = [block for stage in model.backbone.blocks for block in stage]
    inputs = []
    handles = [
        b.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach())) for b in blocks
    ]
    model(clips)
    for handle in handles:
        handle.remove()
    largest = max(
        saved_bytes(b, torch.float32, x.requires_grad_())[0] - x.nbytes
        for b, x in zip(blocks, inputs, strict=True)
    )
    model.backbone.checkpoint_blocks = True
    outside, _ = saved_bytes(model, torch.float32, clips)  # the blocks' inputs included
    predicted = training_memory(model, 4, 128, torch.float32).activations
    assert predicted == pytest.approx(outside + largest, rel=0.1)
    assert predicted < 0.6 * whole


def test_the_recipe_s_batch_is_predicted_to_fit_its_card():
    model = make("residual", "conv_medium")
    assert sum(training_memory(model, 32 * 8, 224, torch.bfloat16)) < 7.5e9


@pytest.mark.parametrize(
    ("placement", "aggregate"),
    [("residual", "attention"), ("expand", "mean"), ("none", "attention")],
)
def test_a_stream_gives_the_scores_of_the_whole_sequence(placement, aggregate):
    model = make(placement, "conv_small", direction="past", aggregate=aggregate).eval()
    sequence = torch.randn(2, 40, 3, 48, 48)
    stream, scores = Stream(model, shift_step), []
    with torch.no_grad():
        expected, weights = model(sequence)
        early, _ = model(sequence[:, :7])
        assert (weights.max() > 1.5 / 40) == (aggregate == "attention")
        for t in range(40):
            logits, score = stream(sequence[:, t])
            scores.append(score)
            if t == 6:
                torch.testing.assert_close(logits, early, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    # Float32 of a frame alone and of forty: up to 2e-5 apart, by the number of threads.
    torch.testing.assert_close(torch.stack(scores, 1).softmax(1), weights, rtol=0, atol=5e-5)
    if placement != "none":
        windows = model(sequence.unflatten(1, (10, 4)).flatten(0, 1))[0]
        assert (
            windows.unflatten(0, (2, 10)).mean(1) - expected
        ).abs().max() > 1e-4  # another question, another score


def test_a_stream_keeps_one_fold_of_each_site():
    model = make("residual", "conv_small", direction="past", fold_div=8).eval()
    stream = Stream(model, shift_step)
    for _ in range(3):
        stream(torch.randn(1, 3, 224, 224))
        assert sum(fold.numel() for fold in stream.folds) == 15_680


def test_a_running_softmax_survives_scores_that_overflow():
    model = make("none").eval()
    nn.init.normal_(model.head.attention.weight, std=100)
    sequence = torch.randn(1, 6, 3, 32, 32)
    stream = Stream(model, shift_step)
    with torch.no_grad():
        expected, _ = model(sequence)
        scores = [stream(sequence[:, t]) for t in range(6)]
    assert max(score.abs().max() for _, score in scores) > 100
    torch.testing.assert_close(scores[-1][0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"direction": "both"}, {"direction": "past", "padding": "replicate"}]
)
def test_only_a_model_of_the_past_can_stream(options):
    with pytest.raises(InputError, match="--direction past --padding zero: this one has"):
        Stream(make(**options).eval(), shift_step)


@pytest.mark.parametrize(
    ("placement", "checkpoint_blocks"), [("residual", False), ("expand", True)]
)
def test_the_compiler_takes_the_model_whole(placement, checkpoint_blocks):
    plain = make(placement).train()
    compiled = copy.deepcopy(plain)
    compiled.backbone.checkpoint_blocks = checkpoint_blocks
    compiled.compile(fullgraph=True, backend="aot_eager")
    clips = torch.randn(2, 4, 3, 32, 32)
    for model in (plain, compiled):
        model(clips)[0].sum().backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(plain.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(q, p)


def test_the_head_works_in_fp32_under_autocast():
    model = make("expand")
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights = model(torch.randn(2, 4, 3, 32, 32))
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert not torch.equal(logits, logits.bfloat16().float())


def test_grad_cam_of_a_linear_network_is_its_weighted_map():
    torch.manual_seed(0)
    layer, head = torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Linear(4, 1)
    x = torch.randn(2, 3, 5, 6)
    kept = torch.get_rng_state()
    with torch.no_grad():
        found = grad_cam(layer, lambda: head(layer(x).mean((2, 3))))
        # Each of a map's 30 cells has the weight / 30 as its gradient.
        expected = torch.einsum("c,nchw->nhw", head.weight[0] / 30, layer(x)).clamp(min=0)
    assert torch.allclose(found, expected, atol=1e-6) and found.any() and (found == 0).any()
    assert not layer._forward_hooks and layer.weight.grad is None
    assert torch.equal(kept, torch.get_rng_state())
