"""`halfbyte bench sparse` and its peers: numbers are recomputed from samples; no time is asserted."""

import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="prunes and runs torch tensors")

import halfbyte as hb  # noqa: E402
from halfbyte.bench import contest, engine, linear, peers, render, sparse  # noqa: E402
from halfbyte.bench.peers import deepsparse, deepsparse_worker  # noqa: E402
from halfbyte.cli import main  # noqa: E402
from halfbyte.sparse.pattern import Pattern  # noqa: E402
from halfbyte.sparse.scheme import NAMES, SparseScheme  # noqa: E402

FAST = ["--rounds", "3", "--round-ms", "1"]
# DeepSparse as its process sees it, with onnxruntime in the place of its engine.
FAKE = f"""
import runpy, sys, types
import onnxruntime

class Engine:
    def __init__(self, path, batch_size, num_cores):
        assert num_cores == 1
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert self.session.get_inputs()[0].shape[0] == batch_size
        print("what an engine says when it is made")

    def run(self, inputs, val_inp):
        return self.session.run(None, {{"x": inputs[0]}})

sys.modules["deepsparse"] = types.SimpleNamespace(Engine=Engine, __version__="0.0")
runpy.run_path({deepsparse_worker.__file__!r}, run_name="__main__")
"""


def bench(capsys, *argv):
    """(status, stdout) of `halfbyte bench sparse`."""
    status = main(["bench", "sparse", *map(str, argv), *FAST])
    return status, capsys.readouterr().out


def ratios(above, below):
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def problem(m=3, n=64, k=96, sparsity=0.8, copies=1):
    made = linear.problem((m, n, k), linear.Settings([], [], [], threads=1))
    made = sparse.prune(made, Pattern("unstructured"), sparsity)
    nonzero = int(np.count_nonzero(made.weight))
    return dataclasses.replace(made, cold_bytes=0 if copies == 1 else copies * 4 * nonzero)


def fake_worker(task, copies=1):
    pytest.importorskip("onnxruntime", reason="the bench extra is not installed")
    pytest.importorskip("onnx", reason="the bench extra is not installed")
    return deepsparse.Worker([sys.executable, "-c", FAKE], task, copies)


# bench sparse


@pytest.mark.parametrize("scheme", [
    "f32+block16x1", "w8a8+block16x4", "w4a8_g64+block16x4", "w8a8+unstructured", "bf16+block16x1",
])  # fmt: skip
def test_numbers_come_from_the_samples(capsys, tmp_path, scheme):
    file = tmp_path / "result.json"
    status, out = bench(
        capsys, "--shape", "3x64x72,1x32x40", "--scheme", scheme, "--sparsity", "0.5,0.9", "--threads", 1,
        "--vs", "torch-fp32", "--output", file, "--format", "json",
    )  # fmt: skip
    result = json.loads(out)
    assert status == 0 and json.loads(file.read_text()) == result and result["kind"] == "sparse"
    assert [s["sparsity"] for s in result["results"]] == pytest.approx([0.5, 0.9] * 2, abs=0.02)
    for shape in result["results"]:
        m, n, k = shape["m"], shape["n"], shape["k"]
        ceilings = shape["ceiling_samples"]
        ours, *others = shape["rows"]
        names = [sparse.DENSE, "torch-fp32"] if SparseScheme.parse(scheme).quantized else ["torch-fp32"]
        assert [row["name"] for row in others] == names and shape["unavailable"] == {}
        assert ours["name"] == "halfbyte" and shape["kernel"] in ours["note"]
        pruned = sparse.prune(
            linear.problem((m, n, k), linear.Settings([], [], [], 1)),
            SparseScheme.parse(scheme).pattern,
            0.5 if shape["sparsity"] < 0.7 else 0.9,
        )
        packed = hb.pack(hb.sparsify(torch.from_numpy(pruned.weight), scheme))
        assert ours["bytes"] == packed.nbytes + 4 * m * k + 4 * m * n
        nonzero = np.count_nonzero(pruned.weight)
        assert shape["sparsity"] == pytest.approx(1 - nonzero / (n * k))
        for row in shape["rows"]:
            assert len(row["samples_us"]) == 3 and row["us"] == statistics.median(row["samples_us"])
            assert row["gops"] == pytest.approx(2 * m * n * k / row["us"] / 1e3)
            operations = {"halfbyte": 2 * m * nonzero, sparse.DENSE: 2 * m * n * k}.get(row["name"])
            if operations and SparseScheme.parse(scheme).quantized and "int8 peak" in ceilings:
                rate = [operations / us * 1e6 for us in row["samples_us"]]
                assert row["of_peak"] == pytest.approx(ratios(rate, ceilings["int8 peak"]))
            else:
                assert row["of_peak"] is None
        for row in others:
            assert row["ours_is_faster_by"] == pytest.approx(ratios(row["samples_us"], ours["samples_us"]))
        values = SparseScheme.parse(scheme).values
        limit = sparse._ERROR_LIMITS.get(values) or linear.error_limit(hb.Scheme.parse(values))
        assert ours["error"] < limit
    for style in ("table", "markdown"):
        text = render.render(result, style)
        for row in others:
            assert f"{row['ours_is_faster_by']:.2f}x" in text and row["note"] in text


