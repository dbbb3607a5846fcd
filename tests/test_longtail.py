"""The long-tail schedule: its table, its loss terms, and the parameters that each phase trains."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from common import longtail, metrics, optim
from common.check import audit
from common.data import sampling
from common.errors import InputError
from common.longtail import Phase, Schedule, read_schedule
from common.models import clip
from common.models import raer as models
from common.models.clip import TextTower

TABLE = Schedule(
    10, (Phase(0), Phase(4, "weighted", cap=2.0, mi=0.3, dc=0.1, ramp=4), Phase(8, lr=0.1))
)


STILL = {"epochs": 6, "phases": [{"start": 0}]}
DOUBLE = {"start": 0, "sampler": "weighted", "weights": "effective"}


def test_a_phase_holds_from_its_start_to_the_next_one_and_its_weights_rise():
    found = [TABLE.index(epoch) for epoch in range(12)]
    assert found == [0] * 4 + [1] * 4 + [2] * 4
    assert [TABLE.at(epoch).mi for epoch in range(10)] == pytest.approx(
        [0] * 4 + [0, 0.1, 0.2, 0.3] + [0] * 2
    )
    assert [TABLE.at(epoch).lr for epoch in (0, 7, 8, 9)] == [1.0, 1.0, 0.1, 0.1]
    at_once = Schedule(4, (Phase(0, mi=0.3, ramp=1),))
    assert at_once.at(0).mi == 0.3


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20, 60, 333])
def test_a_scaled_table_keeps_its_proportions_and_drops_what_no_epoch_is_left_for(epochs):
    scaled = TABLE.scaled(epochs)
    starts = [p.start for p in scaled.phases]
    assert starts[0] == 0 and sorted(set(starts)) == starts and starts[-1] < epochs
    wanted = {round(s * epochs / 10) for s in (0, 4, 8)}
    assert set(starts) <= wanted and {s for s in wanted if s < epochs} == set(starts)
    assert {scaled.at(e).sampler for e in range(epochs)} <= {"random", "weighted"}


def test_a_table_is_read_as_it_stands(tmp_path):
    rows = [
        {"start": 0, "smoothing": 0.05},
        {"start": 3, "sampler": "weighted", "cap": 1.5, "mi": 0.1, "ramp": 2},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"epochs": 6, "phases": rows}))
    lines = ["epochs = 6", "[[phases]]", "start = 0", "smoothing = 0.05", "[[phases]]", "start = 3"]
    lines += ['sampler = "weighted"', "cap = 1.5", "mi = 0.1", "ramp = 2"]
    (tmp_path / "a.toml").write_text("\n".join(lines))
    expected = Schedule(
        6, (Phase(0, smoothing=0.05), Phase(3, "weighted", cap=1.5, mi=0.1, ramp=2))
    )
    assert (
        read_schedule(str(tmp_path / "a.json"))
        == read_schedule(str(tmp_path / "a.toml"))
        == expected
    )
    text = expected.describe().splitlines()
    assert text[0].split() == ["epochs", "sampler", "cap", "smoothing", "mi", "ramp"]
    assert text[1].split() == ["[0,", "3)", "random", "none", "0.05", "0", "0"]
    assert text[2].split() == ["[3,", "6)", "weighted", "1.5", "0", "0.1", "2"]


@pytest.mark.parametrize(
    "table, message",
    [
        ("{", "schedule"),
        ([], "expected epochs"),
        ({"epochs": 6}, "expected epochs"),
        ({"epochs": 0, "phases": [{"start": 0}]}, "epochs must be"),
        ({"epochs": True, "phases": [{"start": 0}]}, "epochs must be"),
        ({"epochs": 6, "phases": []}, "must not be empty"),
        ({"epochs": 6, "phases": [{"start": 1}]}, "rise from 0"),
        ({"epochs": 6, "phases": [{"start": 0}, {"start": 6}]}, "stay below"),
        ({"epochs": 6, "phases": [{"start": 0}, {"start": 0}]}, "rise"),
        ({"epochs": 6, "phases": [{"tau": 0}]}, "a table with start"),
        ({"epochs": 6, "phases": [{"start": 0, "taus": 1}]}, "did you mean tau"),
        ({"epochs": 6, "phases": [{"start": 0, "tau": -1}]}, "tau is -1"),
        ({"epochs": 6, "phases": [{"start": 0, "tau": "1"}]}, "tau is '1'"),
        ({"epochs": 6, "phases": [{"start": 0.5}]}, "an integer"),
        ({"epochs": 6, "phases": [{"start": 0, "temperature": 0}]}, "> 0"),
        ({"epochs": 6, "phases": [{"start": 0, "smoothing": 2}]}, "0 to 1"),
        (
            {"epochs": 6, "phases": [{"start": 0, "sampler": "balanced"}]},
            "allowed random, weighted",
        ),
        ({"epochs": 6, "phases": [{"start": 0, "cap": 2.0}]}, "no effect"),
        ('{"epochs": 6, "epochs": 9, "phases": [{"start": 0}]}', "'epochs' stands twice"),
        ({"epoch": 6, "phases": [{"start": 0}]}, "unknown key 'epoch'; did you mean epochs"),
        ({"epochs": 6, "phases": [DOUBLE]}, "phase 0: .*twice; .*allow_double_balance = true"),
        ({"epochs": 6, "phases": [DOUBLE], "allow_double_balance": 1}, "is 1, allowed true"),
        (STILL | {"augmentation": 3}, "augmentation is no table; expected any of jitter"),
        (STILL | {"augmentation": {"jiter": 0.1}}, "augmentation.jiter'?; did you mean jitter"),
        (STILL | {"augmentation": {"jitter": 1.5}}, "jitter is 1.5, allowed 0 to 1"),
        (STILL | {"augmentation": {"crop": 0}}, "crop is 0, allowed 0.01 to 1"),
        (STILL | {"augmentation": {"degrees": True}}, "degrees is True, allowed 0 to 180"),
        (STILL | {"augmentation": {"mirror": 1}}, "mirror is 1, allowed true, false"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, table, message):
    path = tmp_path / "table.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(InputError, match=message) as caught:
        read_schedule(str(path))
    assert "\n" not in str(caught.value) and "--schedule" in str(caught.value)


def test_a_table_may_balance_twice_where_it_says_so(tmp_path):
    table = {"epochs": 6, "phases": [DOUBLE], "allow_double_balance": True}
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert read_schedule(str(tmp_path / "table.json")).phases == (Phase(**DOUBLE),)


def test_a_table_may_say_how_clips_vary(tmp_path):
    (tmp_path / "table.toml").write_text(
        "epochs = 6\n[[phases]]\nstart = 0\n[augmentation]\njitter = 0\nmirror = false\n"
    )
    schedule = read_schedule(str(tmp_path / "table.toml"))
    assert schedule.augmentation == longtail.Augmentation(jitter=0, mirror=False)
    assert schedule.scaled(3).augmentation == schedule.augmentation
    plain = longtail.SCHEDULES["three-stage"]
    # The name of a run that leaves the augmentation alone is what it was.
    assert plain.as_list() == [60, *(asdict(phase) for phase in plain.phases)]
    assert schedule.as_list()[-1]["jitter"] == 0


def test_a_missing_table_and_another_suffix_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_schedule(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="allowed are .toml and .json"):
        read_schedule(str(tmp_path / "table.yaml"))


def test_the_three_stages_are_the_recipes_in_every_one_of_60_epochs():
    table = longtail.SCHEDULES["three-stage"]
    for epoch in range(60):
        phase = table.at(epoch)
        stage = 1 if epoch < 16 else 2 if epoch < 41 else 3
        sampler = {1: ("random", None), 2: ("weighted", 2.0), 3: ("weighted", 1.5)}[stage]
        assert (
            (phase.sampler, phase.cap) == sampler
            and phase.weights == "none"
            and phase.trains == "all"
        )
        assert phase.tau == {1: 0.0, 2: 0.4, 3: 0.2}[stage]
        assert phase.temperature == {1: 0.15, 2: 0.15, 3: 0.12}[stage] and phase.smoothing == 0.05
        rise = 0.0 if epoch < 16 else min(1.0, (epoch - 16) / 9)
        assert phase.mi == pytest.approx(0.1 * rise) and phase.dc == pytest.approx(0.1 * rise)
        assert phase.lr == (1.0 if epoch < 41 else 0.1 if epoch < 51 else 0.01)
    assert [phase.start for phase in table.scaled(30).phases] == [0, 8, 20, 26]
    for epochs in (1, 7, 20, 90):
        wanted = {round(16 * epochs / 60), round(41 * epochs / 60)} - {epochs}
        assert wanted <= {phase.start for phase in table.scaled(epochs).phases}


def clip_like(num_classes=4, dim=16, tune="none", prompts=True):
    """A model with a random text tower, and cached features whose mean tells the class."""
    torch.manual_seed(0)
    tower = TextTower(50, 12, width=16, layers=2, heads=2, embed_dim=dim, activation="quick_gelu")
    ids = torch.tensor([[48, 3 + i, 9, 20 - i, 49] for i in range(num_classes)])
    text = models.Prompts(tower, ids, 3) if prompts else None
    return models.RaerModel(
        torch.nn.Identity(), dim, num_classes, num_frames=5, tune=tune, prompts=text, scale=20.0
    )


def test_clips_own_answer_is_its_logits_for_images_and_texts():
    small = clip.Variant(16, 2, 2, 8, 24, text_width=16, text_layers=2, text_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.VARIANTS, "small", small)
        published = clip.build_clip("small", 16, vocab=50)
    ids = torch.tensor([[[48, 3 + i, 9 + j, 49] for i in range(5)] for j in range(3)])
    published.own_texts = {"zero_shot": ids[:1], "zero_shot_templates": ids}
    model = models.RaerModel(
        published.visual, 24, 5, num_frames=1, streams="face", tune="none", scale=1.0
    )
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        features = model.mean_features(images[:, None, None])
        logits = torch.stack([published(images, rows) for rows in ids])
    found = {
        name: clip.cosine_logits(features, texts, published.logit_scale.exp().item())
        for name, texts in models.own_classes(published).items()
    }
    torch.testing.assert_close(found["zero_shot"], logits[0].detach())
    # The direction of the mean of unit features has the mean cosine, but for one factor a class.
    ratio = found["zero_shot_templates"] / logits.mean(0)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert models.own_classes(None) == models.own_classes(torch.nn.Identity()) == {}


def test_a_linear_probe_is_one_layer_on_standardized_means():
    torch.manual_seed(0)
    model = models.RaerModel(
        torch.nn.Identity(), 4, 3, num_frames=5, tune="none", scale=None, probe=True
    )
    x = 3 + torch.randn(400, 2, 5, 4) * torch.arange(1, 5)
    for _ in range(200):  # the running statistics
        model.train()(x)
    rows = x.numpy().astype(float)
    mean, deviation = (f(rows, axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
    z = ((rows - mean) / deviation).mean(2).reshape(400, 8)
    weight, bias = (p.detach().double().numpy() for p in model.classes.parameters())
    logits = model.eval()(x)[0].detach()
    np.testing.assert_allclose(logits, z @ weight.T + bias, rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", list(longtail.SCHEDULES))
@pytest.mark.parametrize("tune", ["none", "adapter"])
@pytest.mark.parametrize("prompts", [True, False])
def test_all_that_is_to_train_is_alive_in_every_phase(method, tune, prompts):

    labels, counts = torch.arange(8) % 4, np.array([40, 9, 3, 2])
    features = torch.randn(3, 8, 2, 5, 16, generator=torch.Generator().manual_seed(1))
    for phase in longtail.SCHEDULES[method].phases:
        model = clip_like(tune=tune, prompts=prompts).train()
        model.choose_trained(phase.trains == "classes")

        def terms_of(network, k, phase=phase):
            output = network(features[k])
            return longtail.loss_terms(method, phase, counts, "sampled", network, output, labels)

        def optimizer(network):
            modules = [m for part in network.parts().values() for m in part]
            return optim.build_optimizer("sgd", optim.param_groups(modules, 1e-4), lr=1e-2)

        assert audit.check_setting("phase", model, optimizer, terms_of) == []
        terms = terms_of(model, 0)
        assert ("mi" in terms, "dc" in terms) == (bool(phase.mi) and prompts, bool(phase.dc))


def long_tailed(counts, seed):
    """Features (n, 2, 4, 16) of clips whose rare classes need both streams and the order of the
    frames.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    rises = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])[labels]
    x = 0.7 * torch.randn(len(labels), 2, 4, 16, generator=generator)
    x[..., 0] += rises[:, :, None] * torch.tensor([-1.5, -0.5, 0.5, 1.5])
    x[:, 1, :, 1] += 3.0 * (labels == 4)[:, None]
    return x, labels


