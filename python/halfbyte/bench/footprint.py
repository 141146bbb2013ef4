"""Bytes of a model, on disk and while it runs."""

from __future__ import annotations


def byte_count(model) -> int:
    """Bytes of all parameters and buffers; tensors that are shared count once. What `save` writes, about."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def resident_bytes(model) -> int:
    """The same, and the packed weights of quantized layers: what the model takes while it runs."""
    from ..report import packed_bytes

    return byte_count(model) + sum(packed_bytes(model).values())
