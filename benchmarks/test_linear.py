"""pytest-benchmark suite of `linear_w8a8`: every kernel of the list, forced, on the shapes of the README."""

import numpy as np
import pytest

import halfbyte as hb

SHAPES = [
    (1, 4096, 4096), (8, 4096, 4096), (32, 4096, 4096), (128, 4096, 4096), (512, 4096, 4096),
    (16, 384, 384), (128, 384, 384), (128, 1536, 384), (128, 384, 1536), (128, 1000, 1001),
]  # fmt: skip
# Scalar code takes seconds per call on the large shapes and tells nothing new there.
SCALAR_LIMIT = 128 * 384 * 384
OP = "linear_w8a8"


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def layer(request):
    """(x, packed, bias) of one shape."""
    m, n, k = request.param
    rng = np.random.default_rng([m, n, k])
    weight = rng.standard_normal((n, k), dtype=np.float32)
    x = rng.standard_normal((m, k), dtype=np.float32)
    return x, hb.pack(hb.quantize(weight)), rng.standard_normal(n, dtype=np.float32)


@pytest.mark.parametrize("kernel", hb.kernels(OP), ids=lambda row: row["name"])
def test_linear(benchmark, layer, kernel):
    if not kernel["supported"]:
        pytest.skip(f"this CPU lacks {kernel['isa']}")
    x, packed, bias = layer
    work = len(x) * packed.shape[0] * packed.shape[1]
    if kernel["isa"] == "scalar" and work > SCALAR_LIMIT:
        pytest.skip("too slow to be of interest")
    benchmark.group = "x".join(map(str, (len(x), *packed.shape)))
    with hb.force_isa(kernel["isa"]):
        assert packed.kernel == kernel["name"]
        benchmark(hb.linear, x, packed, bias)
    benchmark.extra_info.update(kernel=kernel["name"], threads=hb.get_num_threads())
    if benchmark.stats:
        benchmark.extra_info["gops"] = 2e-9 * work / benchmark.stats.stats.median
