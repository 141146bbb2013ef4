"""load_quantized_: a checkpoint into a model, whole or not at all; ties, the meta device, foreign models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.loading import load_quantized_
from halfbyte.pack_inplace import is_freed
from quantized_layers import TOKEN, Layer, compressed, gptq, read, write


class Net(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 24, bias=False)
        self.register_buffer("steps", torch.zeros(3))
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


def checkpoint(*, embed=True, head=True):
    """Layers of compressed-tensors for Net, and the tensors that stay float."""
    layers = {"up": Layer(96, 64, 32, seed=1), "down": Layer(64, 96, 32, seed=2)}
    if embed:
        layers["embed"] = Layer(24, 64, 32, seed=3)
    if head:
        layers["head"] = Layer(24, 64, 32, seed=4)
    floats = {
        "up.bias": torch.randn(96), "norm.weight": torch.randn(96), "norm.bias": torch.randn(96),
        "steps": torch.randn(3),
    }  # fmt: skip
    return layers, floats


def read_net(tmp_path, layers, floats):
    tensors = dict(floats)
    for name, layer in layers.items():
        tensors |= layer.packed(name)
    return read(tmp_path, tensors, compressed(group=32))


def assert_untouched(model, before):
    modules, values = before
    assert modules == [(name, id(m)) for name, m in model.named_modules()]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "_halfbyte_report")


def snapshot(model):
    return [(name, id(m)) for name, m in model.named_modules()], {
        name: value.clone() for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_a_model(dtype, tmp_path):
    layers, floats = checkpoint()
    read_net(tmp_path, layers, floats)
    model = Net().to(dtype).eval()
    assert load_quantized_(model, tmp_path) is model
    for name, layer in layers.items():
        module = model.get_submodule(name)
        assert isinstance(module, hb.QLinear if name != "embed" else hb.QEmbedding), name
        assert torch.equal(module.quantized.dequantize(), layer.weight)
        assert module.weight.dtype == dtype and not module.training and module.name == name
    assert torch.equal(model.up.bias, floats["up.bias"]) and model.down.bias is None
    assert (
        torch.equal(model.norm.weight, floats["norm.weight"].to(dtype)) and model.norm.weight.dtype == dtype
    )
    assert torch.equal(model.steps, floats["steps"].to(dtype))
    assert {row["name"]: row["action"] for row in model._halfbyte_report} == dict.fromkeys(
        layers, "quantized"
    )
    plain = Net().eval()
    plain.load_state_dict({f"{n}.weight": layer.weight for n, layer in layers.items()} | floats)
    ids = torch.arange(24)
    with torch.no_grad():
        got, want = model(ids).float(), plain(ids)
    assert (got - want).abs().max() <= (1e-4 if dtype == torch.float32 else 0.05) * want.abs().max()


def test_tied_weights(tmp_path):
    layers, floats = checkpoint(head=False)
    tensors = read_net(tmp_path, layers, floats)
    model = load_quantized_(Net(tie=True), tensors)
    assert model.head.weight_codes is model.embed.weight_codes
    assert model.head.weight_scale is model.embed.weight_scale
    with pytest.raises(hb.FormatError, match="the checkpoint has no 'head.weight'"):
        load_quantized_(Net(), tensors)

    layers, floats = checkpoint(embed=False)  # the other one of the two
    model = load_quantized_(Net(tie=True), read_net(tmp_path, layers, floats))
    assert model.head.weight_codes is model.embed.weight_codes

    layers, floats = checkpoint()  # both: each has its own
    model = load_quantized_(Net(tie=True), read_net(tmp_path, layers, floats))
    assert torch.equal(model.embed.quantized.dequantize(), layers["embed"].weight)
    assert torch.equal(model.head.quantized.dequantize(), layers["head"].weight)


def test_tied_weights_of_which_one_is_float(tmp_path):
    layers, floats = checkpoint(embed=False)
    floats["embed.weight"] = torch.randn(24, 64)
    model = load_quantized_(Net(tie=True), read_net(tmp_path, layers, floats))
    assert torch.equal(model.embed.weight, floats["embed.weight"]) and isinstance(model.head, hb.QLinear)
    layers, floats = checkpoint(embed=False, head=False)
    floats |= {"embed.weight": torch.randn(24, 64)}
    model = load_quantized_(Net(tie=True), read_net(tmp_path, layers, floats))
    assert model.head.weight is model.embed.weight and torch.equal(model.head.weight, floats["embed.weight"])
    assert [r["name"] for r in model._halfbyte_report if r["action"] == "float"] == ["head"]
    floats |= {"head.weight": torch.randn(24, 64)}
    with pytest.raises(hb.FormatError, match="'embed.weight' and 'head.weight' differ in the checkpoint"):
        load_quantized_(Net(tie=True), read_net(tmp_path, layers, floats))


def test_a_model_on_meta(tmp_path):
    layers, floats = checkpoint(head=False)
    with torch.device("meta"):
        model = Net(tie=True)
    load_quantized_(model, read_net(tmp_path, layers, floats))
    assert not any(t.is_meta for t in model.state_dict().values())
    assert isinstance(model.norm.weight, nn.Parameter) and torch.equal(
        model.norm.weight, floats["norm.weight"]
    )
    assert model(torch.arange(24)).isfinite().all()
    with torch.device("meta"):
        model = Net()
        model.register_buffer("table", torch.zeros(3), persistent=False)
    layers, floats = checkpoint()
    with pytest.raises(hb.DeviceError, match="table is on the meta device, and the checkpoint has no value"):
        load_quantized_(model, read_net(tmp_path, layers, floats))
    assert isinstance(model.up, nn.Linear) and model.norm.weight.is_meta


def test_a_layer_a_conv1d_and_a_quantized_model(tmp_path):
    layer = Layer(16, 64, 64)
    q = read(tmp_path, layer.gptq("x"), gptq())["x.weight"]
    bias = torch.randn(16)
    linear = load_quantized_(nn.Linear(64, 16), {"weight": q, "bias": bias})
    assert isinstance(linear, hb.QLinear) and torch.equal(linear.bias, bias)
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert torch.equal(load_quantized_(conv1d(16, 64), {"weight": q, "bias": bias}).bias, bias)
    again = hb.quantize_(nn.Sequential(nn.Linear(64, 16)))
    again[0].activation = "relu"
    load_quantized_(again, {"0.weight": q, "0.bias": bias})
    assert str(again[0].scheme) == "w4a16_g64+asym" and again[0].activation == "relu"


@pytest.mark.parametrize("packed", [False, True])
def test_a_static_range_of_a_quantized_model(packed, tmp_path):
    layer = Layer(16, 64, 64, symmetric=True)
    a16, a8 = (read(tmp_path, layer.gptq("0"), gptq(), activations=a) for a in ("a16", "a8"))
    model = hb.quantize_(nn.Sequential(nn.Linear(64, 16, bias=False)))
    model[0].static = (0.05, -3)
    if packed:
        hb.pack_(model)
    old = model[0]
    with pytest.raises(hb.ModelError, match="load_quantized_: 0 has a static range .* w4a16_g64 cannot use"):
        load_quantized_(model, a16)
    assert model[0] is old
    load_quantized_(model, a8)
    assert model[0] is not old and model[0].static == pytest.approx((0.05, -3))
    assert torch.equal(model[0].quantized.dequantize(), layer.weight)
    assert model(torch.randn(2, 64)).isfinite().all()
    assert not is_freed(model[0]) and is_freed(hb.pack_(model)[0])
    model[0].static = None
    assert load_quantized_(model, a16)[0].static is None


def test_names_that_do_not_fit(tmp_path):
    layers, floats = checkpoint()
    tensors = read_net(tmp_path, layers, floats)
    model = Net()
    before = snapshot(model)
    other = {n: t for n, t in tensors.items() if n not in ("up.bias", "norm.bias", "down.weight")}
    other |= {"more.weight": tensors["up.weight"], "rest": torch.ones(1)}
    with pytest.raises(hb.FormatError) as error:
        load_quantized_(model, other)
    for text in ("no 'up.bias'", "no 'norm.bias'", "no 'down.weight'", "no 'more.weight'", "no 'rest'"):
        assert text in str(error.value)
    assert_untouched(model, before)
    bias = model.up.bias.detach().clone()
    with pytest.warns(UserWarning, match="the checkpoint has no 'up.bias'"):
        load_quantized_(model, other, strict=False)
    assert torch.equal(model.up.bias, bias) and isinstance(model.down, nn.Linear)
    many = {f"x{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(hb.FormatError, match="'x7'; and 1 more; build"):
        load_quantized_(Net(), dict(tensors) | many)


def test_what_does_not_fit_leaves_the_model_alone(tmp_path):
    layers, floats = checkpoint()
    tensors = read_net(tmp_path, layers, floats)
    up, down = tensors["up.weight"], tensors["down.weight"]

    class Own(nn.Linear):
        pass

    def refuse(error, match, change, model=None):
        model = model or Net()
        before = snapshot(model)
        with pytest.raises(error, match=match):
            load_quantized_(model, dict(tensors) | change)
        assert_untouched(model, before)

    refuse(hb.FormatError, "'down.weight' is 96 x 64 in the checkpoint and 64 x 96", {"down.weight": up})
    refuse(hb.FormatError, "'embed.weight' is 64 x 96 in the checkpoint and 24 x 64", {"embed.weight": down})
    refuse(hb.FormatError, r"'norm.weight' is torch.float32 \(3,\) in the", {"norm.weight": torch.ones(3)})
    refuse(hb.FormatError, "'norm.weight' is torch.int64", {"norm.weight": torch.ones(96, dtype=torch.int64)})
    refuse(hb.FormatError, r"'up.bias' is torch.float32 \(95,\)", {"up.bias": torch.ones(95)})
    refuse(hb.FormatError, "'norm.weight' is quantized .*LayerNorm", {"norm.weight": up})
    refuse(hb.FormatError, "'steps' is quantized in the checkpoint, but in the model", {"steps": up})
    refuse(hb.DTypeError, "'x' is a list; it must be a tensor", {"x": [1]})
    model = Net()
    model.up = Own(64, 96)
    refuse(hb.FormatError, "up in the model is a Own; only nn.Linear, Conv1D", {}, model)
    model = Net()
    model.up.register_forward_hook(print)
    refuse(hb.ModelError, "up cannot be replaced: it has hooks", {}, model)
    model = Net()
    model.embed.max_norm = 1.0
    refuse(hb.ModelError, "embed cannot be replaced: max_norm", {}, model)


def test_values_without_memory_leave_the_model_alone(tmp_path):
    layers, floats = checkpoint()
    tensors = read_net(tmp_path, layers, floats)
    q = tensors["down.weight"]
    bare = {
        part: dataclasses.replace(q, **{part: getattr(q, part).to("meta")})
        for part in ("codes", "scale", "group_scale")
    }
    for name, value, match in [
        ("steps", floats["steps"].to("meta"), "'steps' is on the meta device"),
        ("steps", floats["steps"].to_sparse(), "'steps' has the layout torch.sparse_coo"),
        ("up.bias", floats["up.bias"].to("meta"), "'up.bias' is on the meta device"),
        *(("down.weight", v, f"^{part} of 'down.weight' is on the meta device") for part, v in bare.items()),
    ]:
        model = Net()
        before = snapshot(model)
        with pytest.raises(hb.DeviceError, match=match):
            load_quantized_(model, tensors | {name: value})
        assert_untouched(model, before)


def test_errors_of_a_path_name_the_function_that_takes_the_argument(tmp_path):
    layer = Layer(16, 64, 64, symmetric=True)
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    write(tmp_path, layer.packed("0"), compressed(symmetric=True, inputs=TOKEN | {"dynamic": False}))
    with pytest.raises(hb.FormatError, match=r"call halfbyte.read_checkpoint\(path, activations='a8'\)"):
        load_quantized_(model, tmp_path)
    write(tmp_path, layer.packed("0"))
    with pytest.raises(hb.FormatError, match=r"call halfbyte.read_checkpoint\(path, quantization="):
        load_quantized_(model, tmp_path)


def test_arguments():
    with pytest.raises(hb.DTypeError, match="load_quantized_ takes a model"):
        load_quantized_(3, {})
    with pytest.raises(hb.DTypeError, match="tensors must be a mapping or a path, not int"):
        load_quantized_(Net(), 3)
