"""`halfbyte doctor`: the machine and its GPUs, what was built, which kernels run and why, threads, torch, a
self-test.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from ..tables import mebibytes, text_table

_FORCE_VARIABLE = "HALFBYTE_ISA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `halfbyte doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; the status is 1 if a kernel fails its self-test or none can be chosen."""
    report = examine()
    print(json.dumps(report, indent=1) if args.json else _text(report))
    failed = [row["kernel"] for row in report["self_test"] if row["status"] == "failed"]
    for name in failed:
        print(f"self-test FAILED: {name}", file=sys.stderr)
    return 1 if failed or report["error"] else 0


def examine() -> dict:
    """Everything that the report shows, as plain JSON values."""
    # torch first: halfbyte runs on the OpenMP runtime that it finds in the process, and torch brings one.
    torch = _torch()
    from .. import _core, selftest
    from ..bench.machine import describe

    forced = os.environ.get(_FORCE_VARIABLE)
    error, chosen, tests = None, [], []
    try:
        chosen = _chosen_kernels(forced)
        tests = selftest.run()
    except RuntimeError as problem:  # HALFBYTE_ISA names something unknown or absent
        error = str(problem)
    build = _core.build_info()
    return {
        "machine": describe(_core.get_num_threads()),
        "isas": [
            {
                "isa": isa,
                "cpu": runs,
                "built": isa in build["isas"],
                "emulated_in_tests": isa in build["emulated"],
            }
            for isa, runs in _core.cpu_features().items()
        ],
        "forced_isa": forced,
        "kernels": chosen,
        "torch": torch,
        "cuda": _cuda(torch),
        "self_test": tests,
        "error": error,
    }


def _chosen_kernels(forced: str | None) -> list[dict]:
    """Per op: the kernel that runs, and for each better row of the list the reason why it does not."""
    from .. import _core

    rows = _core.kernels()
    result = []
    for op in dict.fromkeys(row["op"] for row in rows):
        listed = [row for row in rows if row["op"] == op]
        name = _core.select(op)
        better = listed[: next(i for i, row in enumerate(listed) if row["name"] == name)]
        reasons = {
            row["name"]: f"{_FORCE_VARIABLE}={forced} excludes it"
            if row["supported"]
            else f"this CPU lacks {row['isa']}"
            for row in better
        }
        result.append({"op": op, "kernel": name, "better": reasons})
    return result


def _torch() -> dict | None:
    try:
        import torch
    except ImportError:
        return None
    cuda = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def _cuda(torch: dict | None) -> dict:
    """The CUDA library and the GPUs that it sees. why: there is none, or no kernel runs on one."""
    from ..cuda import library

    found = library.library()
    count = max(0, found.devices()) if found else 0
    names = torch["gpus"] if torch else []
    devices = [
        {
            "device": index,
            "name": names[index] if index < len(names) else "",
            "arch": arch if (arch := found.arch(index)) > 0 else None,  # below 0: an error; why tells which
            "why": library.obstacle(index) or _no_torch(torch, index),
        }
        for index in range(count)
    ]
    return {
        "library": found.path if found else None,
        "interface": found.abi() if found else None,
        "devices": devices,
        "why": "" if devices else library.obstacle(0),
    }


def _no_torch(torch: dict | None, index: int) -> str:
    """Why torch cannot put tensors on a GPU that the library sees."""
    if torch is None:
        return "torch is not installed"
    return "" if index < len(torch["gpus"]) else f"torch {torch['version']} does not see it"


def _text(report: dict) -> str:
    machine, build, torch = report["machine"], report["machine"]["build"], report["torch"]
    from .. import _core

    runtime = _core.thread_runtime()  # with the path of the library, which results leave out
    cache = (
        ", ".join(f"{level} {mebibytes(size)}" for level, size in machine["caches"].items())
        or "caches unknown"
    )
    lines = [
        f"halfbyte {build['version']}, Python {machine['python']}, {machine['os']}, {machine['kernel']}",
        f"CPU      {machine['cpu']}, {machine['cores']} cores, {cache}",
        f"build    {build['compiler']}",
        f"threads  {runtime['threads']}, {runtime['name']} {runtime['library']}".rstrip(),
    ]
    if torch is None:
        lines.append("torch    not installed: halfbyte works on numpy arrays; pip install 'halfbyte[torch]'")
    else:
        gpus = f"CUDA {torch['cuda']}: {', '.join(torch['gpus'])}" if torch["cuda"] else "no CUDA device"
        lines.append(f"torch    {torch['version']}, {torch['threads']} threads, {gpus}")
    lines += _cuda_lines(report["cuda"])
    if report["forced_isa"]:
        lines.append(f"forced   {_FORCE_VARIABLE}={report['forced_isa']}")
    isas = [[row["isa"], _yes(row["cpu"]), _yes(row["built"])] for row in report["isas"]]
    parts = ["\n".join(lines), text_table(["instruction set", "this CPU", "built"], isas)]
    if report["error"]:
        return "\n\n".join([*parts, f"no kernel can be chosen: {report['error']}"])
    chosen = [
        [
            row["op"],
            row["kernel"],
            "; ".join(f"{n}: {why}" for n, why in row["better"].items()) or "it is the best",
        ]
        for row in report["kernels"]
    ]
    tests = [[row["kernel"], row["status"], row["detail"]] for row in report["self_test"]]
    parts.append(text_table(["op", "kernel that runs", "why not a better one"], chosen))
    parts.append(text_table(["self-test", "status", "detail"], tests))
    return "\n\n".join(parts)


def _cuda_lines(cuda: dict) -> list[str]:
    """What the report says of GPUs."""
    if cuda["library"] is None:
        return [f"CUDA     no kernels: {cuda['why']}"]
    lines = [f"CUDA     {cuda['library']}, interface {cuda['interface']}"]
    if not cuda["devices"]:
        return [*lines, f"         no kernel runs: {cuda['why']}"]
    return lines + [
        f"GPU {d['device']}    {d['name'] or 'unnamed'}"
        + (f", sm_{d['arch']}: " if d["arch"] else ": ")
        + (f"torch computes: {d['why']}" if d["why"] else "kernels run")
        for d in cuda["devices"]
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
