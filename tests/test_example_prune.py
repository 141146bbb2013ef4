"""examples/prune_and_run.py: what it reports fits together, and it wrote what it says."""

import json
import math
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the example trains a model")
pytest.importorskip("transformers", reason="the demo extra is not installed")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HAS_PLOT = find_spec("matplotlib") is not None
BLOCK = (16, 4)


def example(script, *arguments, **environment):
    """Run a script of the examples as a user does; nothing but the arguments says what it reads."""
    inherited = {name: value for name, value in os.environ.items() if name != "HALFBYTE_TEXT"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=inherited | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, what was printed, the result) of a quick run."""
    folder = tmp_path_factory.mktemp("example") / "new"
    plot = () if HAS_PLOT else ("--no-plot",)
    ran = example("prune_and_run.py", "--quick", "--threads", 1, "--out", folder, *plot)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "runs its own forward" not in ran.stderr  # what fuse_ warns of
    return folder, ran.stdout, json.loads((folder / "prune_and_run.json").read_text())


def test_zeros_are_exact(done):
    result = done[2]
    for name in ("magnitude", "taylor"):
        zeros = result["trained"][name]["zeros"]
        layers = zeros["layers"]
        assert len(layers) == 7 * result["settings"]["layers"]  # the head is not among them
        for layer in layers:
            blocks = math.prod(size // block for size, block in zip(layer["shape"], BLOCK, strict=True))
            assert layer["zeros"] == math.floor(0.8 * blocks) * math.prod(BLOCK), layer
        assert zeros["zeros"] == sum(layer["zeros"] for layer in layers)
        assert zeros["share"] == zeros["zeros"] / zeros["total"] == pytest.approx(0.8, abs=0.01)
    assert result["trained"]["dense"]["zeros"]["zeros"] == 0


def test_int8_sparse_is_int8_dense_with_the_same_zeros(done):
    alike = done[2]["alike"]
    assert alike["unfused"] is alike["fused"] is True
    assert alike["float_difference"] < 1e-5


def test_losses_fit_together(done):
    result = done[2]
    trained, rows = result["trained"], {row["name"]: row for row in result["rows"]}
    for one in (*trained.values(), *rows.values()):
        assert len(one["losses"]) == result["settings"]["windows"]
        assert one["loss"] == pytest.approx(statistics.fmean(one["losses"]))
        assert 0 < one["accuracy"] < 1
        assert one["loss"] < math.log(result["text"]["letters"])  # it has learned something
    assert result["best"] == min(("magnitude", "taylor"), key=lambda name: trained[name]["loss"])
    for name, row in rows.items():
        assert row["weights"] == ("dense" if "+" not in name else result["best"])
        expected = trained[row["weights"]]["loss"]
        assert row["loss"] == pytest.approx(expected, rel=0.01 if "w8a8" in name else 1e-5)
        assert row["fusion"] == f"Llama decoder: {result['settings']['layers']} blocks in one call"
    gain = result["taylor_to_magnitude"]
    assert gain["difference"] == pytest.approx(trained["taylor"]["loss"] - trained["magnitude"]["loss"])
    assert gain["standard_error"] > 0
    for name, difference in result["to_dense"].items():
        expected = trained[name]["loss"] - trained["dense"]["loss"]
        assert difference["difference"] == pytest.approx(expected)


def test_all_three_start_from_one_model_and_get_the_same_steps(done):
    result = done[2]
    curves = [one["curve"] for one in result["trained"].values()]
    assert len({json.dumps(curve[0]) for curve in curves}) == 1
    assert all([p["step"] for p in curve] == [p["step"] for p in curves[0]] for curve in curves)
    assert curves[0][0]["loss"] == result["base_curve"][-1]["loss"] < result["base_curve"][0]["loss"]
    for name in ("magnitude", "taylor"):
        one = result["trained"][name]
        shares = [point["zeros"] for point in one["curve"]]
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == one["zeros"]["share"]


def test_times_and_bytes(done):
    result = done[2]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["float32", "w8a8", "f32+block16x1", "w8a8+block16x4"]
    for row in rows.values():
        kinds = [(time["windows"], time["fused"]) for time in row["times"]]
        assert kinds == [(n, fused) for n in result["settings"]["forwards"] for fused in (False, True)]
        for time in row["times"]:
            assert len(time["samples_ms"]) == result["settings"]["rounds"]
            assert time["ms"] == pytest.approx(statistics.median(time["samples_ms"])) and time["ms"] > 0
            assert time["faster"] > 0 and time["faster_than_int8"] > 0
    saved = {name: row["saved_bytes"] for name, row in rows.items()}
    assert saved["w8a8+block16x4"] < saved["w8a8"] < saved["float32"]
    assert saved["f32+block16x1"] < saved["float32"] >= 4 * result["parameters"]
    assert all(row["memory_bytes"] >= row["saved_bytes"] for row in rows.values())


def test_it_prints_what_it_measured(done):
    _, printed, result = done
    for row in result["rows"]:
        assert f"{row['loss']:.4f}" in printed and row["name"] in printed
    gain = result["taylor_to_magnitude"]
    words = f"{abs(gain['difference']):.4f} +- {gain['standard_error']:.4f}"
    assert f"taylor is {words} {'better' if gain['difference'] < 0 else 'worse'} than magnitude" in printed
    assert "bit for bit the same" in printed and result["sample"] in printed
    assert result["machine"]["threads"] == 1 and result["machine"]["cpu"] in printed


def test_the_plot_is_drawn_and_drawn_again(done):
    if not HAS_PLOT:
        pytest.skip("the bench extra is not installed")
    folder, printed, _ = done
    image = folder / "prune_and_run.png"
    assert image.read_bytes()[:4] == b"\x89PNG" and image.stat().st_size > 20_000
    image.unlink()
    again = example("prune_and_run_report.py", folder / "prune_and_run.json")
    assert again.returncode == 0 and image.is_file(), again.stderr
    assert again.stdout.strip() in printed


def test_a_seed_gives_the_same_model(done, tmp_path):
    ran = example("prune_and_run.py", "--quick", "--threads", 1, "--no-plot", "--out", tmp_path)
    assert ran.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["prune_and_run.json"]
    result = json.loads((tmp_path / "prune_and_run.json").read_text())
    for name, one in done[2]["trained"].items():
        assert one["losses"] == result["trained"][name]["losses"], name
    assert result["sample"] == done[2]["sample"]


def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be")
    ran = example("prune_and_run.py", "--quick", "--no-plot", "--text", short, "--out", tmp_path)
    assert ran.returncode != 0 and "short.txt is too short to learn from" in ran.stderr
    ran = example("prune_and_run.py", "--quick", "--amount", "1.5")
    assert ran.returncode == 2 and "must be from 0 to 1" in ran.stderr
