"""benchmarks/gpu_suite.py without a GPU: its checks on the emulated library, and when one breaks."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import halfbyte
from building import ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.py"
PACKAGE = str(Path(halfbyte.__file__).parent.parent)  # where this Python has it
CHECKS = {"smoke sm80", "smoke sm90", "ceilings", "correctness", "integration"}


@pytest.fixture(scope="module")
def parts():
    """The package benchmarks/gpu."""
    sys.path.insert(0, str(SUITE.parent))
    names = ("build", "children", "record", "sanitizer", "smoke", "table", "verdicts")
    try:
        modules = {name: importlib.import_module(f"gpu.{name}") for name in names}
        yield SimpleNamespace(suite=importlib.import_module("gpu_suite"), **modules)
    finally:
        sys.path.remove(str(SUITE.parent))


@pytest.fixture(scope="module")
def results(emulated_library, tmp_path_factory) -> tuple[dict, str]:
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("suite")
    command = [sys.executable, SUITE, "--self-test", "--library", emulated_library, "--out", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr + (out / "log.txt").read_text()[-3000:]
    assert done.returncode == 0, said
    return json.loads((out / "results.json").read_text()), done.stdout


def test_every_check_passes_on_the_emulated_library(results):
    rows = results[0]["rows"]
    assert {row["phase"] for row in rows} >= CHECKS
    for row in rows:
        assert row["phase"] not in CHECKS or row["verdict"] in ("PASS", "SKIP"), row
    skipped = [row["name"] for row in rows if row["verdict"] == "SKIP"]
    assert len(skipped) == 4, f"what needs two devices, or CUDA graphs, alone is left out: {skipped}"
    checks = [row["name"] for row in rows if row["phase"] == "correctness"]
    assert checks[0].startswith("rows") and checks[-1].startswith("linear"), "what products need comes first"
    users = [row["name"] for row in rows if row["phase"] == "integration"]
    assert "compiled" in users[-1] and not any("compiled" in name for name in users[:-3])
    assert {row["phase"]: 0 for row in rows} == dict.fromkeys(results[0]["planned"], 0)


def test_every_op_is_timed_against_the_ceilings(results):
    timed = {row["name"].split()[0]: row for row in results[0]["rows"] if row["phase"] == "timing"}
    wanted = {row["op"] for row in json.loads((SUITE.parent / "gpu" / "targets.json").read_text())}
    assert wanted <= set(timed)
    for op in wanted:
        assert timed[op]["seconds"] > 0 and timed[op]["share"] > 0, timed[op]
    assert timed["linear"]["target"]["scheme"] == "w8a8"
    assert all(timed["linear"][name] > 0 for name in ("bf16", "int_mm", "codes_mm")), timed["linear"]
    assert timed["rmsnorm_quantize"]["unfused"] > 0
    many = [row for row in timed.values() if "(codes)" in row["name"]]
    assert {row["target"]["op"] for row in many} == {op for op in wanted if "quantize" in op} - {"dequantize"}
    explored = [row for row in results[0]["rows"] if row["phase"] == "explore"]
    assert len(explored[0]["seconds"]) == 1 + 2 * 2 * 4, "archs, warps, splits"


def test_the_table_is_short(results, parts):
    assert len(results[1].splitlines()) <= parts.table.MOST_LINES
    data = results[0] | {"rows": results[0]["rows"] * 20}
    assert len(parts.table.lines(data)) <= parts.table.MOST_LINES


STUB = """
import argparse, os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu.record import Record
parser = argparse.ArgumentParser()
for name in ("--out", "--phase", "--until"):
    parser.add_argument(name)
