"""Bytes of a model, on disk and while it runs."""

from __future__ import annotations


def byte_count(model) -> int:
    """Bytes of all parameters and buffers; tensors that are shared count once. What `save` writes, about."""
    from ..pack_inplace import tensors

    return sum({t.data_ptr() or id(t): t.nbytes for t in tensors(model)}.values())


def resident_bytes(model) -> int:
    """The same less the codes that `pack_` has freed, and the packed weights of quantized layers: what the
    model takes while it runs.
    """
    from ..pack_inplace import freed_bytes
    from ..report import packed_bytes

    return byte_count(model) - freed_bytes(model) + sum(packed_bytes(model).values())
