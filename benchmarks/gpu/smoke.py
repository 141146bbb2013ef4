"""The first calls on a new GPU, and what compute-sanitizer looks at: small, without torch, each buffer as
large as what it holds.

python -m gpu.smoke [--arch 80|90] runs all of it.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from functools import partial
from pathlib import Path

import numpy as np

from gpu.record import Clock, Record, Skipped, Wrong
from halfbyte.cuda import library
from halfbyte.cuda.library import Dequantize, Finish, Format, Linear, Rows

F32, BF16, F16, I8 = 0, 1, 2, 4
N, K = 70, 336  # neither whole tiles nor whole groups of 128
TILE_N, TILE_K = 64, 128
DENSE, PAIRS, BLOCKS = range(3)  # halfbyte_cuda_pattern: all codes, two of four, blocks of 64 x 64
FORMATS = (  # bits, group, offsets, pattern
    (4, 128, 0, DENSE), (4, 32, 1, DENSE), (4, 0, 0, DENSE), (8, 0, 0, DENSE), (8, 64, 1, DENSE),
    (8, 0, 0, PAIRS), (8, 0, 0, BLOCKS),
)  # fmt: skip
SCHEDULES = ((1, 8), (2, 4), (8, 8))  # splits, warps
ROWS = (1, 9, 20)
Form = tuple[int, int, int, int]


class Host:
    """The emulated library's memory."""

    def put(self, array: np.ndarray) -> int:
        self.kept = [*getattr(self, "kept", ()), array]
        return array.ctypes.data

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        return next(array for array in self.kept if array.ctypes.data == address)

    def free(self) -> None:
        self.kept = []


class Gpu:
    """Memory of the CUDA runtime."""

    def __init__(self) -> None:
        self.runtime = ctypes.CDLL(_runtime())
        self.kept: list[ctypes.c_void_p] = []

    def _check(self, code: int, what: str) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code} in {what}")

    def put(self, array: np.ndarray) -> int:
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(array.nbytes)
        self._check(self.runtime.cudaMalloc(ctypes.byref(address), size), "cudaMalloc")
        self.kept.append(address)
        self._copy(address, ctypes.c_void_p(array.ctypes.data), array.nbytes, 1)
        return address.value

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """Waits for everything before; a kernel's fault shows here."""
        self._check(self.runtime.cudaDeviceSynchronize(), "a kernel")
        array = np.empty_like(like)
        self._copy(ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(address), array.nbytes, 2)
        return array

    def _copy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, nbytes: int, kind: int) -> None:
        self._check(self.runtime.cudaMemcpy(to, source, ctypes.c_size_t(nbytes), kind), "cudaMemcpy")

    def free(self) -> None:
        for address in self.kept:
            self._check(self.runtime.cudaFree(address), "cudaFree")
        self.kept = []


def _runtime() -> str:
    """libcudart: of the toolkit, or of torch's wheels."""
    if found := find_library("cudart"):
        return found
    places = [Path(path) / "nvidia" for path in sys.path] + [Path("/usr/local")]
    for place in places:
        if found := next(place.glob("cu*/lib*/libcudart.so*"), None):
            return str(found)
    raise OSError("no libcudart")


