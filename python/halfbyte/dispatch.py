"""Which kernels there are, which one runs, and on how many threads: the Python face of the kernel table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _core
from .errors import IsaError

# What set_num_threads asked for; 0 follows torch, whose count differs between Python threads.
thread_override = 0


class _IsaErrors:
    """A context that makes the RuntimeError of the core, which HALFBYTE_ISA causes, an IsaError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError):
            raise IsaError(str(error)) from None


isa_errors = _IsaErrors()


def kernels(op: str | None = None) -> list[dict]:
    """Every kernel built in, best first per op: dicts of op, name, isa and supported (by this machine)."""
    return [row for row in _core.kernels() if op in (None, row["op"])]


def cpu_features() -> dict[str, bool]:
    """ISA name -> whether this machine, its operating system included, can run it."""
    return _core.cpu_features()


@contextmanager
def force_isa(isa: str | None) -> Iterator[None]:
    """Within the block and on this thread, choose kernels as on a machine whose best ISA is `isa` (None: the
    real one).

    Applies to weights that are packed already. Raises IsaError for an unknown name and for an ISA the machine
    lacks.
    """
    try:
        previous = _core.force_isa(isa)
    except (ValueError, RuntimeError) as error:
        raise IsaError(str(error)) from None
    try:
        yield
    finally:
        _core.force_isa(previous)


def get_num_threads() -> int:
    """Threads that a large call uses."""
    return _core.get_num_threads()


def set_num_threads(threads: int) -> None:
    """Use at most `threads` threads from now on; 0 follows torch or, without it, OpenMP."""
    global thread_override
    if threads < 0:
        raise ValueError(
            f"set_num_threads: {threads} is negative; give a number of threads, or 0 to follow torch"
        )
    _core.set_num_threads(threads)
    thread_override = threads
