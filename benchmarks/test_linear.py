"""pytest-benchmark suite of the linear ops: every kernel of the list, forced, on the shapes of the README."""

import numpy as np
import pytest

import halfbyte as hb

SCHEMES = ["w8a8", "w8a8+ag64", "w8a16", "w4a8_g32", "w4a8_g128", "w4a16_g128"]
SHAPES = [
    (1, 4096, 4096), (8, 4096, 4096), (32, 4096, 4096), (128, 4096, 4096), (512, 4096, 4096),
    (16, 384, 384), (128, 384, 384), (128, 1536, 384), (128, 384, 1536), (128, 1000, 1001),
]  # fmt: skip
# Scalar code takes seconds per call on the large shapes and tells nothing new there.
SCALAR_LIMIT = 128 * 384 * 384
CASES = [
    pytest.param(scheme, kernel, id=f"{scheme}-{kernel['name']}")
    for scheme in SCHEMES
    for kernel in hb.kernels(hb.Scheme.parse(scheme).op)
]


@pytest.fixture(scope="module")
def layers():
    """(shape, scheme) -> (x, packed, bias); the last one is kept."""
    kept = {}

    def make(shape, scheme):
        if (shape, scheme) not in kept:
            m, n, k = shape
            rng = np.random.default_rng([m, n, k])
            weight = rng.standard_normal((n, k), dtype=np.float32)
            x = rng.standard_normal((m, k), dtype=np.float32)
            packed = hb.pack(hb.quantize(weight, scheme, method="absmax"))
            kept.clear()
            kept[shape, scheme] = x, packed, rng.standard_normal(n, dtype=np.float32)
        return kept[shape, scheme]

    return make


@pytest.mark.parametrize(("scheme", "kernel"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear(benchmark, layers, shape, scheme, kernel):
    if not kernel["supported"]:
        pytest.skip(f"this CPU lacks {kernel['isa']}")
    work = np.prod(shape)
    if kernel["isa"] == "scalar" and work > SCALAR_LIMIT:
        pytest.skip("too slow to be of interest")
    x, packed, bias = layers(shape, scheme)
    benchmark.group = f"{scheme} " + "x".join(map(str, shape))
    with hb.force_isa(kernel["isa"]):
        assert packed.kernel == kernel["name"]
        benchmark(hb.linear, x, packed, bias)
    benchmark.extra_info.update(kernel=kernel["name"], threads=hb.get_num_threads())
    if benchmark.stats:
        benchmark.extra_info["gops"] = 2e-9 * float(work) / benchmark.stats.stats.median
