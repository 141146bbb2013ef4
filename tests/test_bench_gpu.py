"""What measures on a GPU, without one: `halfbyte bench linear --device cuda` on the emulated GPU (what it
does and says, not how fast), the clock, and the package that benchmarks/gpu_suite.py builds.
"""

from __future__ import annotations

import importlib
import json
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from building import ROOT
from halfbyte.bench import gpu as bench_gpu
from halfbyte.bench import gpu_clock, render
from halfbyte.bench.gpu_clock import Emulated
from halfbyte.cli import main


def run(scheme: str) -> dict:
    return bench_gpu.run(bench_gpu.Settings([(3, 70, 128)], [scheme], rounds=2), Emulated())


@pytest.mark.parametrize(("scheme", "peers"), [
    ("w8a8", ["torch-bf16", "torch-int8"]), ("w4a16_g64", ["torch-bf16", "torch-int4"]),
])  # fmt: skip
def test_rows_and_table(gpu, scheme, peers):
    result = json.loads(json.dumps(run(scheme)))
    shape = result["results"][0]
    rows = {row["name"]: row for row in shape["rows"]}
    assert [*rows, *shape["unavailable"]] == ["halfbyte", *peers]
    assert rows["halfbyte"]["note"].startswith("QLinear, linear_w")
    assert rows["halfbyte"]["error"] < 0.25 and rows["torch-bf16"]["error"] < 0.01
    assert all(len(row["samples_us"]) == 2 for row in rows.values())
    text = render.render(result, "markdown")
    assert "emulated" in text and "3x70x128" in text and "torch-bf16" in text


def test_a_wrong_kernel_is_not_timed(gpu, monkeypatch):
    monkeypatch.setattr(bench_gpu, "_ERROR_LIMITS", {8: 1e-6, 4: 1e-6})
    with pytest.raises(bench_gpu.HalfbyteError, match="w8a8: QLinear, .* is wrong"):
        run("w8a8")


def test_without_a_gpu(capsys):
    if bench_gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "linear", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--vs", "none"), ("--isa", "avx2")])
def test_options_of_the_cpu(capsys, option):
    assert main(["bench", "linear", "--device", "cuda", *option]) == 2
    assert f"{option[0]} is for --device cpu" in capsys.readouterr().err


def test_a_capture_that_fails_is_ended(monkeypatch):
    """Else every later call of the stream fails, too; and what is said is why it failed."""
    said = []

    class Graph:
        def capture_begin(self) -> None:
            said.append("begin")

        def capture_end(self) -> None:
            said.append("end")
            raise RuntimeError("the capture is not whole")

    def failing() -> None:
        said.append("call")
        if said.count("call") == 2:
            raise ValueError("the reason")

    cuda = gpu_clock.torch.cuda
    monkeypatch.setattr(cuda, "Stream", lambda: None)
    monkeypatch.setattr(cuda, "stream", lambda _: gpu_clock.contextlib.nullcontext())
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    device = object.__new__(gpu_clock.Gpu)
    with pytest.raises(ValueError, match="the reason"):
        device.captured([failing])
    assert said == ["call", "begin", "call", "end"] and gpu_clock.gc.isenabled()


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 256 << 20), (100 << 20, 3), (256 << 20, 2), (1 << 60, 2)])
def test_no_call_is_repeated_on_the_same_weight(nbytes, copies):
    assert object.__new__(gpu_clock.Gpu).copies(nbytes) == copies


@pytest.fixture
def build(monkeypatch):
    """benchmarks/gpu/build.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu.build")


@pytest.fixture
def tree(build, tmp_path, monkeypatch) -> Path:
    """A tree with a Python file and an extension, for build.package."""
    package = tmp_path / "tree" / "python" / "halfbyte"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__pycache__").mkdir()
    (package / "old.so").write_text("")
    (package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("extension")
    (tmp_path / "tree" / "pyproject.toml").write_text('version = "1.2.3"\n')
    monkeypatch.setattr(build, "ROOT", tmp_path / "tree")
    return tmp_path / "tree"


def test_a_package_of_what_is_built_already(build, tree, tmp_path):
    library = tmp_path / "libhalfbyte_cuda.so"
    library.write_text("library")
    made = build.package(tmp_path / "into", library, tmp_path / "log.txt", 1.0)
    folder = tmp_path / "into" / "halfbyte"
    core = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert made == library and {item.name for item in folder.iterdir()} == {"__init__.py", core}
    assert (folder / "__init__.py").is_symlink() and (folder / core).read_text() == "extension"
    with pytest.raises(build.BuildError, match="there is no"):
        build.package(tmp_path / "into", tmp_path / "none.so", tmp_path / "log.txt", 1.0)


PROGRAM = """#!{python}
import os, sys, time
from pathlib import Path
into = Path({into!r})
with open(into.parent / "calls.txt", "a") as calls:
    print(Path(sys.argv[0]).name, os.environ["NVCC_APPEND_FLAGS"], *sys.argv[1:], file=calls)
print("said by", Path(sys.argv[0]).name)
{does}
"""
BUILDS = """
if "ninja" in sys.argv[0]:
    (into / "build" / "csrc" / "cuda").mkdir(parents=True)
    (into / "build" / "csrc" / "cuda" / "libhalfbyte_cuda.so").write_text("built")
    (into / "build" / "_core.any.so").write_text("built")
"""


@pytest.fixture
def programs(build, tmp_path, monkeypatch):
    """Makes cmake and ninja of a line of Python."""

    def make(does: str) -> None:
        for name in ("cmake", "ninja"):
            program = tmp_path / name
            program.write_text(PROGRAM.format(python=sys.executable, into=str(tmp_path / "into"), does=does))
            program.chmod(0o755)

    monkeypatch.setattr(build, "_program", lambda name: str(tmp_path / name))
    return make


@pytest.mark.parametrize("has_core", [True, False])
def test_a_package_of_what_is_missing(build, tree, programs, tmp_path, has_core):
    programs(BUILDS)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not has_core:
        (tree / "python" / "halfbyte" / f"_core{suffix}").unlink()
    made = build.package(tmp_path / "into", None, tmp_path / "log.txt", 60.0)
    assert made == tmp_path / "into" / "build" / "csrc" / "cuda" / "libhalfbyte_cuda.so"
    core = (tmp_path / "into" / "halfbyte" / f"_core{suffix}").read_text()
    assert core == ("extension" if has_core else "built")
    configure, compile_ = (tmp_path / "calls.txt").read_text().splitlines()
    assert configure.startswith("cmake --threads=4 -S") and "-DHALFBYTE_CUDA=ON" in configure
    assert "-DHALFBYTE_VERSION=1.2.3" in configure
    assert f"-DHALFBYTE_PYTHON={'OFF' if has_core else 'ON'}" in configure
    assert compile_.split()[-1] == "halfbyte_cuda" and ("_core" in compile_.split()) is not has_core
    assert "said by cmake\nsaid by ninja\n" in (tmp_path / "log.txt").read_text()


def test_a_build_that_fails_or_takes_long(build, tree, programs, tmp_path):
    programs("sys.exit('ninja' in sys.argv[0])")
    with pytest.raises(build.BuildError, match="said by ninja"):
        build.package(tmp_path / "into", None, tmp_path / "log.txt", 60.0)
    programs("time.sleep(2 if 'cmake' in sys.argv[0] else 300)")
    began = time.monotonic()
    with pytest.raises(build.BuildError, match="more than 3 s, and ninja"):
        build.package(tmp_path / "into", None, tmp_path / "log.txt", 3.0)
    assert time.monotonic() - began < 4.5, "both share the seconds"
