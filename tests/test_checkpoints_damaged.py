"""read_checkpoint: truncated files, and configs and tensors that do not fit, by name."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.checkpoints import read_checkpoint
from quantized_layers import Layer, awq, compressed, gptq, read, write


def test_truncated_anywhere(tmp_path):
    write(tmp_path, Layer(8, 64, 64).gptq(), gptq())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(hb.FormatError, match="model.safetensors is truncated or no safetensors file"):
            read_checkpoint(tmp_path)
    path.write_bytes(whole)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config[:-9])
    with pytest.raises(hb.FormatError, match="config.json is truncated or damaged"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"quant_method": "fp8"}, "the quant_method is 'fp8'; those that can be read are: gptq, awq"),
        ({"quant_method": ["gptq"]}, "the quant_method is .'gptq'.; those"),
        ({}, "the quant_method is None"),
        (gptq(3), "bits is 3; 4 and 8 can be read"),
        (gptq(group=0), "group_size is 0; it must be"),
        (gptq(group="64"), "group_size is '64'; it must be"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (gptq(8), r"a.qzeros is 1 x 2, int32; with this config it must be 1 x 4, int32: correct the config"),
        (gptq(group=32), "a.scales is 1 x 16, float16; with this config it must be 2 x 16, float16 or"),
        (awq(version="gemv"), "the AWQ version is 'gemv'; only gemm"),
        (awq(bits=8), "bits is 8; 4 can be read"),
        (awq(), "a.scales is 1 x 16, float16; with this config it must be 1 x 128, float16 or"),
        ({"quant_method": "compressed-tensors"}, "its quantization_config is damaged .lacks 'config_groups'"),
        (compressed("float-quantized"), "the format is 'float-quantized' with weights of the type 'int'"),
        (compressed(bits=2), "num_bits is 2"),
        (
            compressed(config_groups={"a": {"targets": ["re:("], "weights": {"num_bits": 4}}}),
            r"the target 're:\(' is no regular expression",
        ),
        (compressed(config_groups=[]), "its quantization_config is damaged"),
        (compressed(transform_config={"x": 1}), "it has a transform_config"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "it has a sparsity_config"),
        (compressed(), "has 'a.weight_scale'|has 'a.qweight'|missing"),
    ],
)
def test_configs_that_do_not_fit(config, match, tmp_path):
    tensors = Layer(16, 64, 64).gptq()
    if config == compressed():
        tensors = {"a.weight_packed": tensors["a.qweight"]}
    with pytest.raises(hb.FormatError, match=match) as error:
        read(tmp_path, tensors, config)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("weight_map", ["[]", "null", '"a"'])
def test_a_damaged_index(weight_map, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(hb.FormatError, match="index.json is damaged: its weight_map is no object"):
        read_checkpoint(tmp_path)


def test_parts_that_do_not_fit(tmp_path):
    layer = Layer(16, 64, 64)

    def refuse(tensors, config, match, drop=None, **change):
        tensors = {n: t for n, t in tensors.items() if n != drop} | {f"a.{n}": t for n, t in change.items()}
        with pytest.raises(hb.FormatError, match=match):
            read(tmp_path, tensors, config)

    refuse(layer.gptq(), gptq(), "a.scales is missing; the file is incomplete", drop="a.scales")
    refuse(layer.gptq(), gptq(), "has 'a.g_idx' without a.qweight", drop="a.qweight")
    refuse(layer.gptq(), gptq(), "a.qweight is 8 x 16, float32", qweight=torch.zeros(8, 16))
    refuse(layer.gptq(), gptq(), "a.qweight is 8, int32", qweight=torch.zeros(8, dtype=torch.int32))
    refuse(layer.gptq(), gptq(), "a was quantized with act-order", g_idx=torch.zeros(63, dtype=torch.int32))
    refuse(layer.packed(), compressed(), "a.weight_shape is missing", drop="a.weight_shape")
    refuse(layer.packed(), compressed(), "a.weight_shape is .1, 2, 3.", weight_shape=torch.arange(1, 4))
    refuse(
        layer.packed(),
        compressed(),
        "a.weight_packed is .16, 8. for 16 x 99",
        weight_shape=torch.tensor([16, 99]),
    )
    refuse(layer.packed(), compressed(), "is asymmetric and has no weight_zero", drop="a.weight_zero_point")
    refuse(layer.packed(), compressed(symmetric=True), "a is symmetric by its config, but has zero points")
    refuse(
        layer.packed(),
        compressed(),
        "weight_scale is 15 x 1, float32; .* 16 x 1",
        weight_scale=torch.ones(15, 1),
    )
    refuse(layer.packed(), compressed(), "act-order", weight_g_idx=torch.ones(64, dtype=torch.int32))
    wide = Layer(16, 64, 64, bits=8)
    refuse(wide.integers(), compressed("int-quantized"), "a.weight holds numbers of more than 4 bits")


def test_arguments(tmp_path):
    with pytest.raises(hb.DTypeError, match="quantization must be a mapping, not str"):
        read_checkpoint(tmp_path, quantization="gptq")
    with pytest.raises(ValueError, match="activations='a4' is none of"):
        read_checkpoint(tmp_path, activations="a4")
