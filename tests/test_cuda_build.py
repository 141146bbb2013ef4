"""libhalfbyte_cuda.so as nvcc makes it, looked at without a GPU: architectures, registers, instructions,
symbols.

The library of HALFBYTE_BUILD_DIR if it was built there, else the installed one, else one built for this.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from building import cuda_library
from cuda_binary import Binary, Kernel, find_tools

MOST_BYTES = 25 << 20
EVERY = {"sm_80", "sm_89", "sm_90"}  # architectures of all kernels but those of *_sm90.cu

# Kernel (a pattern of its mangled name) -> most registers a thread. A processor has 65536: 128 let two blocks
# of 256 threads run side by side, 255 is what one thread can have.
REGISTERS = {
    r"linear_kernelI.*ELi1ELNS0_3HasE": 128,  # of 8, 16 and 32 rows
    r"linear_kernelI.*ELi[24]ELNS0_3HasE": 255,
    r"linear_meet_kernel": 64,
    r"quantize_rowI.*ELi16E": 80,  # of 16 and of 64 values that a thread keeps
    r"quantize_rowI.*ELi64E": 128,
    r"quantize_long_row": 64,
    r"finish_products": 80,
    r"dequantize_tiles": 64,
}
# Shared memory that is not asked for at the launch: none of ours; 1 KiB of a block is the system's on sm_90.
SHARED = {"sm_80": 0, "sm_89": 0, "sm_90": 1024}


@pytest.fixture(scope="module")
def library(request) -> Path:
    return cuda_library(request)


@pytest.fixture(scope="module")
def kernels(library, tmp_path_factory) -> list[Kernel]:
    return binary(library, tmp_path_factory).kernels


def binary(library: Path, tmp_path_factory) -> Binary:
    tools = find_tools(tmp_path_factory.mktemp("tools"))
    if tools is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return Binary(library, tools)


def linear(kernels: list[Kernel], copy: str) -> list[Kernel]:
    return [kernel for kernel in kernels if "linear_kernelI" in kernel.name and copy in kernel.name]


def test_machine_code_for_three_architectures_and_ptx_for_the_rest(library, tmp_path_factory):
    built = binary(library, tmp_path_factory)
    assert built.elf == EVERY
    assert built.ptx == {"sm_80"}


def test_each_kernel_is_there_for_its_architectures(kernels):
    by_name: dict[str, set[str]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, set()).add(kernel.arch)
    for name, found in by_name.items():
        assert found == ({"sm_90"} if "CopyInBulk" in name else EVERY), name
    assert len(linear(kernels, "CopyByThreads")) == 3 * len(linear(kernels, "CopyInBulk")) > 0


def test_nothing_spills(kernels):
    """Local memory is memory: an array that is indexed at run time, or registers that did not suffice."""
    for kernel in kernels:
        assert kernel.resources["STACK"] == kernel.resources["LOCAL"] == 0, kernel
        assert not kernel.has("LDL") and not kernel.has("STL"), kernel


def test_registers_and_shared_memory_are_bounded(kernels):
    for kernel in kernels:
        ceilings = [most for pattern, most in REGISTERS.items() if re.search(pattern, kernel.name)]
        assert len(ceilings) == 1, f"{kernel.name} has {len(ceilings)} rows in REGISTERS"
        assert kernel.resources["REG"] <= ceilings[0], kernel
        assert kernel.resources["SHARED"] <= SHARED[kernel.arch], kernel
    for pattern in REGISTERS:
        assert any(re.search(pattern, kernel.name) for kernel in kernels), f"no kernel is a {pattern}"


def test_linear_kernels_multiply_on_the_tensor_cores(kernels):
    pairs = 0
    for kernel in linear(kernels, "Copy"):
        x_type, has = re.search(r"ELi(\d)ELi[48]ELi[124]ELNS0_3HasE(\d)E", kernel.name).groups()
        codes = x_type == "4"  # HALFBYTE_I8
        assert kernel.has("IMMA") == codes and kernel.has("HMMA") != codes, kernel
        assert kernel.has("IMMA.SP") == (has == "3"), kernel  # Has::pairs: two of four
        pairs += has == "3"
    assert pairs


def test_linear_kernels_copy_behind_the_threads_backs(kernels):
    for kernel in linear(kernels, "CopyByThreads"):
        assert kernel.has("LDGSTS"), kernel
        assert not kernel.has("UBLKCP") and not kernel.has("UCGABAR_ARV"), kernel
    for kernel in linear(kernels, "CopyInBulk"):
        for mnemonic in ("UBLKCP", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT"):
            assert kernel.has(mnemonic), (mnemonic, kernel)
        assert not kernel.has("LDGSTS"), kernel


def test_products_start_while_rows_are_quantized(kernels):
    """On sm_90: the quantizer lets the next kernel start, which waits for it before it reads the rows."""
    for kernel in kernels:
        if kernel.arch == "sm_90":
            assert kernel.has("PREEXIT") == bool(re.search(r"\dquantize_", kernel.name)), kernel
            assert kernel.has("ACQBULK") == ("CopyInBulk" in kernel.name), kernel


# Compute capability -> bytes of shared memory that a block may ask for.
BLOCK_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize("arch", BLOCK_SHARED)
def test_every_format_fits_the_shared_memory(gpu, arch):
    """What a launch asks for depends on the format; where a device has less, api.cpp has no kernel."""
    from halfbyte.cuda.library import Format, Linear

    formats = [(4, 0, 2, 0), (8, 0, 2, 0), (8, 0, 2, 0, 1), (8, 0, 2, 0, 2)]
    formats += [(b, g, s, o) for b in (4, 8) for g in (32, 64, 128) for s in (2, 4) for o in (0, 1)]
    emulate = ctypes.CDLL(gpu.path).halfbyte_cuda_emulate
    emulate(arch, 108, BLOCK_SHARED[arch], 0)
    try:
        for form in formats:
            for x_type in (1, 2, 4) if len(form) == 4 else (4,):
                for m in (1, 16, 192):
                    call = Linear(
                        x=256, x_scale=256 if x_type == 4 else None, weight=256, scale=256, y=256, ldx=4096,
                        ldy=4096, m=m, n=4096, k=4096, x_type=x_type, format=Format(*form), starts=256,
                        columns=256,
                    )  # fmt: skip
                    name = gpu.linear_kernel(ctypes.byref(call))
                    assert name and name.endswith(b"sm90" if arch == 90 else b"sm80"), (form, x_type, m, name)
    finally:
        emulate(90, 132, 232448, 0)


def output_of(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def test_it_needs_the_c_library_alone(library):
    needed = set(re.findall(r"^\s*(lib[\w+-]+)\.so", output_of("ldd", library), re.MULTILINE))
    assert needed <= {"libc", "libm", "libdl", "librt", "libpthread"}, needed


def test_it_exports_its_interface_and_nothing_else(library):
    from building import ROOT

    exported = {line.split()[-1] for line in output_of("nm", "-D", "--defined-only", library).splitlines()}
    declared = re.findall(
        r"^HALFBYTE_CUDA_API .*?\b(halfbyte_cuda_\w+)\(", (ROOT / "csrc/cuda/api.h").read_text(), re.MULTILINE
    )
    assert exported == set(declared)


def test_it_is_small(library):
    assert library.stat().st_size < MOST_BYTES


def test_it_loads_where_there_is_no_driver(library):
    """In a process of its own: devices are none, and every call that needs one says so."""
    code = f"""
import ctypes
library = ctypes.CDLL({str(library)!r})
library.halfbyte_cuda_error.restype = ctypes.c_char_p
print(library.halfbyte_cuda_devices(), library.halfbyte_cuda_arch(0) < 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert done.stdout.split() == ["0", "True"]
