"""read_checkpoint: GPTQ, AWQ and compressed-tensors, exact, and where files are found."""

from __future__ import annotations

import json

import pytest
import torch

import halfbyte as hb
from halfbyte.checkpoints import read_checkpoint
from quantized_layers import TOKEN, Layer, awq, compressed, gptq, read, same, save_file


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits, group, symmetric, v2, tmp_path):
    layer = Layer(16, 256, group, bits=bits, symmetric=symmetric)
    config = gptq(bits, group, sym=symmetric, checkpoint_format="gptq_v2" if v2 else "gptq")
    tensors = read(tmp_path, layer.gptq(v2=v2), config)
    assert tensors.keys() == {"a.weight"}
    suffix = (f"_g{group}" if group > 0 else "") + ("" if symmetric else "+asym")
    same(tensors["a.weight"], layer, f"w{bits}a16{suffix}")
    assert str(read_checkpoint(tmp_path, activations="a8")["a.weight"].scheme) == f"w{bits}a8{suffix}"


def test_gptq_of_which_the_config_says_one_format_and_the_zeros_the_other(tmp_path):
    layer = Layer(16, 128, 64, symmetric=True)
    same(read(tmp_path, layer.gptq(v2=True), gptq(sym=True))["a.weight"], layer, "w4a16_g64")
    layer.z[3, 1] = 5
    with pytest.raises(hb.FormatError, match="a: the checkpoint is symmetric by its config, but not by its"):
        read(tmp_path, layer.gptq(), gptq(sym=True))
    same(read(tmp_path, layer.gptq(), gptq(sym=False))["a.weight"], layer, "w4a16_g64+asym")


def test_gptq_with_act_order(tmp_path):
    layer = Layer(16, 128, 64)
    tensors = layer.gptq()
    same(
        read(tmp_path, tensors, gptq(desc_act=True))["a.weight"], layer, "w4a16_g64+asym"
    )  # in order, though
    tensors["a.g_idx"] = tensors["a.g_idx"].flip(0).contiguous()
    for config in (gptq(desc_act=True), gptq()):
        with pytest.raises(hb.FormatError, match="a was quantized with act-order.*desc_act=False"):
            read(tmp_path, tensors, config)
    del tensors["a.g_idx"]
    with pytest.raises(hb.FormatError, match="a has desc_act and no g_idx"):
        read(tmp_path, tensors, gptq(desc_act=True))
    same(read(tmp_path, tensors, gptq())["a.weight"], layer, "w4a16_g64+asym")


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq(group, tmp_path):
    layer = Layer(24, 256, group)
    scheme = f"w4a16_g{group}+asym" if group > 0 else "w4a16+asym"
    same(read(tmp_path, layer.awq(), awq(group))["a.weight"], layer, scheme)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_compressed_tensors(layout, bits, group, symmetric, dtype, tmp_path):
    layer = Layer(17, 256, group, bits=bits, symmetric=symmetric, dtype=dtype)
    tensors = layer.packed() if layout == "pack-quantized" else layer.integers()
    if symmetric:
        del tensors["a.weight_zero_point"]
    config = compressed(layout, bits, group, symmetric=symmetric)
    q = read(tmp_path, tensors, config)["a.weight"]
    same(q, layer, f"w{bits}a16" + f"_g{group}" * (group > 0) + "+asym" * (not symmetric))
    if group > 0:
        assert q.group_scale.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)


def test_scales_far_apart_stay_exact(tmp_path):
    layer = Layer(4, 128, 32, dtype=torch.bfloat16, symmetric=True)
    config = compressed(group=32, symmetric=True)
    for exponents, dtype in (([60, 59, 50, 45], torch.float16), ([60, 59, 50, -60], torch.float32)):
        layer.s = ((1 + torch.rand(4, 4) / 2).bfloat16() * 2.0 ** torch.tensor(exponents)).bfloat16()
        q = read(tmp_path, layer.packed(), config)["a.weight"]
        same(q, layer, "w4a16_g32")
        assert q.group_scale.dtype == dtype


def test_an_odd_number_of_features(tmp_path):
    layer = Layer(5, 37, 32)
    same(read(tmp_path, layer.packed(), compressed(group=32))["a.weight"], layer, "w4a16_g32+asym")
    same(
        read(tmp_path, layer.integers(), compressed("int-quantized", group=32))["a.weight"],
        layer,
        "w4a16_g32+asym",
    )


