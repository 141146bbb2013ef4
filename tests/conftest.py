"""Fixtures of the whole suite: a fixed seed for every test, and no forced ISA left behind by one."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from building import emulated_cuda_library

if TYPE_CHECKING:
    from halfbyte.cuda.library import Library


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)


@pytest.fixture
def one_thread_of_torch():
    """For tests of many small tensors, whose torch operations only wait for one another's threads, the longer
    the busier the machine is. halfbyte computes on as many threads as it is told.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated_library(request) -> Path:
    """The GPU kernels on the CPU behind their C interface (csrc/cuda/api.h)."""
    return emulated_cuda_library(request)


@pytest.fixture
def gpu(emulated_library) -> Iterator[Library]:
    """Within the test the emulated library runs the ops, and tensors of the CPU are those of its GPU."""
    from halfbyte.cuda.library import use_library

    with use_library(emulated_library) as library:
        yield library


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of products of each call into the core that a module fused by its patterns made."""
    from halfbyte import _core
    from halfbyte.fuse import patterns

    seen = []

    def together(x, given, *rest):
        if (outs := _core.LinearPlan.together(x, given, *rest)) is not None:
            seen.append(len(given))
        return outs

    plan = types.SimpleNamespace(together=together)
    monkeypatch.setattr(patterns, "_core", types.SimpleNamespace(LinearPlan=plan, Watch=_core.Watch))
    return seen


@pytest.fixture(autouse=True)
def isa_restored():
    """A test that forces an ISA and fails must not decide what the next one runs."""
    from halfbyte import _core

    previous = _core.force_isa(None)
    _core.force_isa(previous)
    yield
    _core.force_isa(previous)
