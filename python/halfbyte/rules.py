"""What the caller of quantize_ asked for: schemes by name, patterns to include and exclude, embeddings."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .errors import DTypeError
from .scheme import Scheme

Schemes = str | Scheme | Mapping[str, "str | Scheme | None"]
Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer."""

    scheme: Scheme | None  # None: stays float
    reason: str = ""
    asked: bool = False  # a pattern of the caller's asks for this very layer


class Rules:
    """The arguments of quantize_, parsed."""

    def __init__(
        self, scheme: Schemes, include: Patterns, exclude: Patterns, embeddings: str | Scheme | None
    ):
        mapping = dict(scheme) if isinstance(scheme, Mapping) else {"_default": scheme}
        parsed = {p: None if s is None else Scheme.parse(s) for p, s in mapping.items()}
        self.default = parsed.pop("_default", None)
        self.mapping = {_Pattern(p): s for p, s in parsed.items()}
        self.include = None if include is None else _patterns(include)
        self.exclude = _patterns(exclude or ())
        self.embeddings = None if embeddings is None else Scheme.parse(embeddings)

    def idle(self, linear: list[str], embeddings: list[str]) -> list[str]:
        """The patterns that fit none of the names, quoted."""
        chosen = [*self.mapping, *(self.include or ())]
        idle = [p for p in chosen if not p.fits(*linear)]
        names = linear if self.embeddings is None else [*linear, *embeddings]
        return [repr(p.text) for p in (*idle, *(p for p in self.exclude if not p.fits(*names)))]

    def decide(self, names: list[str], module: nn.Module) -> Decision | None:
        """What becomes of a linear layer or an embedding with these names; None: not looked at."""
        embedding = isinstance(module, nn.Embedding)
        if embedding and self.embeddings is None:
            return None
        if any(p.fits(*names) for p in self.exclude):
            return Decision(None, "excluded")
        if embedding:
            return Decision(self.embeddings)
        if self.include is not None and not any(p.fits(*names) for p in self.include):
            return Decision(None, "not included")
        for pattern, scheme in self.mapping.items():
            if pattern.fits(*names):
                reason = "" if scheme else f"the mapping says None for {pattern.text!r}"
                return Decision(scheme, reason, asked=True)
        if self.default is None:
            return Decision(None, "no pattern of the mapping fits it, and its _default is float")
        return Decision(self.default, asked=self.include is not None)


class _Pattern:
    """A glob, or a regular expression after "re:", for whole dotted names."""

    def __init__(self, text: str):
        if not isinstance(text, str):
            raise DTypeError(f"{text!r} is no pattern for names of layers: it must be a string")
        self.text = text
        expression = text[3:] if text.startswith("re:") else fnmatch.translate(text)
        try:
            self.regex = re.compile(expression)
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is no regular expression: {error}") from None

    def fits(self, *names: str) -> bool:
        """Whether it fits one of the names."""
        return any(map(self.regex.fullmatch, names))


def _patterns(texts: str | Iterable[str]) -> list[_Pattern]:
    return [_Pattern(text) for text in ([texts] if isinstance(texts, str) else texts)]
