"""Write the README's measured tables from benchmarks/results/*.json, between the two bench markers.

usage: render_readme.py [--check]     --check: write nothing, exit 1 if the README differs from the results
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

from halfbyte.bench.ceilings import products_per_weight
from halfbyte.bench.machine import sentence
from halfbyte.bench.model import FLOAT, FUSED, FUSED_FLOAT
from halfbyte.bench.peers import PEERS, PRUNED_PEERS, QUANTIZED_PEERS
from halfbyte.bench.sparse import DENSE
from halfbyte.tables import markdown_table, percent, significant

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = "halfbyte"
_PLAIN = "w8a8"
_NO_PEERS = (FLOAT, OURS, FUSED, FUSED_FLOAT)  # of a whole model, in the order of the columns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is out of date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    results = [
        json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    ]
    after = replace_block(before, render(results))
    if args.check:
        if after != before:
            print("README.md is out of date: run python benchmarks/render_readme.py", file=sys.stderr)
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


def replace_block(text: str, block: str) -> str:
    """`text` with what stands between the markers replaced; ValueError if a marker is missing or doubled."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must hold {START} and {END} exactly once each")
    head, tail = text.partition(START)[0], text.partition(END)[2]
    return f"{head}{START}\n{block}{END}{tail}"


def render(results: list[dict]) -> str:
    """Markdown of all results: per machine the linear layers, then the models."""
    parts = []
    kinds = [r for r in results if r["kind"] in _TABLES]
    for _, group in groupby(sorted(kinds, key=_machine_key), key=_machine_key):
        members = list(group)
        where = max((sentence(r["machine"]) for r in members), key=len)
        parts.append(f"Measured on {where}; {_versions(members)}.")
        for kind, table in _TABLES.items():
            chosen = [r for r in members if r["kind"] == kind]
            parts += [table(chosen)] if chosen else []
    return "".join(f"{part}\n\n" for part in parts).removesuffix("\n")


def _machine_key(result: dict) -> str:
    """The machine, without its instruction sets: later versions know more names of them."""
    return sentence(result["machine"] | {"isas": []})


def _versions(results: list[dict]) -> str:
    packages = {name: version for r in results for name, version in r["machine"]["packages"].items()}
    return ", ".join(f"{name} {version}" for name, version in packages.items() if name != "numpy")


def _linear(results: list[dict]) -> str:
    """A table for each scheme, w8a8 first."""
    shapes = [(r, shape) for r in results for shape in r["results"]]
    schemes = sorted({shape["scheme"] for _, shape in shapes}, key=lambda name: (name != _PLAIN, name))
    return "\n\n".join(
        _linear_table(scheme, [(r, shape) for r, shape in shapes if shape["scheme"] == scheme])
        for scheme in schemes
    )


def _linear_table(scheme: str, shapes: list[tuple[dict, dict]]) -> str:
    named = {row["name"] for _, shape in shapes for row in shape["rows"]}
    peers = [name for name in PEERS if name in named]
    kind = "int8" if scheme == _PLAIN else "quantized"
    headers = ["m x n x k", OURS, "ceiling", "of ceiling", f"best {kind} peer", "faster than it", *peers]
    title = "Microseconds" if scheme == _PLAIN else f"Microseconds, `{scheme}`"
    return f"{title}:\n\n" + markdown_table(headers, [_linear_row(r, shape, peers) for r, shape in shapes])


def _linear_row(result: dict, shape: dict, peers: list[str]) -> list[str]:
    rows = {row["name"]: row for row in shape["rows"]}
    mine = rows[OURS]
    top = shape["ceilings"]
    limits = []  # (seconds at that ceiling, fraction of it that was reached)
    if top["int8"]:
        products = products_per_weight(shape["scheme"]) * shape["m"] * shape["n"] * shape["k"]
        limits.append((2 * products / top["int8"], mine["of_peak"]))
    if mine["read_level"]:
        rate = top["dram_read" if mine["read_level"].startswith("DRAM") else "cache_read"]
        limits.append((mine["bytes"] / rate, mine["of_read"]))
    seconds, reached = max(limits, default=(None, None))
    rivals = [row for name, row in rows.items() if name in QUANTIZED_PEERS]
    best = min(rivals, key=lambda row: row["us"], default=None)
    forced = result["settings"]["isa"] or result["machine"]["forced_isa"]
    label = f"{shape['m']}x{shape['n']}x{shape['k']}" + (", cold" if shape["cold"] else "")
    return [
        f"{label}, forced to {forced}" if forced else label,
        significant(mine["us"]),
        significant(seconds and seconds * 1e6),
        percent(reached),
        *_best(best),
        *(significant(rows[name]["us"]) if name in rows else "-" for name in peers),
    ]


def _model(results: list[dict]) -> str:
    blocks = []
    for result in results:
        names = list(dict.fromkeys(row["name"] for shape in result["results"] for row in shape["rows"]))
        others = [name for name in names if name not in _NO_PEERS]
        ours = [name for name in _NO_PEERS if name in names]
        rows = []
        for shape in result["results"]:
            cells = {row["name"]: row for row in shape["rows"]}
            best = min((cells[name] for name in others if name in cells), key=_ms, default=None)
            rows.append([
                f"{shape['batch']}x{shape['tokens']}",
                *(_ms_and_cosine(cells.get(name)) for name in ours),
                f"**{cells[result.get('ours', OURS)]['speedup']:.2f}x**",
                *_best(best),
                *(_ms_and_cosine(cells.get(name)) for name in others),
            ])  # fmt: skip
        headers = ["batch x tokens", *ours, "faster than float32", "best peer", "faster than it", *others]
        blocks.append(
            f"{result['model']}: milliseconds per forward pass, and in brackets the lowest cosine of "
            "a sentence embedding to float32. `halfbyte` has its linear layers in w8a8, `halfbyte-fused` is "
            "the same after `fuse_`, `halfbyte-fused-fp32` is not quantized:\n\n"
            + markdown_table(headers, rows)
        )
    return "\n\n".join(blocks)


