"""`halfbyte bench linear --device cuda` on the emulated GPU: what is measured and said, not how fast."""

from __future__ import annotations

import json

import pytest

from halfbyte.bench import gpu as bench_gpu
from halfbyte.bench import render
from halfbyte.bench.gpu_clock import Emulated
from halfbyte.cli import main


def run(scheme: str) -> dict:
    return bench_gpu.run(bench_gpu.Settings([(3, 70, 128)], [scheme], rounds=2), Emulated())


@pytest.mark.parametrize(("scheme", "peers"), [
    ("w8a8", ["torch-bf16", "torch-int8"]), ("w4a16_g64", ["torch-bf16", "torch-int4"]),
])  # fmt: skip
def test_rows_and_table(gpu, scheme, peers):
    result = json.loads(json.dumps(run(scheme)))
    shape = result["results"][0]
    rows = {row["name"]: row for row in shape["rows"]}
    assert [*rows, *shape["unavailable"]] == ["halfbyte", *peers] or set(rows) >= {"halfbyte", "torch-bf16"}
    assert rows["halfbyte"]["note"].startswith("QLinear, linear_w")
    assert rows["halfbyte"]["error"] < 0.25 and rows["torch-bf16"]["error"] < 0.01
    assert all(len(row["samples_us"]) == 2 for row in rows.values())
    text = render.render(result, "markdown")
    assert "emulated" in text and "3x70x128" in text and "torch-bf16" in text


def test_a_wrong_kernel_is_not_timed(gpu, monkeypatch):
    monkeypatch.setattr(bench_gpu, "_ERROR_LIMITS", {8: 1e-6, 4: 1e-6})
    with pytest.raises(bench_gpu.HalfbyteError, match="w8a8: QLinear, .* is wrong"):
        run("w8a8")


def test_without_a_gpu(capsys):
    if bench_gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "linear", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--vs", "none"), ("--isa", "avx2")])
def test_options_of_the_cpu(capsys, option):
    assert main(["bench", "linear", "--device", "cuda", *option]) == 2
    assert f"{option[0]} is for --device cpu" in capsys.readouterr().err
