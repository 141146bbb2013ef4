"""A measured row against its target: FAIL, PASS (what a first version must reach) or GOAL."""

from __future__ import annotations

from .record import FAIL, GOAL, NONE, PASS

# What targets are given for, as [accept, goal] or [accept]. share: of the ceiling. The others: times as fast
# as torch's bfloat16, as its _int_mm with codes and scales made around it, as norm and quantization apart.
AT_LEAST = ("share", "bf16", "int_mm", "unfused")
MOST_STEP = 1.35  # between numbers of rows that follow each other
STEP_SCHEME, STEP_SIZE = "w4a16_g128", 8192


def verdict(target: dict, measured: dict, earlier: list[dict], gpu: str) -> dict:
    """The worst of what the target says, and what was missed. What was not measured is missed: `missing` of
    `measured` may say why.
    """
    microseconds, why = measured["seconds"] * 1e6, measured.get("missing", {})
    limits = [(key, measured.get(key), target[key], 1) for key in AT_LEAST if key in target]
    limits += [("us", microseconds, target["us"], -1)] if "us" in target else []
    if "h200_us" in target and "H200" in gpu:
        limits.append(("us on an H200", microseconds, target["h200_us"], -1))
    if "times_m1" in target:
        one = _of_one_row(target, earlier)
        times = measured["seconds"] / one if one else None
        limits.append(("times the time of m = 1", times, [target["times_m1"]], -1))
    missed, goals, unmeasured = [], [], [name for name, value, *_ in limits if value is None]
    for name, value, (accept, *goal), sign in limits:
        if value is None:
            missed.append(f"{name}: not measured: {why.get(name, 'no such row')}")
            continue
        if sign * value < sign * accept:
            missed.append(f"{name}: {value:.3g}, wanted {accept:.3g}")
        goals += [sign * value >= sign * wanted for wanted in goal]
    if not limits:
        return {"verdict": NONE}
    if missed:
        more = {"unmeasured": unmeasured} if unmeasured else {}
        return {"verdict": FAIL, "note": "; ".join(missed), **more}
    return {"verdict": GOAL if goals and all(goals) else PASS}


def _of_one_row(target: dict, earlier: list[dict]) -> float | None:
    wanted = target | {"m": 1}
    for row in earlier:
        other = row.get("target", {})
        if "seconds" in row and all(other.get(key) == wanted[key] for key in ("op", "scheme", "m", "n", "k")):
            return row["seconds"]
    return None


def steps(rows: list[dict]) -> dict:
    """Whether one more row of x, or twice as many, ever costs much: between the numbers that were timed."""
    times = {}
    for row in rows:
        target = row.get("target", {})
        if (target.get("op"), target.get("scheme")) == ("linear", STEP_SCHEME) and "seconds" in row:
            if target["n"] == target["k"] == STEP_SIZE and target["m"] <= 256:
                times[target["m"]] = row["seconds"]
    order = sorted(times)
    # More rows than twice as many may take more time in proportion.
    neighbours = zip(order, order[1:], strict=False)
    found = {f"{a} to {b}": times[b] / times[a] / max(1.0, b / a / 2) for a, b in neighbours}
    over = {step: round(ratio, 2) for step, ratio in found.items() if ratio > MOST_STEP}
    if not found:
        return {"verdict": FAIL, "note": "not measured: no two neighbours were timed"}
    note = f"over {MOST_STEP}: {over}" if over else ""
    return {"verdict": FAIL if over else PASS, "note": note, "steps": found}
