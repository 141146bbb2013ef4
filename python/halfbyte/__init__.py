"""halfbyte: int8 and int4 kernels that make eager PyTorch models small and fast on the CPU.

Importing this needs numpy only; torch is met when a tensor or model is passed, or a name that needs it used.
"""

from __future__ import annotations

from importlib import import_module

from . import _core
from .attention import QuantizedKV, attention, quantize_kv
from .dispatch import cpu_features, force_isa, get_num_threads, kernels, set_num_threads
from .errors import (
    CudaError,
    DeviceError,
    DTypeError,
    FormatError,
    HalfbyteError,
    IsaError,
    ModelError,
    NonFiniteError,
    PatternError,
    SchemeError,
    ShapeError,
)
from .norms import layernorm, layernorm_quantize, rmsnorm, rmsnorm_quantize, rope, silu_mul_quantize
from .ops import gated_linear, gated_mlp, linear, linears
from .pack import PackedWeight, pack
from .quantize import RowQuantized, dequantize, quantize, quantize_rows
from .quantized_tensor import QuantizedTensor
from .scheme import Scheme
from .sparse.scheme import SparseScheme
from .sparse.tensor import SparseTensor, sparsify

__version__: str = _core.build_info()["version"]

# Names that need torch, and the modules that hold them. No module is called as a name is: importing a
# submodule binds it in the package, over a function of that name.
_NEED_TORCH = {
    "QEmbedding": "embedding",
    "QLinear": "qlinear",
    "SparseLinear": "sparse.linear",
    "quantize_": "convert",
    "quantize_dynamic": "convert",
    "calibrate": "calibration",
    "decalibrate_": "calibration",
    "pack_": "pack_inplace",
    "save": "io",
    "load": "io",
    "read_gguf": "gguf",
    "read_checkpoint": "checkpoints",
    "load_quantized_": "loading",
    "fuse_": "fuse",
    "unfuse_": "fuse",
    "fusion_report": "fuse",
    "FusionReport": "fuse",
    "generate": "generation",
    "KVCache": "fuse.cache",
    "summary": "report",
    "Summary": "report",
    "profile": "profiling",
    "Profile": "profiling",
    "sparsify_": "sparse.convert",
    "prune_": "pruning",
    "PruneSchedule": "pruning",
    "remove_masks_": "pruning",
    "sparsity": "pruning",
}

__all__ = [
    "CudaError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "HalfbyteError",
    "IsaError",
    "ModelError",
    "NonFiniteError",
    "PackedWeight",
    "PatternError",
    "QuantizedKV",
    "QuantizedTensor",
    "RowQuantized",
    "Scheme",
    "SchemeError",
    "ShapeError",
    "SparseScheme",
    "SparseTensor",
    "__version__",
    "attention",
    "cpu_features",
    "dequantize",
    "force_isa",
    "gated_linear",
    "gated_mlp",
    "get_num_threads",
    "kernels",
    "layernorm",
    "layernorm_quantize",
    "linear",
    "linears",
    "pack",
    "quantize",
    "quantize_kv",
    "quantize_rows",
    "rmsnorm",
    "rmsnorm_quantize",
    "rope",
    "set_num_threads",
    "silu_mul_quantize",
    "sparsify",
    *_NEED_TORCH,
]


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .extras import require

    require("torch", extra="torch", purpose=f"halfbyte.{name}")
    value = getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
