"""halfbyte without torch: where importing it fails, the road from quantize to linear runs on numpy arrays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not installed")
sys.meta_path.insert(0, NoTorch())
"""

# Also run under qemu by test_baseline.py, on CPUs that lack AVX.
LINEAR_ON_NUMPY = """
import sys
import numpy as np
import halfbyte as hb
import truth
rng, ran = np.random.default_rng(5), set()
for m, n, k in ((1, 1, 1), (0, 5, 7), (13, 33, 70), (5, 64, 64), (40, 97, 129)):
    w, x = rng.standard_normal((n, k), np.float32), rng.standard_normal((m, k), np.float32)
    bias, residual = rng.standard_normal(n, np.float32), rng.standard_normal((m, n), np.float32)
    q = hb.quantize(w)
    codes, scale, _ = truth.quantize_weight(w)
    assert isinstance(q.codes, np.ndarray)
    assert np.array_equal(q.codes, codes) and np.array_equal(q.scale, scale)
    assert np.array_equal(hb.dequantize(q), codes * scale[:, None])
    rows = hb.quantize_rows(x)
    for got, want in zip((rows.codes, rows.scale, rows.zero, rows.sums), truth.quantize_rows(x)):
        assert np.array_equal(got, want)
    packed = hb.pack(q)
    y = truth.linear(x, codes, scale, bias)
    assert np.array_equal(hb.linear(x, packed, bias), y)
    got = hb.linear(x, packed, bias, activation="relu", residual=residual)
    assert np.array_equal(got, np.maximum(y, 0) + residual)
    half = hb.linear(x, packed, bias, out_dtype=np.float16)
    assert half.dtype == np.float16 and np.array_equal(half, y.astype(np.float16))
    static = (0.03, -7)
    assert np.array_equal(hb.linear(x, packed, static=static), truth.linear(x, codes, scale, static=static))
    if m:
        assert np.array_equal(hb.linear(x[0], packed, bias), y[0])
        assert np.array_equal(hb.linear(x[::-1], packed, bias), y[::-1])
    for name in ("w4a8_g32", "w8a8+asym", "w8a16", "w4a8+ag64", "w4a16_g32+asym", "w4a16_g64+asym hqq",
                 "w4a16_g32+nf4"):
        name, _, method = name.partition(" ")
        q = hb.quantize(w, name, method=method or "absmax")
        scheme, parts = q.scheme, dict(group_scale=q.group_scale, zero=q.zero, minimum=q.minimum)
        kind, fold = "token" if scheme.per_token else f"int{scheme.activation_bits}", scheme.fold_group or k
        want = truth.linear_grouped(x, q.unpacked(), q.scale, fold, kind, bias=bias, **parts)
        assert np.array_equal(hb.linear(x, hb.pack(q), bias), want), name
        ran.add(hb.pack(q).kernel)
assert "torch" not in sys.modules
print("right on", packed.kernel, *sorted(ran))
"""


SPARSE_ON_NUMPY = """
import sys
import numpy as np
import halfbyte as hb
rng = np.random.default_rng(5)
for m, n, k in ((1, 1, 1), (13, 33, 70), (40, 97, 129)):
    w, x = rng.standard_normal((n, k), np.float32), rng.standard_normal((m, k), np.float32)
    w *= np.arange(k) % 4 < 2
    dense = hb.linear(x, hb.pack(hb.quantize(w)))
    for pattern in ("2:4", "4:8", "block16x4", "unstructured"):
        sparse = hb.sparsify(w, "w8a8+" + pattern)
        assert isinstance(sparse.values, np.ndarray)
        assert np.array_equal(hb.linear(x, hb.pack(sparse)), dense), pattern
    for pattern in ("2:4", "block16x1", "unstructured"):
        sparse = hb.sparsify(w, "f32+" + pattern)
        assert np.array_equal(sparse.to_dense(), w)
        assert np.allclose(hb.linear(x, hb.pack(sparse)), x @ w.T, rtol=1e-4, atol=1e-4), pattern
try:
    hb.sparsify(w + 1, "w8a8+1:4")
except hb.PatternError:
    assert "torch" not in sys.modules
    print("right")
"""


def run_numpy_only(code: str, *prefix: str, env: dict | None = None) -> subprocess.CompletedProcess:
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return subprocess.run(
        [*prefix, sys.executable, "-c", setup + code], env=env, capture_output=True, text=True, timeout=600
    )


def test_linear_on_numpy_without_torch():
    done = run_numpy_only(BLOCK_TORCH + LINEAR_ON_NUMPY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("right on linear_w8a8_")
    for op in ("linear_w4a8", "linear_w8a16", "linear_w4a16"):
        assert op in done.stdout


def test_sparse_on_numpy_without_torch():
    done = run_numpy_only(BLOCK_TORCH + SPARSE_ON_NUMPY)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_import_does_not_load_torch():
    pytest.importorskip("torch")
    done = run_numpy_only(LINEAR_ON_NUMPY)
    assert done.returncode == 0, done.stderr


def test_names_that_need_torch_say_so():
    done = run_numpy_only(BLOCK_TORCH + "import halfbyte\nhalfbyte.QLinear")
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "torch" in done.stderr.splitlines()[-1]


def test_bad_arguments_without_torch():
    code = (
        BLOCK_TORCH
        + """
import numpy as np, halfbyte as hb
w, x = np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)
p = hb.pack(hb.quantize(w))
for call in (
    lambda: hb.quantize([[1.0]]),
    lambda: hb.quantize(np.ones((3, 4))),
    lambda: hb.quantize(w[0]),
    lambda: hb.quantize(np.full_like(w, np.nan)),
    lambda: hb.quantize(w, "w9a9"),
    lambda: hb.linear(x[:, 1:], p),
    lambda: hb.linear(np.ones((2, 4), np.int8), p),
    lambda: hb.linear(x, p, np.ones(4, np.float32)),
    lambda: hb.linear(x, p, activation="tanh"),
):
    try:
        call()
    except (TypeError, ValueError):
        continue
    raise SystemExit("accepted")
"""
    )
    done = run_numpy_only(code)
    assert done.returncode == 0, done.stderr
