"""quantize_: every failure leaves the model whole, and what cannot be replaced without loss stays float."""

from __future__ import annotations

import gc
import signal
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import halfbyte as hb
from models import Model, assert_untouched, quantized, report, snapshot


def bad_nan(model):
    model.blocks[2].down.weight.data[3, 5] = torch.nan


def bad_meta(model):
    model.blocks[2].down.to("meta")


def bad_dtype(model):
    model.blocks[2].down.double()


def bad_empty(model):
    model.blocks[2].down = nn.Linear(0, 16)


def bad_bias(model):
    model.blocks[2].down.bias = nn.Parameter(torch.zeros(16, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (bad_nan, hb.NonFiniteError, r"blocks\.2\.down\.weight .*row 3"),
        (bad_meta, hb.DeviceError, r"blocks\.2\.down\.weight is on the meta device"),
        (bad_dtype, hb.DTypeError, r"blocks\.2\.down\.weight has the dtype torch.float64"),
        (bad_empty, hb.ShapeError, r"blocks\.2\.down\.weight has the shape \(16, 0\)"),
        (bad_bias, hb.DTypeError, r"blocks\.2\.down\.bias has the dtype"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_bad_layer_leaves_the_model_as_it_was(spoil, error, says):
    model = Model()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=says):
        hb.quantize_(model)
    assert_untouched(model, before)
    hb.quantize_(model, exclude="blocks.2.down")
    assert "blocks.2.down" not in quantized(model)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"scheme": "w9a9"}, hb.SchemeError, "w9a9"),
        ({"scheme": {"head": "w9a9", "_default": "w8a8"}}, hb.SchemeError, "w9a9"),
        ({"include": "re:("}, ValueError, "'re:\\('"),
        ({"include": [0]}, hb.DTypeError, "0 is no pattern"),
        ({"exclude": [None]}, hb.DTypeError, "None is no pattern"),
        ({"scheme": {3: "w8a8"}}, hb.DTypeError, "3 is no pattern"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(options, error, says):
    model = Model()
    before = snapshot(model)
    with pytest.raises(error, match=says):
        hb.quantize_(model, **options)
    assert_untouched(model, before)


def test_float_weights_are_released_as_layers_are_replaced(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    quantize = hb.quantize

    def watched(*args, **kwargs):
        alive.append(sum(ref() is not None for ref in weights))
        return quantize(*args, **kwargs)

    monkeypatch.setattr("halfbyte.convert.quantize", watched)
    gc.disable()  # released at once, not when the collector comes by
    try:
        hb.quantize_(model)
    finally:
        gc.enable()
    assert alive == [6] * 6 + [6, 5, 4, 3, 2, 1] and not any(ref() is not None for ref in weights)


def fail_at(monkeypatch, call, error):
    """Make the given call of quantize, counted from 1, raise or do something."""
    quantize, calls = hb.quantize, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            error()
        return quantize(*args, **kwargs)

    monkeypatch.setattr("halfbyte.convert.quantize", failing)
    return calls


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3, 7])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch, call, error):
    model = Model()
    before = snapshot(model)

    def fail():
        raise error

    fail_at(monkeypatch, call, fail)
    with pytest.raises(error):
        hb.quantize_(model)
    assert_untouched(model, before)


@pytest.fixture
def python_handles_ctrl_c():
    """A process that a shell started in the background ignores it from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_during_the_replacement_waits_for_its_end(monkeypatch):
    model = Model()
    calls = fail_at(monkeypatch, 7 + 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        hb.quantize_(model)
    assert len(calls) == 14 and len(quantized(model)) == 7 and len(report(model)) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_quantizing_in_a_thread_and_under_a_foreign_handler(monkeypatch):
    model = Model()
    thread = threading.Thread(target=hb.quantize_, args=(model,))
    thread.start()
    thread.join()
    assert len(quantized(model)) == 7
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # what it says of a handler written in C
    assert len(quantized(hb.quantize_(Model()))) == 7
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_layers_know_their_names():
    model = hb.quantize_(Model(1))
    with pytest.raises(hb.ShapeError, match=r"^blocks\.0\.up: x has the shape \(2, 15\)"):
        model.blocks[0].up(torch.randn(2, 15))


SPOILS = {
    "backward hook": (lambda m: m.register_full_backward_hook(lambda *_: None), "hooks"),
    "state_dict hook": (lambda m: m.register_state_dict_pre_hook(lambda *_: None), "hooks"),
    "load hook": (lambda m: m.register_load_state_dict_post_hook(lambda *_: None), "hooks"),
    "buffer": (lambda m: m.register_buffer("mask", torch.ones(3)), "holds mask"),
    "parameter": (lambda m: m.register_parameter("lora", nn.Parameter(torch.ones(2))), "holds lora"),
    "module": (lambda m: m.add_module("adapter", nn.ReLU()), "holds adapter"),
    "attribute": (lambda m: setattr(m, "owner", [m]), "holds owner"),
}


@pytest.mark.parametrize("what", SPOILS)
def test_nothing_is_lost_by_a_replacement(what):
    spoil, says = SPOILS[what]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    spoil(model[0])
    hb.quantize_(model)
    assert quantized(model) == {"1"} and says in report(model)["0"][1]


def test_plain_attributes_move_to_the_replacement():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].tag, model[0]._is_hf_initialized, model[0].in_features = "x", True, 4
    hb.quantize_(model)
    assert quantized(model) == {"0"} and model[0].tag == "x" and model[0]._is_hf_initialized


def test_weights_of_tensor_subclasses_stay_as_they_are():
    with FakeTensorMode():
        fake = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), fake)
    hb.quantize_(model)
    assert quantized(model) == {"0"} and "its weight is a FakeTensor" in report(model)["1"][1]


def test_freed_weights_are_an_error():
    model = Model(1)
    model.head.weight.untyped_storage().resize_(0)  # as FSDP does
    with pytest.raises(hb.DeviceError, match="head.weight has no memory of its own"):
        hb.quantize_(model)
    assert not quantized(model)


@pytest.mark.parametrize("options", [{"exclude": "again"}, {"include": "2"}, {"scheme": {"again": None}}])
def test_every_name_of_a_shared_module_counts(options):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.again = model[0]
    if "scheme" in options:
        options["scheme"]["_default"] = "w8a8"
    hb.quantize_(model, **options)
    assert "0" not in quantized(model)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.again = model[0]
    assert quantized(hb.quantize_(model, include="again")) == {"0"} and model.again is model[0]


def test_inference_mode_does_not_undo_the_sharing_of_packs():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        hb.quantize_(model)
    assert model[0].weight_codes is model[1].weight_codes
    assert not any(buffer.is_inference() for buffer in model.buffers())


@pytest.mark.parametrize("call", [hb.quantize_, hb.quantize_dynamic])
@pytest.mark.parametrize("model", [None, torch.zeros(3, 3), nn.Linear])
def test_only_modules_are_quantized(call, model):
    with pytest.raises(hb.DTypeError, match=r"takes a model \(an nn.Module\), not "):
        call(model)
