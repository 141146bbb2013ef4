"""The GPU, its driver, and the software of a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

_GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "power.limit")


def output_of(*command: str, timeout: float = 30) -> str:
    """Standard output of a command, empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(root: Path) -> dict:
    """Plain JSON values; what cannot be read is left out."""
    gpu = output_of("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader")
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": dict(zip(_GPU_FIELDS, (part.strip() for part in gpu.split("\n")[0].split(",")), strict=False)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nvcc": output_of("nvcc", "--version").split("\n")[-1],
        "commit": output_of("git", "-C", str(root), "rev-parse", "HEAD"),
        "changed": output_of("git", "-C", str(root), "status", "--porcelain").count("\n"),
    }
    for name in ("torch", "numpy", "triton"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: value for name, value in facts.items() if value not in ("", {})}
