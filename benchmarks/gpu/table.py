"""What a run found, in at most sixty lines."""

from __future__ import annotations

from .record import FAIL, GOAL, PASS, SKIP

MOST_LINES = 60
MOST_FAULTS = 12
COUNTED = ("smoke sm80", "smoke sm90", "correctness", "integration", "sanitizer", "explore")
RATIOS = {  # times as fast as; and their heads
    "bf16": "x bf16", "int_mm": "x int_mm", "tinygemm": "x tinyg", "dequantize_mm": "x dq+mm",
    "unfused": "x unfused",
}  # fmt: skip


def lines(data: dict) -> list[str]:
    """Ceilings, counts of the checks with the first that failed, and a line for each timed row."""
    environment, ceilings = data["environment"], data["ceilings"]
    gpu = environment.get("gpu", {}).get("name") or environment.get("device", "no GPU")
    found = [f"{gpu}, torch {environment.get('torch')}, {environment.get('date')}"]
    if ceilings:
        parts = (f"{name} {value / 1e12:.3g} T/s" for name, value in ceilings.items())
        found.append("ceilings: " + ", ".join(parts))
    found.append("seconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in data["phases"].items()))
    faults = []
    for phase in COUNTED:
        rows = [row for row in data["rows"] if row["phase"] == phase]
        if rows:
            found.append(f"{phase:<12} {_counts(rows, PASS, FAIL, SKIP)}")
            faults += [row for row in rows if row["verdict"] == FAIL]
    for row in faults[:MOST_FAULTS]:
        found.append(f"  FAIL {row['phase']}: {row['name']}: {row.get('note', '')}"[:150])
    if len(faults) > MOST_FAULTS:
        found.append(f"  and {len(faults) - MOST_FAULTS} more")
    timed = [row for row in data["rows"] if row["phase"] == "timing"]
    if timed:
        head = f"{'op, scheme, m x n x k':<42}{'us':>9}{'% ceiling':>11}"
        found.append(head + "".join(f"{name:>10}" for name in RATIOS.values()))
    room = MOST_LINES - len(found) - 1
    found += [_timed(row) for row in timed[:room]]
    if len(timed) > room:
        found.append(f"and {len(timed) - room} more rows in results.json")
    return [*found[: MOST_LINES - 1], f"timing       {_counts(timed, GOAL, PASS, FAIL)}"]


def _counts(rows: list[dict], *verdicts: str) -> str:
    return "  ".join(f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in verdicts)


def _timed(row: dict) -> str:
    if "seconds" not in row:
        return f"{row['name']:<42} {row['verdict']} {row.get('note', '')}"[:150]
    share = f"{100 * row['share']:.0f}" if "share" in row else ""
    ratios = "".join(f"{row[name]:>10.2f}" if name in row else f"{'':>10}" for name in RATIOS)
    return f"{row['name']:<42}{row['seconds'] * 1e6:>9.1f}{share:>11}{ratios}  {row['verdict']}"
