"""Checks of a GGUF file before the `gguf` package reads it, which trusts the counts that it finds.

Source: the format's description in ggml (docs/gguf.md), version 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from types import ModuleType

from .errors import FormatError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment says nothing else
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> bytes
_UINT32, _STRING, _ARRAY = 4, 8, 9
_DIMENSIONS = 4  # at most
_NESTING = 4  # arrays within arrays: more is no file that anybody wrote


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as GGUF files do."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def check(path: str | os.PathLike[str], gguf: ModuleType) -> None:
    """FormatError unless every count, length and offset of the file lies within it, and `gguf`, the package,
    knows the types of its tensors.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FormatError(f"{path} is empty; get the file anew")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(str(path), data, gguf).run()


class _Walk:
    def __init__(self, path: str, data: mmap.mmap, gguf: ModuleType):
        self.path, self.data, self.gguf = path, data, gguf
        self.position = 0
        self.alignment = _ALIGNMENT

    def run(self) -> None:
        if (magic := self.take(len(_MAGIC))) != _MAGIC:
            raise FormatError(f"{self.path} is no GGUF file: it starts with {magic!r}")
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
            what = "is big-endian" if swapped else f"has the GGUF version {version}"
            raise FormatError(f"{self.path} {what}; versions 2 and 3, little-endian, can be read: convert it")
        tensors, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):
            self.pair()
        found = [self.tensor() for _ in range(tensors)]
        start = -(-self.position // self.alignment) * self.alignment
        for name, offset, size in found:
            if start + offset + size > len(self.data):
                raise self.truncated(f"{name} lies at the bytes {start + offset}..{start + offset + size}")

    def truncated(self, what: str) -> FormatError:
        return FormatError(
            f"{self.path} is truncated or damaged: {what}, and the file has {len(self.data)} bytes; "
            "get it anew"
        )

    def take(self, size: int) -> bytes:
        start = self.position
        self.skip(size)
        return self.data[start : self.position]

    def skip(self, size: int) -> None:
        if self.position + size > len(self.data):
            raise self.truncated(f"the header needs {size} bytes at {self.position}")
        self.position += size

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"{self.path} is damaged: {raw[:40]!r} is no name; get it anew") from None

    def pair(self) -> None:
        key, kind = self.string(), self.number("I")
        if key == "general.alignment":
            if kind == _UINT32:
                self.alignment = self.number("I")
            if kind != _UINT32 or self.alignment < 1 or self.alignment & (self.alignment - 1):
                raise FormatError(f"{self.path} is damaged: its general.alignment is no power of two")
        else:
            self.value(key, kind, 0)

    def value(self, key: str, kind: int, depth: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and depth < _NESTING:
            kind, count = self.number("I"), self.number("Q")
            if kind in _SCALARS:
                self.skip(count * _SCALARS[kind])
            else:
                for _ in range(count):
                    self.value(key, kind, depth + 1)
        else:
            raise FormatError(f"{self.path} is damaged: {key!r} has a value of the type {kind}; get it anew")

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset and size in bytes."""
        name, dimensions = self.string(), self.number("I")
        if dimensions > _DIMENSIONS:
            raise FormatError(f"{self.path} is damaged: {name!r} has {dimensions} dimensions; get it anew")
        shape = [self.number("Q") for _ in range(dimensions)]
        if not all(shape):
            raise FormatError(f"{self.path}: the tensor {name!r} has no elements; the file is damaged")
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, size = self.gguf.GGML_QUANT_SIZES[self.gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise FormatError(
                f"{self.path}: the tensor {name!r} is of the type number {kind}, which the installed gguf "
                "package does not know; upgrade it, or get the model as Q4_0, Q4_1 or Q8_0"
            ) from None
        if shape and shape[0] % block:
            raise FormatError(f"{self.path} is damaged: rows of {name!r} are no whole blocks; get it anew")
        return name, offset, math.prod(shape) // block * size
