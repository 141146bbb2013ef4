"""Phases in processes of their own: a kernel that hangs or breaks the context of the device ends one of them
and not the run.
"""

from __future__ import annotations

import contextlib
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
_running: list[subprocess.Popen] = []  # what `start` started and `end` has not ended


def start(command: list[str], **options: object) -> subprocess.Popen:
    """A process in a session of its own, for `end`."""
    child = subprocess.Popen(command, start_new_session=True, **options)
    _running.append(child)
    return child


def end(child: subprocess.Popen) -> None:
    """Kills the session: the process, and whatever it has started and left behind."""
    kill_session(child.pid)
    child.wait()
    if child in _running:
        _running.remove(child)


def end_all() -> None:
    """For a way out that passes by every `finally`."""
    for child in list(_running):
        kill_session(child.pid)


def kill_session(leader: int) -> None:
    """Also process groups within the session, as sanitizer.py makes them, which killpg would pass by."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry.name)) == leader:
                    os.kill(int(entry.name), signal.SIGKILL)


def is_over(child: subprocess.Popen) -> bool:
    """Without taking its exit status: until then no other process gets its number, by which it is ended."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_phase(command: list[str], env: dict, phase: str, record: Record, clock: Clock, log: Path) -> None:
    """Runs a phase to its end. After a row that hung or crashed a new process goes on behind it."""
    began, why = time.monotonic(), f"{1 + MOST_RESTARTS} processes broke"
    for _ in range(1 + MOST_RESTARTS):
        if clock.out():
            why = "out of time"
            break
        before = len(record.rows(phase))
        record.running.unlink(missing_ok=True)
        full = [*command, "--phase", phase, "--until", str(clock.until)]
        with log.open("a") as output:
            child = start(full, env=env, stdout=output, stderr=output)
        try:
            found = _watch(child, record.running, clock)
        finally:
            end(child)
        if found == "over":
            found = "done" if child.returncode == 0 else f"crashed ({child.returncode})"
        record.reload()
        if found == "done":
            why = "out of time" if record.rows(phase) else "it ended without a row"
            break
        running = json.loads(record.running.read_text()) if record.running.exists() else {}
        name = running.get("name", f"{phase}: start")
        late = found == "late"
        if not record.has(phase, name):
            note = "stopped at its deadline" if late else f"{found}; {log.name} may say why"
            record.row(phase, name, FAIL, note=note)
        if late or not running or len(record.rows(phase)) == before:
            why = "out of time" if late else found
            break
    record.close(phase, why)
    record.running.unlink(missing_ok=True)
    record.set("phases", **{phase: round(time.monotonic() - began, 1)})


def _watch(child: subprocess.Popen, running: Path, clock: Clock) -> str:
    """Waits for the child: `over`, or, to be ended, `hung` (a row took too long) or `late`."""
    started = time.time()  # as the file system has it
    while not is_over(child):
        time.sleep(POLL_SECONDS)
        since, patience = started, START_PATIENCE
        try:
            since, patience = running.stat().st_mtime, json.loads(running.read_text())["patience"]
        except (OSError, ValueError):
            pass  # not there yet, or being written
        if clock.left() < -5:  # a phase looks at the clock itself, between rows
            return "late"
        if time.time() - max(since, started) > patience:
            return "hung"
    return "over"