def fitted(method, seed, epochs=12):
    """UAR and WAR of a small model after a method's schedule on a fifth of RAER's clips."""
    counts, lr = np.array([221, 21, 5, 25, 68]), 1e-3
    x, y = long_tailed(counts.tolist(), seed)
    torch.manual_seed(seed)
    model = models.RaerModel(torch.nn.Identity(), 16, 5, num_frames=4, tune="none", scale=1 / 0.07)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    table = longtail.SCHEDULES[method].scaled(epochs)
    for epoch in range(epochs):
        phase, order = table.at(epoch), sampling.permutation(len(x), seed, epoch)
        if phase.sampler == "weighted":
            weights = sampling.class_weights(counts, phase.cap)[y.numpy()]
            order = sampling.weighted_order(np.arange(len(x)), weights, seed, epoch)
        optimizer.param_groups[0]["lr"] = lr * phase.lr
        for batch in sampling.batch_slices(order, 16):
            optimizer.zero_grad()
            terms = longtail.loss_terms(
                method, phase, counts, "sampled", model, model(x[batch]), y[batch]
            )
            sum(terms.values()).backward()
            optimizer.step()
    x, y = long_tailed([200, 100, 100, 100, 100], 100 + seed)
    with torch.no_grad():
        scores = metrics.long_tail(y, model.eval()(x)[0].argmax(1), 5)
    return scores["uar"], scores["war"]


