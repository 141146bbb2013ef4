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
