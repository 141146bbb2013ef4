"""MiniLM on STS sentence pairs: Spearman correlation with human scores, float32 against quantized models.

usage: quality_minilm.py --data FILE.csv --scheme w8a8,w4a8_g64   (rows: sentence, sentence, score; no header)
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import halfbyte as hb
from halfbyte.bench import minilm
from halfbyte.bench.machine import available_cores, describe
from halfbyte.bench.peers import UnavailableError, failures_are_reasons
from halfbyte.cli.arguments import schemes
from halfbyte.tables import text_table

FLOAT = "torch-fp32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CSV of sentence, sentence, score")
    parser.add_argument(
        "--scheme", type=schemes, default=["w8a8"], metavar="S,...", help="halfbyte schemes (default w8a8)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pairs")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with args.data.open(newline="", encoding="utf-8") as file:
        pairs = list(csv.reader(file))[: args.limit]
    scores = np.array([float(row[2]) for row in pairs])
    base, tokenizer = minilm.load()
    rows, exact = [], None
    for name, make in contestants(args.scheme).items():
        try:
            with failures_are_reasons():
                model = make(base)
        except UnavailableError as error:
            rows.append({"name": name, "not_measured": str(error)})
            continue
        print(f"{name}: {len(pairs)} pairs", file=sys.stderr)
        vectors = minilm.embed_texts(model, tokenizer, [text for row in pairs for text in row[:2]]).numpy()
        exact = vectors if exact is None else exact
        similarity = (vectors[0::2] * vectors[1::2]).sum(axis=1)
        cosine = (vectors * exact).sum(axis=1)
        rows.append(
            {
                "name": name, "spearman": 100 * spearman(similarity, scores),
                "min_cosine": float(cosine.min()), "mean_cosine": float(cosine.mean()),
            }
        )  # fmt: skip
    result = {
        "format": "halfbyte-bench", "version": 1, "kind": "quality", "machine": describe(args.threads),
        "data": args.data.name, "pairs": len(pairs), "rows": rows,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    base_score = rows[0]["spearman"]
    table = [
        [
            r["name"], f"{r['spearman']:.2f}", f"{r['spearman'] - base_score:+.2f}",
            f"{r['min_cosine']:.4f}", f"{r['mean_cosine']:.4f}",
        ]
        if "spearman" in r else [r["name"], "-", "-", "-", r["not_measured"]]
        for r in rows
    ]  # fmt: skip
    print(text_table(["", "Spearman x100", "change", "min cosine", "mean cosine"], table))
    return 0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _torch_int8(base: torch.nn.Module) -> torch.nn.Module:
    from halfbyte.bench.peers.torch_int8 import quantized

    return quantized(base, torch.backends.quantized.engine)


def _torchao(base: torch.nn.Module) -> torch.nn.Module:
    from halfbyte.bench.peers.torchao_int8 import quantized

    return quantized(base)


def contestants(names: list[str]) -> dict[str, Callable[[torch.nn.Module], torch.nn.Module]]:
    """What makes each model of the float one: halfbyte's, with the schemes of these names, and the peers'."""
    ours = {
        f"halfbyte {name}": lambda base, name=name: hb.quantize_(copy.deepcopy(base), name) for name in names
    }
    return {FLOAT: lambda base: base, **ours, "torch-int8": _torch_int8, "torchao": _torchao}


if __name__ == "__main__":
    sys.exit(main())
