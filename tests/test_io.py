"""save and load: round trips, replacement whole or not at all, and every kind of damaged or foreign file."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte import manifest


class Net(nn.Module):
    """Float and quantized parts, a buffer, a tied embedding, shared modules and tied codes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.three.weight = self.one.weight
        self.again = self.two
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.again(torch.relu(self.three(self.two(torch.relu(self.one(self.embed(ids)))))))
        return self.head(self.norm(x))


IDS = torch.arange(11)


def trained():
    model = Net().eval()
    nn.init.normal_(model.norm.running_mean)
    hb.quantize_(model)
    model.three.static = (0.02, -5)
    model.one.activation = "relu"
    return model


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    model = trained()
    hb.save(model, tmp_path / "out")
    return model, tmp_path / "out"


def test_round_trip(saved):
    model, out = saved
    fresh = Net().eval()
    assert hb.load(fresh, out) is fresh
    assert same_state(state(fresh), state(model))
    same(fresh(IDS), model(IDS))
    assert fresh.three.static == model.three.static and fresh.one.activation == "relu"
    assert fresh.again is fresh.two and fresh.head.weight is fresh.embed.weight
    assert fresh.three.weight_codes is fresh.one.weight_codes
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]


def test_what_is_on_disk(saved):
    model, out = saved
    text = json.loads((out / "halfbyte.json").read_bytes())
    assert set(files(out)) == {"halfbyte.json", text["weights"]["file"]}
    assert (text["format"], text["version"], text["halfbyte_version"]) == ("halfbyte", 2, hb.__version__)
    assert text["layers"]["three"] == {
        "kind": "linear",
        "scheme": "w8a8",
        "in": 8,
        "out": 8,
        "bias": True,
        "static": True,
        "activation": "none",
    }
    assert text["aliases"] == {
        "three.weight_codes": "one.weight_codes",
        "three.weight_scale": "one.weight_scale",
        "again.weight_codes": "two.weight_codes",
        "again.weight_scale": "two.weight_scale",
        "head.weight": "embed.weight",
    }
    assert [path.stat().st_mode & 0o444 for path in out.iterdir()] == [0o444] * 2
    read = manifest.read(out)
    assert read.layers["one"].in_ == 8 and read.weights == out / text["weights"]["file"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_keeps_its_own_dtype(dtype, tmp_path):
    model = hb.quantize_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(dtype))
    hb.save(model, tmp_path)
    fresh = hb.load(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(dtype), tmp_path)
    assert same_state(state(fresh), state(model)) and fresh[1].weight.dtype == dtype
    wide = hb.load(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), tmp_path)
    assert wide[1].weight.dtype == torch.float32 and wide[0].weight.dtype == torch.float32


def test_a_bare_layer_and_a_conv1d(tmp_path):
    layer, x = hb.quantize_(nn.Linear(6, 3)), torch.randn(2, 6)
    hb.save(layer, tmp_path)
    fresh = hb.load(nn.Linear(6, 3), str(tmp_path))
    same(fresh(x), layer(x))
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    same(hb.load(conv1d(3, 6), tmp_path)(x), layer(x))


def test_loading_into_a_quantized_model(saved):
    model, out = saved
    other = hb.quantize_(Net().eval())
    other(IDS)
    same(hb.load(other, out)(IDS), model(IDS))


