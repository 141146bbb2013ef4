"""What the kernels see of a numpy array or a torch tensor: a pointer, a row stride, a dtype code.

torch is never imported here: only a process that has imported it can pass one of its tensors.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import numpy as np

from . import dispatch
from .errors import DeviceError, DTypeError, ShapeError

F32, BF16, F16, I32 = range(4)  # dtype codes of halfbyte._core

Array = Any  # numpy.ndarray or torch.Tensor

gpu_devices = ("cuda",)  # types of the torch devices whose tensors halfbyte.cuda computes on


class _Numpy:
    name = "a numpy array"
    module = np  # for functions that numpy and torch call by one position of arguments
    float32, float16 = np.dtype(np.float32), np.dtype(np.float16)
    int8, uint8, int32 = np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int32)
    codes = {float32: F32, float16: F16, int32: I32}

    def owns(self, x: object) -> bool:
        return isinstance(x, np.ndarray)

    def check_memory(self, x: np.ndarray, what: str) -> None:
        pass

    def has_values(self, x: np.ndarray) -> bool:
        return True

    def bounds(self, x: np.ndarray) -> tuple[float, float]:
        return float(x.min()), float(x.max())

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    def from_numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def repeat(self, x: np.ndarray, times: int) -> np.ndarray:
        return np.repeat(x, times, 1)

    def take(self, table: tuple[int, ...], index: np.ndarray) -> np.ndarray:
        return np.array(table, np.int8)[index]

    def silu(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # exp(-x) is an infinity where silu is 0
            return x / (1 + np.exp(-x))

    def dtype(self, spec: object) -> np.dtype:
        return np.dtype(spec)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def cast(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.ascontiguousarray(x, dtype)

    def pointer(self, x: np.ndarray) -> int:
        return x.__array_interface__["data"][0]

    def rows(self, x: np.ndarray, k: int) -> tuple[np.ndarray, int]:
        a = x.reshape(math.prod(x.shape[:-1]), k)
        (outer, inner), size = a.strides, a.itemsize
        dense = (inner == size or k == 1) and (len(a) <= 1 or (outer >= k * size and outer % size == 0))
        if not (dense and a.flags.aligned):
            a = a.copy()
        return a, a.strides[0] // size if len(a) > 1 else k

    def threads(self) -> int:
        return 0


class _Torch:
    name = "a torch tensor"

    def __init__(self, torch: Any):
        self.torch = torch
        self.module = torch
        self.float32, self.float16 = torch.float32, torch.float16
        self.int8, self.uint8, self.int32 = torch.int8, torch.uint8, torch.int32
        self.codes = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16, torch.int32: I32}

    def owns(self, x: object) -> bool:
        return isinstance(x, self.torch.Tensor)

    def check_memory(self, x: Any, what: str) -> None:
        if x.is_meta:
            raise DeviceError(f"{what} is on the meta device, without data; load its values first")
        self._check_device(x, what)
        if x.layout is not self.torch.strided:
            raise DeviceError(
                f"{what} has the layout {x.layout}; the kernels take dense tensors: call .to_dense()"
            )
        if not self._has_memory(x):
            raise DeviceError(
                f"{what} has no memory of its own (a fake, freed or wrapped tensor); pass a plain tensor"
            )

    def _check_device(self, x: Any, what: str) -> None:
        if x.device.type != "cpu":
            raise DeviceError(
                f"{what} is on the device {str(x.device)!r}; the kernels run on the CPU: move it there"
            )

    def _has_memory(self, x: Any) -> bool:
        if wraps(x):
            return False
        try:
            return x.numel() == 0 or (x.untyped_storage().nbytes() > 0 and x.data_ptr() != 0)
        except RuntimeError:  # a tensor of vmap and its kind
            return False

    def has_values(self, x: Any) -> bool:
        """Whether the numbers can be looked at, at no cost, and unseen by modes that record or fake."""
        dense = not x.is_meta and x.device.type == "cpu" and x.layout is self.torch.strided
        return dense and self._has_memory(x) and not self.torch._C._len_torch_dispatch_stack()

    def bounds(self, x: Any) -> tuple[float, float]:
        return tuple(bound.item() for bound in x.detach().aminmax())

    def to_numpy(self, x: Any) -> np.ndarray:
        return self.cast(x, self.float32).numpy()

    def from_numpy(self, x: np.ndarray) -> Any:
        return self.torch.from_numpy(x)

    def repeat(self, x: Any, times: int) -> Any:
        return x.repeat_interleave(times, 1)

    def take(self, table: tuple[int, ...], index: Any) -> Any:
        values = self.table(table, index)
        return values.index_select(0, index.reshape(-1).to(self.int32)).reshape(index.shape)

    def table(self, table: tuple[int, ...], like: Any) -> Any:
        """int8 where `like` is; on a GPU kept, unless a mode that records or fakes sees it."""
        key = table, like.device
        if not on_gpu(like) or wraps(like) or self.torch._C._len_torch_dispatch_stack():
            return self.torch.tensor(table, dtype=self.int8, device=like.device)
        if key not in _tables:
            with self.torch.inference_mode(False):
                _tables[key] = self.torch.tensor(table, dtype=self.int8, device=like.device)
        return _tables[key]

    def has_table(self, table: tuple[int, ...], like: Any) -> bool:
        """Whether it is there: to make it, it is copied to the GPU, which capturing a CUDA graph forbids."""
        return (table, like.device) in _tables

    def silu(self, x: Any) -> Any:
        return self.torch.nn.functional.silu(x)

    def dtype(self, spec: object) -> Any:
        return spec

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.torch.empty(shape, dtype=dtype, device="cpu")

    def cast(self, x: Any, dtype: Any) -> Any:
        return x.detach().resolve_neg().to(dtype).contiguous()

    def pointer(self, x: Any) -> int:
        return x.data_ptr()

    def rows(self, x: Any, k: int) -> tuple[Any, int]:
        a = x.detach().resolve_neg().reshape(math.prod(x.shape[:-1]), k)
        outer, inner = a.stride()
        if (inner != 1 and k > 1) or (len(a) > 1 and outer < k):
            a = a.contiguous()
        return a, a.stride(0) if len(a) > 1 else k

    def threads(self) -> int:
        return dispatch.thread_override or self.torch.get_num_threads()


class Gpu(_Torch):
    """Tensors of one GPU."""

    def __init__(self, torch: Any, device: Any):
        super().__init__(torch)
        self.device = device

    def _check_device(self, x: Any, what: str) -> None:
        if x.device != self.device:
            raise DeviceError(
                f"{what} is on the device {str(x.device)!r} and not on {str(self.device)!r} like the rest: "
                "move it there"
            )

    def to_numpy(self, x: Any) -> np.ndarray:
        return self.cast(x, self.float32).cpu().numpy()

    def from_numpy(self, x: np.ndarray) -> Any:
        return self.torch.from_numpy(x).to(self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.torch.empty(shape, dtype=dtype, device=self.device)


Kind = _Numpy | _Torch

_tables: dict[tuple[tuple[int, ...], Any], Any] = {}  # the numbers and a GPU -> int8 tensor there
NUMPY = _Numpy()
_torch = cache(_Torch)
_gpu = cache(Gpu)


def owner_of(x: object, what: str) -> Kind:
    """The adapter for `x`, which may lack memory (on the meta device, say); DTypeError for other types."""
    torch = sys.modules.get("torch")
    if NUMPY.owns(x):
        return NUMPY
    if torch is not None and _torch(torch).owns(x):
        return _torch(torch)
    raise DTypeError(f"{what} must be a numpy array or a torch tensor, not {type(x).__name__}")


def kind_of(x: object, what: str) -> Kind:
    """The adapter for `x`, whose memory the CPU's kernels can read; DTypeError or DeviceError otherwise."""
    kind = owner_of(x, what)
    kind.check_memory(x, what)
    return kind