@pytest.mark.parametrize("group, unit", [(96, 32), (192, 64), (256, 128), (384, 128)])
def test_other_group_sizes_are_cut(group, unit, tmp_path):
    layer = Layer(8, 640, group)
    same(read(tmp_path, layer.gptq(), gptq(group=group))["a.weight"], layer, f"w4a16_g{unit}+asym")
    with pytest.raises(hb.FormatError, match="a has groups of 16 elements; only multiples of 32"):
        read(tmp_path, Layer(8, 64, 16).gptq(), gptq(group=16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_scales_that_are_negative_or_zero(group, bits, tmp_path):
    layer = Layer(16, 96, group, bits=bits)
    layer.s[::3] *= -1
    layer.s[5] = 0
    scheme = f"w{bits}a16{'_g32' if group > 0 else ''}+asym"
    same(read(tmp_path, layer.gptq(), gptq(bits, group))["a.weight"], layer, scheme)
    layer.s[2, -1] = float("nan")
    with pytest.raises(hb.NonFiniteError, match=".*: a: the scale of row 2, group"):
        read(tmp_path, layer.gptq(), gptq(bits, group))


def test_one_scale_for_the_tensor(tmp_path):
    layer = Layer(6, 64, -1, bits=8, symmetric=True)
    layer.s = layer.s[:1].expand(6, 1)
    tensors = {"a.weight": layer.integers()["a.weight"]}
    config = compressed("int-quantized", 8, -1, symmetric=True, inputs=TOKEN)
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    for scale in (layer.s[0, 0].clone(), layer.s[0].clone()):
        same(read(tmp_path, tensors | {"a.weight_scale": scale}, config)["a.weight"], layer, "w8a8")


def test_activations_of_compressed_tensors(tmp_path):
    layer = Layer(8, 128, 128, symmetric=True)
    tensors = layer.packed()
    config = compressed(group=128, symmetric=True, inputs=TOKEN)
    same(read(tmp_path, tensors, config)["a.weight"], layer, "w4a8_g128")
    same(read(tmp_path, tensors, config, activations="a16")["a.weight"], layer, "w4a16_g128")
    tensors |= {"a.input_scale": torch.ones(1), "a.input_zero_point": torch.zeros(1, dtype=torch.int8)}
    for inputs, text in (
        (TOKEN | {"dynamic": False}, "8 bits, int, with fixed"),
        (TOKEN | {"num_bits": 4}, "4"),
    ):
        config = compressed(group=128, symmetric=True, inputs=inputs)
        with pytest.raises(
            hb.FormatError, match=f"a wants activations of {text}.*read_checkpoint.path, activations='a8'"
        ):
            read(tmp_path, tensors, config)
        assert read(tmp_path, tensors, config, activations="a8").keys() == {"a.weight"}


def test_groups_of_compressed_tensors(tmp_path):
    """Targets by name or expression come before the class."""
    one, two, three = Layer(8, 64, 32, seed=1), Layer(8, 64, -1, bits=8, seed=2), Layer(8, 64, 64, seed=3)
    config = compressed(group=32)
    groups = config["config_groups"]
    groups["b"] = compressed(bits=8, group=-1)["config_groups"]["group_0"] | {"targets": ["re:.*down$"]}
    groups["c"] = compressed(group=64)["config_groups"]["group_0"] | {
        "targets": ["x.y"],
        "format": "int-quantized",
    }
    tensors = one.packed("x.up") | two.packed("x.down") | three.integers("x.y")
    found = read(tmp_path, tensors, config)
    same(found["x.up.weight"], one, "w4a16_g32+asym")
    same(found["x.down.weight"], two, "w8a16+asym")
    same(found["x.y.weight"], three, "w4a16_g64+asym")
    del groups["group_0"]
    with pytest.raises(hb.FormatError, match="no group of the config has x.up among its targets"):
        read(tmp_path, tensors, config)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_compressed_tensors_writes(bits, group, dtype, symmetric, layout, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(24, 96).to(dtype)
    parts = weight.view(24, -1, group or 96)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero.to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(layout)
    written = compressor.compress(state, scheme)
    want = compressor.decompress(written, scheme)["weight"]
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=layout).model_dump(mode="json")
    found = read(tmp_path, {f"a.{k}": v.contiguous() for k, v in written.items()}, config)
    assert torch.equal(found["a.weight"].dequantize().to(want.dtype), want)


def test_other_tensors_and_layers(tmp_path):
    one, two = Layer(8, 64, 64, seed=1), Layer(16, 128, 64, seed=2)
    plain = {"a.bias": torch.randn(8), "norm.weight": torch.randn(8).bfloat16(), "n": torch.arange(3)}
    found = read(tmp_path, one.gptq("a") | two.gptq("b.c") | plain, gptq())
    assert found.keys() == {"a.weight", "b.c.weight", *plain}
    same(found["b.c.weight"], two, "w4a16_g64+asym")
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_checkpoint_of_floats(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "a.weight_norm": torch.randn(3)}
    found = read(tmp_path, tensors)
    assert found.keys() == tensors.keys()
    with pytest.raises(hb.FormatError, match=r"has quantized layers \('a.qweight'\), but no config.json"):
        read(tmp_path, Layer(8, 64, 64).gptq())
    assert read_checkpoint(tmp_path, quantization=gptq()).keys() == {"a.weight"}


def test_where_files_and_configs_are_found(tmp_path):
    one, two = Layer(8, 64, 64, seed=1), Layer(8, 64, 64, seed=2)
    save_file(one.gptq("a"), tmp_path / "x-1.safetensors")
    save_file(two.gptq("b"), tmp_path / "x-2.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "sym": False}))
    assert read_checkpoint(tmp_path / "x-1.safetensors").keys() == {"a.weight"}
    with pytest.raises(hb.FormatError, match="has 2 safetensors files and no model.safetensors.index.json"):
        read_checkpoint(tmp_path)
    names = {name: "x-1.safetensors" for name in one.gptq("a")} | {
        name: "x-2.safetensors" for name in two.gptq("b")
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert read_checkpoint(tmp_path).keys() == {"a.weight", "b.weight"}
    index.write_text(json.dumps({"weight_map": names | {"b.bias": "x-2.safetensors"}}))
    with pytest.raises(hb.FormatError, match="x-2.safetensors lacks 'b.bias', which the index says it has"):
        read_checkpoint(tmp_path)
    for file, match in (
        ("../x-1.safetensors", "is no name of a file"),
        ("x-3.safetensors", "is missing; copy"),
    ):
        index.write_text(json.dumps({"weight_map": names | {"b.bias": file}}))
        with pytest.raises(hb.FormatError, match=match):
            read_checkpoint(tmp_path)
    for text, match in (
        ("{", "truncated or damaged"),
        ("[]", "it holds no object"),
        ("{}", "it names no file"),
    ):
        index.write_text(text)
        with pytest.raises(hb.FormatError, match=match):
            read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "y.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(hb.FormatError, match="has no safetensors files"):
        read_checkpoint(tmp_path / "empty")
