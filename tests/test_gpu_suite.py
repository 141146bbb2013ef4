"""benchmarks/gpu_suite.py without a GPU: its checks on the emulated library, and when one breaks."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from building import ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.py"
CHECKS = {"smoke sm80", "smoke sm90", "ceilings", "correctness", "integration"}


@pytest.fixture(scope="module")
def parts():
    """The package benchmarks/gpu."""
    sys.path.insert(0, str(SUITE.parent))
    names = ("children", "record", "table", "verdicts")
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu.{name}") for name in names})
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
    assert len(skipped) == 2, f"what needs two devices alone is left out: {skipped}"


def test_every_op_is_timed_against_the_ceilings(results):
    timed = {row["name"].split()[0]: row for row in results[0]["rows"] if row["phase"] == "timing"}
    wanted = {row["op"] for row in json.loads((SUITE.parent / "gpu" / "targets.json").read_text())}
    assert wanted <= set(timed)
    for op in wanted:
        assert timed[op]["seconds"] > 0 and timed[op]["share"] > 0, timed[op]
    assert timed["linear"]["bf16"] > 0 and timed["rmsnorm_quantize"]["unfused"] > 0
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
    assert [row["note"] for row in record.rows("phase")] == (["stopped at its deadline"] if left > 0 else [])


@pytest.mark.parametrize(
    ("target", "measured", "gpu", "expected"),
    [
        ({}, {}, "", "-"),
        ({"share": [0.5, 0.7]}, {"share": 0.49}, "", "FAIL"),
        ({"share": [0.5, 0.7]}, {"share": 0.5}, "", "PASS"),
        ({"share": [0.5, 0.7]}, {"share": 0.8}, "", "GOAL"),
        ({"share": [0.5, 0.7], "bf16": [2.0]}, {"share": 0.8, "bf16": 1.9}, "", "FAIL"),
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


def test_a_step_between_neighbouring_numbers_of_rows_is_found(parts):
    def rows(*seconds: float) -> list[dict]:
        sizes = {"op": "linear", "scheme": "w4a16_g128", "n": 8192, "k": 8192}
        return [{"target": sizes | {"m": m}, "seconds": s} for m, s in zip((8, 9, 64), seconds, strict=True)]

    assert parts.verdicts.steps(rows(1.0, 1.3, 3.0))["verdict"] == "PASS"
    assert parts.verdicts.steps(rows(1.0, 1.4, 3.0))["verdict"] == "FAIL"
    assert parts.verdicts.steps([])["verdict"] == "-"


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