def test_the_three_stages_beat_plain_cross_entropy_on_unequal_classes():
    """Three seeds: at least 10 points of UAR more, at most 5 of WAR less."""
    ours, plain = (
        np.mean([fitted(method, seed) for seed in range(3)], 0) for method in ("three-stage", "ce")
    )
    assert ours[0] - plain[0] > 0.10 and ours[1] - plain[1] > -0.05, (ours, plain)


def test_prompts_are_the_text_towers_features_of_context_and_words():
    model = clip_like()
    tower, ids, context = model.prompts.tower, model.prompts.ids, model.prompts.context
    embedded = tower.token_embedding(ids)
    with_context = (
        torch.cat([embedded[:, :1], context, embedded[:, 1:]], 1) + tower.positional_embedding[:8]
    )
    hidden = tower.ln_final(tower.transformer(with_context, True, False))
    torch.testing.assert_close(model.class_features(), hidden[:, 7] @ tower.text_projection)
    torch.testing.assert_close(model.prompts.fixed, tower(ids))
    x = torch.randn(2, 2, 5, 16)
    logits, classes = model.eval()(x)
    z = torch.nn.functional.normalize(model.clip_features(x), dim=1)
    torch.testing.assert_close(logits, 20 * z @ torch.nn.functional.normalize(classes, dim=1).T)
    assert {n for n, p in model.named_parameters() if p.requires_grad} & {"prompts.context"}
    assert not any(p.requires_grad for p in tower.parameters())
    with pytest.raises(
        models.InputError, match="longest descriptor has 5 tokens, together at most 12"
    ):
        models.Prompts(tower, ids, 8)


