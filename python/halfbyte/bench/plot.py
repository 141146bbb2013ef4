"""Roofline of a `bench linear` result: rate by operations per byte, under the ceilings of the same run."""

from __future__ import annotations

from pathlib import Path

from ..extras import require
from .linear import OURS


def check(path: Path) -> None:
    """MissingExtraError without matplotlib; ValueError for a suffix that it does not draw."""
    require("matplotlib", extra="bench", purpose="--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"--plot {path}: the suffix must be one of {', '.join(sorted(formats))}")


def roofline(result: dict, path: Path) -> None:
    """Draw all shapes of `result` into the image `path` (format by suffix)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["name"] for shape in result["results"] for row in shape["rows"]))
    intensities = []
    for index, name in enumerate(names):
        points = [
            (2 * shape["m"] * shape["n"] * shape["k"] / row["bytes"], row["gops"])
            for shape in result["results"]
            for row in shape["rows"]
            if row["name"] == name
        ]
        intensities += [x for x, _ in points]
        marker, size = ("*", 130) if name == OURS else ("o", 36)
        axes.scatter(
            *zip(*points, strict=True), s=size, marker=marker, color=f"C{index % 10}", label=name, zorder=3
        )
    _ceilings(axes, result, min(intensities) / 2, max(intensities) * 2)
    machine = result["machine"]
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="GOP/s",
        title=f"Linear layers, {machine['cpu']}, {machine['threads']} threads",
    )  # fmt: skip
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _ceilings(axes, result: dict, low: float, high: float) -> None:
    """The highest of the shapes' median ceilings: level for the peak, a slope for each memory level."""
    tops = [shape["ceilings"] for shape in result["results"]]
    peak = max((t["int8"] for t in tops if t["int8"]), default=None)
    if peak:
        _line(axes, (low, peak), (high, peak), f"int8 peak, {tops[0]['isa']}: {peak / 1e9:.0f} GOP/s", "-")
    for key, label, style in (("cache_read", "cache", "--"), ("dram_read", "DRAM", ":")):
        rate = max(t[key] for t in tops)
        end = min(high, peak / rate) if peak else high
        _line(axes, (low, low * rate), (end, end * rate), f"{label} read {rate / 1e9:.0f} GB/s", style)


def _line(axes, start: tuple[float, float], end: tuple[float, float], label: str, style: str) -> None:
    """A ceiling in ops/s with its label standing above its left end."""
    (x0, y0), (x1, y1) = start, end
    axes.plot([x0, x1], [y0 / 1e9, y1 / 1e9], color="black", linestyle=style, linewidth=1)
    axes.annotate(label, (x0, y0 / 1e9), xytext=(0, 14), textcoords="offset points", fontsize=8)
