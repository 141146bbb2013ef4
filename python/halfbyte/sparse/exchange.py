"""SparseTensor from and to the sparse matrices of torch and of scipy, which is imported when it is used."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..errors import DTypeError, SchemeError
from ..extras import require
from . import tensor
from .check import check_compressed
from .layout import compress
from .pattern import Pattern
from .scheme import NAMES, SparseScheme

if TYPE_CHECKING:
    from .tensor import SparseTensor

_UNSTRUCTURED = Pattern("unstructured")


def from_torch(source: Any, scheme: str | SparseScheme | None, name: str) -> SparseTensor:
    """See SparseTensor.from_torch."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(source, torch.Tensor):
        raise DTypeError(f"from_torch takes a torch tensor, not {type(source).__name__}")
    if source.layout is torch.strided:
        if scheme is None:
            raise SchemeError(f"{name} is a dense tensor, which says no pattern: give a scheme")
        return tensor.sparsify(_single(source), scheme, name=name)
    if source.layout not in (torch.sparse_csr, torch.sparse_bsr) or source.ndim != 2:
        raise DTypeError(
            f"{name} is a {source.ndim}-dimensional tensor with the layout {source.layout}; it must be a "
            "matrix in torch.sparse_csr or torch.sparse_bsr: call .to_sparse_csr() or .to_sparse_bsr((16, 4))"
        )
    source = source.detach()
    values, crow, columns = source.values(), source.crow_indices(), source.col_indices()
    scheme = _scheme_of(scheme, tuple(values.shape[1:]), str(values.dtype).removeprefix("torch."), name)
    _check(crow.cpu().numpy(), columns.cpu().numpy(), tuple(source.shape), tuple(values.shape[1:]))
    return tensor.sparsify(_single(source.to_dense()), scheme, name=name)


def from_scipy(source: Any, scheme: str | SparseScheme | None, name: str) -> SparseTensor:
    """See SparseTensor.from_scipy."""
    sparse = sys.modules.get("scipy.sparse")
    known = sparse is not None and sparse.issparse(source) and source.format in ("csr", "bsr")
    if not known or source.ndim != 2:
        raise DTypeError(
            "from_scipy takes a matrix of scipy.sparse in the format csr or bsr, not "
            f"{type(source).__name__}; call .tocsr()"
        )
    block = tuple(source.data.shape[1:])
    scheme = _scheme_of(scheme, block, str(source.dtype), name)
    _check(source.indptr, source.indices, source.shape, block)
    return tensor.sparsify(_single(source.toarray()), scheme, name=name)


def to_torch(weight: SparseTensor) -> Any:
    """See SparseTensor.to_torch."""
    torch = require("torch", extra="torch", purpose="SparseTensor.to_torch")
    crow, columns, values, blocks = _arrays(weight)
    make = torch.sparse_bsr_tensor if blocks else torch.sparse_csr_tensor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # torch calls these layouts a beta at their first use
        parts = (torch.from_numpy(part) for part in (crow, columns, values))
        return make(*parts, size=weight.shape, check_invariants=True)


def to_scipy(weight: SparseTensor) -> Any:
    """See SparseTensor.to_scipy."""
    crow, columns, values, blocks = _arrays(weight)
    from scipy import sparse

    make = sparse.bsr_array if blocks else sparse.csr_array
    return make((values, columns, crow), shape=weight.shape)


def _single(weight: Array) -> Array:
    """float64 as float32; other dtypes as they are."""
    if isinstance(weight, np.ndarray):
        with np.errstate(over="ignore"):  # becomes an infinity, which sparsify refuses
            return weight.astype(np.float32) if weight.dtype == np.float64 else weight
    return weight.float() if weight.dtype.itemsize == 8 and weight.is_floating_point() else weight


def _scheme_of(
    scheme: str | SparseScheme | None, block: tuple[int, ...], dtype: str, name: str
) -> SparseScheme:
    """That which is given, or else that of the pattern and dtype of a matrix."""
    if scheme is not None:
        return SparseScheme.parse(scheme)
    pattern = f"block{block[0]}x{block[1]}" if block else "unstructured"
    own = f"{'bf16' if dtype == 'bfloat16' and block else 'f32'}+{pattern}"
    if own not in NAMES:
        raise SchemeError(
            f"{name} has blocks of {block[0]} x {block[1]}, with which no kernel runs float values; give a "
            f"scheme: one of {', '.join(NAMES)}"
        )
    return SparseScheme.parse(own)


def _check(crow: np.ndarray, columns: np.ndarray, shape: tuple[int, int], block: tuple[int, ...]) -> None:
    check_compressed(crow, columns, shape[1] // (block[1] if block else 1))


def _arrays(weight: SparseTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """crow, columns, float32 values of a weight, and whether these are blocks."""
    p, dense = weight.scheme.pattern, weight.to_dense()
    blocks = p.kind == "block" and weight.shape[0] % p.rows == 0 and weight.shape[1] % p.columns == 0
    parts = compress(np.asarray(dense), p if blocks else _UNSTRUCTURED)
    return parts["crow"], parts["columns"], parts["values"], blocks