def test_every_scheme_and_its_amounts(capsys):
    status, out = bench(
        capsys, "--shape", "2x32x64", "--scheme", ",".join(NAMES), "--sparsity", "0.4,0.75", "--vs", "none",
        "--format", "json",
    )  # fmt: skip
    seen = [(s["scheme"], s["sparsity"]) for s in json.loads(out)["results"]]
    want = []
    for scheme in NAMES:
        amount = SparseScheme.parse(scheme).pattern.amount
        want += [(scheme, a) for a in ([0.4, 0.75] if amount is None else [amount])]
    assert status == 0 and [scheme for scheme, _ in seen] == [scheme for scheme, _ in want]
    assert [s for _, s in seen] == pytest.approx([s for _, s in want], abs=0.05)


def test_what_a_scheme_is_compared_with(capsys, monkeypatch):
    built = []

    def build(name, task):
        built.append((name, np.count_nonzero(task.weight), (task.weight == 0).all(0).any()))
        raise peers.UnavailableError("not here")

    monkeypatch.setattr(peers, "build", build)
    for scheme, names in (
        ("f32+block16x1", ["torch-fp32", "torch-csr", "deepsparse"]),
        ("f32+unstructured", ["torch-fp32", "torch-csr", "deepsparse"]),
        ("w8a8+2:4", ["torch-fp32"]),
    ):
        built.clear()
        status, out = bench(capsys, "--shape", "1x16x128", "--scheme", scheme, "--sparsity", "0.5")
        assert status == 0 and out.count("not measured: not here") == len(names)
        assert [name for name, _, _ in built] == names and {count for _, count, _ in built} == {1024}
        for name, _, whole_columns in built:  # of a weight of one row of blocks
            assert whole_columns == (scheme == "f32+block16x1" and name == "torch-fp32")


def test_a_dense_layer_that_differs_is_an_error(capsys, monkeypatch):
    wrong = linear.ours

    def off(problem):
        layer = wrong(problem)
        return dataclasses.replace(layer, output=lambda: layer.output() + np.float32(1e-3))

    monkeypatch.setattr(linear, "ours", off)
    argv = ["bench", "sparse", "--shape", "2x16x16", "--scheme", "w8a8+block16x4", "--vs", "none", *FAST]
    assert main(argv) == 2 and "differ on the same codes" in capsys.readouterr().err


def test_cold_rotates_through_more_than_the_cache(monkeypatch):
    cache = 1 << 16
    monkeypatch.setattr(linear, "last_level_cache_bytes", lambda: cache)
    settings = sparse.Settings(
        [(1, 64, 256)], ["w8a8+block16x4"], [0.5], ["torch-csr"], 1, cold=True, rounds=1, round_seconds=1e-4
    )
    (shape,) = sparse.run(settings)["results"]
    assert [row["name"] for row in shape["rows"]] == ["halfbyte", sparse.DENSE, "torch-csr"]
    for row in shape["rows"]:
        weight_bytes = row["bytes"] - 4 * 256 - 4 * 64
        assert row["copies"] * weight_bytes > 3 * cache >= (row["copies"] - 1) * weight_bytes
        assert row["read_level"] == "DRAM read"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--scheme", "w8a8+block16x5"], "block16x4"),
        (["--scheme", "w4a8"], "sparse scheme"),
        (["--sparsity", "1.0"], "from 0 to below 1"),
        (["--sparsity", "many"], "invalid sparsity value"),
        (["--vs", "openvino"], "known: torch-fp32, torch-bf16, torch-csr, deepsparse, none"),
    ],
)
def test_options_are_checked(capsys, option, says):
    with pytest.raises(SystemExit):
        main(["bench", "sparse", *option])
    assert says in capsys.readouterr().err


# engine


def test_calls_elsewhere_are_timed_there():
    asked = []

    def elsewhere(count):
        asked.append(count)
        return count * 0.25

    timed = engine.Timed("x", [None] * 3, round_seconds=1.0, warm_calls=2, elsewhere=elsewhere)
    assert asked == [1] * len(asked) and len(asked) >= 12 and timed.inner == 4
    asked.clear()
    assert timed.sample() == 0.25 and asked == [4, 4]


# peers


