"""results.json: every row is in the file before the next one begins, whatever happens to the process then."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

# GOAL: passed, and what was hoped for besides. NONE: there is no target.
PASS, GOAL, FAIL, SKIP, NONE = "PASS", "GOAL", "FAIL", "SKIP", "-"
PATIENCE = 30.0  # seconds that a row may take before the parent takes it for hung
DRIVER_CODE = re.compile(r"\(code [1-9]\d*\)")  # halfbyte's CudaError where the driver said no


class Wrong(Exception):
    """A check found what must not be."""


class Skipped(Exception):
    """Something that this machine does not have."""


class Record:
    """The results of a run, shared by the parent and, one after the other, its children."""

    def __init__(self, folder: Path) -> None:
        self.path, self.running = folder / "results.json", folder / "running.json"
        self.data: dict = {"kind": "gpu", "environment": {}, "ceilings": {}, "phases": {}}
        self.data |= {"planned": {}, "rows": []}
        self.reload()

    def reload(self) -> None:
        """What a child has written since."""
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def save(self) -> None:
        """Replaces the file as a whole, so that it is never half written."""
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.data, indent=1))
        os.replace(draft, self.path)

    def set(self, part: str, **values: object) -> None:
        """Facts of the whole run: environment, ceilings, phases, planned."""
        self.data[part].update(values)
        self.save()

    def start(self, phase: str, name: str, patience: float = PATIENCE) -> None:
        """Says what is about to run, for the parent that watches."""
        self.running.write_text(json.dumps({"phase": phase, "name": name, "patience": patience}))

    def row(self, phase: str, name: str, verdict: str, **values: object) -> dict:
        """One result; `values` is what the phase knows of it."""
        row = {"phase": phase, "name": name, "verdict": verdict, **values}
        self.data["rows"].append(row)
        self.save()
        return row

    def rows(self, phase: str) -> list[dict]:
        return [row for row in self.data["rows"] if row["phase"] == phase]

    def has(self, phase: str, name: str) -> bool:
        """Whether an earlier child got as far as this."""
        return any(row["name"] == name for row in self.rows(phase))

    def attempt(self, phase: str, name: str, job: Callable[[], dict], patience: float = PATIENCE) -> None:
        """Runs a check and adds its row. It returns what there is to say, or raises Wrong or Skipped."""
        if self.has(phase, name):
            return
        self.start(phase, name, patience)
        try:
            values = job()
            self.row(phase, name, values.pop("verdict", PASS), **values)
        except Skipped as reason:
            self.row(phase, name, SKIP, note=str(reason))
        except Exception as error:
            what = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            self.row(phase, name, FAIL, note=what[:400])
            driver = type(error).__name__ == "CudaError" and DRIVER_CODE.search(what)
            if driver or "CUDA error" in what:
                raise  # the context may be broken: another process goes on

    def attempt_all(self, phase: str, jobs: list[tuple], clock: Clock) -> None:
        """Each of (name, job, and maybe patience) in its turn, until the clock is out."""
        self.set("planned", **{phase: [name for name, *_ in jobs]})
        for name, job, *patience in jobs:
            if not clock.out():
                self.attempt(phase, name, job, *patience)

    def close(self, phase: str, why: str) -> None:
        """A row that counts what was planned and has no row: none that ran at all is a failure."""
        names = {row["name"] for row in self.rows(phase)}
        planned = self.data["planned"].get(phase, [])
        missing = [name for name in planned if name not in names]
        if names and not missing:
            return
        name, count = f"{phase}: not run", f"{len(missing)} of {len(planned)} " if planned else ""
        if name not in names:
            verdict = SKIP if len(missing) < len(planned) else FAIL
            self.row(phase, name, verdict, note=f"{count}not run: {why}")


class Clock:
    """Seconds until a moment of the clock that all processes of a machine share."""

    def __init__(self, until: float) -> None:
        self.until = until

    def left(self) -> float:
        return self.until - time.monotonic()

    def out(self) -> bool:
        return self.left() <= 0
