"""compute-sanitizer over the small cases of smoke.py, where it is there and supports the device."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from .record import Clock, Record, Skipped, Wrong

PHASE = "sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # our choice of its exit status for errors
PATIENCE = 35.0
LEAST_SECONDS = 5.0


def check(record: Record, clock: Clock, archs: tuple[int, ...], log: Path) -> None:
    """One row per tool and family of kernels."""
    jobs = [
        (f"{tool} sm{arch}", partial(_run, tool, arch, clock, log), PATIENCE)
        for tool in TOOLS
        for arch in archs
    ]
    record.attempt_all(PHASE, jobs, Clock(clock.until - LEAST_SECONDS))


def _run(tool: str, arch: int, clock: Clock, log: Path) -> dict:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Skipped("no compute-sanitizer")
    subject = [sys.executable, "-m", "gpu.smoke", "--arch", str(arch)]
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *subject]
    seconds = min(clock.left(), PATIENCE - LEAST_SECONDS)
    status, said = finished(command, seconds, Path(__file__).parents[1])
    with log.open("a") as output:
        output.write(f"== {tool} sm{arch}\n{said}")
    if status is None:
        raise Skipped(f"no time: {said.count(chr(10))} lines in {seconds:.0f} s")
    if "Device not supported" in said:
        raise Skipped("it does not support this device")
    if status:
        lines = [line for line in said.splitlines() if "=====" in line] or said.splitlines()
        raise Wrong(" ".join(lines[:3])[:300] or f"exit status {status}")
    return {}


def finished(command: list[str], seconds: float, folder: Path) -> tuple[int | None, str]:
    """(exit status or None where it took longer, output). What it started ends with it: the program that it
    looks at would hold the device. A group within the phase's session, which children.py ends.
    """
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=folder,
        preexec_fn=os.setpgrp,
    )  # fmt: skip
    try:
        said, status = child.communicate(timeout=seconds)[0], child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        said, status = child.communicate()[0], None
    return status, said
