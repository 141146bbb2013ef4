"""Kernels for instruction sets that this machine may lack: the kernel tests, in a process of their own, on an
extension whose AMX and AVX-VNNI bodies run on emulated intrinsics.

HALFBYTE_EMULATED_CORE names such an extension that is built already.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import halfbyte
from building import ROOT, cmake_build, need_compiler
from halfbyte import _core

ISAS = ("avx_vnni", "amx_int8")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-VNNI and AMX are of x86-64"),
    pytest.mark.skipif(not _core.cpu_features().get("avx2"), reason="the emulation itself needs AVX2"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> dict[str, str]:
    """Environment of a process whose halfbyte is this one, but for an emulated _core."""
    if given := os.environ.get("HALFBYTE_EMULATED_CORE"):
        core = Path(given)
    else:
        need_compiler()
        build = tmp_path_factory.mktemp("build")
        cmake_build(build, "_core", HALFBYTE_EMULATE="ON")
        core = next(build.glob("_core*.so"))
    package = tmp_path_factory.mktemp("emulated") / "halfbyte"
    package.mkdir()
    for item in Path(halfbyte.__file__).parent.iterdir():
        if item.name != "__pycache__" and not item.name.startswith("_core."):
            (package / item.name).symlink_to(item)
    shutil.copy(core, package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}")
    env = {
        name: value for name, value in os.environ.items() if name not in ("HALFBYTE_ISA", "PYTEST_ADDOPTS")
    }
    return env | {"PYTHONPATH": f"{package.parent}{os.pathsep}{env.get('PYTHONPATH', '')}"}


def test_the_emulated_core_says_so(emulated):
    code = "from halfbyte import _core; print(_core.build_info()['emulated'], _core.cpu_features())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=emulated, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for isa in ISAS:
        assert repr(isa) in done.stdout
    assert "'avx_vnni': True" in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_on_emulated_intrinsics(emulated, isa):
    if isa == "amx_int8" and not _core.cpu_features()["avx512_vnni"]:
        pytest.skip("the epilogue of the AMX kernel needs AVX-512, which is not emulated")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_kernels.py",
        "-k",
        isa,
    ]
    done = subprocess.run(command, cwd=ROOT, env=emulated, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 2000 and "skipped" not in done.stdout, done.stdout[-500:]
