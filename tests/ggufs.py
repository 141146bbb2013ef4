"""Small GGUF files that tests write: raw blocks, and whole models with the names of llama.cpp."""

from __future__ import annotations

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
TYPE = gguf.GGMLQuantizationType

WIDTH, HIDDEN, VOCABULARY, LAYERS, HEADS, KEY_HEADS = 64, 96, 50, 2, 4, 2
HEAD = {"llama": 16, "qwen2": 16, "qwen3": 128}  # features of a head; of qwen3 transformers reads no other


def _layer(architecture):
    """Name -> shape of the tensors of one layer."""
    size = HEAD[architecture]
    return {
        "attn_norm": (WIDTH,),
        "attn_q": (HEADS * size, WIDTH),
        "attn_k": (KEY_HEADS * size, WIDTH),
        "attn_v": (KEY_HEADS * size, WIDTH),
        "attn_output": (WIDTH, HEADS * size),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }


def write(path, tensors, architecture="llama", **metadata):
    """tensors: name -> (numpy array or raw blocks, type or None). metadata: name_of_key=uint32 or string."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(weight, kind):
    """An argument of `write` of a float32 weight."""
    return gguf.quantize(weight, kind), kind


def model_tensors(architecture="llama", kind=TYPE.Q4_0, *, output=True):
    """The tensors of a tiny model, of fixed random values."""
    random = np.random.default_rng(0)

    def matrix(*shape, kind=kind):
        return quantized(random.standard_normal(shape).astype(np.float32) / 8, kind)

    def vector(n):
        return (1 + random.standard_normal(n) / 8).astype(np.float32), None

    tensors = {
        "token_embd.weight": matrix(VOCABULARY, WIDTH, kind=TYPE.Q8_0),
        "output_norm.weight": vector(WIDTH),
    }
    if output:
        tensors["output.weight"] = matrix(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        for name, shape in _layer(architecture).items():
            tensors[f"blk.{layer}.{name}.weight"] = matrix(*shape) if len(shape) == 2 else vector(*shape)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{name}.bias"] = vector(shape[0])
        if architecture == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                tensors[f"blk.{layer}.{name}.weight"] = vector(HEAD[architecture])
    return tensors


def write_model(path, architecture="llama", kind=TYPE.Q4_0, *, output=True):
    """A whole tiny model, with the metadata that transformers needs to build it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD[architecture])
    writer.add_value_length(HEAD[architecture])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    for name, (data, raw) in model_tensors(architecture, kind, output=output).items():
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
