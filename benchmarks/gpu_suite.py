"""One command for a machine with an NVIDIA GPU: is every kernel right, and how fast is it?

    python benchmarks/gpu_suite.py --out DIR [--deadline 460] [--library libhalfbyte_cuda.so]

Builds the library (unless it is given) and the CPU extension for the running Python, which needs torch,
numpy, cmake, ninja and pybind11, a C++ compiler and nvcc. Then, each in a process of its own: first small
calls, ceilings, every kernel against float64, times against torch, the public functions, compute-sanitizer,
and all schedules of the shapes that matter. DIR/results.json has every row as soon as it is known,
DIR/table.txt the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from gpu import build, machine, table
from gpu.children import run_phase
from gpu.record import FAIL, Clock, Record

ROOT = Path(__file__).resolve().parent.parent
# Phase -> seconds that it may take, and that are kept for it while those before it run.
PHASES = {
    "smoke sm80": (40, 5),
    "smoke sm90": (40, 5),
    "ceilings": (40, 15),
    "correctness": (110, 40),
    "timing": (170, 90),
    "integration": (90, 40),
    "sanitizer": (60, 30),
    "explore": (60, 10),
}
CHECKS = ("smoke sm80", "smoke sm90", "correctness", "integration", "sanitizer")
DEADLINE, MOST_BUILD = 460.0, 0.6  # seconds, and the part of them that building may take


def main() -> int:
    options = _options()
    if options.phase:
        _child(options)
        return 0
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
    _watchdog(end + 20, record, options.out)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            env, arch = _prepare(options, record, Path(scratch), log)
        except build.BuildError as error:
            print(error, file=sys.stderr)
            return 2
        if arch < 80:
            print("no GPU of compute capability 8.0 or more that the library sees", file=sys.stderr)
            return 2
        archs = [90, 80] if 90 <= arch < 100 else [80]
        left = dict(PHASES)
        for phase, (most, _) in PHASES.items():
            del left[phase]
            if phase.startswith("smoke") and int(phase[-2:]) not in archs:
                continue
            until = min(time.monotonic() + most, end - sum(least for _, least in left.values()))
            command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out)]
            command += ["--archs", ",".join(map(str, archs))]
            if options.self_test:
                command += ["--self-test", "--library", str(options.library)]
            run_phase(command, env, phase, record, Clock(until), log)
            if phase == "smoke sm90" and any(row["verdict"] == FAIL for row in record.rows(phase)):
                archs.remove(90)  # what follows is about the kernels that work
    return _report(record, options.out)


def _prepare(options: argparse.Namespace, record: Record, scratch: Path, log: Path) -> tuple[dict, int]:
    """(environment of the children, compute capability * 10)."""
    if options.self_test:
        path = os.pathsep.join(filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
        return os.environ | {"PYTHONPATH": path}, 90
    began = time.monotonic()
    library = build.package(scratch, options.library, log, MOST_BUILD * options.deadline)
    record.set("phases", build=round(time.monotonic() - began, 1))
    record.set("environment", library_bytes=library.stat().st_size)
    asked = f"import ctypes; l = ctypes.CDLL({str(library)!r}); print(l.halfbyte_cuda_arch(0))"
    arch = machine.output_of(sys.executable, "-c", asked)
    path = os.pathsep.join(filter(None, (str(scratch), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "HALFBYTE_CUDA_LIBRARY": str(library)}, int(arch or -1)


def _watchdog(end: float, record: Record, out: Path) -> None:
    """Whatever hangs: the table of what there is."""

    def late() -> None:
        record.reload()
        _report(record, out)
        os._exit(3)

    timer = threading.Timer(end - time.monotonic(), late)
    timer.daemon = True
    timer.start()


def _report(record: Record, out: Path) -> int:
    text = "\n".join(table.lines(record.data))
    (out / "table.txt").write_text(text + "\n")
    print(text, flush=True)
    return int(any(row["verdict"] == FAIL for phase in CHECKS for row in record.rows(phase)))


def _child(options: argparse.Namespace) -> None:
    """One phase. Nothing here imports torch before a phase that needs it."""
    record, clock = Record(options.out), Clock(float(options.until))
    archs, phase, tiny = tuple(map(int, options.archs.split(","))), options.phase, options.self_test
    if phase == "sanitizer":
        from gpu import sanitizer

        if not tiny:
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
        jobs = {
            "ceilings": [ceilings.measure],
            "correctness": [correctness.check, elementwise.check],
            "timing": [timing.measure],
            "integration": [integration.check],
            "explore": [explore.measure],
        }[phase]
        for job in jobs:
            job(on, record, clock, archs, tiny)


if __name__ == "__main__":
    sys.exit(main())
