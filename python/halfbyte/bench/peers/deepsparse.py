"""DeepSparse, a float32 weight with zeros, in a process of its own.

Its last release, 1.8.0, has wheels up to Python 3.11 and holds numpy and onnx at old versions, so it gets an
environment of its own, whose interpreter HALFBYTE_DEEPSPARSE_PYTHON names. The process compiles the layer,
waits at a pipe, and makes calls when it is asked to: it is sampled in the same rounds as the others and is
quiet between them.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

import numpy as np

from ...errors import HalfbyteError
from . import Layer, Problem, UnavailableError, deepsparse_worker

VARIABLE = "HALFBYTE_DEEPSPARSE_PYTHON"
_BUILD_SECONDS, _REPLY_SECONDS = 600, 120
# No messages to its makers; threads pinned to cores, as its own benchmark tool has them.
_ENVIRONMENT = {"NM_DISABLE_ANALYTICS": "1", "NM_BIND_THREADS_TO_CORES": "1"}


def build(problem: Problem) -> Layer:
    python = os.environ.get(VARIABLE)
    if not python:
        raise UnavailableError(
            f"{VARIABLE} names no interpreter; make one: python3.11 -m venv ds && ds/bin/pip install "
            f"deepsparse==1.8.0, then {VARIABLE}=ds/bin/python"
        )
    m, n, _ = problem.mnk
    # Its values; how it stores where they belong is not known.
    bytes_ = 4 * (int(np.count_nonzero(problem.weight)) + n)
    copies = problem.copies(bytes_)
    worker = Worker([python, "-I", deepsparse_worker.__file__], problem, copies)
    call = lambda: worker.seconds(1)  # noqa: E731
    return Layer([call] * copies, lambda: worker.output().reshape(m, n), bytes_, worker.note, worker.seconds)


class Worker:
    """The process. It ends with this object, or with the process that holds it."""

    def __init__(self, command: list[str], problem: Problem, copies: int):
        folder = Path(tempfile.mkdtemp(prefix="halfbyte-"))
        self._folder, self._log = folder, folder / "log"
        for name in ("x", "weight", "bias"):
            np.save(folder / f"{name}.npy", getattr(problem, name))
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, str(folder), str(problem.threads), str(copies)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    env=os.environ | {k: os.environ.get(k, v) for k, v in _ENVIRONMENT.items()},
                )  # fmt: skip
        except OSError as error:
            shutil.rmtree(folder)
            raise UnavailableError(f"{VARIABLE}: {command[0]} cannot be started: {error.strerror}") from error
        self._end = weakref.finalize(self, _end, self._process, folder)
        ready = self._reply(_BUILD_SECONDS, UnavailableError)
        if "error" in ready:
            self._end()
            raise UnavailableError(f"{ready['error']} ({VARIABLE}={command[0]})")
        self.note = ready["note"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def seconds(self, count: int) -> float:
        """That the next `count` calls take; copies of the weight are used in turn."""
        return self._ask({"calls": count})["seconds"]

    def output(self) -> np.ndarray:
        """Of the first copy."""
        self._ask({"output": True})
        return np.load(self._folder / "y.npy")

    def _ask(self, request: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # then there is no reply either
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self._reply(_REPLY_SECONDS, HalfbyteError)

    def _reply(self, seconds: float, error: type[Exception]) -> dict:
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if ready and (line := self._process.stdout.readline()):
            return json.loads(line)
        words = (self._log.read_text(errors="replace").strip().splitlines() or ["it does not say why"])[-1]
        self._end()
        raise error(f"DeepSparse {'stopped' if ready else f'took more than {seconds} s'}: {words[:160]}")


def _end(process: subprocess.Popen, folder: Path) -> None:
    process.kill()
    process.communicate()
    shutil.rmtree(folder, ignore_errors=True)
