"""The audit finds what is dead, names it, and leaves the model as it is."""

import copy

import pytest
import torch
from torch import nn

from common.check import audit
from common.errors import exit_codes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
        self.head = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.head(self.tower(x))


def terms_of(model, k):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
    return {"ce": nn.functional.cross_entropy(model(x), torch.arange(8) % 3)}


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def frozen_net():
    model = Net().train()
    model.tower.eval()
    return model


def test_what_lives_passes_and_nothing_changes():
    torch.manual_seed(0)
    model, state = frozen_net(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    assert audit.check_setting("stage 1", model, sgd, terms_of) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(
        p.grad is None for p in model.parameters()
    )


def test_each_fault_is_named():
    model = frozen_net()
    model.spare.requires_grad_(True)  # trainable, in the optimizer, and not in the loss
    found = audit.check_setting("stage 1", model, sgd, terms_of)
    assert [
        f"stage 1: spare.{n} is trainable and did not move in 3 steps" for n in ("weight", "bias")
    ] == found

    model = frozen_net()
    model.tower.train()  # BatchNorm of a frozen tower follows the batches
    found = audit.check_setting("s", model, sgd, terms_of)
    assert {f"s: tower.1.{n} is frozen and moved" for n in ("running_mean", "running_var")} <= set(
        found
    )

    def with_dead_terms(model, k):
        return terms_of(model, k) | {"mi": torch.tensor(0.3), "dc": 0 * model.head.weight.sum()}

    found = audit.check_setting("s", frozen_net(), sgd, with_dead_terms)
    assert found == [f"s: the loss term {name} moves no gradient" for name in ("mi", "dc")]

    found = audit.check_setting(
        "s", frozen_net(), lambda m: torch.optim.SGD(m.tower.parameters(), lr=0.1), terms_of
    )
    assert "s: head.weight is trainable and in 0 optimizer groups" in found
    assert "s: tower.0.weight is frozen and in an optimizer group" in found
    found = audit.check_setting("s", frozen_net(), lambda m: sgd(m, lr=0.0), terms_of)
    assert "s: head.weight is trainable and did not move in 3 steps" in found
    assert audit.check_setting("s", Net().requires_grad_(False), lambda m: sgd(Net()), terms_of)


def test_a_parameter_in_two_groups_and_a_strange_one_are_named():
    model = frozen_net()
    optimizer = sgd(model)
    optimizer.param_groups.append({"params": [model.head.bias, nn.Parameter(torch.zeros(1))]})
    found = audit.check_groups(model, optimizer)
    assert found[0] == "head.bias is trainable and in 2 optimizer groups"
    assert found[1:] == ["the optimizer holds 1 parameter that the model lacks"]


def test_a_step_that_rounding_swallows_is_alive():
    model = frozen_net()
    with torch.no_grad():
        model.head.bias.fill_(1e4)
    assert audit.check_setting("s", model, lambda m: sgd(m, lr=1e-6), terms_of) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_alive(value):
    def terms(model, k):
        return terms_of(model, k) | {"mi": value * model.head.bias.sum()}

    problems = audit.check_setting("s", frozen_net(), sgd, terms)
    assert "s: the loss term mi moves no gradient" in problems
    assert "s: head.bias is not finite after 3 steps" in problems


def test_problems_end_with_their_own_exit_code(capsys):
    audit.refuse([])
    with pytest.raises(SystemExit) as caught, exit_codes():
        audit.refuse([f"a{i} is dead" for i in range(12)])
    assert caught.value.code == 4
    error = capsys.readouterr().err
    assert error.startswith("audit failed: a0 is dead; a1") and error.strip().endswith("and 2 more")
