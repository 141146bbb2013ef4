"""Types of command line arguments that several commands take."""

from __future__ import annotations

import argparse

import halfbyte

from ..errors import SchemeError


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def schemes(text: str) -> list[str]:
    """Names of schemes with commas between, in their canonical form."""
    try:
        return [str(halfbyte.Scheme.parse(part)) for part in text.split(",")]
    except SchemeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