def test_the_sampled_prior_is_what_the_sampler_draws_and_does_not_correct_twice():
    counts, phase = np.array([1106, 103, 24, 126, 338]), Phase(0, "weighted", cap=2.0)
    labels = np.repeat(np.arange(5), counts)
    sampled = longtail.prior(counts, phase, "sampled").numpy()
    drawn = sampling.weighted_order(
        np.arange(1697), sampling.class_weights(counts, 2.0)[labels], 0, 0
    )
    shares = np.bincount(labels[drawn], minlength=5) / 1697
    assert np.abs(shares - sampled).max() < 0.03
    np.testing.assert_allclose(
        longtail.prior(counts, phase, "train").numpy(), counts / 1697, rtol=1e-6
    )
    np.testing.assert_allclose(
        longtail.prior(counts, Phase(0), "sampled").numpy(), counts / 1697, rtol=1e-6
    )
    uniform = longtail.prior(counts, Phase(0, "weighted"), "sampled")
    np.testing.assert_allclose(uniform.numpy(), [0.2] * 5, rtol=1e-6)
    # All classes drawn equally often leave nothing to adjust: the loss is plain cross-entropy.
    logits, targets, model = torch.randn(6, 5), torch.arange(6) % 5, clip_like(5, prompts=False)
    output = (logits, model.class_features())
    balanced = Phase(0, "weighted", tau=1.0)
    once, twice = (
        longtail.loss_terms("three-stage", balanced, counts, which, model, output, targets)["ce"]
        for which in ("sampled", "train")
    )
    torch.testing.assert_close(once, torch.nn.functional.cross_entropy(logits, targets))
    assert not torch.allclose(once, twice)


