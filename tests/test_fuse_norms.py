"""What a call of a quantized layer takes along beside its activation: norm, gate and residual sum.

In float32 the result is that of the core's parts called one after the other, bit for bit (prenorm.parts).
Against torch, whose norm sums in another order, a normalized value may differ by some 1e-6 of itself; where
it is quantized, that may move its code by one, a 255th of the row's range. That is 0.3 % of the length of a
row of 48, and changes the cosine of what is made of it by some 5e-6: the bounds of `fusing.check_close` hold.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from fusing import check_close, error, fused_calls, roused
from halfbyte import _core
from halfbyte.fuse.attach import fused_of
from prenorm import NORMS, K, PreNorm, X, made, normed, parts, product, what
from sparse_layers import prune_linear

SCHEMES = ["w8a8", "w8a8+ag64", "w4a8_g32", "w4a16_g32+asym", "w8a16"]
SPARSE = ["w8a8+unstructured", "w8a8+2:4", "f32+unstructured", "f32+block16x1"]


class Two(nn.Module):
    """Layers on one norm's output, of which the core does what quantizes alike at once."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(K), nn.Linear(K, 64), nn.GELU()
        self.down, self.short = nn.Linear(64, 40), nn.Linear(K, 40)

    def forward(self, x):
        y = self.norm(x)
        return self.short(y) + self.down(self.act(self.up(y)))


class Later(Two):
    def forward(self, x):
        y = self.norm(x)
        return self.down(self.act(self.up(y))) + self.short(y)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_numbers(norm, scheme, calls):
    model = made(PreNorm(NORMS[norm]()), scheme)
    want = model(X)
    hb.fuse_(model)
    assert what(model) == "1 norm + linear, 1 linear + activation, 1 gated product, 1 linear + residual"
    with fused_calls(model, 3):
        y, one, rows = model(X), model(X[0, 0]), model(X[:, 0])
    assert calls == [1, 1] * 3
    check_close(y, want, scheme)
    assert torch.equal(y, parts(model, X))
    assert torch.equal(one, y[0, 0]) and torch.equal(rows, y[:, 0])
    assert torch.equal(hb.unfuse_(model)(X), want)


@pytest.mark.parametrize("scheme", SPARSE)
@torch.no_grad()
def test_sparse_layers(scheme, calls):
    model = roused(PreNorm(nn.RMSNorm(K)))
    for name in ("gate", "up", "down"):
        prune_linear(getattr(model, name), scheme.partition("+")[2])
    hb.sparsify_(model, "always", scheme=scheme, progress=False)
    want = model(X)
    y = hb.fuse_(model)(X)
    assert calls == [1, 1] and torch.equal(y, parts(model, X))
    check_close(y, want, "w8a8")


@pytest.mark.parametrize("rows", [1, 7, 300])
@torch.no_grad()
def test_threads_and_memory(rows):
    model = hb.fuse_(made(PreNorm()))
    x = torch.randn(rows, K)
    model(x)
    try:
        outputs = []
        for threads in (1, 2, 3):
            hb.set_num_threads(threads)
            outputs.append(model(x))
            before = _core.buffer_allocations()
            assert torch.equal(model(x), outputs[0]) and _core.buffer_allocations() == before
        assert all(torch.equal(y, outputs[0]) for y in outputs)
    finally:
        hb.set_num_threads(0)


@pytest.mark.parametrize("cls", [Two, Later])
@torch.no_grad()
def test_layers_that_share_a_norm(cls, calls):
    model = made(cls())
    want = model(X)
    hb.fuse_(model)
    assert what(model) == "1 norm + linear, 1 linear + activation, 1 linear + residual"
    y = model(X)
    assert calls == [2, 1]
    check_close(y, want, "w8a8")
    x = normed(model.norm, X)
    up = product(model.up, x, activation="gelu")
    assert torch.equal(y, product(model.down, up, residual=product(model.short, x)))
    model.short.static = (0.02, 3)  # no longer quantizes alike: each has a call of its own
    model(X), calls.clear()
    y = model(X)
    assert calls == [1, 1, 1]
    assert torch.equal(y, product(model.down, up, residual=product(model.short, x)))


@torch.no_grad()
def test_gates_of_another_scheme(calls):
    model = made(PreNorm(), {"gate": "w4a8_g32", "*": "w8a8"})
    want = model(X)
    hb.fuse_(model)
    assert what(model) == "1 norm + linear, 1 linear + activation, 1 linear + residual"
    check_close(model(X), want, "w4a8")
    assert calls == [1, 1, 1]


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(K, 40), nn.Linear(K, 40)

    def forward(self, x):
        return self.a(x) * self.b(x)


