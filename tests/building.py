"""CMake builds of the C++ part, for tests that need more than the installed extension."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(__file__).resolve().parent.parent


def need_compiler() -> None:
    """Skips the calling test where nothing can be built: no C++ compiler, or no cmake and ninja from pip."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    for module in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(module, reason=f"the Python package {module} is not installed")


def cmake_build(into: Path, target: str, **options: str) -> None:
    """Configures the repository in `into` with -D<option>=<value>, and builds one target."""
    import cmake
    import ninja
    import pybind11

    ninja_program = Path(ninja.BIN_DIR) / "ninja"
    defaults = {
        "CMAKE_MAKE_PROGRAM": ninja_program,
        "CMAKE_BUILD_TYPE": "Release",
        "HALFBYTE_VERSION": halfbyte.__version__,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in {**defaults, **options}.items()]
    configure = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", ROOT, "-B", into, "-G", "Ninja", *defines]
    for command in (configure, [ninja_program, "-C", into, target]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
