"""The package that a run measures: the Python files of this tree, a CPU extension and a GPU library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

from .children import end, start

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libhalfbyte_cuda.so"


class BuildError(RuntimeError):
    """What the compiler said last."""


def package(into: Path, library: Path | None, log: Path, seconds: float) -> Path:
    """Makes `into`/halfbyte, to be put on PYTHONPATH; returns the GPU library, to be named to it.

    An extension that the running Python can import is taken from the tree, and a `library` that is given;
    what is missing is compiled, with all cores, in so many seconds.
    """
    if library and not library.exists():
        raise BuildError(f"there is no {library}")
    source = ROOT / "python" / "halfbyte"
    core = source / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    targets = ([] if core.exists() else ["_core"]) + ([] if library else ["halfbyte_cuda"])
    if targets:
        built = _compile(into / "build", targets, log, seconds)
        core = core if core.exists() else next(built.glob("_core*.so"))
        library = library or built / "csrc" / "cuda" / LIBRARY
    folder = into / "halfbyte"
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        link = folder / item.name
        if item.suffix != ".so" and item.name != "__pycache__" and not link.exists():
            link.symlink_to(item)
    shutil.copy(core, folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}")
    return library.resolve()


def _compile(into: Path, targets: list[str], log: Path, seconds: float) -> Path:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": _program("ninja"),
        "HALFBYTE_VERSION": version,
        "HALFBYTE_PYTHON": "ON" if "_core" in targets else "OFF",
        "HALFBYTE_CUDA": "ON" if "halfbyte_cuda" in targets else "OFF",
        "Python_EXECUTABLE": sys.executable,
    }
    if find_spec("pybind11"):
        import pybind11

        options["pybind11_DIR"] = pybind11.get_cmake_dir()
    defines = [f"-D{name}={value}" for name, value in options.items()]
    # nvcc compiles a file for one architecture after the other unless told otherwise.
    env = os.environ | {"NVCC_APPEND_FLAGS": "--threads=4"}
    configure = [_program("cmake"), "-S", str(ROOT), "-B", str(into), "-G", "Ninja", *defines]
    until = time.monotonic() + seconds
    for command in (configure, [_program("ninja"), "-C", str(into), *targets]):
        with log.open("a") as output:
            before = output.tell()
            child = start(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            child.wait(until - time.monotonic())
        except subprocess.TimeoutExpired:
            name = Path(command[0]).name
            raise BuildError(f"the build took more than {seconds:.0f} s, and {name} was not done") from None
        finally:
            end(child)
        if child.returncode:
            raise BuildError(log.read_bytes()[before:].decode(errors="replace")[-3000:])
    return into


def _program(name: str) -> str:
    """cmake or ninja: of the Python package of that name, else of PATH."""
    if find_spec(name):
        module = __import__(name)
        if folder := getattr(module, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", None):
            return str(Path(folder) / name)
    return shutil.which(name) or name
