"""One recorded call as events of the Trace Event format, which Perfetto and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Iterator

from ..fuse.stack import StackRun
from .account import Account, Names, is_row
from .record import Span
from .stacks import StackParts, by_thread, key_of, together

_PID, _CALLS = 1, 0  # the track of the calls; thread t of the stacks has the track t + 1
_WAITING = "waiting"


def trace_events(model: str, account: Account, names: Names) -> list[dict]:
    """Complete events (ph X, times in us from the begin of the call), by track and time, after the names of
    the tracks (ph M).
    """
    start = account.spans[0].begin
    events = []
    for span in account.spans:
        events.append(_call(span, names))
        for run in span.runs:
            parts = names.stack(run.stack)
            events += [_stack(run, parts), *_threads(run, parts)]
    for event in events:
        event["ts"] = (event["ts"] - start) / 1e3
        event["dur"] /= 1e3
    tracks = {event["tid"] for event in events}
    titles = {track: f"thread {track - 1} of fused blocks" if track else "calls" for track in sorted(tracks)}
    head = [_title("process_name", _CALLS, model), *(_title("thread_name", *item) for item in titles.items())]
    return head + sorted(events, key=lambda event: (event["tid"], event["ts"], -event["dur"]))


def _call(span: Span, names: Names) -> dict:
    args: dict[str, object] = {"class": type(span.module).__name__} if span.module is not None else {}
    kind = "call"
    if is_row(span):
        part = names.part(span.module)
        kind = part.op
        args |= {"kernel": part.kernel, "shape": part.shape}
        args |= {"operations": span.work.operations, "bytes": span.work.bytes}
    return _complete(names.module(span.module), kind, _CALLS, span.begin, span.end, args)


def _stack(run: StackRun, parts: StackParts) -> dict:
    begin, end = min(e[3] for e in run.events), max(e[4] for e in run.events)
    args = {"batch": run.batch, "tokens": run.tokens, "past": run.past}
    name = f"{parts.title}: blocks {run.blocks[0]} to {run.blocks[1] - 1}"
    return _complete(name, "fused", _CALLS, begin, end, args)


def _threads(run: StackRun, parts: StackParts) -> Iterator[dict]:
    """What each thread did; where they work together, from when all could begin."""
    threads = by_thread(run.events)
    lasts = [max(e[4] for e in step) for step in zip(*threads, strict=True)] if together(threads) else []
    for thread in threads:
        for i, e in enumerate(thread):
            (block, phase), begin = key_of(e), e[3]
            if lasts and i > 0 and lasts[i - 1] > begin:
                begin = lasts[i - 1]
                yield _complete(_WAITING, _WAITING, e[2] + 1, e[3], begin, {})
            part, work = parts.part(block, phase), parts.work(block, phase, run)
            args = {"kernel": part.kernel, "shape": part.shape}
            if lasts:  # else of many runs of sequences together
                args |= {"operations of all threads": work.operations, "bytes of all threads": work.bytes}
            yield _complete(f"{parts.block(block, phase)} {phase}", part.op, e[2] + 1, begin, e[4], args)


def _complete(name: str, kind: str, track: int, begin: int, end: int, args: dict) -> dict:
    args = {key: value for key, value in args.items() if value}
    span = {"ts": begin, "dur": end - begin}
    return {"name": name, "cat": kind, "ph": "X", "pid": _PID, "tid": track, **span, "args": args}


def _title(what: str, track: int, name: str) -> dict:
    return {"name": what, "ph": "M", "pid": _PID, "tid": track, "args": {"name": name}}
