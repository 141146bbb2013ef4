"""A profile as an icicle: modules above their parts, each as wide as its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..extras import require
from ..tables import significant
from .account import BETWEEN, CALL, MODEL

if TYPE_CHECKING:
    from .result import Profile, Row

_WIDTH, _ROW_HEIGHT, _FONT = 15.0, 0.42, 7.5  # inches, inches, points
_LETTER = 0.56 * _FONT / 72  # inches; of the default font, on average
_MODULE, _OTHER = "#d9d9d9", "#f3f3f3"
_COLORS = ("#4878d0", "#ee854a", "#6acc64", "#d65f5f", "#956cb4", "#8c613c", "#dc7ec0", "#d5bb67", "#82c6e2")


@dataclass
class Node:
    """A module, or at the ends of the branches, a row."""

    name: str
    own: float = 0  # ms that no child has
    op: str = ""  # of a row
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        return self.own + sum(child.ms for child in self.children.values())

    def child(self, name: str) -> Node:
        return self.children.setdefault(name, Node(name))


def tree(profile: Profile) -> Node:
    """Modules by the parts of their names; time between layers is that of the module itself."""
    root = Node(profile.model)
    for row in (*profile.rows, *profile.between):
        node = root
        for name in _path(row):
            node = node.child(name)
        node.own += row.ms
        if row.op != BETWEEN:
            node.op = row.op
    return _joined(root)


def check(path: Path) -> None:
    """MissingExtraError without matplotlib; ValueError for a suffix that it does not draw."""
    require("matplotlib", extra="bench", purpose="the plot of a profile")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"the plot {path}: its suffix must be one of {', '.join(sorted(formats))}")


def icicle(profile: Profile, path: Path) -> None:
    """Draw into the image `path`; raises what `check` does."""
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    root = tree(profile)
    boxes = list(_boxes(root, 0, 0))
    depth = 1 + max(level for level, _, _ in boxes)
    ops = sorted(profile.by("op"), key=lambda row: -row.ms)
    named = [row.op for row in ops if row.op != BETWEEN]
    colors = {op: _COLORS[i % len(_COLORS)] for i, op in enumerate(dict.fromkeys(named))}
    figure = Figure(figsize=(_WIDTH, 1.6 + _ROW_HEIGHT * depth), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for level, begin, node in boxes:
        color = colors.get(node.op, _MODULE)
        axes.broken_barh([(begin, node.ms)], (-level, 0.94), fc=color, ec="white", lw=0.5)
        if text := _fitting(node, node.ms / root.ms * _WIDTH * 0.95):
            axes.text(begin + node.ms / 2, 0.47 - level, text, ha="center", va="center", fontsize=_FONT)
    axes.set(xlim=(0, root.ms), ylim=(1 - depth, 1), yticks=[], xlabel="ms", facecolor=_OTHER)
    axes.set_title(
        f"{profile.model}, {significant(profile.plain_ms, 4)} ms a call, {profile.threads} threads; "
        "under a module, blank: its own time, between its parts"
    )
    labels = [(colors.get(row.op, _OTHER), f"{row.op} {100 * row.ms / profile.total_ms:.0f}%") for row in ops]
    handles = [Patch(facecolor=color, edgecolor="#bbbbbb", label=label) for color, label in labels[:12]]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _path(row: Row) -> list[str]:
    names = [] if row.layer in (CALL, MODEL) else row.layer.split(".")
    return [*names, row.phase or row.op] if row.op != BETWEEN and (row.phase or not names) else names


def _joined(node: Node) -> Node:
    """Modules whose whole time is that of one part become one box with it."""
    children = [_joined(child) for child in node.children.values()]
    if len(children) == 1 and not node.own and not node.op and not children[0].op:
        (child,) = children
        return Node(f"{node.name}.{child.name}", child.own, child.op, child.children)
    return Node(node.name, node.own, node.op, {child.name: child for child in children})


def _boxes(node: Node, level: int, begin: float) -> Iterator[tuple[int, float, Node]]:
    yield level, begin, node
    for child in node.children.values():
        yield from _boxes(child, level + 1, begin)
        begin += child.ms


def _fitting(node: Node, inches: float) -> str:
    """As much of its name, and time, as the box has room for."""
    room = int(inches / _LETTER) - 1
    name = node.name
    for text in (f"{name} {significant(node.ms)} ms", name, name.rpartition(".")[2]):
        if len(text) <= room:
            return text
    return f"{name[: room - 2]}.." if room >= 5 else ""
