"""The rules of the house that a machine can check: names, the one list per op, clean ISA objects, file sizes.

HALFBYTE_BUILD_DIR names a build tree whose objects are looked at; without it the core is built for that.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import halfbyte as hb
from building import ROOT, cmake_build, need_compiler
from halfbyte import _core

OPS = sorted(path.name for path in (ROOT / "csrc/ops").iterdir())
ISAS = re.findall(r"^\s*set\(HALFBYTE_FLAGS_(\w+)", (ROOT / "csrc/isa.cmake").read_text(), re.MULTILINE)
LISTS = sorted(path.parent for path in (ROOT / "csrc").rglob("kernels.inc"))
SPARSE = [op for op in OPS if op.startswith("spmm_")]
QUANTIZED = [op for op in OPS if op.startswith("linear_") and op != "linear_f32"]  # that schemes name
LINEAR = [*QUANTIZED, "linear_f32", *SPARSE]
TILES = sorted((ROOT / "csrc/tiles").glob("*.*"))
ISA_FILES = sorted(path for folder in LISTS for path in folder.glob("*.cpp") if path.stem in ISAS)
TEXT = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".inc", ".cmake", ".md", ".toml", ".txt", ""}


def text_files() -> list[Path]:
    folders = ("csrc", "python", "tests", "benchmarks", "docs", ".ci")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    caches = {"__pycache__", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    return [path for path in files if path.suffix in TEXT and not caches.intersection(path.parts)]


def listed(folder: Path) -> list[str]:
    return re.findall(r"^KERNEL\((\w+)\)", (folder / "kernels.inc").read_text(), re.MULTILINE)


def test_there_is_something_to_check():
    assert OPS and ISA_FILES and len(LISTS) > len(OPS) - 1 and "scalar" in ISAS


def test_kernel_names_follow_the_grammar():
    for row in _core.kernels():
        assert row["op"] in OPS and row["isa"] in ISAS
        assert re.fullmatch(rf"{row['op']}(_[1-9]\d*x[1-9]\d*x[1-9]\d*)?_{row['isa']}", row["name"]), row


@pytest.mark.parametrize("folder", LISTS, ids=lambda path: path.name)
def test_each_isa_file_is_listed_and_back(folder):
    names = listed(folder)
    assert sorted(names) == sorted(path.stem for path in ISA_FILES if path.parent == folder)
    assert names[-1] == "scalar", "scalar fills every slot, last"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", OPS)
def test_the_extension_has_the_list_of_each_op(op):
    built = [row["isa"] for row in _core.kernels() if row["op"] == op]
    assert built == [isa for isa in listed(ROOT / "csrc/ops" / op) if isa in built], "same order"
    assert built[-1] == "scalar"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_all_its_parts(op):
    from halfbyte import reference, selftest

    name = "linear" if op in LINEAR else op  # all linear ops share one entry and one reference
    assert callable(getattr(reference, f"{name}_ref"))
    assert callable(getattr(_core, name))
    assert op in selftest._CHECKS
    folder = ROOT / "csrc/ops" / op
    assert (folder / "op.h").is_file() and (folder / "op.cpp").is_file()
    assert (folder / "bind.cpp").is_file() == (op not in LINEAR)
    assert (ROOT / "docs/ops" / f"{op}.md").is_file()


def test_each_scheme_has_its_op_and_each_quantized_op_its_schemes():
    from halfbyte.scheme import NAMES
    from halfbyte.sparse.scheme import NAMES as SPARSE_NAMES

    assert {hb.Scheme.parse(name).op for name in NAMES} == set(QUANTIZED)
    assert {hb.SparseScheme.parse(name).op for name in SPARSE_NAMES} == set(SPARSE)


def test_quantized_ops_have_the_kernels_of_the_tiles():
    """An ISA file of a quantized op includes the tiles of its ISA, which share the rest of csrc/tiles."""
    isas = [path.stem for path in TILES if path.stem in ISAS]
    assert TILES and all(path.suffix == ".h" for path in TILES)
    for op in QUANTIZED:
        assert sorted(listed(ROOT / "csrc/ops" / op)) == sorted(isas)
        for isa in isas:
            text = (ROOT / "csrc/ops" / op / f"{isa}.cpp").read_text()
            assert re.findall(r'#include "tiles/(\w+)\.h"', text) == [isa], (op, isa)
    shared = {path.stem for path in TILES} - set(isas)
    included = {name for path in TILES for name in re.findall(r'#include "tiles/(\w+)\.h"', path.read_text())}
    assert included == shared


def test_isa_names_agree():
    known = set(_core.cpu_features())
    assert known <= {*ISAS, "neon_dot", "neon_i8mm"}
    if platform.machine() == "x86_64":
        assert known == set(ISAS)


# What an ISA file may reach, through our headers too: a standard container's inline functions, compiled with
# the flags of an ISA, could be the copy that the linker keeps for everyone.
HARMLESS = {"immintrin.h", "stdint.h", "string.h", "cstddef", "cstdint", "cmath", "cstring"}


def includes_of(path: Path, seen: set[Path]) -> set[str]:
    """System headers that a file includes, directly or through the project's own."""
    seen.add(path)
    system = set()
    for quoted, angled in re.findall(r'#include (?:"(.+)"|<(.+)>)', path.read_text()):
        if angled:
            system.add(angled)
        elif (header := ROOT / "csrc" / quoted) not in seen and header.suffix == ".h":
            system |= includes_of(header, seen)
    return system


