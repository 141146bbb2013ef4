"""`halfbyte demo`: MiniLM searches Python's own documentation in float32, int8 and int8 fused, side by side.

`halfbyte demo llm` is a demonstration of its own (demo_llm.py).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import textwrap
import time

from ..bench import footprint, fusion, minilm
from ..bench.linear import kernel_name, thread_counts
from ..bench.machine import available_cores
from ..extras import require
from ..tables import mebibytes, text_table
from . import demo_llm
from .arguments import positive

_SCHEME = "w8a8"
_BATCH = 32
_TOP = 5
_FLOAT, _QUANTIZED, _FUSED = "float32", _SCHEME, f"{_SCHEME} fused"
_QUESTIONS = (
    "How do I leave a loop before it has finished?",
    "How can I run cleanup code whether or not an error happened?",
    "What does the @ sign above a function do?",
    "How do I make my own object usable in a with statement?",
    "How do I print a number with two digits after the decimal point?",
    "When is an object that nobody uses removed from memory?",
    "How can a function take any number of arguments?",
    "If two parent classes have the same method, which one is called?",
    "How do I go through my program line by line to find a bug?",
    "How do I write a function that pauses and gives out values one by one?",
    "Why is 0.1 + 0.2 not exactly 0.3?",
    "How do I change a global variable from inside a function?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `halfbyte demo`."""
    cores = available_cores()
    parser.set_defaults(demo=_run_minilm)
    parser.add_argument("--threads", type=positive, default=cores, help=f"for all models (default {cores})")
    parser.add_argument(
        "--passages", type=int, metavar="N", help="index only the first N passages (default: all)"
    )
    parser.add_argument(
        "--show", type=int, default=4, metavar="N", help="print the answers to N questions (default 4)"
    )
    others = parser.add_subparsers(metavar="[llm]")
    summary = "a language model instead: perplexity, tokens per second and bytes of float32 and int4"
    other = others.add_parser("llm", help=summary, description=summary[0].upper() + summary[1:] + ".")
    other.set_defaults(demo=demo_llm.run)
    demo_llm.add_arguments(other)


def run(args: argparse.Namespace) -> int:
    """The demonstration that was asked for."""
    return args.demo(args)


def _run_minilm(args: argparse.Namespace) -> int:
    """Embed, search, print answers and the table."""
    require("torch", extra="demo", purpose="halfbyte demo")
    require("tqdm", extra="demo", purpose="halfbyte demo")
    with thread_counts(args.threads):
        return _compare(args)


def _compare(args: argparse.Namespace) -> int:
    import halfbyte as hb

    base, tokenizer = minilm.load()
    quantized = hb.quantize_(copy.deepcopy(base), _SCHEME)
    models = {_FLOAT: base, _QUANTIZED: quantized, _FUSED: hb.fuse_(copy.deepcopy(quantized))}
    passages = minilm.passages()[: args.passages]
    texts = [text for _, text in passages]
    print(
        f"{minilm.NAME} reads Python's documentation: {len(texts)} passages, {args.threads} threads, "
        f"{kernel_name(_SCHEME)}\n"
    )
    vectors, seconds = _embed_all(models, tokenizer, texts)
    queries = {name: minilm.embed_texts(model, tokenizer, _QUESTIONS) for name, model in models.items()}
    hits = {name: (queries[name] @ vectors[name].T).topk(min(_TOP, len(texts)), dim=1) for name in models}
    for index, question in enumerate(_QUESTIONS[: args.show]):
        _print_answers(
            question, passages,
            {name: (hits[name].values[index], hits[name].indices[index]) for name in (_FLOAT, _FUSED)},
        )  # fmt: skip
    print(_table(models, vectors, seconds, hits))
    faster = _ratio(seconds[_QUANTIZED], seconds[_FUSED])
    what = fusion.describe(models[_FUSED])
    print(f"\nFused: hb.fuse_(model), {what}; {faster:.2f}x faster than {_SCHEME} alone.")
    return 0


