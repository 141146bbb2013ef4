"""The `halfbyte` command: doctor, bench, demo, profile, inspect. Only the one that runs is imported."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from ..errors import HalfbyteError

_COMMANDS = {
    "doctor": "what this machine can run, what was built, which kernel each op uses, and a self-test",
    "bench": "measure layers, call overhead or a whole model against other tools and this machine's ceilings",
    "demo": "search Python's documentation with MiniLM in float32 and int8, or (llm) run a language model",
    "profile": "where the time of MiniLM goes, by layer and op, beside what this machine can do",
    "inspect": "show what a directory written by halfbyte.save holds",
}
_EXIT_ERROR = 2  # argparse uses the same status for a wrong command line
_EXIT_INTERRUPT, _EXIT_PIPE = (
    128 + signal.SIGINT,
    128 + signal.SIGPIPE,
)  # what a shell reports for these signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the named subcommand is imported: `halfbyte inspect` does not pay for the imports of the
    # benchmarks.
    chosen = next((word for word in arguments if word in _COMMANDS), None)
    parser = argparse.ArgumentParser(
        prog="halfbyte", description="Int8 and int4 kernels for PyTorch models on this CPU."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    if args.version:
        from .. import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return _EXIT_ERROR
    try:
        return args.run(args)
    except (
        BrokenPipeError
    ):  # the reader of our output, such as `head`, has left: nothing to report, and no one to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_PIPE
    except (HalfbyteError, OSError) as error:
        print(f"halfbyte {args.command}: error: {error}", file=sys.stderr)
        return _EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPT
