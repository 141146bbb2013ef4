"""The saved form of a model: halfbyte.json, which names a safetensors file and says what its tensors mean.

    {"format": "halfbyte", "version": 3, "halfbyte_version": "0.1.0",
     "weights": {"file": "model-<16 hex digits>.safetensors", "bytes": 123, "sha256": "..."},
     "layers": {"encoder.0": {"kind": "linear", "scheme": "w8a8", "in": 384, "out": 1536, "bias": true,
                              "static": false, "activation": "none"}},
     "aliases": {"decoder.weight_codes": "encoder.0.weight_codes"},
     "floats": {"head": "excluded"}}

`layers` are the quantized and sparse ones, of the kind "linear", "embedding" (whose `in` is the length of a
row, and `out` the number of rows) or "sparse" (with a scheme such as "w8a8+2:4"). Version 1 has linear layers
only, and no "kind"; version 2, which is still written where it will do, has no sparse layers. `aliases` are
names of tensors that are stored under another name; `floats` says why other layers stayed float. The weights'
file is named by its content, so that replacing halfbyte.json alone replaces the model: whole, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import _core
from .errors import FormatError
from .ops import ACTIVATIONS
from .scheme import Scheme
from .sparse.scheme import SparseScheme

FILE = "halfbyte.json"
FORMAT = "halfbyte"
VERSION = 3
KINDS = {1: ("linear",), 2: ("linear", "embedding"), 3: ("linear", "embedding", "sparse")}  # by version
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.halfbyte-[0-9a-f]{16}\.tmp")
_STALE_SECONDS = 3600  # no save is at work on a file that has not changed for so long


@dataclass(frozen=True)
class LayerEntry:
    """One quantized or sparse layer: `in_` features, `out` channels, and what its buffers are."""

    kind: str  # of KINDS
    scheme: Scheme | SparseScheme
    in_: int
    out: int
    bias: bool
    static: bool
    activation: str


@dataclass(frozen=True)
class Manifest:
    """A halfbyte.json that has been checked, and where it was found."""

    directory: Path
    halfbyte_version: str
    file: str
    nbytes: int
    sha256: str
    layers: dict[str, LayerEntry]
    aliases: dict[str, str]
    floats: dict[str, str]

    @property
    def weights(self) -> Path:
        """Path of the safetensors file."""
        return self.directory / self.file


def read(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a saved model. FormatError where it is missing, damaged, foreign, or from a newer
    version.
    """
    directory = Path(directory)
    path = directory / FILE
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"{directory} is no saved model: it has no {FILE}; give the directory that halfbyte.save wrote"
        ) from None
    except NotADirectoryError:
        raise FormatError(f"{directory} is a file; give the directory that halfbyte.save wrote") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is truncated or damaged ({error}); save the model again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f'{path} was not written by halfbyte: it has no "format": "{FORMAT}"')
    if type(version := data.get("version")) is not int or version < 1:
        raise FormatError(f"{path}: version {version!r} is none; the file is damaged, save the model again")
    if version > VERSION:
        raise FormatError(
            f"{path} has the format version {version}, written by halfbyte "
            f"{data.get('halfbyte_version')}; this one reads up to {VERSION}: upgrade halfbyte"
        )
    try:
        return _parse(directory, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{path} is damaged ({what}); save the model again") from None


def _parse(directory: Path, data: dict) -> Manifest:
    def field(table: dict, key: str, kind: type) -> object:
        if type(value := table[key]) is not kind:
            raise ValueError(f"{key!r} is {value!r}, not {kind.__name__}")
        return value

    weights = field(data, "weights", dict)
    file = field(weights, "file", str)
    if not _WEIGHTS.fullmatch(file):
        raise ValueError(f"{file!r} is no name of a weights' file")
    layers = {}
    for name, entry in field(data, "layers", dict).items():
        kind = "linear" if data["version"] == 1 else field(entry, "kind", str)
        layer = LayerEntry(
            kind,
            (SparseScheme if kind == "sparse" else Scheme).parse(field(entry, "scheme", str)),
            field(entry, "in", int),
            field(entry, "out", int),
            field(entry, "bias", bool),
            field(entry, "static", bool),
            field(entry, "activation", str),
        )
        if layer.activation not in ACTIVATIONS:
            raise ValueError(f"the activation {layer.activation!r} of {name!r} is unknown")
        if layer.kind not in KINDS[data["version"]]:
            raise ValueError(f"the kind {layer.kind!r} of {name!r} is unknown")
        if layer.static and not layer.scheme.per_token:
            raise ValueError(f"{name!r} has a static scale, and the scheme {layer.scheme} has no use for one")
        if layer.kind == "embedding" and (layer.bias or layer.static or layer.activation != "none"):
            raise ValueError(f"the embedding {name!r} has a bias, an activation or a static scale")
        layers[name] = layer
    names = {key: field(data, key, dict) for key in ("aliases", "floats")}
    for table in names.values():
        for name in table:
            field(table, name, str)
    return Manifest(
        directory,
        field(data, "halfbyte_version", str),
        file,
        field(weights, "bytes", int),
        field(weights, "sha256", str),
        layers,
        **names,
    )


def check_weights(manifest: Manifest) -> None:
    """FormatError unless the weights' file is there and holds, byte for byte, what was saved."""
    path = manifest.weights
    try:
        size = path.stat().st_size
        if size != manifest.nbytes:
            raise FormatError(
                f"{path} has {size} bytes instead of {manifest.nbytes}: it is truncated or was replaced; "
                "copy it again, or save the model again"
            )
        digest = _sha256(path)
    except OSError as error:
        raise FormatError(
            f"{path}, which {FILE} names, cannot be read ({error.strerror}); copy the whole directory, "
            "or save the model again"
        ) from None
    if digest != manifest.sha256:
        raise FormatError(
            f"{path} is corrupt: its SHA-256 is not the one in {FILE}; copy it again, or save the model again"
        )


@contextlib.contextmanager
def replacing(
    directory: str | os.PathLike[str],
    layers: dict[str, LayerEntry],
    aliases: dict[str, str],
    floats: dict[str, str],
) -> Iterator[Path]:
    """Within the block, write the weights to the path given; at its end they become the model in `directory`.

    After an error, or a crash at any moment, the directory holds the model that it held before. Where several
    save at once, the last one wins.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _temporary(directory) as weights, _temporary(directory) as text:
        yield weights
        digest = _sha256(weights)
        file = f"model-{digest[:16]}.safetensors"
        text.write_text(
            json.dumps(
                {
                    "format": FORMAT,
                    "version": 3 if any(layer.kind == "sparse" for layer in layers.values()) else 2,
                    "halfbyte_version": _core.build_info()["version"],
                    "weights": {"file": file, "bytes": weights.stat().st_size, "sha256": digest},
                    "layers": {name: _entry(layer) for name, layer in layers.items()},
                    "aliases": aliases,
                    "floats": floats,
                },
                indent=1,
            )
            + "\n"
        )
        weights.chmod(text.stat().st_mode)  # safetensors lets nobody else read what it writes
        _to_disk(weights)
        _to_disk(text)
        with _locked(directory):  # or another save could remove these weights before their JSON is there
            os.replace(weights, directory / file)
            _to_disk(directory)
            os.replace(text, directory / FILE)
            _to_disk(directory)
            _sweep(directory, file)


def _sweep(directory: Path, file: str) -> None:
    """Remove the weights that were replaced, and what crashed saves left behind."""
    for old in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the temporary file of a save that ended just now
            if _WEIGHTS.fullmatch(old.name) and old.name != file:
                old.unlink()
            elif _TEMPORARY.fullmatch(old.name) and time.time() - old.stat().st_mtime > _STALE_SECONDS:
                old.unlink()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """No other process or thread is in such a block for the same directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: saves must not overlap there
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _entry(layer: LayerEntry) -> dict:
    return {key.rstrip("_"): value for key, value in asdict(layer).items()} | {"scheme": str(layer.scheme)}


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    path = directory / f".halfbyte-{secrets.token_hex(8)}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
