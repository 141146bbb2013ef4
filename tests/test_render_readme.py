"""benchmarks/render_readme.py: the README shows what benchmarks/results holds."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from halfbyte.bench import linear, machine


@pytest.fixture(scope="module")
def render_readme():
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "render_readme.py"
    spec = importlib.util.spec_from_file_location("render_readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_what_the_results_say(render_readme, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render_readme.py", "--check"])
    assert render_readme.main() == 0
    kinds = [
        json.loads(p.read_text())["kind"] for p in (render_readme.ROOT / "benchmarks/results").glob("*.json")
    ]
    assert {"linear", "model"} <= set(kinds), "benchmarks/results has no measured table for the README"


def measured(*schemes):
    """A result of `bench linear` without peers."""
    settings = linear.Settings([(1, 16, 32)], schemes, [], threads=1, rounds=2, round_seconds=1e-4)
    return json.loads(json.dumps(linear.run(settings)))


def test_readme_table_shows_the_result(render_readme):
    result = measured("w8a8")
    (shape,) = result["results"]
    (ours,) = shape["rows"]
    assert "| 1x16x32 |" in render_readme.render([result])
    for name, factor in (("torch-fp32", 1.125), ("openvino", 2.5), ("onnxruntime", 2.25)):
        peer = {"name": name, "us": factor * ours["us"], "ours_is_faster_by": factor}
        shape["rows"].append(ours | peer)
    text = render_readme.render([result])
    row = next(line for line in text.splitlines() if line.startswith("| 1x16x32 |"))
    assert "| onnxruntime | **2.25x** |" in row  # the fastest of the quantized ones
    assert result["machine"]["cpu"] in text


def test_readme_has_a_table_for_each_scheme(render_readme):
    text = render_readme.render([measured("w4a16_g32", "w8a8", "w4a8_g32")])
    titles = [line for line in text.splitlines() if line.startswith("Microseconds")]
    assert titles == ["Microseconds:", "Microseconds, `w4a16_g32`:", "Microseconds, `w4a8_g32`:"]
    assert text.count("best int8 peer") == 1 and text.count("best quantized peer") == 2


def model_row(name, ms, faster):
    return {"name": name, "ms": ms, "ours_is_faster_by": faster, "speedup": 7.5, "min_cosine": 0.998}


def test_readme_shows_models_with_the_best_peer(render_readme):
    names = ["torch-fp32", "halfbyte", "halfbyte-fused", "halfbyte-fused-fp32", "openvino-int8", "torchao"]
    times, faster = [9, 5, 2, 4, 2.5, 3], [4.5, 2.5, None, 2, 1.25, 1.5]
    rows = [model_row(*each) for each in zip(names, times, faster, strict=True)]
    result = {
        "kind": "model", "machine": machine.describe(1), "model": "a model", "ours": "halfbyte-fused",
        "results": [
            {"batch": 1, "tokens": 16, "rows": rows},
            {"batch": 8, "tokens": 64, "rows": rows[:4] + rows[5:]},
            {"batch": 9, "tokens": 64, "rows": rows[:4]},
        ],
    }  # fmt: skip
    lines = [line for line in render_readme.render([result]).splitlines() if line.startswith("|")]
    heads, _, all_, some, alone = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert heads == [
        "batch x tokens", *names[:4], "faster than float32", "best peer", "faster than it", *names[4:],
    ]  # fmt: skip
    assert all_[3] == "2.00 (0.998)" and all_[5:8] == ["**7.50x**", "openvino-int8", "**1.25x**"]
    assert some[6:9] == ["torchao", "**1.50x**", "-"] and alone[6:] == ["-"] * 4


def test_readme_shows_tokens_per_second(render_readme):
    def row(name, prefill, decode, faster, unfused=None):
        speeds = zip(("prefill", "decode"), (128, 64), (prefill, decode), faster, strict=True)
        keys = ("what", "tokens", "tokens_per_s", "ours_is_faster_by")
        return {
            "name": name, "note": "", "weight_bytes": 80e6, "loss": 2.5, "unfused_loss": unfused,
            "measures": [dict(zip(keys, values, strict=True)) for values in speeds],
        }  # fmt: skip

    result = {
        "kind": "decoder", "machine": machine.describe(1), "model": "Tiny-Instruct",
        "ours": "halfbyte w4a8_g32",
        "rows": [
            row("torch-fp32", 10, 5, (99, 98)), row("halfbyte w4a8_g32", 900, 80, (None, None), 2.501),
            row("halfbyte w4a8_g32 unfused", 800, 90, (1.1, 0.9)), row("torch-bf16", 300, 9, (3, 8.9)),
            row("llama.cpp-q4_0", 200, 40, (4.5, 2)),
        ],
    }  # fmt: skip
    text = render_readme.render([result])
    assert "Tiny: tokens per second at batch 1" in text and "after one of 128 (decode)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2].startswith("| prefill, 128 tokens | 900 | torch-bf16 | **3.00x** | 10.0 | 800 |")
    assert lines[3].startswith("| decode, 64 tokens | 80.0 | llama.cpp-q4_0 | **2.00x** |")
    assert lines[5].startswith("| loss | 2.500 (2.501) |  |  | 2.500 | 2.500 |")


def test_readme_shows_perplexities(render_readme):
    row = {"name": "halfbyte w4a8_g32", "perplexity": 14.5, "ratio": 1.02, "note": "the default method"}
    result = {
        "kind": "perplexity", "machine": machine.describe(1), "model": "a model",
        "text": {"scored_tokens": 1022, "source": "a text"},
        "rows": [row, {"name": "hqq", "note": "", "not_measured": "gone"}],
    }  # fmt: skip
    text = render_readme.render([result])
    assert "| halfbyte w4a8_g32 | 14.500 | 1.0200 | the default method |" in text and "hqq" not in text
    assert "a model, perplexity of 1022 tokens of a text" in text


def test_readme_markers(render_readme):
    block = render_readme.replace_block(f"a\n{render_readme.START}\nold\n{render_readme.END}\nb\n", "new\n")
    assert block == f"a\n{render_readme.START}\nnew\n{render_readme.END}\nb\n"
    with pytest.raises(ValueError, match="exactly once"):
        render_readme.replace_block("no markers", "new")