def test_views_of_one_memory_are_saved_apart(tmp_path):
    class Views(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("head", base[:3])
            self.register_buffer("tail", base[2:])
            self.register_buffer("turned", base.view(2, 3).t())

    model = hb.quantize_(Views(torch.arange(6.0)))
    hb.save(model, tmp_path)
    apart = Views(torch.zeros(6))
    apart.head, apart.tail, apart.turned = torch.zeros(3), torch.zeros(4), torch.zeros(3, 2)
    assert same_state(state(hb.load(apart, tmp_path)), state(model))


def test_saving_again_replaces_and_leaves_other_files_alone(saved):
    model, out = saved
    (out / "tokenizer.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_text("not ours")
    model.two.weight_codes.neg_()
    hb.save(model, out)
    assert len(files(out)) == 4
    assert same_state(state(hb.load(Net(), out)), state(model))
    hb.save(model, out)
    assert len(files(out)) == 4


@pytest.mark.parametrize("step", range(20))
def test_a_crash_at_any_step_leaves_the_old_or_the_new_model(saved, monkeypatch, step):
    model, out = saved
    old = state(model)
    model.two.weight_codes.neg_()
    calls, os_close = [], os.close

    def crash(f):
        def wrapped(*args, **kwargs):
            calls.append(f)
            if len(calls) == step + 1:
                if f is os_close:
                    f(*args)  # a close that fails has closed
                raise OSError("disk full")
            return f(*args, **kwargs)

        return wrapped

    for name in ("replace", "fsync", "open", "close"):
        monkeypatch.setattr(os, name, crash(getattr(os, name)))
    monkeypatch.setattr("halfbyte.io.save_file", crash(hb.io.save_file))
    try:
        hb.save(model, out)
        failed = False
    except OSError:
        failed = True
    monkeypatch.undo()
    assert failed == (len(calls) > step)
    got = state(hb.load(Net(), out))
    assert same_state(got, old) or same_state(got, state(model))
    assert not failed or calls.count(os.replace) == 2 or same_state(got, old)
    hb.save(model, out)
    assert same_state(state(hb.load(Net(), out)), state(model))
    assert not [name for name in files(out) if name.endswith(".tmp")] and len(files(out)) == 2


def refused(out, error=hb.FormatError, says=".", strict=True):
    """load raises, and the model is as before: its modules, parameters and their values."""
    model = Net()
    modules, before = list(model.modules()), state(model)
    with pytest.raises(error, match=says) as caught:
        hb.load(model, out, strict=strict)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and same_state(
        state(model), before
    )
    return str(caught.value)


@pytest.mark.parametrize("which", ["json", "safetensors"])
def test_truncated_anywhere(saved, which):
    _, out = saved
    path = next(out.glob(f"*.{which}"))
    data = path.read_bytes()
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        if which == "json" and data[size:].strip() == b"":
            continue
        assert path.name in refused(out)


@pytest.mark.parametrize("which", ["json", "safetensors"])
def test_a_flipped_bit_is_found_or_harmless(saved, which):
    model, out = saved
    path = next(out.glob(f"*.{which}"))
    data, rng, harmless = path.read_bytes(), random.Random(1), 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = hb.load(Net().eval(), out)
        except hb.FormatError as error:
            assert str(out) in str(error)
        else:
            harmless += 1
            assert same_state(state(loaded), state(model))
            same(loaded(IDS), model(IDS))
    assert harmless == 0 if which == "safetensors" else harmless < 60


def edit(out, change):
    path = out / "halfbyte.json"
    text = json.loads(path.read_bytes())
    change(text)
    path.write_text(json.dumps(text))


def test_version_1_is_read(saved):
    """It knew layers of one kind, and did not name it."""

    def old(text):
        text["version"] = 1
        for layer in text["layers"].values():
            del layer["kind"]

    model, out = saved
    edit(out, old)
    assert same_state(state(hb.load(Net(), out)), state(model))


EDITS = {
    "no kind": (lambda t: t["layers"]["one"].pop("kind"), "lacks 'kind'"),
    "other kind": (lambda t: t["layers"]["one"].update(kind="conv"), "the kind 'conv'"),
    "newer version": (
        lambda t: t.update(version=4, halfbyte_version="7.1"),
        "version 4, written by halfbyte 7.1.*upgrade",
    ),
    "no version": (lambda t: t.pop("version"), "damaged"),
    "version zero": (lambda t: t.update(version=0), "damaged"),
    "version true": (lambda t: t.update(version=True), "damaged"),
    "foreign": (lambda t: t.update(format="gguf"), "not written by halfbyte"),
    "no layers": (lambda t: t.pop("layers"), "lacks 'layers'"),
    "layers a list": (lambda t: t.update(layers=[]), "'layers' is"),
    "layer a list": (lambda t: t["layers"].update(one=[]), "damaged"),
    "no in": (lambda t: t["layers"]["one"].pop("in"), "lacks 'in'"),
    "in a string": (lambda t: t["layers"]["one"].update({"in": "8"}), "'in' is '8'"),
    "other in": (
        lambda t: t["layers"]["one"].update({"in": 9}),
        "'one' with 9 -> 8 features, the model with 8 -> 8",
    ),
    "scheme": (lambda t: t["layers"]["one"].update(scheme="w3a3"), "w3a3"),
    "activation": (lambda t: t["layers"]["one"].update(activation="tanh"), "tanh"),
    "bias dropped": (lambda t: t["layers"]["one"].update(bias=False), "the model has no 'one.bias'"),
    "bias invented": (lambda t: t["layers"]["two"].update(bias=True), "two.bias must be"),
    "static dropped": (
        lambda t: t["layers"]["three"].update(static=False),
        "the model has no 'three.input_scale'",
    ),
    "static invented": (lambda t: t["layers"]["one"].update(static=True), "one.input_scale must be"),
    "layer renamed": (lambda t: t["layers"].update(four=t["layers"].pop("one")), "no module 'four'"),
    "layer is a norm": (
        lambda t: t["layers"].update(norm=t["layers"].pop("one")),
        "'norm', which in the model is a Batch",
    ),
    "file outside": (
        lambda t: t["weights"].update(file="../model-0123456789abcdef.safetensors"),
        "no name of",
    ),
    "other file": (
        lambda t: t["weights"].update(file="model-0123456789abcdef.safetensors"),
        "cannot be read",
    ),
    "other digest": (lambda t: t["weights"].update(sha256="0" * 64), "corrupt"),
    "alias to nowhere": (lambda t: t["aliases"].update({"head.weight": "nowhere"}), "nowhere"),
    "alias dropped": (lambda t: t["aliases"].pop("head.weight"), "the file has no 'head.weight'"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_json_is_refused(saved, what):
    change, says = EDITS[what]
    edit(saved[1], change)
    assert str(saved[1]) in refused(saved[1], says=says)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"a": 1}', "\xff\xfe", "[" * 100000, '{"format": []}']
)
def test_foreign_json(saved, text):
    (saved[1] / "halfbyte.json").write_bytes(text.encode("latin1"))
    assert "halfbyte.json" in refused(saved[1])


def test_missing_files(saved, tmp_path):
    refused(tmp_path / "nothing", says="no halfbyte.json")
    refused(saved[1] / "halfbyte.json", says="is a file")
    next(saved[1].glob("*.safetensors")).unlink()
    refused(saved[1], says="cannot be read")


def test_a_file_of_other_tensors_that_is_listed_right(saved):
    from safetensors.torch import save_file

    _, out = saved
    path = next(out.glob("*.safetensors"))
    for content, says in ((b"not safetensors at all", "no safetensors file"),
                          ({"one.weight_codes": torch.zeros(8, 8)}, "lacks the tensor|must be torch.int8"),
                          ({}, "lacks the tensor")):  # fmt: skip
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        digest = manifest._sha256(path)
        edit(out, lambda t, d=digest: t["weights"].update(sha256=d, bytes=path.stat().st_size))
        refused(out, says=says)


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(9)


def test_another_model(saved):
    _, out = saved
    for strict in (True, False):
        model = Wider()
        before = state(model)
        with pytest.raises(hb.FormatError, match=r"'norm.*\(8,\).*\(9,\)"):
            hb.load(model, out, strict=strict)
        assert same_state(state(model), before) and type(model.one) is nn.Linear


def test_strict(saved):
    trained_model, out = saved
    model = Net().eval()
    del model.norm
    model.extra = nn.Linear(3, 3)
    with pytest.raises(hb.FormatError, match="the file has no 'extra.*the model has no 'norm"):
        hb.load(model, out)
    with pytest.warns(UserWarning, match="extra.weight"):
        hb.load(model, out, strict=False)
    assert (
        torch.equal(model.one.weight_codes, trained_model.one.weight_codes) and type(model.extra) is nn.Linear
    )


def test_a_meta_model_is_refused(saved):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(hb.DeviceError, match="build the model on the CPU"):
        hb.load(model, saved[1])
    assert type(model.one) is nn.Linear


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(hb.ModelError, match="quantize_"):
        hb.save(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(hb.DeviceError, match="0.weight_codes is on the meta device"):
        hb.save(hb.quantize_(nn.Sequential(nn.Linear(2, 2))).to("meta"), tmp_path / "a")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(hb.ModelError, match="1._extra_state.*not a tensor"):
        hb.save(hb.quantize_(nn.Sequential(nn.Linear(2, 2), Extra(2, 2))), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        hb.save(trained(), tmp_path / "file")
