"""fusion_report: rows, table, Markdown and JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import halfbyte as hb
from fusing import roused

X = torch.randn(1, 3, 16)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"dim_feedforward": 24, "batch_first": True}
        self.known = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, **options), 3, enable_nested_tensor=False
        )
        self.unknown = nn.TransformerEncoderLayer(16, 2, activation=nn.Tanh(), **options)
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x):
        return self.mlp(self.unknown(self.known(x)))


@pytest.fixture
def model():
    return hb.quantize_(roused(Mixed()), "w8a8", progress=False)


def test_before_fuse_(model):
    report = hb.fusion_report(model)
    assert [row.name for row in report.rows] == ["known", "unknown", "mlp"]
    assert not report.fused and len(report.left_alone) == 3
    assert report.rows[0].reason == "fuse_ has not been called on it"
    assert report.rows[1].reason == "the core has no activation Tanh"
    assert "Modules: 0 fused, 3 left alone." in str(report)


@torch.no_grad()
def test_rows(model):
    hb.fuse_(model)
    for _ in range(3):
        model(X)
    model.known(X, is_causal=True, mask=torch.zeros(3, 3).int() == 1)
    with pytest.raises(RuntimeError):
        model.known(X, mask=torch.zeros(9, 9))
    known, unknown, mlp = hb.fusion_report(model).rows
    assert (known.name, known.kind, known.blocks, known.reason) == ("known", "torch encoder", 3, "")
    assert known.fused_calls == 4 and known.unfused_calls == {"a mask of the shape (9, 9)": 1}
    assert (unknown.kind, unknown.blocks, unknown.fused_calls) == ("TransformerEncoderLayer", 0, 0)
    assert (mlp.kind, mlp.what, mlp.fused_calls) == ("quantized layers", "1 linear + activation", 3)
    report = hb.fusion_report(model)
    assert isinstance(report, hb.FusionReport)
    assert report.fused == (known, mlp) and report.left_alone == (unknown,)


@torch.no_grad()
def test_table_and_markdown(model):
    hb.fuse_(model)
    model(X)
    text = str(hb.fusion_report(model))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "module" and "left alone because" in lines[0]
    assert "unfused calls" not in lines[0]
    assert lines[2].split() == "known torch encoder 3 all layers in one call 1".split()
    assert lines[-1] == "Modules: 2 fused, 1 left alone."
    with pytest.raises(RuntimeError):
        model.known(X, mask=torch.zeros(9, 9))
    table = hb.fusion_report(model).to_markdown().splitlines()
    assert table[0].startswith("| module | kind | blocks |") and "| unfused calls |" in table[0]
    assert "1: a mask of the shape (9, 9)" in table[2]


def test_json(model):
    report = hb.fusion_report(hb.fuse_(model))
    rows = json.loads(report.to_json())["rows"]
    assert [row["name"] for row in rows] == ["known", "unknown", "mlp"]
    assert rows[0] == {
        "name": "known",
        "kind": "torch encoder",
        "blocks": 3,
        "what": "all layers in one call",
        "reason": "",
        "fused_calls": 0,
        "unfused_calls": {},
    }


def test_nothing_to_fuse():
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())):
        report = hb.fusion_report(hb.fuse_(model))
        assert not report.rows
        assert str(report) == "No block that halfbyte knows, and no pattern among quantized layers."


def test_the_model_itself_has_a_name():
    model = hb.fuse_(roused(nn.TransformerEncoderLayer(16, 2, 24)))
    assert str(hb.fusion_report(model)).splitlines()[2].startswith("(the model)  torch encoder layer")


def test_a_shared_block_is_there_once():
    layer = roused(nn.TransformerEncoderLayer(16, 2, 24))
    holder = hb.fuse_(nn.ModuleList([layer, layer]))
    assert [row.name for row in hb.fusion_report(holder).rows] == ["0"]