def test_isa_files_reach_no_containers():
    for path in ISA_FILES:
        assert includes_of(path, set()) <= HARMLESS, path
        assert len(re.findall(r"^constinit const ", path.read_text(), re.MULTILINE)) == 1, path


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[Path, Path]:
    """ISA source -> its object file."""
    given = os.environ.get("HALFBYTE_BUILD_DIR")
    if not given:
        need_compiler()
    build = Path(given) if given else tmp_path_factory.mktemp("build")
    if not given:
        cmake_build(build, "halfbyte_core", HALFBYTE_PYTHON="OFF")
    found = {}
    for source in ISA_FILES:
        name = source.relative_to(ROOT).as_posix() + ".o"
        matches = [path for path in build.rglob(source.name + ".o") if path.as_posix().endswith(name)]
        assert matches, f"no object of {name} under {build}: is HALFBYTE_BUILD_DIR a build of this tree?"
        found[source] = matches[0]
    return found


def tool(name: str, *args: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *map(str, args)], capture_output=True, text=True, check=True).stdout


def test_isa_objects_export_one_kernel_and_nothing_weak(objects):
    for source, path in objects.items():
        symbols = [
            line.split(maxsplit=2)[1:] for line in tool("nm", "-C", "--defined-only", path).splitlines()
        ]
        exported = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
        owner = f"{source.parent.name}::kernel" if source.parent.name in OPS else source.parent.name
        assert exported == [f"halfbyte::{owner}_{source.stem}"], path


def test_isa_objects_call_nothing_of_ours(objects):
    """A common function compiled into an ISA object could be the copy that the linker keeps for everyone."""
    harmless = {
        "memcpy",
        "memset",
        "memmove",
        "fma",
        "fmaf",
        "lrintf",
        "_GLOBAL_OFFSET_TABLE_",
        "__stack_chk_fail",
    }
    for path in objects.values():
        undefined = {line.split()[-1] for line in tool("nm", "--undefined-only", path).splitlines()}
        assert undefined <= harmless, path


def test_isa_objects_have_no_static_initializers(objects):
    for path in objects.values():
        sections = tool("readelf", "-SW", path)
        assert ".text" in sections
        assert not re.search(r"\.(init_array|ctors|preinit_array|tdata|tbss)", sections), path


def test_extension_links_neither_torch_nor_openmp():
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", _core.__file__))
    assert needed
    assert not [name for name in needed if re.match(r"lib(torch|c10|gomp|omp|iomp5|cuda|python)", name)]


def test_nothing_is_built_for_the_build_machine_only():
    for path in text_files():
        if path.suffix in {".cmake", ".toml", ""} or path.name == "CMakeLists.txt":
            assert not re.search(r"-m(arch|tune|cpu)=native|-ffast-math|-Ofast", path.read_text()), path


def test_files_are_short_and_open_with_their_scope():
    first_line = {".py": r'"""\S', ".cmake": "# ", ".md": "# "}
    first_line |= dict.fromkeys((".h", ".cpp", ".cu", ".cuh", ".inc"), "// ")
    for path in text_files():
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.relative_to(ROOT)} has {len(lines)} lines"
        if (pattern := first_line.get(path.suffix)) and lines:
            assert re.match(pattern, lines[0]), f"{path.relative_to(ROOT)} does not say what it is for"


def test_nothing_is_left_undone():
    for path in text_files():
        if path != Path(__file__):
            assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text()), path


def test_versions_agree():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert hb.__version__ == declared == _core.build_info()["version"]
    assert f"\n## {declared}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_public_name_is_there_and_explained():
    for name in hb.__all__:
        value = getattr(hb, name)
        assert name.startswith("__") or (value.__doc__ or "").strip(), f"halfbyte.{name} has no docstring"


def test_links_of_the_documentation_lead_somewhere():
    for page in (path for path in text_files() if path.suffix == ".md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- bench:start -->") == readme.count("<!-- bench:end -->") == 1
