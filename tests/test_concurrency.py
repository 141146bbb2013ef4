"""Many Python threads on one module, and processes forked from one that computed: one thread's answers."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import traceback

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same

THREADS = 8
SCHEMES = ["w8a8", "w4a8_g64", "w4a16_g32+asym"]
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def make(k, n, scheme="w8a8"):
    return hb.QLinear.from_linear(nn.Linear(k, n), scheme, method="absmax").eval()


def run_threads(work):
    """work(i) on THREADS threads that start together; the first exception is raised here."""
    barrier, errors = threading.Barrier(THREADS), []

    def body(i):
        try:
            barrier.wait(60)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


@schemes
@pytest.mark.parametrize("shape", [(1, 64), (37, 200), (160, 500)])
def test_threads_on_one_module(shape, scheme):
    layer = make(shape[1], 333, scheme)
    inputs = [torch.randn(shape) for _ in range(THREADS)]
    alone = hb.QLinear(layer.quantized, layer.bias)
    want = [alone(x) for x in inputs]

    def work(i):
        for round_ in range(30):
            j = (i + round_) % THREADS
            same(layer(inputs[j]), want[j])

    run_threads(work)


@schemes
def test_threads_pack_once(monkeypatch, scheme):
    from halfbyte import torch_ops

    packed = []
    monkeypatch.setattr(torch_ops, "pack", lambda q, pack=hb.pack: (packed.append(q), pack(q))[1])
    layer, x = make(300, 400, scheme), torch.randn(4, 300)
    run_threads(lambda i: layer(x))
    assert len(packed) == 1


@schemes
def test_threads_with_different_isas_and_thread_counts(scheme):
    layer, x = make(130, 90, scheme), torch.randn(50, 130)
    want = layer(x)
    isas = [row["isa"] for row in hb.kernels(layer.scheme.op) if row["supported"]]

    def work(i):
        with hb.force_isa(isas[i % len(isas)]):
            for _ in range(10):
                same(layer(x), want)
                same(hb.linear(x, hb.pack(layer.quantized), layer.bias), want)

    run_threads(work)


@schemes
def test_threads_of_numpy_calls(scheme):
    import numpy as np

    w, x = np.random.randn(200, 100).astype(np.float32), np.random.randn(64, 100).astype(np.float32)
    packed = hb.pack(hb.quantize(w, scheme, method="absmax"))
    want = hb.linear(x, packed)

    def work(i):
        for _ in range(20):
            assert np.array_equal(hb.linear(x, packed), want)

    run_threads(work)


@pytest.mark.parametrize("scheme", [*SCHEMES, {"0": "w4a8_g64", "3": "w8a16"}], ids=str)
def test_threads_between_torch_ops(scheme):
    model = hb.quantize_(
        nn.Sequential(nn.Linear(96, 192), nn.GELU(), nn.LayerNorm(192), nn.Linear(192, 96)), scheme
    ).eval()
    x = torch.randn(40, 96)
    with torch.no_grad():
        want = model(x)

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                torch.testing.assert_close(model(x), want, rtol=0, atol=0.02)

    run_threads(work)


def _child(layer, fresh, x, want, queue):
    # Answers are compared as bytes: torch's own parallel operations may hang in a forked child.
    try:
        answers = [layer(x), layer(x), fresh(x), hb.linear(x, hb.pack(layer.quantized), layer.bias)]
        queue.put("right" if all(y.numpy().tobytes() == want for y in answers) else "wrong")
    except BaseException:
        queue.put(traceback.format_exc())


def fork_and_compute(x, layer, want):
    """The verdict of a child forked while this process has threads of torch and of halfbyte."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    fresh = copy.deepcopy(layer)  # without a pack
    child = context.Process(target=_child, args=(layer, fresh, x, want.numpy().tobytes(), queue), daemon=True)
    child.start()
    try:
        return queue.get(timeout=60)
    except Exception:
        return f"no answer from the child, exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@schemes
@pytest.mark.parametrize("m", [1, 200])
def test_fork(m, scheme):
    torch.randn(300, 300) @ torch.randn(300, 300)
    layer, x = make(512, 512, scheme), torch.randn(m, 512)
    want = layer(x)
    for _ in range(2):
        assert fork_and_compute(x, layer, want) == "right"
    same(layer(x), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@schemes
def test_fork_while_other_threads_compute(scheme):
    layer, x = make(512, 512, scheme), torch.randn(100, 512)
    want, stop = layer(x), threading.Event()
    other = make(512, 512, scheme)

    def busy():
        while not stop.is_set():
            other.weight_codes.bitwise_not_()  # packs each time, so that the fork finds the lock held
            other(x)

    threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert fork_and_compute(x, layer, want) == "right"
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