@pytest.mark.parametrize("own", [("none", "none"), ("relu", "none"), ("none", "relu"), ("relu", "silu")])
@torch.no_grad()
def test_gates_whose_activation_is_their_own(own, calls):
    model = made(Bilinear())
    model.a.activation, model.b.activation = own
    want = model(X)
    hb.fuse_(model)
    fits = own != ("relu", "silu")
    assert (fused_of(model) is not None) == fits
    check_close(model(X), want)  # bit for bit where torch has no part in it
    assert calls == [1] * fits
    model.b.activation = "gelu"  # behind the back of what fuse_ found
    check_close(model(X), hb.unfuse_(model)(X))


def _set(**values):
    return lambda model: [setattr(model.norm, name, value) for name, value in values.items()]


def _hook(model):
    model.norm.register_forward_hook(lambda module, args, output: output * 2)


CHANGES = {
    "eps": _set(eps=0.5),
    "weight": lambda m: m.norm.weight.mul_(2),
    "bias": lambda m: m.norm.bias.add_(1),
    "another weight": _set(weight=nn.Parameter(torch.randn(K), requires_grad=False)),
    "memory of the weight": lambda m: setattr(m.norm.weight, "data", torch.randn(K)),
    "no bias": _set(bias=None),
    "forward": _set(forward=lambda x: x * 2),
    "hook": _hook,
    "hook of a layer": lambda m: m.up.register_forward_hook(lambda module, args, output: output * 2),
    "another norm": lambda m: setattr(m, "norm", nn.RMSNorm(K).requires_grad_(False)),
    "no norm": lambda m: setattr(m, "norm", nn.Tanh()),
    "static gate": lambda m: setattr(m.gate, "static", (0.02, 3)),
    "static layers": lambda m: [setattr(m.gate, "static", (0.02, 3)), setattr(m.up, "static", (0.02, 3))],
    "scale of the gate": lambda m: m.gate.weight_scale.mul_(2),
    "bias of a layer": lambda m: m.down.bias.add_(1),
    "activation": lambda m: setattr(m, "act", nn.Tanh()),
    "dtype": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_after_fuse_(change):
    model = hb.fuse_(made(PreNorm()))
    x = X.bfloat16() if change == "dtype" else X
    before = model(X)
    assert torch.equal(model(X), parts(model, X))
    CHANGES[change](model)
    with fused_calls(model, 2):
        model(x)
        y = model(x)
    assert not torch.equal(y, before)
    want = hb.unfuse_(model)(x)
    if change == "dtype":
        assert error(y, want) < 0.03
    else:
        check_close(y, want, "w8a8")


@torch.no_grad()
def test_a_norm_that_others_need(calls):
    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(K), nn.Linear(K, K)

        def forward(self, x):
            x = self.norm(x)
            return x + self.layer(x)

    model = made(After())
    want = model(X)
    hb.fuse_(model)
    assert what(model) == "1 linear + residual"
    assert torch.equal(model(X), want) and calls == [1]


def _without(norm):
    return hb.fuse_(made(nn.Sequential(norm, nn.Linear(K, 30), nn.ReLU())))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((5, K)),
        type("Own", (nn.LayerNorm,), {"forward": lambda self, x: 2 * x})(K),
        nn.RMSNorm(K, eps=-1.0),
        nn.GroupNorm(5, 5),
        nn.utils.parametrizations.weight_norm(nn.LayerNorm(K), dim=None),
    ],
)
@torch.no_grad()
def test_norms_that_are_not_known(norm):
    model = _without(norm)
    assert what(model) == "1 linear + activation"
    y, want = model(X), hb.unfuse_(copy.deepcopy(model))(X)
    assert want.isnan().any() or error(y, want) < 1e-4
    assert torch.equal(y.isnan(), want.isnan())


def test_norms_whose_changes_are_not_counted():
    with torch.inference_mode():
        norm = nn.LayerNorm(K)
        assert what(_without(norm)) == "1 linear + activation"


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits(dtype, eps, calls):
    """torch rounds to 16 bits after each step, 2^-9 of a bfloat16; the core after the last."""
    model = made(PreNorm(nn.RMSNorm(K, eps=eps)).to(dtype))
    x = X.to(dtype)
    want = model(x)
    y = hb.fuse_(model)(x)
    assert y.dtype is dtype and error(y, want) < 0.03
    assert calls == [1, 1]
    if eps is None:  # versions of torch differ in what that means here: the norm is called
        assert torch.equal(y, parts(model, x, model.norm))


@torch.no_grad()
def test_norms_of_transformers(calls):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="has the norm")
    model = made(PreNorm(llama.LlamaRMSNorm(K, eps=1e-5)))
    want = model(X)
    y = hb.fuse_(model)(X)
    assert calls == [1, 1]
    check_close(y, want, "w8a8")
    model.norm.variance_epsilon = 0.5
    check_close(model(X), hb.unfuse_(model)(X), "w8a8")