def _embed_all(models: dict, tokenizer, texts: list[str]) -> tuple[dict, dict[str, list[float]]]:
    """Embeddings of all texts and seconds per batch; all models take each batch, each in turn first."""
    import torch
    from tqdm import tqdm

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths together: little padding
    batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    vectors = {name: [None] * len(texts) for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        warm_up = minilm.tokenize(tokenizer, [texts[i] for i in batches[len(batches) // 2]])
        for model in models.values():
            minilm.embed(model, warm_up)
        for number, batch in enumerate(tqdm(batches, desc="embedding with all", unit="batch")):
            inputs = minilm.tokenize(tokenizer, [texts[i] for i in batch])
            first = number % len(models)
            for name in [*models][first:] + [*models][:first]:
                start = time.perf_counter()
                rows = minilm.embed(models[name], inputs)
                seconds[name].append(time.perf_counter() - start)
                for i, row in zip(batch, rows, strict=True):
                    vectors[name][i] = row
    return {name: torch.stack(rows) for name, rows in vectors.items()}, seconds


def _print_answers(question: str, passages: list[tuple[str, str]], best: dict) -> None:
    print(f"Q: {question}")
    for name, (scores, indices) in best.items():
        topic, text = passages[int(indices[0])]
        snippet = textwrap.shorten(text, width=160, placeholder=" ...")
        print(
            textwrap.fill(
                f"{name:>{len(_FUSED)}} {float(scores[0]):.3f} [{topic}] {snippet}",
                100,
                subsequent_indent=" " * (len(_FUSED) + 1),
            )
        )
    print()


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _table(models: dict, vectors: dict, seconds: dict[str, list[float]], hits: dict) -> str:
    cosines = {name: (vectors[_FLOAT] * vectors[name]).sum(1) for name in (_QUANTIZED, _FUSED)}
    found = {name: h.indices.tolist() for name, h in hits.items()}
    pairs = {name: list(zip(found[_FLOAT], found[name], strict=True)) for name in cosines}
    first = {name: sum(a[0] == b[0] for a, b in pairs[name]) for name in pairs}
    shared = {name: sum(len(set(a) & set(b)) for a, b in pairs[name]) for name in pairs}
    top = len(found[_FLOAT][0])
    sizes = {name: footprint.resident_bytes(model) for name, model in models.items()}
    saved = {name: footprint.byte_count(model) for name, model in models.items()}
    embedding = sum(p.numel() * p.element_size() for p in models[_FLOAT].embeddings.parameters())
    rest = {name: size - embedding for name, size in saved.items()}

    def size_row(label: str, sizes: dict[str, int]) -> list[str]:
        smaller = f"{sizes[_FLOAT] / sizes[_FUSED]:.2f}x smaller"
        return [label, *(mebibytes(size) for size in sizes.values()), smaller]

    return text_table(
        ["", *models, f"fused to {_FLOAT}"],
        [
            [
                f"ms per batch of {_BATCH}, median",
                *(f"{statistics.median(seconds[n]) * 1e3:.1f}" for n in models),
                f"{_ratio(seconds[_FLOAT], seconds[_FUSED]):.2f}x faster (median over batches)",
            ],
            ["all passages, seconds", *(f"{sum(seconds[n]):.1f}" for n in models), ""],
            size_row("model bytes in memory", sizes),
            size_row("model bytes on disk", saved),
            size_row("  without the float embeddings", rest),
            [
                f"cosine to {_FLOAT}, mean", "", *(f"{c.mean():.4f}" for c in cosines.values()),
                f"worst {cosines[_FUSED].min():.4f}",
            ],
            [
                "same best passage", "", *(str(n) for n in first.values()),
                f"{first[_FUSED]} of {len(_QUESTIONS)} questions",
            ],
            [
                f"same among the top {top}", "", *(str(n) for n in shared.values()),
                f"{shared[_FUSED]} of {top * len(_QUESTIONS)} passages",
            ],
        ],
    )  # fmt: skip
