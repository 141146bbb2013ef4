"""How fusing attaches: what stays as it was, what keeps a stack from running, copies, changes after fuse_."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import halfbyte as hb
from fusing import check_close, error, forward_of, fused_calls, left_alone, roused
from halfbyte.fuse.attach import fused_of

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def make(layers=2, **options):
    settings = {"dim_feedforward": 40, "batch_first": True, "activation": "gelu", "dropout": 0.1} | options
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, **settings)
    return roused(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = make()
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


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
    model = hb.fuse_(make())
    fused = fused_of(model)
    hb.fuse_(model)
    assert fused_of(model) is fused
    with fused_calls(model):
        model(X)


@torch.no_grad()
def test_parts_first_and_then_the_whole():
    model = make()
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
    model = make()
    model.forward = lambda x: x + 1
    hb.fuse_(model)
    assert torch.equal(model(X), X + 1)
    assert hb.fusion_report(model).rows[0].reason == "its forward was replaced on the instance"
    hb.unfuse_(model)
    assert torch.equal(model(X), X + 1)


def test_signature_and_arguments():
    model, plain = hb.fuse_(make()), make()
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
    model, seen = hb.fuse_(make()), []
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
    model, note = hb.fuse_(make()), []
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
    model = hb.fuse_(make())
    model(X)
    model.layers[0].linear1.forward = lambda x: torch.zeros(*x.shape[:-1], 40)
    with left_alone(model, "replaced on the instance"):
        model(X)


@torch.no_grad()
def test_training_mode():
    model = make()
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
    still = make(dropout=0.0)
    hb.fuse_(still.train())
    with fused_calls(still):
        check_close(still(X), want)


def test_gradients_are_not_lost():
    model = hb.fuse_(make())
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
    model = hb.fuse_(make())
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
    model = hb.fuse_(make())
    want = model(X)
    check_close(torch.compile(model, backend="eager", fullgraph=True)(X), want)
    check_close(torch.export.export(model, (X,)).module()(X), want)
    with fused_calls(model):
        model(X)
    torch._dynamo.reset()


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("used", [False, True])
@torch.no_grad()
def test_copies(how, used):
    model = Holder().eval()
    want = model(X)
    hb.fuse_(model)
    if used:
        model(X)
    twin = COPIES[how](model)
    assert forward_of(twin.encoder).module is twin.encoder and forward_of(model.encoder).module is model.encoder
    twin.encoder.layers[0].linear1.weight.mul_(2)
    with fused_calls(model.encoder), fused_calls(twin.encoder):
        check_close(model(X), want)
        assert error(twin(X), want) > 1e-3
    del model
    gc.collect()
    twin(X)


def test_a_shallow_copy_that_lost_its_model_says_so():
    model = hb.fuse_(make())
    twin = copy.copy(model)
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="fuse_ on the copy"):
        twin(X)
    hb.unfuse_(twin)
    twin(X)


@torch.no_grad()
def test_a_model_goes_with_its_last_reference():
    model = hb.fuse_(make())
    model(X)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


CHANGES = {
    "in place": lambda m: m.layers[0].linear1.weight.mul_(1.5),
    "norm": lambda m: m.layers[1].norm1.bias.add_(1),
    "data": lambda m: setattr(m.layers[0].linear2.weight, "data", torch.randn(32, 40)),
    "parameter": lambda m: setattr(m.layers[1].linear2, "bias", nn.Parameter(torch.randn(32))),
    "merged": lambda m: m.layers[0].self_attn.in_proj_weight[40:50].mul_(3),
    "module": lambda m: setattr(m.layers[0], "linear2", nn.Linear(40, 32)),
    "layer": lambda m: m.layers.__setitem__(1, make(1, norm_first=m.layers[0].norm_first).layers[0]),
    "removed": lambda m: m.layers.__delitem__(1),
    "all": lambda m: setattr(m, "layers", make(3, norm_first=m.layers[0].norm_first).layers[1:]),
    "final norm": lambda m: setattr(m, "norm", nn.LayerNorm(32).eval()),
    "load": lambda m: m.load_state_dict(roused(make(), seed=5).state_dict()),
    "there and back": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_changes_after_fuse_(change, norm_first):
    model = hb.fuse_(make(norm_first=norm_first))
    before = model(X)
    CHANGES[change](model)
    with fused_calls(model):
        y = model(X)
    assert error(y, before) > 1e-4
    check_close(y, hb.unfuse_(model)(X))


@torch.no_grad()
def test_an_activation_that_is_exchanged():
    model = hb.fuse_(make())
    model(X)
    for layer in model.layers:
        layer.activation = nn.Tanh()
    hb.unfuse_(hb.fuse_(model))
    hb.fuse_(model)
    assert "no activation Tanh" in hb.fusion_report(model).rows[0].reason


@torch.no_grad()
def test_quantize_before_and_after():
    first = hb.fuse_(hb.quantize_(make(), "w8a8", progress=False))
    then = hb.fuse_(make())
    then(X)
    hb.quantize_(then, "w8a8", progress=False)
    with fused_calls(first), fused_calls(then):
        y = first(X)
        assert torch.equal(then(X), y)
    check_close(y, hb.unfuse_(first)(X), "w8a8")
    assert isinstance(then.layers[0].linear1, hb.QLinear)


@torch.no_grad()
def test_summary_save_and_load(tmp_path):
    model = hb.fuse_(hb.quantize_(make(), "w4a8_g32", progress=False))
    y = model(X)
    assert "w4a8_g32" in str(hb.summary(model, X))
    hb.save(model, tmp_path / "model")
    twin = hb.fuse_(hb.load(make(), tmp_path / "model"))
    with fused_calls(twin):
        assert torch.equal(twin(X), y)


@torch.no_grad()
def test_packed_layers_stay_packed():
    model = hb.fuse_(hb.quantize_(make(), "w8a8", progress=False))
    y = model(X)
    hb.pack_(model)
    with fused_calls(model):
        assert torch.equal(model(X), y)
    from halfbyte.pack_inplace import is_freed

    assert is_freed(model.layers[0].linear1)
    model.layers[0].linear1.weight_scale.mul_(2)
    assert error(model(X), y) > 1e-3
    other = hb.quantize_(roused(make(), seed=3), "w8a8", progress=False)
    hb.pack_(model)
    model(X)
    model.load_state_dict(other.state_dict())
    with fused_calls(model):
        check_close(model(X), other(X), "w8a8")


@pytest.mark.parametrize("scheme", [None, "w8a8"])
@pytest.mark.parametrize("batch", [1, 2, 9])
@torch.no_grad()
def test_threads_change_no_bit(scheme, batch):
    model, x = make(3), torch.randn(batch, 33, 32)
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
    model = hb.fuse_(hb.quantize_(make(), "w8a8", progress=False))
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
        model = hb.fuse_(make().to("meta"))
        assert "meta" in hb.fusion_report(model).rows[0].reason
        model = make().double()
        want = model(X.double())
        hb.fuse_(model)
        with left_alone(model, "float64"):
            assert torch.equal(model(X.double()), want)
