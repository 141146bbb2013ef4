"""What a saved model and a state_dict carry beyond tensors, what they refuse, and saves at the same time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from models import TOKENS, Model, quantized, report


def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_reasons_and_names_are_restored(tmp_path):
    model = hb.quantize_(Model(1), exclude="head")
    hb.save(model, tmp_path)
    fresh = hb.load(Model(1), tmp_path)
    assert report(fresh) == report(model) and report(fresh)["head"] == ("float", "excluded")
    assert [row.why_float for row in hb.summary(fresh).layers] == [
        row.why_float for row in hb.summary(model).layers
    ]
    with pytest.raises(hb.ShapeError, match=r"^blocks\.0\.up: x has the shape"):
        fresh.blocks[0].up(torch.randn(2, 15))


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w4a8_g64", None),
        ("w8a16", None),
        ("w4a16_g32+asym", "hqq"),
        ("w4a16_g32+asym", "absmax"),
        ({"*.up": "w4a16_g32+nf4", "*.down": "w4a8_g32+ag32", "_default": "w8a8+asym"}, None),
    ],
    ids=str,
)
def test_round_trip_of_schemes(scheme, method, tmp_path):
    model = hb.quantize_(Model(1).eval(), scheme, method=method)
    hb.save(model, tmp_path)
    want = model.state_dict()
    for fresh in (Model(1).eval(), hb.quantize_(Model(1).eval(), "w4a8_g32")):
        got = hb.load(fresh, tmp_path).state_dict()
        assert list(got) == list(want)
        for name in want:
            same(got[name], want[name], name)
        same(fresh(TOKENS), model(TOKENS))
        assert [str(m.scheme) for m in fresh.modules() if isinstance(m, hb.QLinear)] == [
            str(m.scheme) for m in model.modules() if isinstance(m, hb.QLinear)
        ]


def test_loading_in_inference_mode_keeps_shared_codes(tmp_path):
    model = plain()
    model.append(nn.Linear(8, 4))
    model[3].weight = model[2].weight
    hb.save(hb.quantize_(model), tmp_path)
    with torch.inference_mode():
        fresh = hb.load(nn.Sequential(*plain(), nn.Linear(8, 4)), tmp_path)
    assert fresh[2].weight_codes is fresh[3].weight_codes
    assert not any(buffer.is_inference() for buffer in fresh.buffers())


def test_loading_loses_nothing_of_the_model(tmp_path):
    hb.save(hb.quantize_(plain()), tmp_path)
    fresh = plain()
    fresh[2].register_forward_hook(lambda *_: None)
    with pytest.raises(hb.ModelError, match="2 cannot be replaced: it has hooks"):
        hb.load(fresh, tmp_path)
    assert not quantized(fresh)


@pytest.mark.parametrize("change", [lambda m: m.input_scale.zero_(), lambda m: m.input_zero.fill_(500)])
def test_a_static_scale_that_is_none_is_refused(tmp_path, monkeypatch, change):
    model, x = hb.quantize_(plain()), torch.randn(2, 8)
    model[2].static = (0.02, 3)
    model(x)
    change(model[2])
    for _ in range(3):
        with pytest.raises(ValueError, match="^2: the static"):
            model(x)
    with pytest.raises(hb.ModelError, match="^2: the static"):
        hb.save(model, tmp_path)
    monkeypatch.setattr("halfbyte.io.check_static", lambda _: None)
    hb.save(model, tmp_path)
    with pytest.raises(hb.FormatError, match="2: the static"):
        hb.load(plain(), tmp_path)


@pytest.mark.parametrize("lacks", ["input_scale", "input_zero"])
@pytest.mark.parametrize("strict", [True, False])
def test_half_a_static_quantization_is_refused(lacks, strict):
    source, target = hb.quantize_(plain()), hb.quantize_(plain())
    source[2].static = (0.02, 3)
    state = source.state_dict()
    del state[f"2.{lacks}"]
    with pytest.raises(RuntimeError, match=r"2\.input_\w+ comes alone"):
        target.load_state_dict(state, strict=strict)
    assert target[2].static is None and target(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_checkpoint_is_refused(strict):
    state = plain().state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight is float .* load it before quantize_"):
        hb.quantize_(plain()).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("through", [copy.deepcopy, "a file"])
def test_a_state_of_other_numbers_is_refused(strict, through, tmp_path):
    """nf4 and integers of 4 bits have tensors of the same names, shapes and dtypes."""

    def make(scheme):
        return hb.quantize_(nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 4)), scheme, embeddings=scheme)

    def state(scheme):
        if callable(through):
            return through(make(scheme).state_dict())
        torch.save(make(scheme).state_dict(), tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt", weights_only=True)

    for saved, own in (("w4a16_g64+nf4", "w4a16_g64"), ("w4a8_g64", "w4a16_g64+nf4")):
        target = make(own)
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(RuntimeError) as error:
            target.load_state_dict(state(saved), strict=strict)
        for name in "01":
            assert f"{name}.weight_codes is of the scheme {saved} and this layer of {own}" in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    target, source = make("w4a8_g64"), make("w4a16_g64")  # the same weights, for other activations
    target.load_state_dict(copy.deepcopy(source.state_dict()), strict=strict)
    same(target[1].weight_codes, source[1].weight_codes)
    target.load_state_dict(dict(state("w4a16_g64+nf4")), strict=strict)  # no metadata: nothing to compare


@pytest.mark.parametrize("call", [hb.save, hb.load])
def test_only_modules_are_saved_and_loaded(tmp_path, call):
    with pytest.raises(hb.DTypeError, match=f"{call.__name__} takes a model"):
        call(None, tmp_path)


def test_without_safetensors_the_extra_is_named():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import halfbyte\n"
        "try: halfbyte.save\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "'safetensors'" in done.stdout and "halfbyte[torch]" in done.stdout, done.stderr


def test_saves_at_once_leave_one_whole_model(tmp_path):
    models = [hb.quantize_(plain()) for _ in range(4)]
    errors = []

    def save(model):
        try:
            for _ in range(10):
                hb.save(model, tmp_path)
        except Exception as error:  # reported by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(os.listdir(tmp_path)) == 2
    codes = hb.load(plain(), tmp_path)[0].weight_codes
    assert any(torch.equal(codes, model[0].weight_codes) for model in models)


def test_a_save_does_not_take_the_weights_of_another_before_their_json(tmp_path, monkeypatch):
    """The second save starts when the first has put its weights in place, and has to wait."""
    first, second = hb.quantize_(plain()), hb.quantize_(plain())
    other = threading.Thread(target=hb.save, args=(second, tmp_path))
    replace, started = os.replace, []

    def replace_and_start(*args):
        replace(*args)
        if not started:
            started.append(other.start())
            time.sleep(0.3)

    monkeypatch.setattr(os, "replace", replace_and_start)
    hb.save(first, tmp_path)
    other.join()
    assert torch.equal(hb.load(plain(), tmp_path)[0].weight_codes, second[0].weight_codes)


def test_what_crashed_saves_left_is_swept(tmp_path):
    old, new = (tmp_path / f".halfbyte-{digit * 16}.tmp" for digit in "01")
    for path in (old, new):
        path.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    hb.save(hb.quantize_(plain()), tmp_path)
    assert not old.exists() and new.exists(), "a young one may belong to a save at work"
