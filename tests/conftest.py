"""Without a GPU Triton kernels run in the interpreter, which must be chosen before triton is
imported; GPU tests show as skipped.
"""

import os
import signal
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # Under nohup a run does not heed it, which is not what the tests expect of one.
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def forget_plans():
    """For tests that change what plans of `kernels` are made from, or what they launch."""

    def forget():
        for name, module in list(sys.modules.items()):
            for value in vars(module).values() if name.startswith("kernels.") else ():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    forget()
    yield forget
    forget()
