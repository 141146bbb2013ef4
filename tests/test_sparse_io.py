"""Sparse layers in files: saved, loaded, inspected; damage is found and named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte import io, manifest
from halfbyte.cli.inspect import examine
from halfbyte.sparse.scheme import NAMES
from models import TOKENS, Model, report
from sparse_layers import CODES, SHAPES, prune_linear, sparse, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
schemes = pytest.mark.parametrize("name", NAMES)


def mixed(name):
    """A model with sparse, quantized and float layers."""
    model = Model(2).eval()
    for layer in (model.blocks[0].up, model.blocks[0].down, model.head):
        prune_linear(layer, hb.SparseScheme.parse(name).pattern)
    hb.sparsify_(model, "always", scheme=name, progress=False)
    hb.quantize_(model, exclude="blocks.1.up", progress=False)
    assert set(sparse_layers(model)) == {"blocks.0.up", "blocks.0.down", "head"}
    model.head.activation = "relu"
    if name in CODES:
        model.blocks[0].up.static = (0.03, 2)
    return model


@schemes
def test_a_model_comes_back(name, tmp_path):
    model = mixed(name)
    hb.save(model, tmp_path)
    text = json.loads((tmp_path / "halfbyte.json").read_text())
    assert text["version"] == 3 and text["layers"]["head"]["kind"] == "sparse"
    assert text["layers"]["head"]["scheme"] == name and text["layers"]["blocks.1.down"]["kind"] == "linear"
    quantized = hb.quantize_(Model(2), exclude="blocks.1.up", progress=False)
    for fresh in (Model(2), quantized, mixed("f32+unstructured")):
        fresh = hb.load(fresh.eval(), tmp_path)
        got, want = fresh.state_dict(), model.state_dict()
        assert list(got) == list(want)
        for key, value in want.items():
            same(got[key], value, key)
        same(fresh(TOKENS), model(TOKENS))
        assert fresh.head.activation == "relu" and fresh.blocks[0].up.static == model.blocks[0].up.static
        rows = report(fresh)
        assert rows["head"] == ("sparse", "") and rows["blocks.1.down"] == ("quantized", "")
        assert rows["blocks.1.up"] == ("float", "excluded")
    with pytest.raises(hb.ShapeError, match="^head: x has"):
        fresh.head(torch.ones(2, 3))


@schemes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_comes_back(name, shape, tmp_path):
    layer = hb.SparseLinear(sparse(shape, name))
    hb.save(layer, tmp_path)
    fresh = hb.load(nn.Linear(shape[1], shape[0], bias=False), tmp_path)
    same(fresh.dequantize(), layer.dequantize())
    hb.save(hb.SparseLinear(hb.sparsify(torch.zeros(shape), name)), tmp_path)
    same(hb.load(fresh, tmp_path).dequantize(), torch.zeros(shape))


def test_models_without_sparse_layers_keep_their_version(tmp_path):
    hb.save(hb.quantize_(nn.Linear(8, 8), progress=False), tmp_path)
    assert json.loads((tmp_path / "halfbyte.json").read_text())["version"] == 2


def test_shared_weights_are_stored_once(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        return model

    model = make()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    hb.sparsify_(model, "always")
    hb.save(model, tmp_path)
    saved = manifest.read(tmp_path)
    assert saved.aliases["1.weight_values"] == "0.weight_values"
    fresh = hb.load(make(), tmp_path)
    assert fresh[0].weight_values is fresh[1].weight_values and fresh[0]._prepare() is fresh[1]._prepare()
    found = examine(tmp_path)["layers"]
    assert found[1]["bytes"] == found[1]["float_bytes"] == 4 * 16  # its bias


# Damage


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{scheme: a saved layer 33 x 70}"""
    found = {}
    for name in ("w8a8+block16x4", "w8a8+2:4", "f32+unstructured"):
        found[name] = tmp_path_factory.mktemp("saved")
        hb.save(nn.Sequential(hb.SparseLinear(sparse((33, 70), name), torch.zeros(33))), found[name])
    return found