options = parser.parse_args()
record = Record(Path(options.out))
record.attempt(options.phase, "one", dict)
record.attempt(options.phase, "two", lambda: {breaks}, 0.5)
record.attempt(options.phase, "three", dict)
"""


@pytest.mark.parametrize(
    ("breaks", "said"),
    [("time.sleep(60)", "hung"), ("os.abort()", "crashed"), ("exec('raise ValueError')", "ValueError")],
    ids=["hangs", "crashes", "raises"],
)
def test_a_row_that_breaks_is_a_row_that_failed(parts, tmp_path, breaks, said):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB.format(benchmarks=str(SUITE.parent), breaks=breaks))
    record, clock = parts.record.Record(tmp_path), parts.record.Clock(time.monotonic() + 60)
    command = [sys.executable, str(stub), "--out", str(tmp_path)]
    parts.children.run_phase(command, None, "phase", record, clock, tmp_path / "log.txt")
    found = {row["name"]: row for row in record.rows("phase")}
    assert [(name, row["verdict"]) for name, row in found.items()] == [
        ("one", "PASS"), ("two", "FAIL"), ("three", "PASS"),
    ]  # fmt: skip
    assert said in found["two"]["note"]
    assert json.loads((tmp_path / "results.json").read_text()) == record.data


@pytest.mark.parametrize("left", [-1, 1])
def test_a_phase_ends_at_its_deadline(parts, tmp_path, left):
    stub = tmp_path / "stub.py"
    stub.write_text("import time; time.sleep(60)")
    record, clock = parts.record.Record(tmp_path), parts.record.Clock(time.monotonic() + left)
    began = time.monotonic()
    parts.children.run_phase([sys.executable, str(stub)], None, "phase", record, clock, tmp_path / "log.txt")
    assert time.monotonic() - began < 20
    note = "stopped at its deadline" if left > 0 else "not run: out of time"
    assert [(row["verdict"], row["note"]) for row in record.rows("phase")] == [("FAIL", note)]


@pytest.mark.parametrize(
    ("ran", "verdict", "note"),
    [(0, "FAIL", "3 of 3 not run: why"), (2, "SKIP", "1 of 3 not run: why"), (3, None, "")],
)
def test_what_was_not_run_is_counted(parts, tmp_path, ran, verdict, note):
    record, turns = parts.record.Record(tmp_path), iter(range(4))
    jobs = [(name, dict) for name in "abc"]
    clock = SimpleNamespace(out=lambda: next(turns) >= ran)
    record.attempt_all("phase", jobs, clock)
    for _ in range(2):
        record.close("phase", "why")
    left = [(row["verdict"], row["note"]) for row in record.rows("phase")[ran:]]
    assert left == ([(verdict, note)] if verdict else [])
    shown = "\n".join(parts.table.lines(record.data))
    assert (note in shown) if note else ("not run" not in shown)


def test_an_error_of_the_driver_ends_the_process(parts, tmp_path):
    class CudaError(RuntimeError):
        """As halfbyte's, which the parent does not import."""

    def failing(code: int) -> None:
        raise CudaError(f"linear: what it means (code {code})")

    record = parts.record.Record(tmp_path)
    record.attempt("phase", "an argument", lambda: failing(-10001))
    with pytest.raises(CudaError):
        record.attempt("phase", "a fault", lambda: failing(700))
    assert [row["verdict"] for row in record.rows("phase")] == ["FAIL", "FAIL"]


