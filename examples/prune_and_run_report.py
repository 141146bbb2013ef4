"""What prune_and_run.py shows: two tables, and a plot of the loss, the time and the bytes.

usage: prune_and_run_report.py prune_and_run.json     once more, from the file; the plot is written beside it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from halfbyte.bench.machine import sentence
from halfbyte.tables import mebibytes, significant, text_table

_GREY, _TAYLOR, _MAGNITUDE = "#777777", "C0", "C1"
_TRAINED = {"dense": _GREY, "magnitude": _MAGNITUDE, "taylor": _TAYLOR}
_NAMES = {
    "float32": "float32 dense", "w8a8": "int8 dense", "f32+block16x1": "float32 sparse",
    "w8a8+block16x4": "int8 sparse",
}  # fmt: skip
_PLAIN, _FUSED = "#b9cfe4", "#2f6fa8"


def report(result: dict) -> str:
    """Both tables and what they say."""
    text, settings, trained = result["text"], result["settings"], result["trained"]
    first = text_table(
        ["trained", "zeros", "loss", "next character right"],
        [
            [
                name, f"{100 * one['zeros']['share']:.2f}%", f"{one['loss']:.4f}",
                f"{100 * one['accuracy']:.2f}%",
            ]
            for name, one in trained.items()
        ],
    )  # fmt: skip
    names = [(count, fused) for count in settings["forwards"] for fused in (False, True)]
    second = text_table(
        ["runs as", "weights", "loss", "right", "saved", "in memory"]
        + [f"ms, {count}x{settings['context']}{' fused' if fused else ''}" for count, fused in names],
        [
            [
                row["name"], row["weights"], f"{row['loss']:.4f}", f"{100 * row['accuracy']:.2f}%",
                mebibytes(row["saved_bytes"]), mebibytes(row["memory_bytes"]),
                *(f"{significant(t['ms'])} ({t['faster']:.2f}x)" for t in row["times"]),
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip
    alike, gain, last = result["alike"], result["taylor_to_magnitude"], result["rows"][-1]
    ratios = [
        f"{time['faster_than_int8']:.2f}x with {time['windows']} x {settings['context']}"
        for time in last["times"] if time["fused"]
    ]  # fmt: skip
    same = "bit for bit the same" if alike["unfused"] and alike["fused"] else "NOT the same"
    return "\n\n".join(
        [
            f"A Llama of {result['parameters'] / 1e6:.1f} million parameters learns to write "
            f"{text['source']} on {sentence(result['machine'])}",
            f"{settings['steps']} steps of training, then {settings['tune']} of fine-tuning for each:",
            first,
            f"After the same fine-tuning, taylor is {_than(gain)} than magnitude; "
            + ", ".join(f"{name} is {_than(x)} than dense" for name, x in result["to_dense"].items()) + ".",
            second,
            f"Fused, {last['name']} is faster than w8a8 on dense weights: {', '.join(ratios)} characters.",
            f"The int8 outputs of sparse and dense kernels are {same} for the same zeros; sparse float32 "
            f"differs by {alike['float_difference']:.1e}.",
            f"{last['name']} continues, from the bar on:\n{result['sample']}",
            f"In all {result['seconds']:.0f} s, {result['training_seconds']:.0f} of them training.",
        ]
    )  # fmt: skip


def _than(difference: dict) -> str:
    """Of losses, in words."""
    word = "better" if difference["difference"] < 0 else "worse"
    return f"{abs(difference['difference']):.4f} +- {difference['standard_error']:.4f} {word}"


def plot(result: dict, path: Path) -> None:
    """Draw `result` into the image `path` (format by suffix)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 0.85))
    _losses(left, result)
    _times(middle, result)
    _bytes(right, result)
    machine, best = result["machine"], result["trained"][result["best"]]
    title = (
        f"A Llama of {result['parameters'] / 1e6:.1f} million parameters, "
        f"{100 * best['zeros']['share']:.0f} % of the weights of its layers pruned in blocks of 16x4 "
        f"({machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''})"
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _losses(axes, result: dict) -> None:
    """Validation loss by step of fine-tuning, and the zeros behind it."""
    for name, one in result["trained"].items():
        steps, losses = ([point[key] for point in one["curve"]] for key in ("step", "loss"))
        axes.plot(steps, losses, color=_TRAINED[name], marker="o", markersize=3, label=name)
    axes.set(xlabel="step of fine-tuning", ylabel="validation loss (nats per character)")
    axes.set_title("Pruned while it is fine-tuned", fontsize=10)
    axes.grid(True, alpha=0.25)
    curve = result["trained"][result["best"]]["curve"]
    zeros = axes.twinx()
    steps, share = [point["step"] for point in curve], [100 * point["zeros"] for point in curve]
    zeros.fill_between(steps, share, color=_GREY, alpha=0.15, linewidth=0, label="zeros of the pruned ones")
    zeros.set(ylabel="zeros, % of the weights", ylim=(0, 100))
    axes.set_zorder(zeros.get_zorder() + 1)
    axes.patch.set_visible(False)
    both = [a.get_legend_handles_labels() for a in (axes, zeros)]
    axes.legend(*(a + b for a, b in zip(*both, strict=True)), fontsize=8)


def _times(axes, result: dict) -> None:
    """Milliseconds of the largest forward pass of each format, as it is and fused."""
    count = max(t["windows"] for t in result["rows"][0]["times"])
    pairs = [[t for t in row["times"] if t["windows"] == count] for row in result["rows"]]
    labels = [f"{_NAMES[row['name']]}\n{row['name']}\nloss {row['loss']:.3f}" for row in result["rows"]]
    kinds = {"in transformers": [p[0]["ms"] for p in pairs], "fused by halfbyte": [p[1]["ms"] for p in pairs]}
    _bars(axes, labels, kinds, lambda i, j: f"{pairs[i][j]['ms']:.1f} ms, {pairs[i][j]['faster']:.1f}x")
    tokens = result["settings"]["context"]
    axes.set_title(f"Time of a forward pass, {count} x {tokens} characters", fontsize=10)
    axes.set_xlabel("ms (and how much faster than float32)")


def _bytes(axes, result: dict) -> None:
    rows = result["rows"]
    sizes = [(row["saved_bytes"] / 2**20, row["memory_bytes"] / 2**20) for row in rows]
    kinds = {"saved": [s for s, _ in sizes], "in memory, packed": [m for _, m in sizes]}
    _bars(axes, [_NAMES[row["name"]] for row in rows], kinds, lambda i, j: f"{sizes[i][j]:.1f}")
    axes.set_title("Bytes of the model", fontsize=10)
    axes.set_xlabel("MiB")


def _bars(axes, labels: list[str], series: dict[str, list[float]], text) -> None:
    """Horizontal bars, the first label on top; text(label, series) stands at the end of each."""
    for j, ((name, values), color) in enumerate(zip(series.items(), (_PLAIN, _FUSED), strict=True)):
        places = [i + 0.38 * (j - 0.5) for i in range(len(values))]
        axes.barh(places, values, height=0.36, color=color, label=name)
        for i, (place, value) in enumerate(zip(places, values, strict=True)):
            axes.annotate(
                text(i, j), (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(v for values in series.values() for v in values))
    axes.grid(True, axis="x", alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    result = json.loads(file.read_text())
    print(report(result))
    plot(result, file.with_suffix(".png"))
