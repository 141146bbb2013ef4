"""Benchmark results as tables for a terminal or for Markdown."""

from __future__ import annotations

from collections.abc import Callable

from ..tables import markdown_table, percent, significant, text_table
from .ceilings import products_per_weight
from .machine import sentence

Table = Callable[[list[str], list[list[str]]], str]
_FOOTNOTE = (
    "us: median over rounds. GOP/s counts 2*m*n*k. GB/s counts packed weights and float32 input and output. "
    "% of ceilings and 'halfbyte is': medians of per-round quotients of this run. "
    "error: relative to the float64 product."
)


def render(result: dict, style: str) -> str:
    """`result` of the `run` of linear, overhead, model or decoder as style "table" or "markdown"."""
    table = markdown_table if style == "markdown" else text_table
    kinds = {"linear": _linear, "overhead": _overhead, "model": _model, "decoder": _decoder}
    body = kinds[result["kind"]](result, table)
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n\n".join([sentence(machine), f"{machine['date']}; {packages}", *body])


def _linear(result: dict, table: Table) -> list[str]:
    blocks = []
    for shape in result["results"]:
        top = shape["ceilings"]
        half = ", half of it with 16-bit activations" if products_per_weight(shape["scheme"]) == 2 else ""
        peak = f"int8 peak {top['int8'] / 1e9:.0f} GOP/s ({top['isa']}{half}), " if top["int8"] else ""
        blocks.append(
            f"{shape['m']}x{shape['n']}x{shape['k']} (m x n x k), {shape['scheme']}, "
            f"{'cold' if shape['cold'] else 'warm'} weights; {peak}"
            f"cache read {top['cache_read'] / 1e9:.0f} GB/s, DRAM read {top['dram_read'] / 1e9:.0f} GB/s"
        )
        headers = ["", "us", "GOP/s", "% of peak", "GB/s", "% of read", "halfbyte is", "error", "what ran"]
        rows = [
            [
                row["name"], significant(row["us"], 4), significant(row["gops"]), percent(row["of_peak"]),
                significant(row["gbps"]), _of_read(row),
                _times(row["ours_is_faster_by"]), significant(row["error"], 2), row["note"],
            ]
            for row in shape["rows"]
        ]  # fmt: skip
        rows += [
            [name, *["-"] * 7, f"not measured: {reason}"] for name, reason in shape["unavailable"].items()
        ]
        blocks.append(table(headers, rows))
    return [*blocks, _FOOTNOTE]


def _overhead(result: dict, table: Table) -> list[str]:
    rows = [[row["name"], f"{row['us']:.2f}", row["note"]] for row in result["rows"]]
    m, n, k = result["shape"]
    return [
        f"One call of a {m}x{n}x{k} layer, {result['kernel']}, {result['threads']} thread",
        table(["", "us", "what it is"], rows),
    ]


def _model(result: dict, table: Table) -> list[str]:
    ours = result["ours"]
    which = f"{result['replaced']} of its linear layers quantized"
    blocks = [f"{result['model']}: {which}; ms per forward pass"]
    headers = ["batch x tokens", "", "ms", "speed-up", "min cosine", f"{ours} is", "what ran"]
    rows = []
    for shape in result["results"]:
        size = f"{shape['batch']}x{shape['tokens']}"
        for row in shape["rows"]:
            rows.append([
                size, row["name"], significant(row["ms"], 4), _times(row["speedup"]),
                f"{row['min_cosine']:.4f}", _times(row["ours_is_faster_by"]), row["note"],
            ])  # fmt: skip
        rows += [
            [size, n, "-", "-", "-", "-", f"not measured: {why}"] for n, why in shape["unavailable"].items()
        ]
    blocks.append(table(headers, rows))
    blocks.append(
        f"ms: median over rounds; speed-up (over torch float32), '{ours} is': median per-round quotients; "
        "min cosine: worst sentence embedding of the batch against torch float32; fused: after hb.fuse_, "
        "fp32: without quantizing."
    )
    return blocks


def _decoder(result: dict, table: Table) -> list[str]:
    measures = [f"{m['what']} {m['tokens']}" for m in result["rows"][0]["measures"]]
    ours = result["ours"]
    times = [h for m in measures for h in (m, f"{ours} is")]
    headers = ["", *times, "MB", "loss", "unfused loss", "what ran"]
    rows = []
    for row in result["rows"]:
        cells = []
        for measure in row["measures"]:
            cells += [significant(measure["tokens_per_s"], 4), _times(measure["ours_is_faster_by"])]
        unfused = row["unfused_loss"]
        cells += [f"{row['weight_bytes'] / 1e6:.1f}", f"{row['loss']:.3f}"]
        rows.append([row["name"], *cells, "-" if unfused is None else f"{unfused:.3f}", row["note"]])
    gap = ["-"] * (len(headers) - 2)
    rows += [[name, *gap, f"not measured: {why}"] for name, why in result["unavailable"].items()]
    return [
        f"{result['model']}, batch 1: tokens per second in a prompt (prefill), after the longest (decode)",
        table(headers, rows),
        f"Tokens per second: medians over rounds; '{ours} is': medians of per-round quotients. MB: weights "
        "as saved. loss: nats per token of the longest prompt; unfused loss: the same before fuse_.",
    ]


def _of_read(row: dict) -> str:
    return f"{percent(row['of_read'])} {row['read_level'].split()[0]}" if row["read_level"] else "-"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
