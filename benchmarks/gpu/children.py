"""Phases in processes of their own: a kernel that hangs or breaks the context of the device ends one of them
and not the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from .record import FAIL, Clock, Record

POLL_SECONDS = 0.1
MOST_RESTARTS = 4
START_PATIENCE = 90.0  # seconds until the first row begins: the imports, and the device's context


def run_phase(command: list[str], env: dict, phase: str, record: Record, clock: Clock, log: Path) -> None:
    """Runs a phase to its end. After a row that hung or crashed a new process goes on behind it."""
    began = time.monotonic()
    for _ in range(1 + MOST_RESTARTS):
        if clock.out():
            break
        before = len(record.rows(phase))
        record.running.unlink(missing_ok=True)
        full = [*command, "--phase", phase, "--until", str(clock.until)]
        with log.open("a") as output:
            child = subprocess.Popen(full, env=env, stdout=output, stderr=output, start_new_session=True)
        end = _watch(child, record.running, clock)
        record.reload()
        if end == "done":
            break
        if end == "late":
            record.row(phase, f"{phase}: time", FAIL, note="stopped at its deadline")
            break
        running = json.loads(record.running.read_text()) if record.running.exists() else {}
        name = running.get("name", f"{phase}: start")
        if not record.has(phase, name):
            record.row(phase, name, FAIL, note=f"{end}; {log.name} may say why")
        if not running or len(record.rows(phase)) == before:
            break
    record.running.unlink(missing_ok=True)
    record.set("phases", **{phase: round(time.monotonic() - began, 1)})


def _watch(child: subprocess.Popen, running: Path, clock: Clock) -> str:
    """Waits for the child, or ends it: `done`, `crashed`, `hung` (a row took too long) or `late`."""
    started = time.time()  # as the file system has it
    while child.poll() is None:
        time.sleep(POLL_SECONDS)
        since, patience = started, START_PATIENCE
        try:
            since, patience = running.stat().st_mtime, json.loads(running.read_text())["patience"]
        except (OSError, ValueError):
            pass  # not there yet, or being written
        if clock.left() < -5:  # a phase looks at the clock itself, between rows
            return _end(child, "late")
        if time.time() - max(since, started) > patience:
            return _end(child, "hung")
    return "done" if child.returncode == 0 else f"crashed ({child.returncode})"


def _end(child: subprocess.Popen, why: str) -> str:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return why
