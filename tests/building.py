"""CMake builds of the C++ part, for tests that need more than the installed extension."""

from __future__ import annotations

import hashlib
import os
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
        "HALFBYTE_CUDA": "OFF",
        "HALFBYTE_VERSION": halfbyte.__version__,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in {**defaults, **options}.items()]
    configure = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", ROOT, "-B", into, "-G", "Ninja", *defines]
    for command in (configure, [ninja_program, "-C", into, target]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def kept_build(request: pytest.FixtureRequest, name: str) -> Path:
    """A build folder that stays in pytest's cache, so that the next run builds only what has changed."""
    # What may not change in a folder that CMake has configured: the place of the sources and of itself.
    key = hashlib.sha256(f"{ROOT}\0{sys.prefix}".encode()).hexdigest()[:12]
    if request.config.pluginmanager.has_plugin("cacheprovider"):
        return request.config.cache.mkdir(f"{name}_{key}")
    return request.getfixturevalue("tmp_path_factory").mktemp(name)


def emulated_cuda_library(request: pytest.FixtureRequest) -> Path:
    """libhalfbyte_cuda_emulated.so of this tree: the GPU kernels and their C interface on the CPU."""
    need_compiler()
    build = kept_build(request, "cuda_emulated")
    cmake_build(build, "halfbyte_cuda_emulated", HALFBYTE_PYTHON="OFF", HALFBYTE_CUDA_EMULATED="ON")
    return build / "csrc/cuda/emulated/libhalfbyte_cuda_emulated.so"


def cuda_library(request: pytest.FixtureRequest) -> Path:
    """libhalfbyte_cuda.so: of HALFBYTE_BUILD_DIR, else the installed one, else built. Skips without nvcc."""
    name = "libhalfbyte_cuda.so"
    if given := os.environ.get("HALFBYTE_BUILD_DIR"):
        if found := next(Path(given).rglob(name), None):
            return found
    if (installed := Path(halfbyte.__file__).parent / name).is_file():
        return installed
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc, hence no libhalfbyte_cuda.so")
    need_compiler()
    build = kept_build(request, "cuda")
    cmake_build(build, "halfbyte_cuda", HALFBYTE_PYTHON="OFF", HALFBYTE_CUDA="ON")
    return build / "csrc/cuda" / name
