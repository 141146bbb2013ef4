"""pytest-benchmark suite of quantization: activations by each kernel, and weights with packing."""

import numpy as np
import pytest

import halfbyte as hb

ROWS = [(1, 4096), (32, 4096), (512, 4096), (128, 384), (128, 1536)]
WEIGHT = (4096, 4096)


@pytest.mark.parametrize("kernel", hb.kernels("quantize_rows"), ids=lambda row: row["name"])
@pytest.mark.parametrize("shape", ROWS, ids=lambda s: "x".join(map(str, s)))
def test_quantize_rows(benchmark, shape, kernel):
    if not kernel["supported"]:
        pytest.skip(f"this CPU lacks {kernel['isa']}")
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    benchmark.group = "quantize_rows " + "x".join(map(str, shape))
    with hb.force_isa(kernel["isa"]):
        benchmark(hb.quantize_rows, x)
    _add_rate(benchmark, x.nbytes)


@pytest.mark.parametrize("steps", ["quantize", "pack", "quantize and pack"])
def test_weight(benchmark, steps):
    weight = np.random.default_rng(0).standard_normal(WEIGHT, dtype=np.float32)
    quantized = hb.quantize(weight)
    calls = {
        "quantize": lambda: hb.quantize(weight),
        "pack": lambda: hb.pack(quantized),
        "quantize and pack": lambda: hb.pack(hb.quantize(weight)),
    }
    benchmark.group = "weight " + "x".join(map(str, WEIGHT))
    benchmark(calls[steps])
    _add_rate(benchmark, weight.nbytes)


def _add_rate(benchmark, nbytes):
    """GB/s of float32 read; absent when timing is disabled."""
    if benchmark.stats:
        benchmark.extra_info["gbps"] = 1e-9 * nbytes / benchmark.stats.stats.median