def _ms(row: dict) -> float:
    return row["ms"]


def _best(peer: dict | None) -> list[str]:
    """The fastest peer, and how much faster than it we are."""
    return [peer["name"], f"**{peer['ours_is_faster_by']:.2f}x**"] if peer else ["-", "-"]


def _ms_and_cosine(row: dict | None) -> str:
    return f"{significant(row['ms'])} ({row['min_cosine']:.3f})" if row else "-"


def _decoder(results: list[dict]) -> str:
    """A table for each result: a row for each measure, a column for each contestant."""
    blocks = []
    for result in results:
        rows = {row["name"]: row for row in result["rows"]}
        mine = rows.pop(result["ours"])
        peers = [row for row in rows.values() if not row["name"].startswith((OURS, "torch-fp32"))]
        table = []
        for index, measure in enumerate(mine["measures"]):
            found = [row["measures"][index] for row in rows.values()]
            best = max(peers, key=lambda row, i=index: row["measures"][i]["tokens_per_s"], default=None)
            table.append([
                f"{measure['what']}, {measure['tokens']} tokens",
                significant(measure["tokens_per_s"]),
                *_best(best and best["measures"][index] | {"name": best["name"]}),
                *(significant(other["tokens_per_s"]) for other in found),
            ])  # fmt: skip
        for label, show in (("MB of weights", _megabytes), ("loss", _loss)):
            table.append([label, show(mine), "", "", *(show(row) for row in rows.values())])
        headers = ["", result["ours"], "best peer", "faster than it", *rows]
        prompt = max(m["tokens"] for m in mine["measures"] if m["what"] == "prefill")
        blocks.append(
            f"{result['model'].removesuffix('-Instruct')}: tokens per second at batch 1, in a prompt "
            f"(prefill) and after one of {prompt} (decode); loss in nats per token of that prompt, and in "
            "brackets before `fuse_`. halfbyte's columns are fused and generate with `hb.generate`, keys and "
            "values in bfloat16 (llama.cpp's are float16); `unfused` runs in transformers:\n\n"
            + markdown_table(headers, table)
        )
    return "\n\n".join(blocks)


def _megabytes(row: dict) -> str:
    return f"{row['weight_bytes'] / 1e6:.1f}"


def _loss(row: dict) -> str:
    before = row["unfused_loss"]
    return f"{row['loss']:.3f}" + ("" if before is None else f" ({before:.3f})")


def _quality(results: list[dict]) -> str:
    rows = [
        [row["name"], f"{row['spearman']:.2f}", f"{row['spearman'] - r['rows'][0]['spearman']:+.2f}"]
        for r in results
        for row in r["rows"]
        if "spearman" in row
    ]
    pairs = results[0]["pairs"]
    title = f"The same model on {pairs} sentence pairs of the STS benchmark, Spearman correlation x100:\n\n"
    return title + markdown_table(["", "Spearman", "change"], rows)


def _perplexity(results: list[dict]) -> str:
    blocks = []
    for result in results:
        text = result["text"]
        rows = [
            [row["name"], f"{row['perplexity']:.3f}", f"{row['ratio']:.4f}", row["note"]]
            for row in result["rows"]
            if "perplexity" in row
        ]
        blocks.append(
            f"{result['model']}, perplexity of {text['scored_tokens']} tokens of {text['source']}:\n\n"
            + markdown_table(["", "perplexity", "to float32", "what it is"], rows)
        )
    return "\n\n".join(blocks)


def _sparse(results: list[dict]) -> str:
    shapes = [shape for result in results for shape in result["results"]]
    named = {row["name"] for shape in shapes for row in shape["rows"]}
    others = sorted(named - {OURS}, key=(DENSE, *PRUNED_PEERS).index)
    rows = []
    for shape in shapes:
        cells = {row["name"]: row for row in shape["rows"]}
        rows.append([
            f"`{shape['scheme']}`",
            f"{shape['m']}x{shape['n']}x{shape['k']}" + (", cold" if shape["cold"] else ""),
            percent(shape["sparsity"]),
            significant(cells[OURS]["us"]),
            *(_us_and_times(cells.get(name)) for name in others),
        ])  # fmt: skip
    return (
        "Layers with zeros, microseconds, and in brackets how many times as fast halfbyte is. "
        "`halfbyte-dense` has the same codes, zeros included; torch-csr and deepsparse have float32 "
        "weights with as many zeros, anywhere; torch-fp32 is dense:\n\n"
        + markdown_table(["scheme", "m x n x k", "zeros", OURS, *others], rows)
    )


def _us_and_times(row: dict | None) -> str:
    return f"{significant(row['us'])} (**{row['ours_is_faster_by']:.2f}x**)" if row else "-"


_TABLES = {
    "linear": _linear, "sparse": _sparse, "model": _model, "quality": _quality, "decoder": _decoder,
    "perplexity": _perplexity,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