class Weight:
    """Random codes packed by the library's own account of its layout, and their float64 values."""

    starts = columns = None

    def __init__(self, lib: library.Library, form: Format, rng: np.random.Generator) -> None:
        wide = form.bits == 8
        codes = rng.integers(-127 if wide else 0, 128 if wide else 16, (N, K))
        self.scale = (0.01 + 0.01 * rng.random(N)).astype(np.float32)
        if form.pattern == DENSE:
            values = self._dense(lib, form, codes, rng)
        else:
            values = (self._pairs if form.pattern == PAIRS else self._blocks)(lib, codes, rng)
        exact = wide and not form.group
        self.total = values.sum(1).astype(np.int32 if exact else np.float32)
        self.values = values * self.scale[:, None].astype(np.float64)

    def _pairs(self, lib: library.Library, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        form = Format(8, 0, 4, 0, PAIRS)
        self.packed = np.zeros(lib.weight_bytes(ctypes.byref(form), N, K), np.uint8)
        rows, depth = -(-N // TILE_N) * TILE_N, -(-K // TILE_K) * TILE_K
        kept = np.zeros((rows, depth), np.int64)
        for n, k in itertools.product(range(rows), range(0, depth, 4)):
            for index, place in enumerate(sorted(rng.choice(4, 2, replace=False))):
                byte, shift = divmod(lib.quad_bit(n, k, depth, index, 1), 8)
                self.packed[byte] |= place << shift
                if n < N and k + place < K:
                    kept[n, k + place] = codes[n, k + place]
                    self.packed[lib.quad_bit(n, k, depth, index, 0) // 8] = kept[n, k + place] & 255
        return kept[:N, :K].astype(np.float64)

    def _blocks(self, lib: library.Library, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Every other block, laid out as a dense weight of half a tile."""
        form, depth = Format(8, 0, 4, 0, DENSE), -(-K // TILE_N)
        starts, columns, tiles = [0], [], []
        kept = np.zeros((N, K), np.int64)
        for row in range(-(-N // TILE_N)):
            for column in range(row % 2, depth, 2):
                tile = np.zeros(TILE_N * TILE_N, np.uint8)
                for n, k in itertools.product(range(TILE_N), repeat=2):
                    at = row * TILE_N + n, column * TILE_N + k
                    if at[0] < N and at[1] < K:
                        kept[at] = codes[at]
                        tile[lib.code_bit(ctypes.byref(form), n, k, TILE_N) // 8] = codes[at] & 255
                tiles.append(tile)
                columns.append(column)
            starts.append(len(columns))
        self.packed = np.concatenate(tiles)
        self.starts, self.columns = np.array(starts, np.int32), np.array(columns, np.int32)
        return kept.astype(np.float64)

    def _dense(
        self, lib: library.Library, form: Format, codes: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        wide = form.bits == 8
        groups = -(-K // form.group) if form.group else 1
        scales = (0.5 + 0.5 * rng.random((N, groups))).astype(np.float16)
        offsets = rng.standard_normal((N, groups)).astype(np.float32)
        size = lib.weight_bytes(ctypes.byref(form), N, K)
        self.packed = np.zeros(size, np.uint8)
        if not wide:  # padding has the code 0, which is stored as 8
            tile = lib.weight_bytes(ctypes.byref(form), 1, 1)
            self.packed.reshape(-1, tile)[:, : TILE_N * TILE_K // 2] = 0x88
        for n, k in itertools.product(range(N), range(K)):
            byte, shift = divmod(lib.code_bit(ctypes.byref(form), n, k, K), 8)
            if wide:
                self.packed[byte] = codes[n, k] & 255
            else:
                self.packed[byte] = self.packed[byte] & (0xF0 >> shift) | codes[n, k] << shift
        for n, g in itertools.product(range(N), range(groups) if form.group else ()):
            for offset in range(1 + form.offsets):
                byte = lib.scale_byte(ctypes.byref(form), n, g * form.group, K, offset)
                value = (offsets if offset else scales)[n, g].tobytes()
                self.packed[byte : byte + len(value)] = np.frombuffer(value, np.uint8)
        values = codes.astype(np.float64) - (0 if wide else 8)
        if form.group:
            each = np.repeat(np.arange(groups), form.group)[:K]
            values = values * scales.astype(np.float64)[:, each]
            values = values + (offsets[:, each] if form.offsets else 0)
        return values


def to_bf16(v: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, as uint16."""
    bits = v.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(v: np.ndarray) -> np.ndarray:
    return (v.astype(np.uint32) << 16).view(np.float32)


def cases(archs: tuple[int, ...]) -> Iterator[tuple[str, Callable]]:
    """Names and functions of (library, memory), each of which returns an error that must be below 1e-4."""
    yield "rows", rows
    yield "finish", finish
    for form in FORMATS:
        if form[3] == DENSE:
            yield f"dequantize {_name(form)}", partial(dequantize, form)
    for arch, form, x_type in itertools.product(archs, FORMATS, (F16, BF16, I8)):
        name = ("", "bfloat16", "float16", "", "codes")[x_type]
        if form[3] == DENSE or x_type == I8:
            yield f"sm{arch} {_name(form)} {name}", partial(linear, arch, form, x_type)


def _name(form: Form) -> str:
    bits, group, offsets, pattern = form
    parts = [f"{bits} bits", f"groups of {group}" if group else "", "offsets" if offsets else ""]
    return ", ".join(filter(None, [*parts, ("", "two of four", "blocks")[pattern]]))


def _format(form: Form) -> Format:
    bits, group, offsets, pattern = form
    return Format(bits, group, 2, offsets, pattern)


def linear(arch: int, form: Form, x_type: int, lib: library.Library, memory: Host | Gpu) -> float:
    rng, worst = np.random.default_rng(0), 0.0
    made = Weight(lib, _format(form), rng)
    places = {
        name: memory.put(part)
        for name, part in (("starts", made.starts), ("columns", made.columns))
        if part is not None
    }
    weight, scale, total = (memory.put(part) for part in (made.packed, made.scale, made.total))
    for m, (splits, warps) in itertools.product(ROWS, SCHEDULES):
        call = Linear(
            weight=weight, scale=scale, m=m, n=N, k=K, ldx=K, ldy=N, x_type=x_type, y_type=F32,
            format=_format(form), arch=arch, splits=splits, warps=warps, **places,
        )  # fmt: skip
        if x_type == I8:
            x = rng.integers(-128, 128, (m, K)).astype(np.int8)
            zero = rng.integers(-128, 128, m).astype(np.int32)
            x_scale = (0.01 * rng.random(m)).astype(np.float32)
            values = (x - zero[:, None].astype(np.float64)) * x_scale[:, None]
            call.total, call.x_scale, call.x_zero = total, memory.put(x_scale), memory.put(zero)
        else:
            floats = rng.standard_normal((m, K)).astype(np.float32)
            x = to_bf16(floats) if x_type == BF16 else floats.astype(np.float16)
            values = (from_bf16(x) if x_type == BF16 else x).astype(np.float64)
        y = np.full((m, N), np.nan, np.float32)
        call.x, call.y = memory.put(x), memory.put(y)
        size = lib.linear_workspace(ctypes.byref(call))
        if size < 0:
            raise Skipped(lib.explain(int(size)))
        workspace = np.zeros(max(size, 1), np.uint8)
        call.workspace, call.workspace_bytes = memory.put(workspace), size
        lib.check(lib.linear_run(ctypes.byref(call), 0), "linear")
        expected = values @ made.values.T
        worst = worse(worst, _difference(memory.get(call.y, y), expected))
    return worst


def dequantize(form: Form, lib: library.Library, memory: Host | Gpu) -> float:
    made = Weight(lib, _format(form), np.random.default_rng(1))
    y = np.full((N, K), np.nan, np.float16)
    call = Dequantize(
        weight=memory.put(made.packed), scale=memory.put(made.scale), y=memory.put(y), ldy=K, n=N, k=K,
        y_type=F16, format=_format(form),
    )  # fmt: skip
    lib.check(lib.dequantize_run(ctypes.byref(call), 0), "dequantize")
    return _difference(memory.get(call.y, y), made.values) / 10  # float16


def rows(lib: library.Library, memory: Host | Gpu) -> float:
    """All kinds; the codes give back x, and of x alone within half a step."""
    rng, worst = np.random.default_rng(2), 0.0
    for kind, (m, k) in itertools.product(range(4), ((3, 100), (2, 4096), (1, 20000))):
        x, other = (rng.standard_normal((m, k)).astype(np.float32) for _ in range(2))
        padded = -(-k // 16) * 16
        codes, scale, zero = np.full((m, padded), 99, np.int8), np.zeros(m, np.float32), np.zeros(m, np.int32)
        call = Rows(
            x=memory.put(x), residual=memory.put(other) if kind else None, codes=memory.put(codes),
            scale=memory.put(scale), zero=memory.put(zero), ldx=k, ld_residual=k, ldc=padded, m=m, k=k,
            k_padded=padded, x_type=F32, kind=kind, eps=1e-6,
        )  # fmt: skip
        lib.check(lib.rows_run(ctypes.byref(call), 0), "rows")
        got = memory.get(call.codes, codes)
        step = memory.get(call.scale, scale)[:, None]
        back = (got[:, :k] - memory.get(call.zero, zero)[:, None].astype(np.float64)) * step
        x, other = x.astype(np.float64), other.astype(np.float64)
        h = x + other if kind else x
        expected = (
            x, (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6),
            h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-6), x / (1 + np.exp(-x)) * other,
        )[kind]  # fmt: skip
        worst = worse(worst, float((np.abs(back - expected) - 0.5 * step).max()))
        worst = worse(worst, float(np.abs(got[:, k:].astype(np.float64)).sum()))  # padding is 0
    return worst


def finish(lib: library.Library, memory: Host | Gpu) -> float:
    rng, m = np.random.default_rng(3), 33
    acc = rng.integers(-(10**6), 10**6, (m, N)).astype(np.int32)
    x_scale, scale = rng.random(m).astype(np.float32), rng.random(N).astype(np.float32)
    zero, total = rng.integers(-9, 9, m).astype(np.int32), rng.integers(-999, 999, N).astype(np.int32)
    y = np.full((m, N), np.nan, np.float32)
    call = Finish(
        acc=memory.put(acc), x_scale=memory.put(x_scale), x_zero=memory.put(zero), scale=memory.put(scale),
        total=memory.put(total), y=memory.put(y), ld_acc=N, ldy=N, m=m, n=N, y_type=F32,
    )  # fmt: skip
    lib.check(lib.finish_run(ctypes.byref(call), 0), "finish")
    expected = (acc - zero[:, None].astype(np.float64) * total) * scale.astype(np.float64) * x_scale[:, None]
    return _difference(memory.get(call.y, y), expected)


def worse(a: float, b: float) -> float:
    """The larger error, and NaN if one of them is: max() would lose it."""
    return b if not b <= a else a


def _difference(y: np.ndarray, expected: np.ndarray) -> float:
    """NaN where an element is missing."""
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


MOST_ERROR = 1e-4
PATIENCE = 15.0


def check(record: Record, clock: Clock, phase: str, arch: int, tiny: bool) -> None:
    """One row of results per case."""
    lib, memory = library.library(), Host() if tiny else Gpu()
    jobs = [(name, partial(_checked, case, lib, memory), PATIENCE) for name, case in cases((arch,))]
    record.attempt_all(phase, jobs, clock)


def _checked(case: Callable, lib: library.Library, memory: Host | Gpu) -> dict:
    error = case(lib, memory)
    memory.free()
    if not error < MOST_ERROR:
        raise Wrong(f"error {error:.1e}")
    return {"error": error}


def main() -> None:
    """Every case; exits with 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=(80, 90))
    archs = tuple(parser.parse_args().arch or (80, 90))
    lib, memory, failed = library.library(), Gpu(), 0
    for name, case in cases(archs):
        try:
            said = _checked(case, lib, memory)
        except (Skipped, Wrong) as reason:
            said, failed = reason, failed + isinstance(reason, Wrong)
        print(f"{name}: {said}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
