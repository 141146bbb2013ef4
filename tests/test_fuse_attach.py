"""How fusing attaches: what stays as it was, and what keeps a stack from running."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch
from torch import nn

import halfbyte as hb
from fusing import Holder, X, check_close, encoder, error, forward_of, fused_calls, left_alone
from halfbyte.fuse.attach import fused_of


@torch.no_grad()
def test_what_stays():
    model = Holder().eval()
    modules, state = list(model.named_modules()), dict(model.state_dict())
    want, shown = model(X), repr(model)
    assert hb.fuse_(model) is model
    assert list(model.named_modules()) == modules and repr(model) == shown
    assert model.state_dict().keys() == state.keys()
    assert all(model.state_dict()[name].data_ptr() == state[name].data_ptr() for name in state)
    with fused_calls(model.encoder):
        check_close(model(X), want)
    assert list(vars(model.encoder)).count("forward") == 1 and "forward" not in vars(model)
    assert hb.unfuse_(model) is model
    assert "forward" not in vars(model.encoder) and torch.equal(model(X), want)
    hb.unfuse_(model)


@torch.no_grad()
def test_fuse_twice():
    model = hb.fuse_(encoder())
    fused = fused_of(model)
    hb.fuse_(model)
    assert fused_of(model) is fused
    with fused_calls(model):
        model(X)


@torch.no_grad()
def test_parts_first_and_then_the_whole():
    model = encoder()
    want = model(X)
    hb.fuse_(model.layers[0])
    assert fused_of(model.layers[0]) is not None
    hb.fuse_(model)
    assert fused_of(model.layers[0]) is None
    with fused_calls(model):
        check_close(model(X), want)


def test_bad_arguments():
    for function in (hb.fuse_, hb.unfuse_, hb.fusion_report):
        with pytest.raises(TypeError, match=function.__name__):
            function(torch.ones(1))
    assert hb.fuse_(nn.Linear(2, 2)) and not hb.fusion_report(nn.Linear(2, 2)).rows


@torch.no_grad()
def test_a_forward_of_the_user_stays():
    model = encoder()
    model.forward = lambda x: x + 1
    hb.fuse_(model)
    assert torch.equal(model(X), X + 1)
    assert hb.fusion_report(model).rows[0].reason == "its forward was replaced on the instance"
    hb.unfuse_(model)
    assert torch.equal(model(X), X + 1)


def test_signature_and_arguments():
    model, plain = hb.fuse_(encoder()), encoder()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__name__ == "forward"
    for args, kwargs in (((), {}), ((X,), {"src": X}), ((X,), {"unknown": 1}), ((X,) * 9, {})):
        with pytest.raises(TypeError) as want:
            plain(*args, **kwargs)
        with torch.no_grad(), left_alone(model, ""), pytest.raises(TypeError) as found:
            model(*args, **kwargs)
        assert str(found.value) == str(want.value)


@torch.no_grad()
def test_hooks_of_the_module_itself_run():
    model, seen = hb.fuse_(encoder()), []
    model.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with fused_calls(model):
        y = model(X)
    assert seen[0] is X and torch.equal(y, seen[1] * 2)


HOOKS = {
    "forward": lambda m, note: m.register_forward_hook(lambda *_: note.append(1)),
    "forward_pre": lambda m, note: m.register_forward_pre_hook(lambda *_: note.append(1)),
    "backward": lambda m, note: m.register_full_backward_hook(lambda *_: None),
    "global": lambda m, note: nn.modules.module.register_module_forward_hook(lambda *_: note.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@torch.no_grad()
def test_a_hook_inside_is_not_skipped(kind):
    model, note = hb.fuse_(encoder()), []
    want = model(X)
    handle = HOOKS[kind](model.layers[1].norm1, note)
    with left_alone(model, "hook"):
        check_close(model(X), want)
    assert note or kind == "backward"
    (row,) = hb.fusion_report(model).rows
    assert "hook" in row.reason and not row.blocks
    handle.remove()
    with fused_calls(model):
        assert torch.equal(model(X), want)
    assert not hb.fusion_report(model).left_alone


@torch.no_grad()
def test_a_forward_replaced_inside():
    model = hb.fuse_(encoder())
    model(X)
    model.layers[0].linear1.forward = lambda x: torch.zeros(*x.shape[:-1], 40)
    with left_alone(model, "replaced on the instance"):
        model(X)


@torch.no_grad()
def test_training_mode():
    model = encoder()
    want = model(X)
    hb.fuse_(model.train())
    with left_alone(model, "training mode"):
        assert error(model(X), want) > 1e-3  # dropout
    assert "training mode" in hb.fusion_report(model).rows[0].reason
    model.eval()
    with fused_calls(model):
        check_close(model(X), want)
    model.layers[1].dropout.train()
    with left_alone(model, "training mode"):
        model(X)
    model.eval().layers[0].self_attn.train()
    with left_alone(model, "training mode"):
        model(X)
    still = encoder(dropout=0.0)
    hb.fuse_(still.train())
    with fused_calls(still):
        check_close(still(X), want)


def test_gradients_are_not_lost():
    model = hb.fuse_(encoder())
    with left_alone(model, "gradient"):
        y = model(X)
    y.sum().backward()
    assert model.layers[0].linear1.weight.grad.abs().max() > 0
    model.requires_grad_(False)
    with fused_calls(model):
        assert not model(X).requires_grad
    x = X.clone().requires_grad_()
    with left_alone(model, "gradient"):
        model(x).sum().backward()
    assert x.grad.abs().max() > 0
    with torch.no_grad(), fused_calls(model):
        model(x)
    with torch.inference_mode(), fused_calls(model):
        assert model(x).is_inference()
    model.layers[1].norm2.bias.requires_grad_()
    with left_alone(model, "gradient"):
        assert model(X).requires_grad


@torch.no_grad()
def test_what_records_operations():
    model = hb.fuse_(encoder())
    want = model(X)
    with left_alone(model, "autocast"), torch.autocast("cpu", torch.bfloat16):
        assert error(model(X).float(), want) > 1e-4
    fused = forward_of(model)
    fused.unfused.clear()
    traced = torch.jit.trace(model, X, check_trace=False)
    check_close(traced(torch.flip(X, [0])), model(torch.flip(X, [0])))
    assert "records" in next(iter(fused.unfused))
    mapped = torch.func.vmap(lambda x: model(x[None])[0])(X)
    check_close(mapped, want)


@torch.no_grad()
def test_compile_and_export_see_the_modules():
    torch._dynamo.reset()
    model = hb.fuse_(encoder())
    want = model(X)
    check_close(torch.compile(model, backend="eager", fullgraph=True)(X), want)
    check_close(torch.export.export(model, (X,)).module()(X), want)
    with fused_calls(model):
        model(X)
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", [None, "w8a8"])
@pytest.mark.parametrize("batch", [1, 2, 9])
@torch.no_grad()
def test_threads_change_no_bit(scheme, batch):
    model, x = encoder(3), torch.randn(batch, 33, 32)
    if scheme:
        hb.quantize_(model, scheme, progress=False)
    hb.fuse_(model)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            with fused_calls(model):
                results.append(model(x))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0]) for y in results)


def test_python_threads_share_a_model():
    model = hb.fuse_(hb.quantize_(encoder(), "w8a8", progress=False))
    inputs, failures = [torch.randn(2, n + 1, 32) for n in range(8)], []
    with torch.no_grad():
        want = [hb.unfuse_(copy.deepcopy(model))(x) for x in inputs]

    def work(i):
        try:
            with torch.no_grad():
                for n in range(40):
                    check_close(model(inputs[(i + n) % 8]), want[(i + n) % 8], "w8a8")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert not forward_of(model).unfused


def test_meta_and_other_dtypes_are_left_alone():
    with torch.no_grad():
        model = hb.fuse_(encoder().to("meta"))
        assert "meta" in hb.fusion_report(model).rows[0].reason
        model = encoder().double()
        want = model(X.double())
        hb.fuse_(model)
        with left_alone(model, "float64"):
            assert torch.equal(model(X.double()), want)
