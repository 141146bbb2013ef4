"""Choosing a kernel: fake machines to kernel names, an ISA forced by call or environment, and the errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import halfbyte as hb
from halfbyte import _core

X86 = pytest.mark.skipif("avx2" not in _core.cpu_features(), reason="the golden table is of x86-64")

# Machines by the instruction sets they have, and what they run: a new kernel changes a line here, knowingly.
MACHINES = {
    "any x86-64": ["scalar"],
    "Haswell, Zen 1-3": ["scalar", "avx2"],
    "Alder Lake": ["scalar", "avx2", "avx_vnni"],
    "Skylake-X": ["scalar", "avx2", "avx512"],
    "Cascade Lake": ["scalar", "avx2", "avx512", "avx512_vnni"],
    "Ice Lake, Zen 4": ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_vbmi"],
    "Zen 5": ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_vbmi"],
    "Sapphire Rapids": ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_vbmi", "amx_int8"],
}
PRODUCTS = {
    "any x86-64": "scalar",
    "Haswell, Zen 1-3": "avx2",
    "Alder Lake": "avx_vnni",
    "Skylake-X": "avx2",
    "Cascade Lake": "avx512_vnni",
    "Ice Lake, Zen 4": "avx512_vnni",
    "Zen 5": "avx512_vnni",
    "Sapphire Rapids": "amx_int8",
}
FLOATS = {
    "any x86-64": "scalar",
    "Haswell, Zen 1-3": "avx2",
    "Alder Lake": "avx2",
    "Skylake-X": "avx512",
    "Cascade Lake": "avx512",
    "Ice Lake, Zen 4": "avx512",
    "Zen 5": "avx512",
    "Sapphire Rapids": "avx512",
}
BLOCKS = PRODUCTS | {"Sapphire Rapids": "avx512_vnni"}
WINDOWS = BLOCKS | dict.fromkeys(("Ice Lake, Zen 4", "Zen 5", "Sapphire Rapids"), "avx512_vbmi")
GOLDEN = {
    "linear_w8a8": PRODUCTS,
    "linear_w4a8": PRODUCTS,
    "linear_w8a16": PRODUCTS,
    "linear_w4a16": PRODUCTS,
    "quantize_rows": FLOATS,
    "embedding": FLOATS,
    "norm": FLOATS,
    "rope": FLOATS,
    "attention": FLOATS,
    "linear_f32": FLOATS,
    "spmm_block_w8a8": BLOCKS,
    "spmm_block_w4a8": BLOCKS,
    "spmm_nm_w8a8": WINDOWS,
    "spmm_unstructured_w8a8": WINDOWS,
    "spmm_block_f32": FLOATS,
    "spmm_block_bf16": FLOATS,
    "spmm_unstructured_f32": FLOATS,
}


def row_of(op: str, isa: str) -> dict:
    return next(row for row in _core.kernels() if (row["op"], row["isa"]) == (op, isa))


@X86
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("op", GOLDEN)
def test_golden_table(op, machine):
    want = row_of(op, GOLDEN[op][machine])["name"]
    assert _core.select(op, MACHINES[machine]) == want
    assert _core.select(op, MACHINES[machine][::-1]) == want, "the order of the features does not matter"


def test_the_golden_table_knows_every_op_and_kernel():
    rows = {(row["op"], row["isa"]) for row in _core.kernels()}
    assert {op for op, _ in rows} == set(GOLDEN)
    if "avx2" in _core.cpu_features():
        assert {(op, isa) for op, best in GOLDEN.items() for isa in best.values()} == rows


def test_first_supported_row_wins_here():
    for op in GOLDEN:
        best = next(row["name"] for row in _core.kernels() if row["op"] == op and row["supported"])
        with hb.force_isa(None):
            assert os.environ.get("HALFBYTE_ISA") or _core.select(op) == best


def test_supported_is_what_the_features_say():
    features = _core.cpu_features()
    assert features["scalar"]
    for row in _core.kernels():
        assert row["supported"] == features[row["isa"]], row


def test_select_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="no_such_op"):
        _core.select("no_such_op")
    with pytest.raises(ValueError, match="avx1024"):
        _core.select("linear_w8a8", ["scalar", "avx1024"])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g64", "w8a16", "w4a16_g32"])
def test_forced_isa_ran(scheme):
    rng = np.random.default_rng(0)
    packed = hb.pack(hb.quantize(rng.standard_normal((40, 70), np.float32), scheme))
    x = rng.standard_normal((5, 70), np.float32)
    answers = []
    for row in (r for r in _core.kernels() if r["op"] == packed.scheme.op and r["supported"]):
        with hb.force_isa(row["isa"]):
            assert packed.kernel == row["name"]
            answers.append(hb.linear(x, packed))
    assert all(np.array_equal(a, answers[0]) for a in answers)


def test_forcing_means_a_machine_with_that_and_what_it_implies():
    for isa in (name for name, here in _core.cpu_features().items() if here):
        with hb.force_isa(isa):
            for op in GOLDEN:
                names = [row["name"] for row in _core.kernels() if row["op"] == op]
                chosen = names.index(_core.select(op))
                assert chosen == len(names) - 1 or isa != "scalar"
                if (
                    row := next((r for r in _core.kernels() if (r["op"], r["isa"]) == (op, isa)), None)
                ) is not None:
                    assert _core.select(op) == row["name"]


def test_force_isa_nests_and_ends_with_an_exception():
    before = _core.select("linear_w8a8")
    scalar = row_of("linear_w8a8", "scalar")["name"]
    with pytest.raises(KeyError), hb.force_isa("scalar"):
        with hb.force_isa("scalar"):
            assert _core.select("linear_w8a8") == scalar
        assert _core.select("linear_w8a8") == scalar
        raise KeyError
    assert _core.select("linear_w8a8") == before


def test_force_isa_is_of_one_thread():
    seen = []
    with hb.force_isa("scalar"):
        thread = threading.Thread(target=lambda: seen.append(_core.select("linear_w8a8")))
        thread.start()
        thread.join()
    assert seen == [_core.select("linear_w8a8")]


def test_force_isa_rejects_unknown_and_missing():
    with pytest.raises(ValueError, match="avx1024"), hb.force_isa("avx1024"):
        pass
    missing = [name for name, here in _core.cpu_features().items() if not here]
    for isa in missing:
        with pytest.raises(RuntimeError, match=isa), hb.force_isa(isa):
            pass
    assert _core.force_isa(None) is None, "a failed force leaves nothing behind"


def in_subprocess(isa: str, code: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HALFBYTE_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


SELECT = "import halfbyte; from halfbyte import _core; print('imported'); print(_core.select('linear_w8a8'))"


@pytest.mark.parametrize("isa", [name for name, here in _core.cpu_features().items() if here])
def test_environment_forces(isa):
    done = in_subprocess(isa, SELECT)
    with hb.force_isa(isa):
        assert done.stdout.split() == ["imported", _core.select("linear_w8a8")], done.stderr


@pytest.mark.parametrize(
    "isa", ["avx1024", *(name for name, here in _core.cpu_features().items() if not here)]
)
def test_environment_rejects(isa):
    done = in_subprocess(isa, SELECT)
    assert done.stdout.split() == ["imported"], "import works, the first selection raises"
    assert done.returncode == 1 and "RuntimeError" in done.stderr
    assert isa in done.stderr and "HALFBYTE_ISA" in done.stderr


def test_an_empty_environment_variable_forces_nothing():
    with hb.force_isa(None):
        default = in_subprocess("", SELECT)
    assert default.returncode == 0, default.stderr


USES = {
    "quantize": "quantize(w)",
    "linear": "linear(w, packed)",
    "kernel": "PackedWeight(packed.core, packed.scheme).kernel",
}


@pytest.mark.parametrize("use", USES)
def test_a_bad_environment_is_an_isa_error_of_the_library(use):
    code = f"""
import numpy as np, halfbyte as hb
from halfbyte import *
from halfbyte import _core
w = np.ones((3, 4), np.float32)
codes, scale = w.astype(np.int8), w[:, 0].copy()
core = _core.pack_linear("linear_w8a8", codes.ctypes.data, 3, 4, 4, scale.ctypes.data)
packed = PackedWeight(core, Scheme(8, 8))
try:
    {USES[use]}
except IsaError as error:
    print(error)
"""
    done = in_subprocess("avx1024", code)
    assert "HALFBYTE_ISA" in done.stdout and "avx1024" in done.stdout, done.stderr


def test_a_layer_under_a_bad_environment_raises_the_same_every_time():
    pytest.importorskip("torch")
    code = """
import torch, halfbyte as hb
q = hb.QuantizedTensor(torch.ones(3, 4, dtype=torch.int8), torch.ones(3), hb.Scheme(8, 8))
layer = hb.QLinear(q)
for _ in range(3):
    try:
        layer(torch.ones(2, 4))
    except hb.IsaError as error:
        print("avx1024" in str(error))
"""
    assert in_subprocess("avx1024", code).stdout.split() == ["True"] * 3
