"""What tests of fused models ask: models with weights that matter, and how far two outputs are apart."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.fuse.attach import Fused, fused_of

FLOAT = 1e-4  # of the largest output: float32 in another order
COSINE = 0.9999  # quantized: a rounding of an activation may fall to the other side,
ROW_COSINE = 0.999  # which is more of a short row than of all of them
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))  # for the encoder below


def roused(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with weights far from their initial ones: attention is not even, norms are not
    ones, and biases are not zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def encoder(layers=2, **options):
    settings = {"dim_feedforward": 40, "batch_first": True, "activation": "gelu", "dropout": 0.1} | options
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, **settings)
    return roused(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = encoder()
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


def error(y: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert y.shape == want.shape and y.dtype == want.dtype
    return ((y.float() - want.float()).abs().max() / want.float().abs().max()).item()


def cosine(y: Tensor, want: Tensor, rows: bool = False) -> float:
    """Of all numbers, or the least of the rows."""
    assert y.shape == want.shape and y.dtype == want.dtype
    y, want = (t.double().reshape(-1, t.shape[-1] if rows else t.numel()) for t in (y, want))
    return torch.cosine_similarity(y, want).min().item()


def check_close(y: Tensor, want: Tensor, scheme: str | None = None) -> None:
    """Close to what the same model computes unfused."""
    if scheme is None:
        assert error(y, want) < FLOAT
    elif "a16" in scheme:
        assert error(y, want) < 10 * FLOAT
    elif scheme.startswith("rough"):  # layers so narrow that one rounding is a good part of them
        assert cosine(y, want) > ROW_COSINE
    else:
        assert cosine(y, want) > COSINE and cosine(y, want, rows=True) > ROW_COSINE


@contextlib.contextmanager
def fused_calls(module: nn.Module, count: int = 1):
    """Within the block the module is called so often, and always fused."""
    fused = forward_of(module)
    calls, unfused = fused.calls, dict(fused.unfused)
    yield fused
    assert dict(fused.unfused) == unfused, f"unfused: {dict(fused.unfused)}"
    assert fused.calls == calls + count


@contextlib.contextmanager
def left_alone(module: nn.Module, reason: str, count: int = 1):
    """Within the block the module is called so often, and never fused, for a reason that has these words."""
    fused = forward_of(module)
    calls, before = fused.calls, fused.unfused.copy()
    yield fused
    new = fused.unfused - before
    assert fused.calls == calls and sum(new.values()) == count, f"fused: {fused.calls - calls}; {new}"
    assert all(reason in given for given in new), new


def forward_of(module: nn.Module) -> Fused:
    fused = fused_of(module)
    assert fused is not None, f"not fused:\n{hb.fusion_report(module)}"
    return fused