def is_gone(pid: int) -> bool:
    """Within some seconds; a zombie that nobody waits for has ended too."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


LEAVES = """
import os, subprocess, sys
from pathlib import Path
left = subprocess.Popen(["sleep", "300"], preexec_fn=os.setpgrp)
Path({pid!r}).write_text(str(left.pid))
"""


@pytest.mark.parametrize("then", ["", "import time; time.sleep(300)"], ids=["done", "late"])
def test_nothing_is_left_of_a_phase(parts, tmp_path, then):
    stub, pid = tmp_path / "stub.py", tmp_path / "pid"
    stub.write_text(LEAVES.format(pid=str(pid)) + then)
    record = parts.record.Record(tmp_path)
    clock = parts.record.Clock(time.monotonic() + (1 if then else 60))
    parts.children.run_phase([sys.executable, str(stub)], None, "phase", record, clock, tmp_path / "log.txt")
    assert is_gone(int(pid.read_text()))


def test_the_watchdog_ends_what_runs(parts, tmp_path):
    child = parts.children.start(["sleep", "300"])
    waiting = threading.Thread(target=child.wait)
    waiting.start()
    parts.children.end_all()
    waiting.join(10)
    assert child.returncode == -9
    parts.children.end(child)


def test_the_sanitizer_ends_what_it_looks_at(parts, tmp_path):
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 300 & echo $! > {pid}; echo begun; wait"]
    assert parts.sanitizer.finished(command, 1.0, tmp_path) == (None, "begun\n")
    assert is_gone(int(pid.read_text()))
    assert parts.sanitizer.finished(["sh", "-c", "echo a; exit 9"], 10.0, tmp_path) == (9, "a\n")


@pytest.mark.parametrize(
    ("said", "status", "verdict"),
    [
        ("Error: Device not supported. See", 1, "SKIP"),
        ("==== shared memory of this size not supported", 9, "FAIL"),
        ("", 0, "PASS"),
        (None, None, "SKIP"),
    ],
)
def test_what_the_sanitizer_says(parts, tmp_path, monkeypatch, said, status, verdict):
    record, clock = parts.record.Record(tmp_path), parts.record.Clock(time.monotonic() + 100)
    monkeypatch.setattr(parts.sanitizer.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(parts.sanitizer, "finished", lambda *_: (status, said or "one\n"))
    parts.sanitizer.check(record, clock, (80,), tmp_path / "log.txt")
    assert [row["verdict"] for row in record.rows("sanitizer")] == [verdict] * 3
    assert said is not None or record.rows("sanitizer")[0]["note"] == "no time: 1 lines in 30 s"


def test_times_of_the_phases_fit(parts):
    suite = parts.suite
    assert sum(most for most, _ in suite.PHASES.values()) <= suite.DEADLINE
    assert sum(least for _, least in suite.PHASES.values()) <= suite.DEADLINE * (1 - suite.MOST_BUILD)
    patience = dict.fromkeys(suite.PHASES, parts.record.PATIENCE)
    patience |= {"smoke sm80": parts.smoke.PATIENCE, "smoke sm90": parts.smoke.PATIENCE}
    patience["sanitizer"] = parts.sanitizer.PATIENCE
    pytest.importorskip("torch")
    patience["integration"] = importlib.import_module("gpu.integration").COMPILE_PATIENCE
    assert all(seconds < suite.PHASES[phase][0] for phase, seconds in patience.items())


@pytest.mark.parametrize(
    ("red", "by_choice", "archs"),
    [((), "PASS", "90,80"), (("smoke sm90",), "FAIL", "80"), (("smoke sm80",), "PASS", "90")],
)
def test_after_a_red_smoke_nothing_uses_its_kernels(parts, tmp_path, monkeypatch, red, by_choice, archs):
    record, asked = parts.record.Record(tmp_path), {}

    def ran(command, env, phase, record, clock, log) -> None:
        asked[phase] = command[command.index("--archs") + 1]
        record.row(phase, "one", "FAIL" if phase in red else "PASS")

    monkeypatch.setattr(parts.children, "run_phase", ran)
    options = SimpleNamespace(out=tmp_path, self_test=False, library=None)
    parts.suite._run_phases(options, record, {}, 90, time.monotonic() + 460)
    for phase in ("timing", "integration", "explore"):
        row = record.rows(phase)[0]
        assert row["verdict"] == by_choice and (phase in asked) == (by_choice == "PASS")
        assert by_choice == "PASS" or "whose smoke failed" in row["note"]
    assert asked["correctness"] == archs and asked["sanitizer"] == "90,80"
    assert parts.suite._report(record, tmp_path) == (1 if red else 0)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"phase": "timing", "seconds": 1.0}, 0),
        ({"phase": "timing", "seconds": 1.0, "unmeasured": ["share"]}, 1),
        ({"phase": "timing"}, 1),
        ({"phase": "ceilings"}, 1),
        ({"phase": "explore", "seconds": {}}, 0),
    ],
)
def test_what_makes_a_run_fail(parts, tmp_path, row, code):
    record = parts.record.Record(tmp_path)
    record.row(name="one", verdict="FAIL", **row)
    assert parts.suite._report(record, tmp_path) == code
    record.set("planned", explore=[])
    if row["phase"] != "explore":
        assert parts.suite._report(record, tmp_path) == 1, "a phase without a row"


@pytest.mark.parametrize(
    ("target", "measured", "gpu", "expected"),
    [
        ({}, {}, "", "-"),
        ({"share": [0.5, 0.7]}, {"share": 0.49}, "", "FAIL"),
        ({"share": [0.5, 0.7]}, {"share": 0.5}, "", "PASS"),
        ({"share": [0.5, 0.7]}, {"share": 0.8}, "", "GOAL"),
        ({"share": [0.5, 0.7], "bf16": [2.0]}, {"share": 0.8, "bf16": 1.9}, "", "FAIL"),
        ({"share": [0.5, 0.7], "bf16": [2.0]}, {"bf16": 9.0}, "", "FAIL"),
        ({"times_m1": 9.0, "k": 9}, {}, "", "FAIL"),
        ({"share": [0.5, 0.7], "bf16": [2.0]}, {"share": 0.8, "bf16": 2.1}, "", "GOAL"),
        ({"bf16": [2.0]}, {"bf16": 9.0}, "", "PASS"),
        ({"us": [3.0]}, {}, "", "FAIL"),
        ({"h200_us": [3.0]}, {}, "NVIDIA H100", "-"),
        ({"h200_us": [20.0, 5.0]}, {}, "NVIDIA H200", "PASS"),
        ({"times_m1": 1.15}, {}, "", "FAIL"),
        ({"times_m1": 1.3}, {}, "", "PASS"),
    ],
)
def test_verdicts(parts, target, measured, gpu, expected):
    sizes = {"op": "linear", "scheme": "w4a16_g128", "m": 2, "n": 8, "k": 8}
    one, other = sizes | {"m": 1}, sizes | {"m": 1, "n": 9}
    earlier = [{"target": other, "seconds": 1}, {"target": one, "seconds": 8e-6}]
    found = parts.verdicts.verdict(sizes | target, {"seconds": 1e-5} | measured, earlier, gpu)
    assert found["verdict"] == expected


def test_a_target_that_was_not_measured_says_why(parts):
    measured = {"seconds": 1.0, "missing": {"bf16": "OutOfMemoryError: so much"}}
    found = parts.verdicts.verdict({"bf16": [2.0], "share": [0.5]}, measured, [], "")
    assert found["verdict"] == "FAIL" and found["unmeasured"] == ["share", "bf16"]
    assert "bf16: not measured: OutOfMemoryError: so much" in found["note"]


def test_a_step_between_neighbouring_numbers_of_rows_is_found(parts):
    def rows(*seconds: float) -> list[dict]:
        sizes = {"op": "linear", "scheme": "w4a16_g128", "n": 8192, "k": 8192}
        return [{"target": sizes | {"m": m}, "seconds": s} for m, s in zip((8, 9, 64), seconds, strict=True)]

    assert parts.verdicts.steps(rows(1.0, 1.3, 3.0))["verdict"] == "PASS"
    assert parts.verdicts.steps(rows(1.0, 1.4, 3.0))["verdict"] == "FAIL"
    assert parts.verdicts.steps([])["verdict"] == "FAIL"


def test_targets_are_rows_of_their_own(parts):
    rows = json.loads((SUITE.parent / "gpu" / "targets.json").read_text())
    keys = {*parts.verdicts.AT_LEAST, "us", "h200_us", "times_m1", "op", "scheme", "m", "n", "k"}
    assert all(set(row) <= keys for row in rows)
    names = [(row["op"], row.get("scheme"), row.get("m"), row.get("n"), row["k"]) for row in rows]
    assert len(set(names)) == len(names)


def test_without_a_gpu_it_says_so(tmp_path):
    """With a library that sees none, and without building anything."""
    library = Path(__file__).with_name("no_such_library.so")
    done = subprocess.run(
        [sys.executable, str(SUITE), "--out", str(tmp_path), "--library", str(library)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "no_such_library" in done.stderr
    assert "no_such_library" in (tmp_path / "table.txt").read_text()


def options_of(tmp_path: Path, library: Path) -> SimpleNamespace:
    return SimpleNamespace(out=tmp_path / "out", library=library, self_test=False, deadline=100.0)


def test_the_children_get_the_package(parts, emulated_library, tmp_path, monkeypatch):
    """The package that a run makes is what its phases import, with the library that it names."""
    monkeypatch.setattr(parts.build, "package", lambda into, library, log, seconds: library)
    monkeypatch.setenv("PYTHONPATH", PACKAGE)
    options = options_of(tmp_path, emulated_library)
    options.out.mkdir()
    record = parts.record.Record(options.out)
    env, arch = parts.suite._prepare(options, record, tmp_path / "scratch", options.out / "log.txt")
    assert env["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "scratch"), PACKAGE]
    assert env["HALFBYTE_CUDA_LIBRARY"] == str(emulated_library) and arch >= 80
    assert record.data["environment"]["library_bytes"] > 0


def test_a_library_that_sees_no_gpu_is_said_in_the_table(parts, tmp_path, monkeypatch, capsys):
    library = tmp_path / "libhalfbyte_cuda.so"
    library.write_text("this is no library")
    monkeypatch.setattr(parts.build, "package", lambda into, library, log, seconds: library)
    monkeypatch.setenv("PYTHONPATH", PACKAGE)
    assert parts.suite._parent(options_of(tmp_path, library)) == 2
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "nothing ran" in text and "does not load" in text
    for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
        timer.join(10)  # one that is cancelled ends soon, but not at once
        assert not timer.is_alive()
