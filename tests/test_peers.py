"""The tools that `halfbyte bench linear` compares with: each computes the scheme's layer, or says why not."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from halfbyte import Scheme
from halfbyte.bench import contest, linear, peers
from halfbyte.bench.peers import grouped

SCHEMES = ["w8a8", "w8a16", "w4a8_g32", "w4a8_g128", "w4a16_g64"]
# torchao compiles for a minute; the float layers are the same for every scheme.
CASES = [
    (scheme, name)
    for scheme in SCHEMES
    for name in peers.default_names(Scheme.parse(scheme))
    if name != "torchao" and (scheme == "w8a8" or name in peers.QUANTIZED_PEERS)
]


def problem(scheme, m=3, n=64, k=256, copies=1):
    """Rotates through `copies` times the 8-bit weights."""
    made = linear.problem((m, n, k), linear.Settings([], [], [], threads=1), scheme)
    return dataclasses.replace(made, cold_bytes=0 if copies == 1 else copies * n * k)


@pytest.mark.parametrize(("scheme", "name"), CASES)
def test_peers_compute_the_same_layer(scheme, name):
    task = problem(scheme, copies=3)
    exact = task.x.astype(np.float64) @ task.weight.T + task.bias
    with linear.thread_counts(1):
        try:
            layer = peers.build(name, task)
        except peers.UnavailableError as error:
            pytest.skip(str(error))
        error = contest.relative_error(layer.output(), exact)
        assert error < (0.15 if scheme.startswith("w4") and name in peers.QUANTIZED_PEERS else 0.03)
        assert len(layer.calls) * layer.weight_bytes > task.cold_bytes
        for call in layer.calls:
            call()
    assert layer.note


@pytest.mark.parametrize("scheme", ["w4a8_g32", "w4a16_g128"])
@pytest.mark.parametrize("name", ["onnxruntime-nbits", "openvino", "torch-int4pack"])
def test_four_bits_are_four_bits(name, scheme):
    task = problem(scheme)
    try:
        layer = peers.build(name, task)
    except peers.UnavailableError as error:
        pytest.skip(str(error))
    elements, groups = task.weight.size, task.weight.size // task.group
    assert elements // 2 + 2 * groups <= layer.weight_bytes <= elements // 2 + 4 * groups
    assert f"g{task.group}" in layer.note


def test_openvino_that_widens_four_bits_is_not_measured(monkeypatch):
    pytest.importorskip("openvino", reason="the bench extra is not installed")
    from halfbyte.bench.peers import openvino_weights

    monkeypatch.setattr(openvino_weights, "_keeps_four_bits", lambda request: False)
    with pytest.raises(peers.UnavailableError, match="widens 4-bit weights"):
        peers.build("openvino", problem("w4a8_g32"))


def test_int4pack_says_which_shapes_it_takes():
    pytest.importorskip("torch", reason="a peer of torch")
    for n, k in ((40, 256), (64, 80)):
        with pytest.raises(peers.UnavailableError, match="n must be a multiple of 16, k of the group 32"):
            peers.build("torch-int4pack", problem("w4a8_g32", n=n, k=k))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 128)])
def test_grouped_codes(bits, group):
    weight = np.random.default_rng(0).standard_normal((5, 200), dtype=np.float32)
    weight[2] = 0
    codes, scale = grouped.grouped_codes(weight, bits, group)
    groups = -(-200 // group)
    zero = 1 << (bits - 1)
    assert codes.shape == (5, groups, group) and codes.dtype == np.uint8 and scale.shape == (5, groups)
    assert codes.min() >= 1 and codes.max() == 2 * zero - 1
    back = ((codes.astype(np.float32) - zero) * scale[..., None]).reshape(5, -1)
    assert (back[:, 200:] == 0).all() and (back[2] == 0).all()
    bound = np.repeat(scale, group, axis=1)[:, :200] * 0.5001
    assert (np.abs(back[:, :200] - weight) <= bound).all()


def test_nibbles_hold_even_elements_low():
    assert grouped.nibbles(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]


def test_cold_onnxruntime_sessions_share_one_pool_of_threads():
    """A pool per session would be two threads for each of a hundred copies."""
    code = (
        "import os; from halfbyte.bench import linear, peers\n"
        "p = linear.problem((3, 64, 128), linear.Settings([], [], [], threads=2))\n"
        "p = peers.Problem(p.x, p.weight, p.bias, threads=2, cold_bytes=40 * p.weight.nbytes)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "layers = [peers.build(name, p) for name in ('onnxruntime', 'onnxruntime-nbits')]\n"
        "print(sum(len(x.calls) for x in layers), len(os.listdir('/proc/self/task')) - before)\n"
    )
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module, reason="the bench extra is not installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    sessions, threads = map(int, done.stdout.split())
    assert sessions > 100 and threads < 10
