"""Other tools that can run one linear layer: one small module per tool, all imported lazily.

Each module has `build(problem) -> Layer`, which makes the layer from the problem's float32 weight, with
float32 in and out, in the form that is fastest for that tool here; `Layer.note` says which form. It runs on
`problem.threads` threads; those of torch take the thread count that the caller has set for the process.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...extras import quiet

PEERS = {
    "torch-fp32": "torch_fp32",
    "torch-bf16": "torch_bf16",
    "torch-int8": "torch_int8",
    "torchao": "torchao_int8",
    "onnxruntime": "onnxruntime_int8",
    "onnxruntime-nbits": "onnxruntime_nbits",
    "openvino": "openvino_int8",
    "openvino-static": "openvino_static",
}
INT8_PEERS = frozenset(PEERS) - {"torch-fp32", "torch-bf16"}

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

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.x.shape[0], *self.weight.shape

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


class UnavailableError(Exception):
    """The tool is not installed, or cannot do this; the message is the reason that the report shows."""


def build(name: str, problem: Problem) -> Layer:
    """Build peer `name`; whatever goes wrong ends in UnavailableError with the tool's own words."""
    with failures_are_reasons():
        return importlib.import_module(f".{PEERS[name]}", __name__).build(problem)


@contextlib.contextmanager
def failures_are_reasons() -> Iterator[None]:
    """Turn whatever a peer raises into UnavailableError; its warnings and log messages are not shown."""
    try:
        with quiet():
            yield
    except UnavailableError:
        raise
    except ImportError as error:
        missing = f"package {error.name!r} is not installed" if error.name else str(error)
        raise UnavailableError(f"{missing}; pip install 'halfbyte[bench]'") from error
    except Exception as error:  # a peer may fail in any way; the benchmark goes on and shows why
        raise UnavailableError(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException, limit: int = 160) -> str:
    """Start of an error's message: peers raise pages of text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
