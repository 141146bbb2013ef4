"""Which steps of a forward go into the call of a quantized layer, and which stay where they are and why."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import halfbyte as hb
from fusing import check_close, error, forward_of, fused_calls, left_alone
from halfbyte.fuse import patterns
from halfbyte.fuse.attach import fused_of
from prenorm import K, PreNorm, X, made, normed, parts, product, what


@torch.no_grad()
def test_inputs_that_a_call_does_not_take(calls):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(K, 40), nn.Linear(K, 1)

        def forward(self, x):
            return self.wide(x) + self.narrow(x)

    model = made(Wide())
    want = model(X)  # the sum broadcasts: torch does it
    assert torch.equal(hb.fuse_(model)(X), want) and calls == [1]
    calls.clear()

    model = hb.fuse_(made(PreNorm(nn.RMSNorm(K))))
    x = X.transpose(0, 1)  # rows lie apart: torch has the norm and the sum
    with fused_calls(model):
        check_close(model(x), parts(model, x.contiguous(), model.norm))
    assert calls == [1, 1]
    alone = hb.fuse_(made(nn.Sequential(nn.Linear(K, K), nn.ReLU())))
    want = alone(X)
    with left_alone(alone, "no plain tensor"):
        assert torch.equal(alone(x), want.transpose(0, 1))
    alone[0].weight_scale.mul_(2)
    with left_alone(alone, "a weight has just changed"):
        y = alone(X)
    with fused_calls(alone):
        assert torch.equal(alone(X), y)
    with pytest.raises(RuntimeError, match="47"):
        model(X[..., 1:])
    x = X.clone()
    x[1, 2, 3] = torch.nan
    y = model(x)
    assert y[1, 2].isnan().all() and torch.equal(y.isnan().sum(), torch.tensor(K))


class InPlace(nn.Module):
    """What lies between a layer and its sum changes the layer's input."""

    def __init__(self, act):
        super().__init__()
        self.layer, self.act, self.other = nn.Linear(K, K), act, nn.Linear(K, K)

    def forward(self, x):
        x = self.other(x)
        y = self.layer(x)
        return y + self.act(x)


@torch.no_grad()
def test_steps_that_must_stay_in_their_places():
    for act, fits in ((nn.ReLU(inplace=True), False), (nn.ReLU(), True), (nn.Softplus(), False)):
        model = made(InPlace(act))
        want = model(X)
        hb.fuse_(model)
        assert (fused_of(model) is not None) == fits
        assert torch.equal(model(X), want)
        if fits:
            model.act.inplace = True
            with left_alone(model, "no pattern"):
                assert torch.equal(model(X), want)


@torch.no_grad()
def test_gates_in_place(calls):
    model = made(PreNorm(act=nn.SiLU(inplace=True)))
    want, x = model(X), X.clone()
    hb.fuse_(model)
    check_close(model(x), want, "w8a8")
    assert calls == [1, 1] and torch.equal(x, X) and forward_of(model).calls == 1


@torch.no_grad()
def test_norms_of_another_dtype(calls):
    """What follows the norm is done as if it stood alone."""
    model = made(PreNorm())
    x = X.bfloat16()
    want = model(x)
    y = hb.fuse_(model)(x)
    assert error(y, want) < 0.03 and calls == [1, 1]
    assert torch.equal(y, parts(model, x, model.norm))


class Sum(nn.Module):
    def __init__(self, b):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(K, K), b, nn.Dropout(0.1)

    def forward(self, x):
        y = self.a(x)
        return y + self.b(self.drop(x))


def doubles(module, args):
    args[0].mul_(2)


def doubles_first(module):
    forward = module.forward
    module.forward = lambda x: forward(x.mul_(2))


