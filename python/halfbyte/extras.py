"""Optional packages: imports that fail with the name of the pip extra to install, and without chatter."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from .errors import HalfbyteError


class MissingExtraError(HalfbyteError, ImportError):
    """A command needs a package that is not installed; the message names the extra that brings it."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module` or raise MissingExtraError that says what for and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs the package {package!r}, which does not import here ({error}); "
            f"install it with: pip install 'halfbyte[{extra}]'"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log messages of other packages, some of which greet every import."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