@pytest.mark.parametrize(("m", "sparsity"), [(1, 0.8), (5, 0.8), (5, 0.999), (5, 0.0)])
def test_csr_computes_the_same_layer(m, sparsity):
    task = problem(m, sparsity=sparsity, copies=3)
    layer = peers.build("torch-csr", task)
    assert contest.relative_error(layer.output(), contest.exact_product(task)) < 1e-6
    assert layer.output().shape == (m, 64) and "CSR" in layer.note
    stored = np.count_nonzero(task.weight)
    assert layer.weight_bytes == 8 * stored + 4 * 65
    assert len(layer.calls) * layer.weight_bytes > task.cold_bytes
    for call in layer.calls:
        call()


@pytest.mark.parametrize("copies", [1, 3])
def test_a_worker_computes_and_times_the_layer(copies):
    task = problem(5, copies=copies)
    worker = fake_worker(task, copies)
    got = worker.output().reshape(5, 64)
    assert contest.relative_error(got, contest.exact_product(task)) < 1e-6
    assert 0 < worker.seconds(1) < 5 and 0 < worker.seconds(7) < 5
    assert worker.note.startswith("DeepSparse 0.0 float32, ") and "the faster of MatMul and" in worker.note


def test_a_worker_is_quiet_between_requests():
    worker = fake_worker(problem())
    worker.seconds(20)
    stat = Path(f"/proc/{worker.pid}/stat")
    if not stat.exists():
        pytest.skip("no /proc here")

    def used() -> float:
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(0.5)
    assert used() - before <= 0.05


def test_a_worker_ends_with_its_object():
    worker = fake_worker(problem())
    process, folder = worker._process, worker._folder
    assert process.poll() is None and folder.exists()
    del worker
    gc.collect()
    assert process.poll() is not None and not folder.exists()


def test_a_worker_that_stops_says_why(capfd):
    task, code = problem(), "import sys; print('{\"note\": \"x\"}', flush=True); input(); sys.exit('no more')"
    worker = deepsparse.Worker([sys.executable, "-c", code], task, 1)
    with pytest.raises(hb.HalfbyteError, match="DeepSparse stopped: no more"):
        worker.seconds(1)
    assert not worker._folder.exists()
    with pytest.raises(peers.UnavailableError, match="DeepSparse stopped: ValueError: bad"):
        deepsparse.Worker([sys.executable, "-c", "raise ValueError('bad')"], task, 1)
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(deepsparse, "_BUILD_SECONDS", 0.2)
    with pytest.raises(peers.UnavailableError, match="took more than 0.2 s: it does not say why"):
        deepsparse.Worker([sys.executable, "-c", "import time; time.sleep(60)"], problem(), 1)


def test_deepsparse_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.delenv(deepsparse.VARIABLE, raising=False)
    with pytest.raises(peers.UnavailableError, match="HALFBYTE_DEEPSPARSE_PYTHON names no interpreter"):
        peers.build("deepsparse", problem())
    monkeypatch.setenv(deepsparse.VARIABLE, str(tmp_path / "python"))
    with pytest.raises(peers.UnavailableError, match="python cannot be started: No such file"):
        peers.build("deepsparse", problem())
    script = tmp_path / "python"  # an interpreter without any packages
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    with pytest.raises(peers.UnavailableError, match="cannot import deepsparse.*DEEPSPARSE_PYTHON="):
        peers.build("deepsparse", problem())


@pytest.mark.parametrize("m", [1, 5])
def test_deepsparse_itself_computes_the_same_layer(m):
    if not os.environ.get(deepsparse.VARIABLE):
        pytest.skip(f"{deepsparse.VARIABLE} names no interpreter that has DeepSparse")
    task = problem(m, copies=3)
    layer = peers.build("deepsparse", task)
    assert contest.relative_error(layer.output(), contest.exact_product(task)) < 1e-5
    assert len(layer.calls) * layer.weight_bytes > task.cold_bytes and len(layer.calls) > 1
    assert type(layer.weight_bytes) is int  # goes into JSON
    assert layer.calls[0]() > 0 and layer.elsewhere(5) > 0 and "DeepSparse 1." in layer.note


def test_a_tool_in_another_process_in_a_whole_run(capsys, monkeypatch):
    def build(task):
        worker = fake_worker(task)
        output = lambda: worker.output().reshape(4, 32)  # noqa: E731
        return peers.Layer([lambda: worker.seconds(1)], output, 1, worker.note, worker.seconds)

    monkeypatch.setattr(deepsparse, "build", build)
    argv = ["--shape", "4x32x64", "--scheme", "f32+block16x1", "--sparsity", "0.5", "--threads", 1]
    status, out = bench(capsys, *argv, "--vs", "deepsparse", "--format", "json")
    (shape,) = json.loads(out)["results"]
    assert status == 0 and [row["name"] for row in shape["rows"]] == ["halfbyte", "deepsparse"]
    assert shape["rows"][1]["error"] < 1e-6 and "DeepSparse 0.0" in shape["rows"][1]["note"]
