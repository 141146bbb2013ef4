"""Perplexity of a causal language model: exp of the mean negative log-likelihood over windows of 512 tokens.

Windows do not overlap, and each starts without context: its first token is not scored, the other 511 are.
What remains of the text after the last whole window is left out. The mean is over all scored tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import HalfbyteError

WINDOW = 512
TEXT_VARIABLE = "HALFBYTE_TEXT"


@dataclass(frozen=True)
class Text:
    """What is read, where it is from, and its SHA-256 (of UTF-8)."""

    source: str
    sha256: str
    content: str


def read_text(path: Path | None = None) -> Text:
    """The text of `path`, else of the file that the environment variable HALFBYTE_TEXT names, else Python's
    own documentation (`pydoc_data.topics`), which differs between Python versions.

    Published figures are for WikiText-2; its files are plain text. Raises OSError, and HalfbyteError for a
    file that is no UTF-8 text.
    """
    if path is None and (named := os.environ.get(TEXT_VARIABLE)):
        path = Path(named)
    if path is not None:
        try:
            source, content = path.name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HalfbyteError(f"{path} is no UTF-8 text ({error}); give a file of plain text") from None
    else:
        from pydoc_data.topics import topics

        source = f"pydoc_data.topics of Python {platform.python_version()}"
        content = "\n\n".join(text for _, text in sorted(topics.items()))
    return Text(source, hashlib.sha256(content.encode()).hexdigest(), content)


def windows(tokenizer, text: Text, tokens: int | None = None):
    """int64 [count, 512]: the first `tokens` tokens of the text (default: all) in whole windows, no special
    tokens.

    HalfbyteError where that is less than one window.
    """
    import torch

    ids = tokenizer(text.content, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    count = len(ids[:tokens]) // WINDOW
    if count == 0:
        raise HalfbyteError(
            f"{len(ids[:tokens])} tokens of {text.source} are less than one window of {WINDOW}"
        )
    return torch.tensor(ids[: count * WINDOW]).reshape(count, WINDOW)


def window_loss(model, ids) -> float:
    """Mean negative log-likelihood, in nats, of the tokens of one window [512] after the first."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[1:]))


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean; every window scores as many tokens as the others."""
    return math.exp(statistics.fmean(losses))


def ratio(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """(perplexity over that of `base` on the same windows, its standard error over windows).

    The standard error is of the mean difference of losses, times the ratio; NaN for a single window.
    """
    differences = [a - b for a, b in zip(losses, base, strict=True)]
    value = math.exp(statistics.fmean(differences))
    if len(differences) < 2:
        return value, math.nan
    return value, value * statistics.stdev(differences) / math.sqrt(len(differences))
