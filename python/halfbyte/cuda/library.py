"""libhalfbyte_cuda by ctypes: where it is, its functions and structures (csrc/cuda/api.h), its errors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from threading import RLock

from .. import arrays
from ..errors import CudaError

ABI = 1  # of api.h as the structures below have it
VARIABLE = "HALFBYTE_CUDA_LIBRARY"  # names the library where it does not lie in the package
NAME = "libhalfbyte_cuda.so"
_OWN = -10000  # where halfbyte_cuda_status begins
OLDEST_ARCH = 80  # compute capability 8.0: the first with cp.async, and mma of bfloat16


class Format(Structure):
    """halfbyte_cuda_format."""

    _fields_ = [(name, c_int32) for name in ("bits", "group", "scale_bytes", "offsets", "pattern")]


class Linear(Structure):
    """halfbyte_cuda_linear."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "x", "x_scale", "x_zero", "weight", "scale", "total", "starts", "columns", "gate", "gate_scale",
            "gate_total", "bias", "gate_bias", "residual", "y", "workspace",
        )),
        *((name, c_int64) for name in ("workspace_bytes", "ldx", "ldy", "ld_residual")),
        *((name, c_int32) for name in ("m", "n", "k", "x_type", "y_type", "residual_type", "activation")),
        ("format", Format),
        *((name, c_int32) for name in ("arch", "splits", "warps", "after_rows")),
    ]  # fmt: skip


class Rows(Structure):
    """halfbyte_cuda_rows."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "sum", "weight", "bias", "codes", "scale", "zero")),
        *((name, c_int64) for name in ("ldx", "ld_residual", "ld_sum", "ldc")),
        *((name, c_int32) for name in ("m", "k", "k_padded", "x_type", "kind", "symmetric")),
        ("eps", c_float),
        ("static_scale", c_float),
        ("static_zero", c_int32),
    ]


class Finish(Structure):
    """halfbyte_cuda_finish."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "acc", "x_scale", "x_zero", "scale", "total", "bias", "residual", "y",
        )),
        *((name, c_int64) for name in ("ld_acc", "ldy", "ld_residual")),
        *((name, c_int32) for name in ("m", "n", "y_type", "residual_type", "activation")),
    ]  # fmt: skip


class Dequantize(Structure):
    """halfbyte_cuda_dequantize."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scale", "y")),
        ("ldy", c_int64),
        *((name, c_int32) for name in ("n", "k", "y_type")),
        ("format", Format),
    ]


# name -> (result, arguments)
_FUNCTIONS: dict[str, tuple[type, list[type]]] = {
    "abi": (c_int, []),
    "devices": (c_int, []),
    "arch": (c_int, [c_int]),
    "error": (c_char_p, [c_int]),
    "linear_kernel": (c_char_p, [POINTER(Linear)]),
    "linear_workspace": (c_int64, [POINTER(Linear)]),
    "linear_run": (c_int, [POINTER(Linear), c_void_p]),
    "rows_run": (c_int, [POINTER(Rows), c_void_p]),
    "finish_run": (c_int, [POINTER(Finish), c_void_p]),
    "dequantize_run": (c_int, [POINTER(Dequantize), c_void_p]),
    "weight_bytes": (c_int64, [POINTER(Format), c_int64, c_int64]),
    "code_bit": (c_int64, [POINTER(Format), c_int64, c_int64, c_int64]),
    "quad_bit": (c_int64, [c_int64, c_int64, c_int64, c_int, c_int]),
    "scale_byte": (c_int64, [POINTER(Format), c_int64, c_int64, c_int64, c_int]),
}


class Library:
    """The library that is loaded; its functions are attributes, without their prefix."""

    def __init__(self, path: str | os.PathLike[str], *, emulated: bool = False):
        self.path = os.fspath(path)
        self.emulated = emulated
        try:
            loaded = ctypes.CDLL(self.path)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(loaded, f"halfbyte_cuda_{name}")
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
                if name == "abi" and (abi := function()) != ABI:
                    raise CudaError(f"{self.path} has the interface {abi}, and this halfbyte needs {ABI}")
        except (OSError, AttributeError) as error:
            raise CudaError(f"{self.path} does not load: {error}") from None

    def check(self, code: int, what: str) -> None:
        """CudaError for what a call returned, unless it is 0."""
        if code:
            raise CudaError(f"{what}: {self.explain(code)}")

    def explain(self, code: int) -> str:
        """What an error code means: a cudaError_t, one negated, as where the result is else a number, or one
        of the library's own, which lie below those.
        """
        code = -code if _OWN < code < 0 else code
        return (self.error(code) or b"unknown").decode(errors="replace") + f" (code {code})"


_lock = RLock()
_state: tuple[Library | None, str] | None = None  # the library, or None and why; None: not looked for yet


def library() -> Library | None:
    """The library, looked for once; None where there is none, of which `missing` says why."""
    return _found()[0]


def missing() -> str:
    """Why there is no library; empty where there is one."""
    return _found()[1]


def load(path: str | os.PathLike[str]) -> Library:
    """Use the library at `path` from now on. Raises CudaError where it does not load."""
    loaded = Library(path)
    _set((loaded, ""))
    return loaded


@contextmanager
def use_library(path: str | os.PathLike[str]) -> Iterator[Library]:
    """For tests: within the block the library is the emulated one at `path`, and tensors of the CPU stand for
    those of a GPU.
    """
    previous, devices = _state, arrays.gpu_devices
    loaded = Library(path, emulated=True)
    _set((loaded, ""))
    arrays.gpu_devices = (*devices, "cpu")
    try:
        yield loaded
    finally:
        arrays.gpu_devices = devices
        _set(previous)


def _found() -> tuple[Library | None, str]:
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _look()
    return _state


def _set(state: tuple[Library | None, str] | None) -> None:
    global _state
    with _lock:
        _state = state
        obstacle.cache_clear()


def _look() -> tuple[Library | None, str]:
    given = os.environ.get(VARIABLE)
    path = Path(given) if given else Path(__file__).resolve().parent.parent / NAME
    if not path.exists():
        named = f"{VARIABLE} names {path}, which is not there" if given else f"there is no {path}"
        return None, f"{named}: halfbyte was built without nvcc"
    try:
        return Library(path), ""
    except CudaError as error:
        return None, str(error)


@cache
def obstacle(index: int) -> str:
    """Why no kernel runs on the GPU with this number; empty where they do. Asked once: drivers do not come
    and go.
    """
    found = library()
    if found is None:
        return missing()
    if (count := found.devices()) <= 0:
        return f"the library sees no GPU: {found.explain(count)}" if count else "the library sees no GPU"
    arch = found.arch(max(index, 0))
    if arch < 0:
        return f"the library does not see the GPU {index}: {found.explain(arch)}"
    if arch < OLDEST_ARCH:
        return f"the GPU has compute capability {arch / 10:.1f}, and the kernels need {OLDEST_ARCH / 10:.1f}"
    return ""
