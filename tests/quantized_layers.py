"""Layers as GPTQ, AWQ and compressed-tensors store them, by plain loops over the published layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from halfbyte.checkpoints import read_checkpoint

save_file = pytest.importorskip("safetensors.torch").save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(rows, bits, order=None):
    """int32 words of rows of unsigned codes: code i of a word is the one at order[i], low bits first."""
    per_word = 32 // bits
    out = np.zeros((len(rows), -(-len(rows[0]) // per_word)), np.int64)
    for r, row in enumerate(rows):
        for i in range(out.shape[1] * per_word):
            word, place = divmod(i, per_word)
            source = word * per_word + (order[place] if order else place)
            out[r, word] += (int(row[source]) if source < len(row) else 0) << (bits * place)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


class Layer:
    """Random codes u [n, k], zero points z and scales s [n, groups], and the weight they stand for."""

    def __init__(self, n, k, group, *, bits=4, dtype=torch.float16, symmetric=False, seed=0):
        random = np.random.default_rng(seed)
        self.n, self.k, self.size, self.bits = n, k, group if group > 0 else k, bits
        groups = -(-k // self.size)
        self.u = random.integers(0, 2**bits, (n, k))
        self.z = np.full((n, groups), 2 ** (bits - 1))
        if not symmetric:
            self.z = random.integers(0, 2**bits, (n, groups))
        self.s = torch.from_numpy(random.uniform(0.001, 0.1, (n, groups))).to(dtype)

    @property
    def weight(self):
        s, out = self.s.float().numpy(), np.zeros((self.n, self.k), np.float32)
        for r in range(self.n):
            for c in range(self.k):
                g = c // self.size
                out[r, c] = np.float32(self.u[r, c] - self.z[r, g]) * s[r, g]
        return torch.from_numpy(out)

    def gptq(self, name="a", *, v2=False):
        stored = (self.z if v2 else self.z - 1) % 2**self.bits
        return {
            f"{name}.qweight": pack(self.u, self.bits).t().contiguous(),
            f"{name}.qzeros": pack(stored.T, self.bits),
            f"{name}.scales": self.s.t().contiguous(),
            f"{name}.g_idx": torch.tensor([c // self.size for c in range(self.k)], dtype=torch.int32),
        }

    def awq(self, name="a"):
        return {
            f"{name}.qweight": pack(self.u.T, 4, AWQ_ORDER),
            f"{name}.qzeros": pack(self.z.T, 4, AWQ_ORDER),
            f"{name}.scales": self.s.t().contiguous(),
        }

    def packed(self, name="a"):
        return {
            f"{name}.weight_packed": pack(self.u, self.bits),
            f"{name}.weight_scale": self.s,
            f"{name}.weight_shape": torch.tensor([self.n, self.k]),
            f"{name}.weight_zero_point": pack(self.z.T, self.bits).t().contiguous(),
        }

    def integers(self, name="a"):
        middle = 2 ** (self.bits - 1)
        return {
            f"{name}.weight": torch.from_numpy((self.u - middle).astype(np.int8)),
            f"{name}.weight_scale": self.s,
            f"{name}.weight_zero_point": torch.from_numpy((self.z - middle).astype(np.int8)),
        }


def gptq(bits=4, group=64, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False} | more


def awq(group=64, **more):
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    } | more


def compressed(layout="pack-quantized", bits=4, group=64, *, symmetric=False, inputs=None, **more):
    strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups} | more


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def write(directory, tensors, config=None):
    save_file(tensors, directory / "model.safetensors")
    text = {"model_type": "x"} | ({} if config is None else {"quantization_config": config})
    (directory / "config.json").write_text(json.dumps(text))
    return directory


def read(directory, tensors, config=None, **options):
    return read_checkpoint(write(directory, tensors, config), **options)


def same(q, layer, scheme):
    assert str(q.scheme) == scheme and q.shape == (layer.n, layer.k)
    assert torch.equal(q.dequantize().view(torch.int32) << 1, layer.weight.view(torch.int32) << 1)
    assert torch.equal(q.dequantize(), layer.weight)  # the sign of a zero can differ, nothing else