CHANGES_X = {
    "hook": lambda module: module.register_forward_pre_hook(doubles),
    "forward": doubles_first,
    "global hook": lambda module: nn.modules.module.register_module_forward_pre_hook(
        lambda m, args: doubles(m, args) if m is module else None
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES_X)
@pytest.mark.parametrize("b", ["layer", "float"])
@torch.no_grad()
def test_what_changes_its_input_stays_in_its_place(b, change, when):
    model = made(Sum(nn.Linear(K, K)))
    if b == "float":
        model.b = nn.Linear(K, K).requires_grad_(False)
    if when == "after":
        with fused_calls(hb.fuse_(model)):
            model(X)
    changed = model.drop if change == "forward" else model.b
    handle = CHANGES_X[change](changed)
    hb.fuse_(model)
    y, row = model(X.clone()), hb.fusion_report(model).rows[0]
    assert torch.equal(y, hb.unfuse_(model)(X.clone()))
    word = "forward of its" if change == "forward" else "hook"
    assert word in row.reason or row.what == "1 linear + residual"  # that of b, which has its place
    if handle is not None:
        handle.remove()


@torch.no_grad()
def test_hooks_run_in_the_order_of_the_forward():
    class Chain(Sum):
        def forward(self, x):
            y = self.a(x)
            return y + self.drop(self.b(self.drop(torch.relu(self.b(x)))))

    model, order = made(Chain(nn.Linear(K, K))), []
    want = model(X)
    hb.fuse_(model)
    for name in ("a", "b", "drop"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: order.append(name))
        order.clear()
        y = model(X)
        assert torch.equal(y, want)
        fused, order[:] = list(order), []
        type(model).forward(model, X)
        assert fused == order


@torch.no_grad()
def test_what_a_hook_leaves_of_the_patterns(calls):
    model = hb.fuse_(made(PreNorm()))
    handle = model.norm.register_forward_hook(lambda *_: None)
    with fused_calls(model):
        model(X)
    row = hb.fusion_report(model).rows[0]
    assert row.what == "1 linear + activation, 1 gated product, 1 linear + residual" and calls == [1, 1]
    assert row.reason == "a hook on its LayerNorm would not run"
    assert hb.fusion_report(model).fused == (row,) and not hb.fusion_report(model).left_alone
    handle.remove()
    model.up.register_forward_hook(lambda *_: None)
    model(X)
    row = hb.fusion_report(model).rows[0]
    assert row.what == "1 linear + activation, 1 linear + residual"
    assert row.reason == "a hook on its QLinear would not run"
    model.down.register_forward_hook(lambda *_: None)
    model.gate.register_forward_hook(lambda *_: None)
    with left_alone(model, "a hook on its QLinear"):
        model(X)
    row = hb.fusion_report(model).rows[0]
    assert row.blocks == 0 and "a hook on its QLinear" in row.reason and row.fused_calls == 2
    model.act.register_forward_hook(lambda *_: None)  # whose pattern is given up for the layers as well
    assert "a hook on its SiLU" in hb.fusion_report(model).rows[0].reason


@torch.no_grad()
def test_a_module_that_is_blocked_is_looked_at_once(monkeypatch):
    model, looked, trace = hb.fuse_(made(PreNorm())), [], patterns.trace
    for layer in (model.up, model.gate, model.down):
        layer.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(patterns, "trace", lambda module: looked.append(module) or trace(module))
    with pytest.warns(UserWarning, match="a hook on its QLinear"):
        for _ in range(3):
            model(X)
    assert len(looked) == 1
    for layer in (model.up, model.gate, model.down):
        layer._forward_hooks.clear()
    model(X)
    assert len(looked) == 2 and hb.fusion_report(model).rows[0].fused_calls == 1


def test_hooks_that_are_in_no_ones_way():
    model = made(nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K), nn.Tanh()))
    model[3].register_forward_hook(lambda *_: None)
    model[2].register_forward_hook(lambda *_: None)
    hb.fuse_(model)
    assert what(model) == "1 linear + activation" and hb.fusion_report(model).rows[0].reason == ""


class Mlp(nn.Module):
    """With the dropouts that timm and others write."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act = nn.LayerNorm(K), nn.Linear(K, 64), nn.GELU()
        self.fc2 = nn.Linear(64, K)
        self.drop1, self.drop2 = nn.Dropout(0.1), nn.Dropout(0.1, inplace=True)

    def forward(self, x):
        return x + self.drop2(self.fc2(self.drop1(self.act(self.fc1(self.norm(x))))))


@torch.no_grad()
def test_dropouts(calls):
    model = made(Mlp())
    want = model(X)
    hb.fuse_(model)
    everything = "1 norm + linear, 1 linear + activation, 1 linear + residual"
    assert what(model) == everything
    with fused_calls(model):
        y = model(X)
    assert calls == [1, 1]
    check_close(y, want, "w8a8")
    up = product(model.fc1, normed(model.norm, X), activation="gelu")
    assert torch.equal(y, product(model.fc2, up, residual=X))

    model.drop2.train()
    rows = hb.fusion_report(model).rows
    assert rows[0].what == "1 norm + linear, 1 linear + activation"
    assert rows[0].reason == "its dropout is in training mode: call .eval() first"
    model.drop2.p = 1.0
    assert torch.equal(model(X), X)
    model.drop2.p = 0.0
    assert what(model) == everything and torch.equal(model(X), y)
    model.eval()
    model.drop1.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(model(X), product(model.fc2, 2 * up, residual=X))


@torch.no_grad()
def test_a_dropout_gives_the_output():
    model = made(nn.Sequential(nn.Dropout(), nn.Linear(K, K), nn.Dropout(), nn.ReLU(), nn.Dropout()))
    want = model(X)
    model.train()
    hb.fuse_(model)
    assert "no pattern: its dropout is in training mode" in hb.fusion_report(model).rows[0].reason
    model.eval()
    with fused_calls(model):
        assert torch.equal(model(X), want)


@pytest.mark.parametrize("eps", [1e300, 3.5e38])
@torch.no_grad()
def test_an_eps_that_float32_does_not_have(eps):
    model = hb.fuse_(made(nn.Sequential(nn.LayerNorm(K, eps=eps), nn.Linear(K, K), nn.ReLU())))
    want = hb.unfuse_(copy.deepcopy(model))(X)
    with fused_calls(model):
        assert torch.equal(model(X), want)
    assert what(model) == "1 linear + activation"


@pytest.mark.parametrize("changes", [False, True])
@torch.no_grad()
def test_two_threads_on_one_module(changes):
    """Each gets its own input's output; also while a weight changes, and calls of both go the long way, which
    has the same bits where torch does no more than relu.
    """
    model = made(nn.Sequential(nn.Linear(K, K), nn.ReLU()) if changes else PreNorm())
    inputs = [torch.randn(rows, K) for rows in (3, 40)]
    hb.fuse_(model)
    want = [model(x) for x in inputs]
    barrier, wrong = threading.Barrier(2), []

    def work(i):
        barrier.wait(60)
        with torch.no_grad():
            for _ in range(200):
                if changes:
                    model[0].weight_scale.mul_(1)
                if not torch.equal(model(inputs[i]), want[i]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)
