"""Small decoders of random weights, whole models of transformers, for the tests of fused ones."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import halfbyte as hb
from halfbyte import dispatch

transformers = pytest.importorskip("transformers", reason="decoders of transformers")

VOCABULARY = 97
# Logits are spread over several units, so that the likeliest token is one whatever rounds how.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 40,
    "initializer_range": 0.15,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LONGER = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
_WAVES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

# name: (class of the model, of its configuration, what differs)
VARIANTS = {
    "llama": ("Llama", {}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one head": ("Llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 32}),
    "llama gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama relu": ("Llama", {"hidden_act": "relu"}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3 rope": ("Llama", {"rope_parameters": {"rope_type": "llama3", **_LONGER, **_WAVES}}),
    "llama linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", **_LONGER}}),
    "llama yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", **_LONGER}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
}


@contextlib.contextmanager
def core_threads(count):
    """On so many threads of halfbyte, whatever torch uses."""
    previous = dispatch.thread_override
    hb.set_num_threads(count)
    try:
        yield
    finally:
        hb.set_num_threads(previous)


VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def make(variant="llama", seed=0, **changes):
    """A causal language model in float32, evaluation mode."""
    family, differs = VARIANTS[variant]
    options = _COMMON | differs | changes
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def pair(variant="llama", **changes):
    """(a model, its fused copy)"""
    model = make(variant, **changes)
    return model, hb.fuse_(copy.deepcopy(model))


def prompts(batch=1, tokens=9, seed=1):
    """Tokens that are no padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)


def padded(side="left", lengths=(9, 4, 7)):
    """(ids, attention_mask) of texts of these lengths."""
    ids = prompts(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        gone = slice(0, max(lengths) - length) if side == "left" else slice(length, None)
        mask[row, gone] = 0
    return ids.masked_fill(mask == 0, 0), mask


def row_of(model):
    """What the report says of the decoder in it."""
    return next(row for row in hb.fusion_report(model).rows if "decoder" in row.kind)


def all_fused(model, calls=None):
    """Every call was fused."""
    row = row_of(model)
    assert row.blocks and not row.reason and row.unfused_calls == {}, row
    assert row.fused_calls == calls if calls is not None else row.fused_calls > 0


def why_unfused(model):
    """The reason of the one call that was not."""
    ((reason, calls),) = row_of(model).unfused_calls.items()
    assert calls == 1
    return reason


BOUND = 1e-4  # of logits of a few units, in float32


def close(got, want, bound=BOUND):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got.float() - want.float()).abs().max() <= bound * max(1, float(want.float().abs().max()))


def relative_error(got, want):
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
