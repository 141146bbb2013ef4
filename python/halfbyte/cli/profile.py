"""`halfbyte profile`: where the time of MiniLM's forward pass goes, quantized and fused or not."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..bench import minilm
from ..bench.linear import thread_counts
from ..bench.machine import available_cores
from .arguments import positive, schemes

_FLOAT = "float32"
_FORMATS = ("table", "json", "markdown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `halfbyte profile`."""
    cores = available_cores()
    parser.add_argument("--batch", type=positive, default=8, help="sentences (default 8)")
    parser.add_argument("--tokens", type=positive, default=128, help="of each sentence (default 128)")
    parser.add_argument(
        "--scheme", type=_scheme, default="w8a8", metavar="S",
        help=f"a halfbyte scheme, such as w4a8_g32, or {_FLOAT} (default w8a8)",
    )  # fmt: skip
    parser.add_argument("--unfused", action="store_true", help="leave the blocks as modules of torch")
    parser.add_argument("--threads", type=positive, default=cores, help=f"default {cores}")
    parser.add_argument("--rounds", type=positive, default=5, help="recorded calls (default 5)")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure what the machine can do")
    parser.add_argument(
        "--rows", action="store_true", help="every row instead of those that are alike added up"
    )
    parser.add_argument("--format", choices=_FORMATS, default=_FORMATS[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the profile as JSON")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write one call for Perfetto")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the call (png, svg, pdf)")


def run(args: argparse.Namespace) -> int:
    """Load, measure, write what is asked for, print."""
    for path in filter(None, (args.output, args.trace, args.plot)):
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            print(f"halfbyte profile: error: {path} cannot be written", file=sys.stderr)
            return 2
    if args.plot:
        from ..profiling.plot import check

        try:
            check(args.plot)
        except ValueError as error:
            print(f"halfbyte profile: error: {error}", file=sys.stderr)
            return 2
    import halfbyte as hb

    model, tokenizer = minilm.load()
    if args.scheme != _FLOAT:
        hb.quantize_(model, args.scheme, progress=False)
    if not args.unfused:
        hb.fuse_(model)
    inputs = minilm.fixed_batch(tokenizer, args.batch, args.tokens)
    with thread_counts(args.threads):
        profile = hb.profile(model, inputs, rounds=args.rounds, ceilings=not args.no_ceilings)
    if args.output:
        profile.to_json(args.output)
    if args.trace:
        profile.to_chrome_trace(args.trace)
    if args.plot:
        profile.plot(args.plot)
    if args.format == "json":
        print(profile.to_json())
    elif args.format == "markdown":
        print(profile.to_markdown())
    else:
        print(profile.table() if args.rows else profile)
    return 0


def _scheme(text: str) -> str:
    if text == _FLOAT:
        return text
    names = schemes(text)
    if len(names) > 1:
        raise argparse.ArgumentTypeError(f"{text}: one scheme, please")
    return names[0]
