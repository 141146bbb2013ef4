"""One command for a machine with an NVIDIA GPU: is every kernel right, and how fast is it?

    python benchmarks/gpu_suite.py --out DIR [--deadline 460] [--library libhalfbyte_cuda.so]

Builds the library (unless it is given) and the CPU extension for the running Python, which needs torch,
numpy, cmake, ninja and pybind11, a C++ compiler and nvcc. Then, each in a process of its own: first small
calls, ceilings, every kernel against float64, times against torch, the public functions, compute-sanitizer,
and all schedules of the shapes that matter. DIR/results.json has every row as soon as it is known,
DIR/table.txt the end. Exits with 0 where all checks passed, 1 where one failed or something was not
measured, 2 where nothing ran, 3 where it hung.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from gpu import build, children, machine, table
from gpu.record import FAIL, Clock, Record

ROOT = Path(__file__).resolve().parent.parent
DEADLINE, MOST_BUILD = 460.0, 0.55  # seconds, and the part of them that building may take
# Phase -> seconds that it may take, and that are kept for it while those before it run. The first fit into
# the deadline where nothing is built, the second where building takes all that it may.
PHASES = {
    "smoke sm80": (20, 10),
    "smoke sm90": (20, 10),
    "ceilings": (35, 15),
    "correctness": (100, 40),
    "timing": (130, 70),
    "integration": (80, 35),
    "sanitizer": (40, 15),
    "explore": (35, 10),
}
CHECKS = ("smoke sm80", "smoke sm90", "ceilings", "correctness", "integration", "sanitizer")
BY_CHOICE = ("timing", "integration", "explore")  # call the kernels that the library chooses


class NothingRan(Exception):
    """Why no phase can run."""


def main() -> int:
    options = _options()
    if options.phase:
        _child(options)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `finally`
    return _parent(options)


def _options() -> argparse.Namespace:
    keep = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and table.txt")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds that all of it may take")
    parser.add_argument("--library", type=Path, help="libhalfbyte_cuda.so, where it is built already")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes, the emulated --library")
    for hidden in ("--phase", "--until", "--archs"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.self_test and not options.library:
        parser.error("--self-test needs the emulated --library")
    return options


def _parent(options: argparse.Namespace) -> int:
    end = time.monotonic() + options.deadline
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "table.txt", "log.txt"):
        (options.out / name).unlink(missing_ok=True)
    record, log = Record(options.out), options.out / "log.txt"
    record.set("environment", **machine.describe(ROOT))
    watchdog = _watchdog(end + 20, record, options.out)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            env, arch = _prepare(options, record, Path(scratch), log)
            _run_phases(options, record, env, arch, end)
    except (NothingRan, build.BuildError) as error:
        record.set("environment", nothing_ran=str(error))
        _report(record, options.out)
        print(error, file=sys.stderr)
        return 2
    finally:
        watchdog.cancel()
    return _report(record, options.out)


def _run_phases(options: argparse.Namespace, record: Record, env: dict, arch: int, end: float) -> None:
    archs = [90, 80] if 90 <= arch < 100 else [80]  # the first is what the library chooses
    phases = {
        phase: seconds
        for phase, seconds in PHASES.items()
        if not (phase.startswith("smoke") and int(phase[-2:]) not in archs)
        and not (phase == "sanitizer" and options.self_test)
    }
    record.set("planned", **{phase: [] for phase in phases})
    left, red = dict(phases), []
    for phase, (most, _) in phases.items():
        del left[phase]
        # What follows is about the kernels that work; only the sanitizer may say why the others do not.
        tested = archs if phase == "sanitizer" else [arch for arch in archs if arch not in red]
        if phase in BY_CHOICE and archs[0] in red:
            note = f"not run: the library would choose kernels of sm{archs[0]}, whose smoke failed"
            record.row(phase, f"{phase}: not run", FAIL, note=note)
            continue
        until = min(time.monotonic() + most, end - sum(least for _, least in left.values()))
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out)]
        command += ["--archs", ",".join(map(str, tested))]
        if options.self_test:
            command += ["--self-test", "--library", str(options.library)]
        children.run_phase(command, env, phase, record, Clock(until), options.out / "log.txt")
        if phase.startswith("smoke") and any(row["verdict"] == FAIL for row in record.rows(phase)):
            red.append(int(phase[-2:]))


def _prepare(options: argparse.Namespace, record: Record, scratch: Path, log: Path) -> tuple[dict, int]:
    """(environment of the children, compute capability * 10)."""
    if options.self_test:
        return dict(os.environ), 90  # with the package of this Python
    began = time.monotonic()
    library = build.package(scratch, options.library, log, MOST_BUILD * options.deadline)
    record.set("phases", build=round(time.monotonic() - began, 1))
    record.set("environment", library_bytes=library.stat().st_size)
    path = os.pathsep.join(filter(None, (str(scratch), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "HALFBYTE_CUDA_LIBRARY": str(library)}
    return env, _arch(library, env)


ASK = """
from halfbyte.cuda.library import library, missing
found = library()
if found is None:
    raise SystemExit(missing())