DAMAGE = {
    "unsorted": ("f32+unstructured", "columns", lambda t: t.flip(0), r"0: columns\[\d+\].* unsorted"),
    "out of range": ("f32+unstructured", "columns", lambda t: t + 60, r"0: columns\[\d+\] is"),
    "short": ("f32+unstructured", "values", lambda t: t[:-1], "0: values has the shape"),
    "nan": ("f32+unstructured", "values", lambda t: t * torch.nan, "0: values.* is a NaN"),
    "dtype": ("w8a8+2:4", "values", lambda t: t.float(), "0: values has the dtype"),
    "positions": ("w8a8+2:4", "positions", lambda t: t * 0, "0: positions of row 0 do not ascend"),
    "scale": ("w8a8+2:4", "scale", lambda t: -t, r"0: scale\[0\] is not positive"),
    "crow": ("w8a8+block16x4", "crow", lambda t: t + 1, "0: crow goes from 1"),
    "no values": ("w8a8+block16x4", "values", None, r"0\.weight_values is missing"),
    "no crow": ("w8a8+block16x4", "crow", None, "0: .* lacks crow"),
    "no bias": ("w8a8+block16x4", "bias", None, r"0\.bias must be"),
}


@pytest.mark.parametrize(("name", "part", "change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tensors(good, tmp_path, name, part, change, message):
    saved = manifest.read(good[name])
    tensors = io._tensors(saved)
    key = "0.bias" if part == "bias" else f"0.weight_{part}"
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key]).contiguous()
    with manifest.replacing(tmp_path, saved.layers, saved.aliases, saved.floats) as path:
        io.save_file(tensors, path)
    model = nn.Sequential(nn.Linear(70, 33))
    layer = model[0]
    with pytest.raises(hb.FormatError, match=f"{message}.*save the model again"):
        hb.load(model, tmp_path)
    assert model[0] is layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(version=2), "the kind 'sparse' of '0' is unknown"),
        (lambda t: t["layers"]["0"].update(scheme="w8a8"), "no kernel runs the sparse scheme 'w8a8'"),
        (lambda t: t["layers"]["0"].update(scheme="w8a8+3:4"), "no kernel runs the sparse scheme"),
        (lambda t: t["layers"]["0"].update(kind="linear"), "is a scheme of sparse weights"),
        (lambda t: t["layers"]["0"].update(scheme="f32+2:4", static=True), "'0' has a static scale"),
    ],
)
def test_damaged_manifests(good, tmp_path, change, message):
    source = good["w8a8+2:4"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = json.loads((tmp_path / "halfbyte.json").read_text())
    change(text)
    (tmp_path / "halfbyte.json").write_text(json.dumps(text))
    with pytest.raises(hb.FormatError, match=f"is damaged .*{message}"):
        hb.load(nn.Sequential(nn.Linear(70, 33)), tmp_path)


def test_another_scheme_than_the_tensors_have(good, tmp_path):
    saved = manifest.read(good["w8a8+2:4"])
    entry = dict(vars(saved.layers["0"])) | {"scheme": hb.SparseScheme.parse("w8a8+block16x4")}
    with manifest.replacing(tmp_path, {"0": manifest.LayerEntry(**entry)}, {}, {}) as path:
        io.save_file(io._tensors(saved), path)
    with pytest.raises(hb.FormatError, match="0: a SparseTensor of the scheme .* lacks crow"):
        hb.load(nn.Sequential(nn.Linear(70, 33)), tmp_path)


@schemes
def test_a_layer_that_is_changed_wrongly_is_not_saved(name, tmp_path):
    layer = hb.SparseLinear(sparse((33, 70), name))
    if layer.weight_positions is None:
        layer.weight_columns[:] = layer.weight_columns.flip(0)
    else:
        layer.weight_positions[:] = 0xFF
    with pytest.raises(hb.ModelError, match="^the model: "):
        hb.save(layer, tmp_path)
    assert not list(tmp_path.iterdir())


@schemes
def test_inspect(name, tmp_path, capsys):
    from halfbyte.cli import main

    model = mixed(name)
    hb.save(model, tmp_path)
    found = {layer["name"]: layer for layer in examine(tmp_path)["layers"]}
    head = found["head"]
    assert (head["kind"], head["scheme"], head["activation"]) == ("sparse", name, "relu")
    assert head["bytes"] == model.head.sparse.nbytes + model.head.bias.nbytes
    assert head["input_codes"] == ("per token" if name in CODES else "none")
    assert found["blocks.0.up"]["input_codes"] == ("fixed scale" if name in CODES else "none")
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert name in text and "quantized or sparse layers" in text


def test_inspect_without_torch(good):
    code = "import sys; sys.modules['torch'] = None; from halfbyte.cli import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", code, "inspect", str(good["w8a8+2:4"])]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "w8a8+2:4" in done.stdout, done.stderr
