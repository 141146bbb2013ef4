"""Patterns among quantized layers of modules that are no known block; and the tracing that finds them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfbyte as hb
from fusing import check_close, error, forward_of, fused_calls, left_alone, roused
from halfbyte.fuse.attach import fused_of
from halfbyte.fuse.trace import Untraceable, trace
from models import TOKENS, Block, Model

X = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(48, 72), nn.Linear(48, 72), nn.Linear(72, 48)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Shorter(nn.Module):
    """The names that Llama's own code has."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(48, 40), nn.Linear(40, 48), nn.Linear(48, 40)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Residual(nn.Module):
    """One activation by torch's function, and two sums."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(48), nn.Linear(48, 64), nn.Linear(64, 48)
        self.second, self.drop, self.scaled = nn.Linear(48, 48), nn.Dropout(0.1), False

    def forward(self, x, mask=None):
        x = x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))
        x = torch.add(self.second(self.drop(x)), x)
        if self.scaled:
            x = x + x
        return x


def sequential(*activations):
    layers, widths = [], [48, 80, 24, 48]
    for i, activation in enumerate(activations):
        layers += [nn.Linear(widths[i], widths[i + 1]), activation]
    return nn.Sequential(*layers)


# name: (module, what the report says)
FOUND = {
    "sequential": (sequential(nn.GELU(), nn.ReLU(), nn.SiLU()), "3 linear + activation"),
    "one": (
        nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 30), nn.GELU("tanh"), nn.Dropout()),
        "1 norm + linear, 1 linear + activation",
    ),
    "inplace": (sequential(nn.ReLU(inplace=True), nn.Tanh()), "1 linear + activation"),
    "gated": (Gated(), "1 linear + activation, 1 gated product"),
    "gelu gated": (Gated(nn.GELU()), "1 linear + activation, 1 gated product"),
    "w1 w2 w3": (Shorter(), "1 linear + activation, 1 gated product"),
    "residual": (Residual(), "1 norm + linear, 1 linear + activation, 2 linear + residual"),
    "block": (Block(48), "1 linear + activation, 1 linear + residual"),
}


def make(name, scheme="w8a8"):
    model = roused(copy.deepcopy(FOUND[name][0]))
    return hb.quantize_(model, scheme, progress=False)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w4a16_g32+asym"])
@torch.no_grad()
def test_patterns(name, scheme):
    model = make(name, scheme)
    want = model(X)
    hb.fuse_(model)
    (row,) = hb.fusion_report(model).rows
    assert (row.what, row.reason) == (FOUND[name][1], "") and row.blocks == sum(
        int(n) for n in row.what if n.isdigit()
    )
    with fused_calls(model, 3):
        first = model(X)  # plans are made
        again = model(X)
        one = model(X[0, 0])
    check_close(first, want)
    quantized = scheme if "norm" in row.what else None  # a norm's rounding may move a code
    check_close(again, want, quantized)
    check_close(one, want[0, 0], quantized)
    assert torch.equal(hb.unfuse_(model)(X), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits(dtype):
    model = hb.quantize_(roused(Gated()).to(dtype), "w8a8", progress=False)
    want = model(X.to(dtype))
    y = hb.fuse_(model)(X.to(dtype))
    assert y.dtype is dtype and error(y, want) < 0.03


@torch.no_grad()
def test_in_a_model():
    model = hb.quantize_(roused(Model()), "w8a8", progress=False)
    want = model(TOKENS)
    hb.fuse_(model)
    assert [row.name for row in hb.fusion_report(model).fused] == ["blocks.0", "blocks.1", "blocks.2"]
    check_close(model(TOKENS), want)
    assert [forward_of(block).calls for block in model.blocks] == [1, 1, 1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_close(twin(TOKENS), want)
        assert forward_of(twin.blocks[1]).calls == 1
    hb.unfuse_(model)
    assert torch.equal(model(TOKENS), want)


@torch.no_grad()
def test_the_layers_own_activation():
    model = make("sequential")
    model[2].activation = "relu"
    want = model(X)
    hb.fuse_(model)
    check_close(model(X), want)
    model[0].activation = "silu"  # behind the back of what fuse_ found
    check_close(model(X), hb.unfuse_(model)(X))


@torch.no_grad()
def test_hooks_are_run():
    model, note = hb.fuse_(make("sequential")), []
    model(X)
    model(X)
    handle = model[0].register_forward_hook(lambda m, args, output: note.append("linear") or output * 2)
    with fused_calls(model):
        y = model(X)
    assert note == ["linear"]
    check_close(y, hb.unfuse_(model)(X))
    hb.fuse_(model)
    handle.remove()
    model(X)
    handle = model[1].register_forward_hook(lambda m, args, output: note.append("activation"))
    note.clear()
    with fused_calls(model):
        model(X)
    assert note == ["activation"] and hb.fusion_report(model).rows[0].what == "2 linear + activation"
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: note.append(type(m)))
    note.clear()
    with left_alone(model, "hook"):
        model(X)
    assert nn.ReLU in note
    handle.remove()
    with fused_calls(model):
        model(X)
    assert hb.fusion_report(model).rows[0].what == "3 linear + activation"


CHANGES = {
    "activation": lambda m: m.__setitem__(1, nn.Tanh()),
    "other activation": lambda m: m.__setitem__(1, nn.ReLU()),
    "option": lambda m: setattr(m[1], "approximate", "tanh"),
    "layer": lambda m: m.__setitem__(0, hb.QLinear.from_linear(nn.Linear(48, 80))),
    "float layer": lambda m: m.__setitem__(2, nn.Linear(80, 24).requires_grad_(False)),
    "scale": lambda m: m[0].weight_scale.mul_(2),
    "inserted": lambda m: m.insert(1, nn.LayerNorm(80).requires_grad_(False)),
    "removed": lambda m: m.__delitem__(5),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_after_fuse_(change):
    model = hb.fuse_(make("sequential"))
    before = model(X)
    CHANGES[change](model)
    y = model(X)
    assert y.shape != before.shape or not torch.equal(y, before)
    check_close(y, hb.unfuse_(model)(X))


@torch.no_grad()
def test_a_flag_that_the_forward_reads():
    model = hb.fuse_(make("residual"))
    y = model(X)
    model.scaled = True
    with fused_calls(model):
        check_close(model(X), 2 * y)


@torch.no_grad()
def test_layers_that_are_float_again():
    model = hb.fuse_(make("block"))
    for name, width in (("up", (48, 96)), ("down", (96, 48))):
        setattr(model, name, nn.Linear(*width, bias=name == "up").requires_grad_(False))
    with left_alone(model, "no quantized layer"):
        model(X)


def test_calls_that_are_not_known():
    model = hb.fuse_(make("residual"))
    with torch.no_grad(), left_alone(model, "something else than its input"):
        model(X, torch.ones(1))
    with left_alone(model, "gradient"):
        assert model(X).requires_grad
    model.requires_grad_(False)
    x = X.clone().requires_grad_()
    block = hb.fuse_(hb.quantize_(nn.Sequential(nn.Linear(48, 48), nn.ReLU()), "w8a8", progress=False))
    with left_alone(block, "gradient"):
        block(x).sum().backward()
    assert x.grad.abs().max() > 0


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.calls, self.log = nn.Linear(48, 48), nn.ReLU(), 0, []


def untraceable(forward):
    return type("Made", (Branch,), {"forward": forward})()


def branches(self, x):
    return self.act(self.a(x)) if x.sum() > 0 else x


def counts(self, x):
    self.calls = self.calls + 1
    return self.act(self.a(x))


def logs(self, x):
    self.log.append(x)
    return self.act(self.a(x))


def asks(self, x):
    return self.act(self.a(x)) if x.shape[0] > 1 else x


def in_place(self, x):
    y = self.act(self.a(x))
    y += x
    return y


def scales(self, x):
    return self.act(self.a(x)) * 2


def two(self, x, y):
    return self.act(self.a(x)) + y


def pair(self, x):
    return self.act(self.a(x)), x


def earlier(self, x):
    y = self.act(self.a(x))
    self.a(x)
    return y


def inner(self, x):
    return [self.act(self.a(part)) for part in (x, x)][0]


def keyword(self, *, x):
    return self.act(self.a(x))


@pytest.mark.parametrize(
    "forward", [branches, counts, logs, asks, in_place, scales, two, pair, earlier, inner, keyword]
)
def test_what_is_not_traced(forward):
    model = hb.quantize_(untraceable(forward), "w8a8", progress=False)
    with pytest.raises(Untraceable):
        trace(model)
    hb.fuse_(model)
    assert fused_of(model) is None and not hb.fusion_report(model).rows
    assert model.calls == 0 and not model.log, "looking at a module changes nothing"


def test_trace():
    steps = trace(Gated()).steps
    assert [step.call for step in steps[:3]] == ["gate_proj", "act_fn", "up_proj"]
    assert [step.arguments for step in steps] == [(0,), (1,), (0,), (2, 3), (4,)]
    assert trace(Residual()).values == {"scaled": False}


def twice(self, x):
    y = self.a(x)
    return self.act(y) + y


def apart(self, x):
    return self.act(x) + self.act(self.a(x))


@torch.no_grad()
def test_a_value_that_is_used_twice_is_kept():
    model = hb.quantize_(untraceable(twice), "w8a8", progress=False)
    hb.fuse_(model)
    assert fused_of(model) is None
    model = hb.quantize_(untraceable(apart), "w8a8", progress=False)
    want = model(X)
    check_close(hb.fuse_(model)(X), want)
    assert hb.fusion_report(model).rows[0].what == "1 linear + activation, 1 linear + residual"


def test_float_layers_are_no_pattern():
    assert not hb.fusion_report(hb.fuse_(sequential(nn.ReLU(), nn.ReLU()))).rows
