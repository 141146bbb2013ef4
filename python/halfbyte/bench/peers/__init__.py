"""Other tools that can run one linear layer: one small module per tool, all imported lazily.

Each module has `build(problem) -> Layer`, which makes the layer from the problem's float32 weight, with
float32 in and out, in the form that is fastest for that tool here; `Layer.note` says which form. It runs on
`problem.threads` threads; those of torch take the thread count that the caller has set for the process. Tools
that can do several formats take the one of `problem.scheme`: its weight bits and group, and int8 or float
activations.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...extras import quiet
from ...scheme import Scheme

PEERS = {
    "torch-fp32": "torch_fp32",
    "torch-bf16": "torch_bf16",
    "torch-int8": "torch_int8",
    "torchao": "torchao_int8",
    "onnxruntime": "onnxruntime_int8",
    "onnxruntime-nbits": "onnxruntime_nbits",
    "openvino": "openvino_weights",
    "openvino-static": "openvino_static",
    "torch-int8pack": "torch_int8pack",
    "torch-int4pack": "torch_int4pack",
}
QUANTIZED_PEERS = frozenset(PEERS) - {"torch-fp32", "torch-bf16"}
# Those that multiply int8 by int8, given int8 activations.
INT8_PEERS = QUANTIZED_PEERS - {"torch-int8pack", "torch-int4pack"}
# Those of `bench sparse`, on a float32 weight with zeros.
PRUNED_PEERS = {
    "torch-fp32": "torch_fp32",
    "torch-bf16": "torch_bf16",
    "torch-csr": "torch_csr",
    "deepsparse": "deepsparse",
}
# What a scheme is compared with where nobody says: tools that can do the same job.
_EVERYWHERE = ("torch-fp32", "torch-bf16", "onnxruntime-nbits", "openvino")
_DEFAULTS = {
    "w8a8": (*_EVERYWHERE, "torch-int8", "torchao", "onnxruntime", "openvino-static"),
    # Without MatMulNBits, which takes ten times as long as float32 there.
    "w8a16": ("torch-fp32", "torch-bf16", "openvino", "torch-int8pack"),
    "w4a8": (*_EVERYWHERE, "torch-int4pack"),
    "w4a16": (*_EVERYWHERE, "torch-int4pack"),
}
_GROUP = 128  # of grouped formats, for a scheme whose weights have one scale per channel

# Cold runs rotate through this many times the last-level cache: a copy has left the caches when its turn is
# back.
COLD_CACHE_MULTIPLE = 3


@dataclass(frozen=True)
class Problem:
    """y[m,n] = x[m,k] @ weight[n,k].T + bias[n], all float32 numpy arrays."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    threads: int
    cold_bytes: int = 0  # weights to rotate through; 0 = one copy, which may stay in the caches
    scheme: Scheme = Scheme.parse("w8a8")  # what halfbyte runs, for peers that can do the same

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.x.shape[0], *self.weight.shape

    @property
    def group(self) -> int:
        """Weights that share a scale along k, for peers whose formats have groups."""
        return self.scheme.group or _GROUP

    def copies(self, weight_bytes: int) -> int:
        """How many layers of `weight_bytes` each are needed to pass `cold_bytes`."""
        return 1 if self.cold_bytes == 0 else self.cold_bytes // weight_bytes + 1


@dataclass
class Layer:
    """A layer ready to run: one call per weight copy, its output, and exactly what it is."""

    calls: Sequence[Callable[[], object]]
    output: Callable[[], np.ndarray]  # runs the first copy
    weight_bytes: int  # read by one call
    note: str
    # For a tool in another process: makes so many calls there, and gives the seconds that they took.
    elsewhere: Callable[[int], float] | None = None


class UnavailableError(Exception):
    """The tool is not installed, or cannot do this; the message is the reason that the report shows."""


def default_names(scheme: Scheme) -> list[str]:
    """The peers that do the job of `scheme`, in the order of PEERS."""
    return [name for name in PEERS if name in _DEFAULTS[f"w{scheme.weight_bits}a{scheme.activation_bits}"]]


def multiplies_int8(name: str, scheme: Scheme) -> bool:
    """Whether a peer's products are int8 by int8, so that the int8 peak bounds it."""
    return name in INT8_PEERS and scheme.activation_bits == 8


def build(name: str, problem: Problem) -> Layer:
    """Build peer `name`; whatever goes wrong ends in UnavailableError with the tool's own words."""
    with failures_are_reasons():
        return importlib.import_module(f".{(PEERS | PRUNED_PEERS)[name]}", __name__).build(problem)


@contextlib.contextmanager
def failures_are_reasons(extra: str = "bench") -> Iterator[None]:
    """Turn whatever a peer raises into UnavailableError; its warnings and log messages are not shown.

    extra: the one of this package that brings the tool.
    """
    try:
        with quiet():
            yield
    except UnavailableError:
        raise
    except ImportError as error:
        missing = f"package {error.name!r} is not installed" if error.name else str(error)
        raise UnavailableError(f"{missing}; pip install 'halfbyte[{extra}]'") from error
    except Exception as error:  # a peer may fail in any way; the benchmark goes on and shows why
        raise UnavailableError(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException, limit: int = 160) -> str:
    """Start of an error's message: peers raise pages of text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