@pytest.mark.parametrize("method", ["three-stage", "ldam-drw"])
def test_class_weights_are_felt_and_are_1_on_average(method):
    counts, phase = np.array([1106, 103, 24, 126, 338]), Phase(0, weights="effective")
    logits, targets, model = torch.randn(6, 5), torch.arange(6) % 5, clip_like(5, prompts=False)
    raw = torch.tensor([(1 - 0.9999) / (1 - 0.9999 ** int(n)) for n in counts])
    plain, weighted = (
        [
            longtail.loss_terms(method, p, counts, "sampled", model, (z[None], None), y[None])["ce"]
            for z, y in rows
        ]
        for p in (Phase(0), phase)
        for rows in [list(zip(logits, targets, strict=True))]
    )
    factors = raw / (raw * torch.from_numpy(counts / counts.sum())).sum()
    torch.testing.assert_close(
        torch.stack(weighted), torch.stack(plain) * factors[targets].float(), rtol=1e-4, atol=1e-5
    )


def test_answers_after_training_are_what_the_papers_say():
    counts, model = np.array([90, 9, 1, 0 + 5, 5]), clip_like(5, prompts=False)
    logits = torch.randn(7, 5)
    expected = logits - torch.log(torch.from_numpy(counts / counts.sum())).float()
    torch.testing.assert_close(longtail.decide("post-hoc", counts, model, logits, 1.0), expected)
    norms = model.classes.weight.detach().norm(dim=1)
    torch.testing.assert_close(
        longtail.decide("tau-norm", counts, model, logits, 0.5), logits / norms.sqrt()
    )
    assert longtail.decide("three-stage", counts, model, logits, 1.0) is logits
    labels = longtail.decide("tau-norm", counts, model, logits, 0.7).argmax(1).numpy()
    tau = longtail.best_tau("tau-norm", counts, model, logits, labels)
    found = longtail.decide("tau-norm", counts, model, logits, tau).argmax(1)
    assert metrics.long_tail(labels, found, 5)["war"] == 1.0
