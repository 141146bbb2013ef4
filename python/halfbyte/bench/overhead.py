"""`halfbyte bench overhead`: what one call of a tiny QLinear costs above the kernel that it runs."""

from __future__ import annotations

import statistics

import numpy as np

from ..extras import require
from .engine import Timed, run_rounds
from .linear import OURS, kernel_name, thread_counts
from .machine import describe

_SHAPE = (1, 64, 64)
_THREADS = 1  # a layer this small runs on the calling thread anyway
_F32 = 0  # dtype code of float32 in halfbyte._core
_BINDING, _EMPTY, _FLOAT = "_core.linear", "_core.linear, 0 rows", "torch float32"


def run(rounds: int = 25, round_seconds: float = 0.01) -> dict:
    """Time the module call, the binding with pointers at hand, and the binding with no rows.

    The kernel alone is the second minus the third: a call without rows pays for the binding only.
    """
    torch = require("torch", extra="torch", purpose="halfbyte bench overhead")
    import halfbyte as hb

    from .. import _core

    m, n, k = _SHAPE
    linear = torch.nn.Linear(k, n)
    module = hb.QLinear.from_linear(linear, "w8a8")
    x = torch.randn(m, k)
    quantized = hb.quantize(linear.weight.detach().numpy(), "w8a8")
    packed = hb.pack(quantized).core
    bias, out = linear.bias.detach().numpy(), np.empty((m, n), np.float32)
    # packed, rows, input, output, bias, no activation, no residual, dynamic activation scale, threads
    tail = (
        x.data_ptr(),
        k,
        _F32,
        out.ctypes.data,
        n,
        _F32,
        bias.ctypes.data,
        0,
        0,
        0,
        _F32,
        0.0,
        0,
        _THREADS,
    )
    calls = {
        OURS: lambda: module(x),
        _BINDING: lambda: _core.linear(packed, m, *tail),
        _EMPTY: lambda: _core.linear(packed, 0, *tail),
        _FLOAT: lambda: linear(x),
    }
    with thread_counts(_THREADS):
        timed = [Timed(name, [call], round_seconds, warm_calls=10) for name, call in calls.items()]
        samples = run_rounds(timed, rounds, "overhead")
        machine = describe(_THREADS)
    us = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
    kernel = us[_BINDING] - us[_EMPTY]
    rows = [
        (OURS, us[OURS], "QLinear module on a torch tensor"),
        (_BINDING, us[_BINDING], "the binding called with pointers at hand"),
        (_EMPTY, us[_EMPTY], "the binding with no rows to compute"),
        ("kernel", kernel, "difference of the two lines above"),
        ("overhead over the binding", us[OURS] - us[_BINDING], "Python module, checks, output tensor"),
        ("overhead over the kernel", us[OURS] - kernel, "all of that and the binding"),
        (_FLOAT, us[_FLOAT], "torch.nn.Linear in float32, for comparison"),
    ]
    return {
        "format": "halfbyte-bench",
        "version": 1,
        "kind": "overhead",
        "machine": machine,
        "shape": list(_SHAPE),
        "threads": _THREADS,
        "kernel": kernel_name("w8a8"),
        "rows": [{"name": name, "us": value, "note": note} for name, value, note in rows],
        "samples_us": {name: [s * 1e6 for s in values] for name, values in samples.items()},
    }
