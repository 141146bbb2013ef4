"""Plain-text and Markdown tables for reports: numbers to the right, words to the left, no dependency."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart under a dashed rule; those whose filled cells all are numbers go right."""
    right = _numeric_columns(headers, rows)
    widths = [max([len(h), *(len(r[i]) for r in rows)]) for i, h in enumerate(headers)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in GitHub Markdown."""
    right = _numeric_columns(headers, rows)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return "\n".join(
        [line(headers), "|" + "|".join("--:" if r else "---" for r in right) + "|", *(line(r) for r in rows)]
    )


def _numeric_columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    def numeric(cells: list[str]) -> bool:
        filled = [c for c in cells if c not in ("", "-")]
        return bool(filled) and all(c.lstrip("+-<~")[:1].isdigit() for c in filled)

    return [numeric([r[i] for r in rows]) for i in range(len(headers))]


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with that many significant digits and no exponent between 1e-4 and 1e9; `-` for None."""
    if value is None:
        return "-"
    if value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}g}"
    exponent = int(f"{value:e}".rsplit("e", 1)[1])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def percent(fraction: float | None) -> str:
    """A fraction as whole percents; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.0f}%"


def mebibytes(count: float) -> str:
    """A byte count in KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
