"""compute-sanitizer over the small cases of smoke.py, where it is there and supports the device."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from .record import Clock, Record, Skipped, Wrong

PHASE = "sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # our choice of its exit status for errors
PATIENCE = 120.0


def check(record: Record, clock: Clock, archs: tuple[int, ...], log: Path) -> None:
    """One row per tool and family of kernels."""
    for tool in TOOLS:
        for arch in archs:
            if clock.left() > 5:
                job = partial(_run, tool, arch, clock, log)
                record.attempt(PHASE, f"{tool} sm{arch}", job, PATIENCE)


def _run(tool: str, arch: int, clock: Clock, log: Path) -> dict:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Skipped("no compute-sanitizer")
    subject = [sys.executable, "-m", "gpu.smoke", "--arch", str(arch)]
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *subject]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=clock.left(), cwd=Path(__file__).parents[1]
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout if isinstance(late.stdout, str) else (late.stdout or b"").decode(errors="replace")
        raise Skipped(f"no time: {said.count(chr(10))} cases in {clock.left():.0f} s") from None
    said = done.stdout + done.stderr
    with log.open("a") as output:
        output.write(f"== {tool} sm{arch}\n{said}")
    if "not supported" in said.lower():
        raise Skipped("it does not support this device")
    if done.returncode:
        lines = [line for line in said.splitlines() if "=====" in line] or said.splitlines()
        raise Wrong(" ".join(lines[:3])[:300])
    return {}
