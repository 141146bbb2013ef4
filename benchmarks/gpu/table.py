"""What a run found, in at most eighty lines."""

from __future__ import annotations

from .record import FAIL, GOAL, PASS, SKIP

MOST_LINES = 80
MOST_FAULTS = 12
MOST_REASON = 20  # lines of why nothing ran
RATIOS = {  # times as fast as; and their heads
    "bf16": "x bf16", "int_mm": "x int_mm", "codes_mm": "x c+imm", "tinygemm": "x tinyg",
    "dequantize_mm": "x dq+mm", "unfused": "x unfused",
}  # fmt: skip
FOOT = (
    "x: times as fast as a peer of bfloat16 x, with cold weights in CUDA graphs, as ours:",
    "  bf16: torch's linear. tinyg: _weight_int4pack_mm. dq+mm: our dequantize, torch's linear.",
    "  int_mm: torch's codes, _int_mm and scales, about ten kernels, none fused; at m < 17 on 32 rows.",
    "  c+imm: our codes, _int_mm, one multiplication (no weight scales); at m < 17 on 32 rows.",
    "  unfused: torch's rms_norm, our codes. (codes): codes and scales, without the sums of the codes.",
)


def lines(data: dict) -> list[str]:
    """Ceilings, counts of the checks with the first that failed, and a line for each timed row."""
    environment, ceilings = data["environment"], data["ceilings"]
    gpu = environment.get("gpu", {}).get("name") or environment.get("device", "no GPU")
    found = [f"{gpu}, torch {environment.get('torch')}, {environment.get('date')}"]
    if reason := environment.get("nothing_ran"):
        return [*found, "FAIL: nothing ran:", *reason.splitlines()[-MOST_REASON:]]
    if ceilings:
        parts = (f"{name} {value / 1e12:.3g} T/s" for name, value in ceilings.items())
        found.append("ceilings: " + ", ".join(parts))
    found.append("seconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in data["phases"].items()))
    faults = []
    for phase in dict.fromkeys([*data["planned"], *(row["phase"] for row in data["rows"])]):
        rows = [row for row in data["rows"] if row["phase"] == phase]
        if phase != "timing":  # whose rows are a table
            found.append(f"{phase:<12} {_counts(rows, PASS, FAIL, SKIP)}")
            faults += [row for row in rows if row["verdict"] == FAIL and not _unran(row)]
        unran = filter(_unran, rows)
        found += [f"  {row['verdict']} {phase}: {row['note']}"[:150] for row in unran]
    for row in faults[:MOST_FAULTS]:
        found.append(f"  FAIL {row['phase']}: {row['name']}: {row.get('note', '')}"[:150])
    if len(faults) > MOST_FAULTS:
        found.append(f"  and {len(faults) - MOST_FAULTS} more")
    timed = [row for row in data["rows"] if row["phase"] == "timing" and not _unran(row)]
    if timed:
        head = f"{'op, scheme, m x n x k':<42}{'us':>9}{'% ceiling':>11}"
        found.append(head + "".join(f"{name:>10}" for name in RATIOS.values()))
    foot = FOOT if timed else ()
    room = MOST_LINES - len(found) - len(foot) - 2
    found += [_timed(row) for row in timed[:room]]
    if len(timed) > room:
        found.append(f"and {len(timed) - room} more rows in results.json")
    found = found[: MOST_LINES - len(foot) - 1]
    return [*found, *foot, f"timing       {_counts(timed, GOAL, PASS, FAIL, SKIP)}"]


def _unran(row: dict) -> bool:
    """Of what Record.close writes."""
    return row["name"] == f"{row['phase']}: not run"


def _counts(rows: list[dict], *verdicts: str) -> str:
    return "  ".join(f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in verdicts)


def _timed(row: dict) -> str:
    if "seconds" not in row:
        return f"{row['name']:<42} {row['verdict']} {row.get('note', '')}"[:150]
    share = f"{100 * row['share']:.0f}" if "share" in row else ""
    ratios = "".join(f"{row[name]:>10.2f}" if name in row else f"{'':>10}" for name in RATIOS)
    return f"{row['name']:<42}{row['seconds'] * 1e6:>9.1f}{share:>11}{ratios}  {row['verdict']}"
