"""The package on CPUs this machine is not: under qemu, without AVX, and with AVX2 and no more.

An instruction that the emulated CPU lacks ends the process, so a pass proves both that common code is built
for plain x86-64 and that the kernel chosen is the one that really ran.
"""

from __future__ import annotations

import os
import platform
import shutil

import pytest

from test_numpy_only import BLOCK_TORCH, LINEAR_ON_NUMPY, run_numpy_only

QEMU = shutil.which("qemu-x86_64")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="this is an x86-64 test"),
    pytest.mark.skipif(
        QEMU is None, reason="qemu-x86_64 is not installed (Debian: apt-get install qemu-user)"
    ),
]
FEATURES = "from halfbyte import _core; print(sorted(k for k, v in _core.cpu_features().items() if v))\n"


def under_qemu(cpu: str, code: str, isa: str | None = None):
    env = {k: v for k, v in os.environ.items() if k != "HALFBYTE_ISA"} | (
        {"HALFBYTE_ISA": isa} if isa else {}
    )
    env["OPENBLAS_CORETYPE"] = "Nehalem"  # numpy's OpenBLAS takes qemu's Nehalem for a CPU with AVX
    return run_numpy_only(BLOCK_TORCH + code, QEMU, "-cpu", cpu, env=env)


def all_ran_on(isa: str, line: str) -> bool:
    """Every linear op, by what LINEAR_ON_NUMPY prints last."""
    assert line.startswith("right on ")
    kernels = set(line.split()[2:])
    ops = {name.rsplit("x", 2)[0].rpartition("_")[0] for name in kernels}
    assert ops == {"linear_w8a8", "linear_w4a8", "linear_w8a16", "linear_w4a16"}, line
    return all(name.endswith(f"_{isa}") for name in kernels)


def test_import_and_linear_without_avx():
    done = under_qemu("Nehalem", FEATURES + LINEAR_ON_NUMPY)
    assert done.returncode == 0, done.stderr
    features, ran = done.stdout.splitlines()
    assert features == "['scalar']"
    assert all_ran_on("scalar", ran)


def test_forced_avx512_without_avx512():
    code = "import halfbyte; from halfbyte import _core; print('imported'); _core.select('linear_w8a8')"
    done = under_qemu("Nehalem", code, "avx512_vnni")
    assert done.stdout.split() == ["imported"]
    assert done.returncode == 1 and "RuntimeError" in done.stderr and "avx512_vnni" in done.stderr


def test_avx2_alone():
    done = under_qemu("Haswell", FEATURES + LINEAR_ON_NUMPY)
    assert done.returncode == 0, done.stderr
    features, ran = done.stdout.splitlines()
    assert features == "['avx2', 'scalar']"
    assert all_ran_on("avx2", ran)


@pytest.mark.parametrize(("cpu", "isas"), [("Nehalem", {"scalar"}), ("Haswell", {"scalar", "avx2"})])
def test_every_op_on_such_a_cpu(cpu, isas):
    """The self-test of the doctor: each kernel that the CPU has against the scalar one."""
    code = """
from halfbyte import selftest
selftest._SHAPES = selftest._SHAPES[:2]  # the emulated CPU is slow
for row in selftest.run():
    print(row["op"], row["isa"], row["status"].replace(" ", "-"), row["detail"])
"""
    done = under_qemu(cpu, code)
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    for op, isa, status, detail in rows:
        assert status == ("ok" if isa in isas else "not-run"), (op, isa, detail)
    assert {op for op, *_ in rows} >= {"embedding", "quantize_rows", "linear_w4a8", "linear_w4a16"}
