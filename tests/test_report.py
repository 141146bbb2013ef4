"""`summary`: every layer is listed with what runs in it; every number is the model's or a measurement."""

import json

import pytest

torch = pytest.importorskip("torch", reason="summary reports on torch models")

import halfbyte as hb  # noqa: E402


class Block(torch.nn.Module):
    """Two linear layers, one of them called twice, one that never runs, and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 24)
        self.up = torch.nn.Linear(24, 40)
        self.down = torch.nn.Linear(40, 24, bias=False)
        self.head = torch.nn.Linear(24, 3)
        self.unused = torch.nn.Linear(5, 7)

    def forward(self, ids, *, twice=True):
        x = self.embed(ids)
        for _ in range(2 if twice else 1):
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


@pytest.fixture
def model():
    return hb.quantize_(Block(), exclude=["head"], progress=False)


IDS = torch.arange(6).reshape(2, 3)


def packed(layer):
    return hb.pack(layer.quantized).nbytes


def by_name(summary):
    return {layer.name: layer for layer in summary.layers}


def test_layers_without_inputs(model):
    layers = by_name(hb.summary(model))
    assert list(layers) == ["up", "down", "head", "unused"]
    up = layers["up"]
    assert (up.in_features, up.out_features, up.scheme) == (24, 40, "w8a8")
    assert up.kernel == hb.pack(model.up.quantized).kernel
    assert up.float_bytes == 4 * (24 * 40 + 40) and up.bytes == 24 * 40 + 4 * 40 + 4 * 40 + packed(model.up)
    assert layers["down"].float_bytes == 4 * 24 * 40
    assert layers["down"].bytes == 24 * 40 + 4 * 24 + packed(model.down)
    assert (up.ms, up.float_ms, up.error, up.why_float) == (None, None, None, "")
    head = layers["head"]
    assert (head.scheme, head.kernel, head.bytes) == ("float", "torch", 4 * (24 * 3 + 3))
    assert head.bytes == head.float_bytes and "excluded" in head.why_float
    assert hb.summary(model).other_bytes == model.embed.weight.nbytes


@pytest.mark.parametrize(
    "inputs", [IDS, (IDS,), [IDS], {"ids": IDS, "twice": False}], ids=lambda i: type(i).__name__
)
def test_measured(model, inputs):
    model.train()
    model.embed.eval()
    layers = by_name(hb.summary(model, inputs))
    for name in ("up", "down"):
        assert layers[name].ms > 0 and layers[name].float_ms > 0
        assert 0 < layers[name].error < 0.05
    assert layers["head"].float_ms > 0 and layers["head"].ms is None and layers["head"].error is None
    assert layers["unused"].ms is None and layers["unused"].float_ms is None
    assert model.training and model.up.training and not model.embed.training
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_and_mode_are_restored_after_an_error(model):
    model.train()
    with pytest.raises(IndexError):
        hb.summary(model, torch.tensor([[99]]))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_error_is_that_of_the_activations():
    layer = torch.nn.Linear(32, 16)
    quantized = hb.QLinear.from_linear(layer)
    x = torch.randn(5, 32)
    exact = torch.nn.functional.linear(x, quantized.quantized.dequantize(), layer.bias)
    expected = ((quantized(x) - exact).norm() / exact.norm()).item()
    (row,) = hb.summary(quantized, x).layers
    assert row.name == "" and row.error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_fused_activation_and_bfloat16(activation):
    quantized = hb.QLinear.from_linear(torch.nn.Linear(64, 48))
    quantized.activation = activation
    (row,) = hb.summary(quantized, torch.randn(9, 64, dtype=torch.bfloat16)).layers
    assert 0 < row.error < 0.05


def test_a_float_model_says_that_nothing_was_done():
    summary = hb.summary(Block())
    assert all(layer.scheme == "float" and layer.why_float for layer in summary.layers)
    assert "0 of 4 linear layers quantized" in str(summary)


def test_shared_weights_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    total = sum(t.nbytes for t in model.parameters())
    summary = hb.summary(model)
    assert sum(layer.bytes for layer in summary.layers) == total and summary.other_bytes == 0
    hb.quantize_(model, progress=False)
    summary = hb.summary(model)
    assert sum(layer.float_bytes for layer in summary.layers) == total
    assert sum(layer.bytes for layer in summary.layers) == 8 * 8 + 4 * 8 + 2 * 4 * 8 + packed(model[0])


def test_forms_agree(model):
    summary = hb.summary(model, IDS)
    data = json.loads(summary.to_json())
    assert [row["name"] for row in data["layers"]] == ["up", "down", "head", "unused"]
    assert data["layers"][0]["ms"] == summary.layers[0].ms and data["threads"] == torch.get_num_threads()
    text, markdown = str(summary), summary.to_markdown()
    for layer in summary.layers:
        assert layer.name in text and layer.kernel in markdown and layer.why_float in text
    assert "2 of 4" not in text and "3 of 4 linear layers quantized" in text
    width = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(width) == 1


def test_float_layers_of_transformers():
    transformers = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D belongs to transformers")
    (row,) = hb.summary(transformers.Conv1D(6, 4), torch.randn(2, 4)).layers
    assert (row.in_features, row.out_features, row.scheme) == (4, 6, "float") and row.float_ms > 0


def test_what_is_timed_is_a_call_as_users_make_it(model, monkeypatch):
    seen = []
    handle = model.up.register_forward_hook(lambda *_: seen.append("hook"))
    checked = hb.QLinear._checked
    monkeypatch.setattr(hb.QLinear, "_checked", lambda self, x: (seen.append("checked"), checked(self, x))[1])
    hb.summary(model, {"ids": IDS, "twice": False})
    # Two layers run once in the model and once, before the short way is prepared, in their twins.
    assert seen.count("checked") == 4 and seen.count("hook") == 1
    handle.remove()


def test_a_call_does_not_build_its_plan_again(model):
    layer, x = model.up, torch.randn(3, 2, 24).transpose(0, 1)
    layer(x)
    plan = layer._plan
    layer(x)
    assert layer._plan is plan
    layer.weight_codes.neg_()
    layer(x)
    assert layer._plan is not plan


def test_only_modules_are_summarized():
    with pytest.raises(hb.DTypeError, match="summary takes a model .* not NoneType"):
        hb.summary(None)
