"""Runs on a stand-in for an Apple GPU, which has no float64: it computes on the CPU."""

import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common.run import checkpoint
from tests.data import cells_tree, raer_tree, utterances_npz
from tests.runs import ended, flags

pytestmark = pytest.mark.e2e


class OnDevice(torch.Tensor):
    """A tensor that says it lies on `mps`."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        if held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @property
    def device(self) -> torch.device:
        return torch.device("mps", 0)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        seen = {}

        def held(x):
            if not isinstance(x, OnDevice):
                return x
            seen[id(x.held)] = x
            return x.held

        args, kwargs = tree_map(held, args), tree_map(held, kwargs or {})
        device = kwargs.get("device") or torch.device("mps" if seen else "cpu")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = function(*args, **kwargs)
        if device.type == "cpu":
            return result
        # What is changed in place stays the tensor that it was.
        return tree_map(lambda x: wrapped(seen.get(id(x), x)), result)


def wrapped(x):
    plain = isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)
    return OnDevice(x.detach()) if plain else x


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return OnDevice.__torch_dispatch__(function, types, args, kwargs)


class Devices(TorchFunctionMode):
    """Calls that name a device compute on the CPU; what they give lies where they say."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("cpu", "tolist") and isinstance(args[0], OnDevice):
            return getattr(args[0].held, name)()
        named = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if not named or name in ("device", "__get__"):
            return function(*args, **kwargs)

        def on_cpu(x):
            return torch.device("cpu") if isinstance(x, torch.device) else x

        if named[0].type == "cpu" and name == "to" and isinstance(args[0], OnDevice):
            args = (args[0].held, *args[1:])
        result = function(*map(on_cpu, args), **{key: on_cpu(x) for key, x in kwargs.items()})
        return tree_map(wrapped, result) if named[0].type == "mps" else result


@pytest.fixture
def apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.lru_cache(lambda: True))
    with Devices(), Dispatch():
        yield


TSM = "--backbone conv_small_035 --image-size 32 --bs 24 --n-segment 2 --clips 1 --eval-every 1"
CASES = {
    "simclr": (
        train_simclr,
        "--stage all --backbone resnet18 --stem cifar --image-size 8 --bs 16"
        " --finetune-bs 16 --finetune-epochs 1",
        cells_tree,
    ),
    "tsm": (train_tsm, f"{TSM} --data sample-flicker --head-bias prior --direction past", None),
    "raer": (train_raer, "--backbone vit_tiny --num-frames 2 --bs 8 --clip-grad 1", raer_tree),
    "cluster": (
        train_cluster,
        "--base-dim 16 --bs 32 --cluster-bs 32 --cluster-epochs 1 --assign partial-ot",
        lambda path: utterances_npz(path.with_suffix(".npz")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_needs_no_float64_on_the_device(name, tmp_path, apple_gpu):
    script, argv, make = CASES[name]
    data = ["--data", str(make(tmp_path / "data"))] if make else []
    run = tmp_path / "run"
    argv = flags(argv, "--epochs 1", data, "--out", run)
    if name == "tsm":  # begun elsewhere, in the middle of the epoch
        assert ended(script.main, flags(argv, "--device cpu --max-steps 2")) == 0
        assert checkpoint.load(run / "last.pt")["sums"]["loss"].dtype == torch.float64
    assert ended(script.main, flags(argv, "--device mps")) == 0
    assert ended(script.main, ["--eval", str(run), "--device", "mps"]) == 0
    assert ended(script.main, flags(argv, "--device mps --check loss-at-init")) == 0
