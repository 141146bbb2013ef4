"""The C++ core on another architecture: cross-compiled, and run under qemu on the same random cases."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from building import cmake_build, need_compiler

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64")
LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler keeps the target's libraries


@pytest.mark.skipif(
    COMPILER is None or QEMU is None,
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_core_is_right_on_aarch64(tmp_path):
    need_compiler()
    cmake_build(
        tmp_path,
        "core_test",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=COMPILER,
        HALFBYTE_PYTHON="OFF",
        HALFBYTE_TESTS="ON",
    )
    program = tmp_path / "tests/cpp/core_test"
    command = [QEMU, "-L", LIBRARIES, program, "60"]  # rounds: an emulated CPU is slow
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "core_test: scalar: " in done.stdout
