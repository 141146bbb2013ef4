"""What tests ask of a profile: that its rows add up, that its trace is one, and that the model is whole."""

from __future__ import annotations

import json

import pytest

import halfbyte as hb
from halfbyte.profiling.account import Account, Names
from halfbyte.profiling.record import Recorder

FAST = {"rounds": 3, "warmup": 1, "ceilings": False}


def rows(profile):
    """Rows by layer and phase."""
    return {(row.layer, row.phase): row for row in profile.rows}


def checked(model, inputs, **options):
    """A short profile; none of the recorded time is lost or counted twice, and the model is clean."""
    before = forwards(model)
    profile = hb.profile(model, inputs, **FAST | options)
    assert forwards(model) == before
    parts = sum(row.ms for row in profile.rows) + profile.unaccounted_ms
    assert parts == pytest.approx(profile.total_ms, rel=1e-6)
    assert all(row.ms >= 0 for row in (*profile.rows, *profile.between))
    assert min(profile.recorded_ms) * 0.999 <= profile.total_ms <= max(profile.recorded_ms) * 1.001
    assert_clean(model)
    return profile


def assert_nothing_is_lost(model, call, **options):
    """The rows of a call, and what recording took, are the time from its begin to its end."""
    call()
    recorder = Recorder(model, set(), **options)
    with recorder.attached():
        spans = recorder.call(call)
    root, *others = spans
    recording = sum(span.begin - span.enter + span.after - span.end for span in others)
    assert Account(spans, Names(model)).total + recording == pytest.approx(root.end - root.begin, abs=1)


def forwards(model):
    """What stands in the place of the forward of a class: of fused modules, for one."""
    return [vars(module).get("forward") for module in model.modules()]


def assert_clean(model):
    """No hook is left."""
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs and not module._forward_hooks_always_called


def check_trace(path, total_ms):
    """Events of a track lie one behind or inside the other, and no track is empty."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    complete = [e for e in events if e["ph"] == "X"]
    assert {e["tid"] for e in complete} == tracks and all(e["dur"] >= 0 and e["ts"] >= 0 for e in complete)
    for track in tracks:
        open_ends = []
        for e in sorted((e for e in complete if e["tid"] == track), key=lambda e: (e["ts"], -e["dur"])):
            while open_ends and open_ends[-1] <= e["ts"] + 1e-6:
                open_ends.pop()
            assert not open_ends or e["ts"] + e["dur"] <= open_ends[-1] + 1e-3, e
            open_ends.append(e["ts"] + e["dur"])
    root = next(e for e in complete if e["name"] == "(the call)")
    assert root["dur"] >= 0.5e3 * total_ms and all(e["ts"] + e["dur"] <= root["dur"] + 1e-3 for e in complete)
    return complete
