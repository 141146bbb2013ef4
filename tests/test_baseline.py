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


def test_import_and_linear_without_avx():
    done = under_qemu("Nehalem", FEATURES + LINEAR_ON_NUMPY)
    assert done.returncode == 0, done.stderr
    features, ran = done.stdout.splitlines()
    assert features == "['scalar']"
    assert ran.startswith("right on linear_w8a8_") and ran.endswith("_scalar")


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
    assert ran.endswith("_avx2")
