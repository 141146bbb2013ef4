"""What became of the blocks of a model: which are fused, which are left alone and why, how calls went."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..tables import markdown_table, text_table


@dataclass(frozen=True)
class FusionRow:
    """One module that fuse_ looked at."""

    name: str
    kind: str  # "BERT encoder"; for one that is left alone the name of its class
    blocks: int  # that one call runs; 0 for one that is left alone
    what: str  # that one call does
    reason: str  # why it, or some of it, is left alone, always or as it is now
    fused_calls: int
    unfused_calls: dict[str, int]  # why calls went to the module's own forward: how many


@dataclass(frozen=True)
class FusionReport:
    """The modules of a model that are fused, or could not be, as a table (`str`), JSON or Markdown."""

    rows: tuple[FusionRow, ...]

    def __str__(self) -> str:
        return self._render(text_table)

    def to_markdown(self) -> str:
        """The table in GitHub Markdown."""
        return self._render(markdown_table)

    def to_json(self) -> str:
        """Every field."""
        return json.dumps(asdict(self), indent=1)

    @property
    def fused(self) -> tuple[FusionRow, ...]:
        """Those that are fused."""
        return tuple(row for row in self.rows if row.blocks)

    @property
    def left_alone(self) -> tuple[FusionRow, ...]:
        """Those that run their own forward, always or as they are now."""
        return tuple(row for row in self.rows if not row.blocks)

    def _render(self, table: Callable[[list[str], list[list[str]]], str]) -> str:
        if not self.rows:
            return "No block that halfbyte knows, and no pattern among quantized layers."
        headers, columns = ["module", "kind", "blocks", "one call does", "fused calls"], []
        for row in self.rows:
            called = row.blocks or row.unfused_calls
            columns.append(
                [
                    row.name or "(the model)",
                    row.kind,
                    str(row.blocks) if row.blocks else "-",
                    row.what or "-",
                    str(row.fused_calls) if called else "-",
                ]
            )
        unfused = ["; ".join(f"{n}: {why}" for why, n in row.unfused_calls.items()) for row in self.rows]
        for header, cells in (
            ("unfused calls", unfused),
            ("left alone because", [r.reason for r in self.rows]),
        ):
            if any(cells):
                headers.append(header)
                columns = [[*row, cell] for row, cell in zip(columns, cells, strict=True)]
        return "\n\n".join([table(headers, columns), self._total()])

    def _total(self) -> str:
        alone = len(self.left_alone)
        return f"Modules: {len(self.fused)} fused, {alone} left alone."