arch = found.arch(0)
if arch < 80:
    raise SystemExit(found.explain(-arch) if arch < 0 else f"its compute capability is {arch / 10}")
print(arch)
"""


def _arch(library: Path, env: dict) -> int:
    """Of the first GPU, asked in a process of its own."""
    command = [sys.executable, "-c", ASK]
    try:
        asked = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise NothingRan(f"{library} did not answer within 60 s which GPU there is") from None
    if asked.returncode:
        why = asked.stderr.strip() or f"exit status {asked.returncode}"
        raise NothingRan(f"{library} sees no GPU of compute capability 8.0 or more:\n{why}")
    return int(asked.stdout)


def _watchdog(end: float, record: Record, out: Path) -> threading.Timer:
    """Whatever hangs: the table of what there is."""

    def late() -> None:
        children.end_all()
        record.reload()
        if not record.data["planned"]:
            record.set("environment", nothing_ran="the build was not done when the time was up")
        _report(record, out)
        os._exit(3)

    timer = threading.Timer(end - time.monotonic(), late)
    timer.daemon = True
    timer.start()
    return timer


def _report(record: Record, out: Path) -> int:
    for phase in record.data["planned"]:
        record.close(phase, "the run ended before")
    text = "\n".join(table.lines(record.data))
    (out / "table.txt").write_text(text + "\n")
    print(text, flush=True)
    return int(any(row["verdict"] == FAIL and _counts(row) for row in record.data["rows"]))


def _counts(row: dict) -> bool:
    """Whether a row that failed is a fault: a time that misses its target is none, but a missing time is."""
    return row["phase"] in CHECKS or not row.keys() & {"seconds", "steps"} or "unmeasured" in row


def _child(options: argparse.Namespace) -> None:
    """One phase. Nothing here imports torch before a phase that needs it."""
    record, clock = Record(options.out), Clock(float(options.until))
    archs = tuple(map(int, filter(None, options.archs.split(","))))
    phase, tiny = options.phase, options.self_test
    if phase == "sanitizer":
        from gpu import sanitizer

        sanitizer.check(record, clock, archs, options.out / "log.txt")
        return
    with contextlib.ExitStack() as stack:
        if tiny:
            from halfbyte.cuda.library import use_library

            stack.enter_context(use_library(options.library))
        if phase.startswith("smoke"):
            from gpu import smoke

            smoke.check(record, clock, phase, int(phase[-2:]), tiny)
            return
        import torch

        from gpu import ceilings, correctness, elementwise, explore, integration, timing
        from halfbyte.bench.gpu_clock import Emulated, Gpu

        stack.enter_context(torch.no_grad())
        torch.manual_seed(0)
        on = Emulated() if tiny else Gpu()
        record.set("environment", device=on.name)
        if phase == "correctness":  # what the products need comes before them
            jobs = elementwise.jobs(on, tiny) + correctness.jobs(on, archs, tiny)
            record.attempt_all(phase, jobs, clock)
            return
        measure = {
            "ceilings": ceilings.measure,
            "timing": timing.measure,
            "integration": integration.check,
            "explore": explore.measure,
        }[phase]
        measure(on, record, clock, archs, tiny)


if __name__ == "__main__":
    sys.exit(main())
