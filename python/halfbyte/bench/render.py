"""Benchmark results as tables for a terminal or for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from ..tables import markdown_table, percent, significant, text_table
from .ceilings import products_per_weight
from .machine import sentence

Table = Callable[[list[str], list[list[str]]], str]
_FOOTNOTE = (
    "us: median over rounds. GOP/s counts 2*m*n*k. GB/s counts packed weights and float32 input and output. "
    "% of ceilings and 'halfbyte is': medians of per-round quotients of this run. "
    "error: relative to the float64 product."
)
_SPARSE_FOOTNOTE = (
    "Microseconds: median over rounds, and in brackets how many times as fast halfbyte is, the median of "
    "per-round quotients. GOP/s counts 2*m*n*k, zeros included; % of peak counts nonzero weights alone. "
    "halfbyte-dense has the same codes, zeros included; torch-csr and deepsparse as many zeros, anywhere."
)


def render(result: dict, style: str) -> str:
    """`result` of the `run` of any kind of benchmark, as style "table" or "markdown"."""
    table = markdown_table if style == "markdown" else text_table
    kinds = {
        "linear": _linear, "sparse": _sparse, "overhead": _overhead, "model": _model, "decoder": _decoder,
        "gpu": _gpu,
    }  # fmt: skip
    body = kinds[result["kind"]](result, table)
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n\n".join([sentence(machine), f"{machine['date']}; {packages}", *body])


def _linear(result: dict, table: Table) -> list[str]:
    blocks = []
    for shape in result["results"]:
        half = ", half of it with 16-bit activations" if products_per_weight(shape["scheme"]) == 2 else ""
        blocks.append(_heading(shape, half))
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


def _heading(shape: dict, peak_note: str = "") -> str:
    """What is multiplied, and the ceilings."""
    top, peak = shape["ceilings"], ""
    if any(row["of_peak"] for row in shape["rows"]):
        peak = f"int8 peak {top['int8'] / 1e9:.0f} GOP/s ({top['isa']}{peak_note}), "
    return (
        f"{shape['m']}x{shape['n']}x{shape['k']} (m x n x k), {shape['scheme']}, "
        f"{'cold' if shape['cold'] else 'warm'} weights; {peak}"
        f"cache read {top['cache_read'] / 1e9:.0f} GB/s, DRAM read {top['dram_read'] / 1e9:.0f} GB/s"
    )


def _sparse(result: dict, table: Table) -> list[str]:
    """A table for each shape and scheme, with a row for each sparsity and a column for each contestant."""
    blocks = []
    for _, group in groupby(result["results"], key=lambda s: (s["m"], s["n"], s["k"], s["scheme"])):
        shapes = list(group)
        blocks += [_heading(shapes[0]), table(*sparse_table(shapes)), _remarks(shapes)]
    return [*blocks, _SPARSE_FOOTNOTE]


def sparse_table(shapes: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of results of one shape and scheme: microseconds by sparsity, halfbyte's first."""
    names = list(dict.fromkeys(row["name"] for shape in shapes for row in shape["rows"]))
    rows = []
    for shape in shapes:
        mine, *others = shape["rows"]
        times = {row["name"]: row for row in others}
        rows.append([
            percent(shape["sparsity"]), significant(mine["us"], 4), significant(mine["gops"]),
            percent(mine["of_peak"]), significant(mine["gbps"]), _of_read(mine),
            *(_us_and_ratio(times.get(name)) for name in names[1:]),
        ])  # fmt: skip
    return ["sparsity", names[0], "GOP/s", "% of peak", "GB/s", "% of read", *names[1:]], rows


def _us_and_ratio(row: dict | None) -> str:
    return f"{significant(row['us'], 4)} ({_times(row['ours_is_faster_by'])})" if row else "-"


def _remarks(shapes: Sequence[dict]) -> str:
    """A list of what ran, and of what did not and why; each once."""
    ran = [f"{row['name']}: {row['note']}" for shape in shapes for row in shape["rows"]]
    missing = [
        f"{name}, {percent(shape['sparsity'])}: not measured: {reason}"
        for shape in shapes
        for name, reason in shape["unavailable"].items()
    ]
    return "\n".join(f"- {remark}" for remark in dict.fromkeys([*ran, *missing]))


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


def _gpu(result: dict, table: Table) -> list[str]:
    copy = result["copy_bytes_per_s"]
    blocks = [f"{result['machine']['gpu']}: a copy moves {copy / 1e9:.0f} GB/s, read and written"]
    for shape in result["results"]:
        blocks.append(f"{shape['m']}x{shape['n']}x{shape['k']} (m x n x k), {shape['scheme']}, cold weights")
        headers = ["", "us", "GB/s", "% of copy", "TFLOP/s", "halfbyte is", "error", "what ran"]
        rows = [
            [
                row["name"], significant(row["us"], 4), significant(row["gbps"]),
                percent(row["gbps"] * 1e9 / copy), significant(row["tflops"]),
                _times(row["ours_is_faster_by"]),
                "-" if row["error"] is None else significant(row["error"], 2), row["note"],
            ]
            for row in shape["rows"]
        ]  # fmt: skip
        rows += [[name, *["-"] * 6, f"not measured: {why}"] for name, why in shape["unavailable"].items()]
        blocks.append(table(headers, rows))
    return [
        *blocks,
        "us: median over rounds of calls within a CUDA graph that rotate over copies of the weights. GB/s "
        "counts packed weights, x and y in bfloat16. error: relative to the float64 product.",
    ]


def _of_read(row: dict) -> str:
    return f"{percent(row['of_read'])} {row['read_level'].split()[0]}" if row["read_level"] else "-"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
