"""pack_ and whatever looks at a model: it sees what it saw before, in other threads and processes too."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import halfbyte as hb
from corecall import same
from halfbyte.pack_inplace import is_freed
from test_linear import twice
from test_pack_inplace import X, freed, layers, make, net, same_state


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sum_of_gradient(model):
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


READERS = {
    "state_dict": lambda m: m.state_dict(),
    "state_dict of a layer": lambda m: m[2].state_dict(keep_vars=True),
    "named_buffers": lambda m: dict(m.named_buffers()),
    "buffers of a layer": lambda m: dict(enumerate(m[0].buffers())),
    "attribute": lambda m: {"codes": m[0].weight_codes},
    "get_buffer": lambda m: {"codes": m.get_buffer("0.weight_codes")},
    "getattr": lambda m: {"codes": getattr(m[0], "weight_codes", None)},
    "_buffers": lambda m: {"codes": m[0]._buffers["weight_codes"]},
    "quantized": lambda m: {"codes": m[0].quantized.codes},
    "dequantize": lambda m: {"weight": m[0].weight.dequantize()},
    "torch on the weight": lambda m: {"y": nn.functional.linear(X, m[0].weight)},
    "deepcopy": lambda m: copy.deepcopy(m).state_dict(),
    "copy": lambda m: copy.copy(m[0]).state_dict(),
    "__getstate__": lambda m: {"codes": m[0].__getstate__()["_buffers"]["weight_codes"]},
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
    "torch.save": lambda m: saved(m).state_dict(),
    "half": lambda m: {name: b.clone() for name, b in copy.deepcopy(m).half().named_buffers()},
    "to": lambda m: m.to("cpu").state_dict(),
    "share_memory": lambda m: m.share_memory().state_dict(),
    "gradient": lambda m: {"x": sum_of_gradient(m)},
    "functional_call": lambda m: {"y": torch.func.functional_call(m, dict(m.named_buffers()), X)},
    "vmap": lambda m: {"y": torch.func.vmap(m, in_dims=1)(X[:, None])},
    "jvp": lambda m: {"y": torch.func.jvp(m[1], (X,), (X,))[0]},
    "twin": lambda m: {"y": hb.QLinear(m[0].quantized, m[0].bias)(X)},
    "forward": lambda m: {"y": m(X)},
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_what_it_saw_before(reader):
    plain, packed = net(), hb.pack_(net())
    try:
        expected = READERS[reader](plain)
    except Exception as error:  # what does not work without pack_
        with pytest.raises(type(error)):
            READERS[reader](packed)
        return
    same_state(READERS[reader](packed), expected)
    same_state(packed.state_dict(), plain.state_dict())
    hb.pack_(packed)
    assert all(freed(packed))
    same_state(READERS[reader](packed), expected)
    same(packed(X), plain(X))


def test_what_was_taken_before_keeps_its_values_and_its_memory():
    model = net()
    taken, expected = model.state_dict(), copy.deepcopy(model.state_dict())
    sum_of_gradient(model)
    x = X.clone().requires_grad_()
    y, grad = model(x), sum_of_gradient(model)
    hb.pack_(model)
    later = model.state_dict()
    hb.pack_(model)
    same_state(taken, expected)
    same_state(later, expected)
    y.square().sum().backward()  # through codes that were freed in between
    same(x.grad, grad)
    later["0.weight_codes"].zero_()
    same(model(X), y.detach())


def test_save_and_load(tmp_path):
    model, fresh = net(), net("w4a8_g32")
    y, state = model(X), copy.deepcopy(model.state_dict())
    hb.save(hb.pack_(model), tmp_path / "packed")
    assert all(freed(model))
    hb.save(net(), tmp_path / "plain")
    files = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("packed", "plain")]
    assert files[0] == files[1]
    hb.load(hb.pack_(fresh), tmp_path / "packed")
    same_state(fresh.state_dict(), state)
    same(fresh(X), y)
    for assign in (False, True):
        other = net()
        for layer in layers(other):
            layer.weight_codes.zero_()
        hb.pack_(other).load_state_dict(copy.deepcopy(state), assign=assign)
        same(other(X), y)
        same(hb.pack_(other)(X), y)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    model = net()
    y, grad = model(X), sum_of_gradient(model)
    close = {"rtol": 0, "atol": 0.03 if backend == "inductor" else 0}
    for compiled in (
        torch.compile(model, fullgraph=True, backend=backend),
        torch.compile(lambda x: model(x), fullgraph=True, backend=backend),
    ):
        for _ in range(2):  # the graph is there when the codes go for the second time
            hb.pack_(model)
            with torch.no_grad():
                torch.testing.assert_close(compiled(X), y, **close)
            hb.pack_(model)
            x = X.clone().requires_grad_()
            compiled(x).square().sum().backward()
            torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = net()
    y = model(X)
    program = torch.export.export(hb.pack_(model), (X,), strict=strict)
    hb.pack_(model)
    with torch.no_grad():
        same(program.module()(X), y)


def test_tracers_and_fake_tensors():
    model, x = net().requires_grad_(False), X + 1
    y = model(x)
    with torch.no_grad():
        for trace in (
            lambda m: torch.jit.trace(m, X),
            lambda m: torch.jit.trace(lambda x: m(x), X),
            lambda m: make_fx(lambda x: m(x))(X),
            lambda m: make_fx(lambda x: nn.functional.linear(x, m[0].weight, m[0].bias))(X),
        ):
            traced = trace(hb.pack_(model))
            hb.pack_(model)
            if (got := traced(x)).shape == y.shape:
                same(got, y)
            else:
                same(got, nn.functional.linear(x, net()[0].weight, model[0].bias))
        hb.pack_(model)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(X)).shape == (3, 64)
    same(model(x), y)
    same_state(model.state_dict(), net().state_dict())


def test_other_devices():
    layer, x = hb.pack_(make()), torch.randn(4, 70)
    y = layer(x)
    with torch.device("meta"):
        _ = layer.weight_codes
        hb.pack_(layer)
        same(layer(x), y)
    assert layer(torch.empty(2, 70, device="meta")).shape == (2, 33)
    moved = hb.pack_(layer).to("meta")
    assert moved.weight_codes.is_meta and not is_freed(moved)


def test_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = make(), torch.randn(4, 70)
        y = twice(layer, x)
        hb.pack_(layer)
        same(twice(layer, x), y)
        assert not layer.weight_codes.is_inference()
        hb.pack_(layer)
    layer.weight_codes.neg_()
    assert not torch.equal(layer(x.clone()), y)


def test_threads():
    model = net()
    y, state, stop, errors = model(X), copy.deepcopy(model.state_dict()), threading.Event(), []

    def guarded(work):
        def body():
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return body

    def ask():
        same(model[0].weight_codes, state["0.weight_codes"])
        same_state(model.state_dict(), state)
        same(model[2].weight.dequantize(), dequantized)

    dequantized = model[2].weight.dequantize()
    jobs = [lambda: same(model(X), y)] * 3 + [ask, lambda: hb.pack_(model)]
    threads = [threading.Thread(target=guarded(job), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    stop.wait(2)
    stop.set()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


def _child(model, queue):
    # Bytes, because torch's own parallel operations may hang in a forked child.
    codes = model[0].weight_codes.numpy().tobytes()
    queue.put((model(X).numpy().tobytes(), codes, model(X).numpy().tobytes()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    model = hb.quantize_(nn.Sequential(nn.Linear(64, 64)), progress=False).eval()
    y, codes = model(X).numpy().tobytes(), model[0].weight_codes.numpy().tobytes()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(hb.pack_(model), queue), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=120) == (y, codes, y)
    finally:
        child.kill()
        child.join()