def on_gpu(x: object) -> bool:
    """Whether `x` is a tensor that halfbyte.cuda computes on."""
    return getattr(getattr(x, "device", None), "type", None) in gpu_devices


def place_of(x: object, what: str) -> Kind:
    """The adapter for `x`, a numpy array or a tensor of the CPU or of a GPU; DTypeError or DeviceError
    otherwise.
    """
    if not on_gpu(x):
        return kind_of(x, what)
    kind = _gpu(sys.modules["torch"], x.device)
    kind.check_memory(x, what)
    return kind


def wraps(tensor: Any) -> bool:
    """Whether a torch tensor is of a subclass that runs operations itself: a fake or quantized one, say."""
    return type(tensor).__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__


def check_owner(kind: Kind, x: object, what: str, like: str) -> None:
    """DTypeError unless `x` is of the given kind."""
    if not kind.owns(x):
        raise DTypeError(f"{what} must be {kind.name} as {like} is, not {type(x).__name__}")


def check_kind(kind: Kind, x: object, what: str, like: str) -> None:
    """DTypeError or DeviceError unless `x` is readable memory of the given kind."""
    check_owner(kind, x, what, like)
    kind.check_memory(x, what)


def float_code(kind: Kind, dtype: Any, what: str) -> int:
    """The dtype code of a floating-point dtype that the kernels read and write."""
    code = kind.codes.get(dtype, I32)
    if code == I32:
        names = ", ".join(str(d).removeprefix("torch.") for d, c in kind.codes.items() if c != I32)
        raise DTypeError(f"{what} has the dtype {dtype}; as {kind.name} it must be one of: {names}; cast it")
    return code


def check_vector(kind: Kind, x: object, n: int, what: str, like: str) -> None:
    """Errors unless `x` is a floating-point vector of n elements of the given kind."""
    check_kind(kind, x, what, like)
    float_code(kind, x.dtype, what)
    if tuple(x.shape) != (n,):
        raise ShapeError(
            f"{what} has the shape {tuple(x.shape)}; it must be ({n},), one value per output channel"
        )
