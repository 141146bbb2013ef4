"""`halfbyte inspect DIR`: what a saved model holds, checked and read without building it or torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import manifest
from ..errors import FormatError
from ..tables import mebibytes, text_table

_BUFFERS = (
    "weight_codes", "weight_scale", "weight_group_scale", "weight_zero", "weight_minimum", "weight_values",
    "weight_crow", "weight_columns", "weight_positions", "bias", "input_scale", "input_zero",
)  # fmt: skip
_FLOAT_BYTES = 4  # the layers were float32 before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `halfbyte inspect`."""
    parser.add_argument("directory", type=Path, help="a directory written by halfbyte.save")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Check the files and print what they hold; a damaged one is an error."""
    found = examine(args.directory)
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def examine(directory: Path) -> dict:
    """The manifest and the sizes of the tensors, as plain JSON values; FormatError for damaged files."""
    saved = manifest.read(directory)
    manifest.check_weights(saved)
    tensors = _tensor_bytes(saved.weights)
    layers = []
    for name, entry in saved.layers.items():
        prefix = f"{name}." if name else ""
        weight = "weight_values" if entry.kind == "sparse" else "weight_codes"
        shared = prefix + weight in saved.aliases  # its bytes count where they are stored
        own_bias = _FLOAT_BYTES * entry.out * (entry.bias and f"{prefix}bias" not in saved.aliases)
        layers.append(
            {
                "name": name,
                "kind": entry.kind,
                "in": entry.in_,
                "out": entry.out,
                "scheme": str(entry.scheme),
                "bias": entry.bias,
                "activation": entry.activation,
                "static": entry.static,
                "input_codes": _input_codes(entry),
                "bytes": sum(tensors.get(prefix + buffer, 0) for buffer in _BUFFERS),
                "float_bytes": _FLOAT_BYTES * entry.out * (0 if shared else entry.in_) + own_bias,
            }
        )
    return {
        "directory": str(directory),
        "halfbyte_version": saved.halfbyte_version,
        "file": saved.file,
        "bytes": saved.nbytes,
        "sha256": saved.sha256,
        "layers": layers,
        "tensors": len(tensors),
        "shared": saved.aliases,
    }


def _shape(layer: dict) -> str:
    if layer["kind"] == "embedding":
        return f"{layer['out']} rows of {layer['in']}"
    return f"{layer['in']} -> {layer['out']}"


def _input_codes(entry: manifest.LayerEntry) -> str:
    """How the activations get their scales."""
    if entry.kind == "embedding":
        return "-"
    if entry.static:
        return "fixed scale"
    if entry.scheme.per_token:
        return "per token"
    return "none" if entry.kind == "sparse" else f"per token and {entry.scheme.fold_group} features"


def _tensor_bytes(path: Path) -> dict[str, int]:
    """Tensor name -> bytes, from the header of a safetensors file: a 64-bit length, then JSON."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return {
            name: end - begin for name, (begin, end) in ((n, e["data_offsets"]) for n, e in header.items())
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is no safetensors file ({error}); save the model again") from None


def _text(found: dict) -> str:
    layers = found["layers"]
    rows = [
        [
            layer["name"] or "(the model)",
            _shape(layer),
            layer["scheme"],
            "bias" if layer["bias"] else "-",
            layer["activation"],
            layer["input_codes"],
            mebibytes(layer["bytes"]),
        ]
        for layer in layers
    ]
    kinds = "quantized or sparse" if any(x["kind"] == "sparse" for x in layers) else "quantized"
    quantized, before = (sum(layer[key] for layer in layers) for key in ("bytes", "float_bytes"))
    return "\n\n".join(
        [
            f"{found['directory']}: written by halfbyte {found['halfbyte_version']}\n"
            f"{found['file']}: {mebibytes(found['bytes'])}, {found['tensors']} tensors, SHA-256 as saved",
            text_table(["layer", "in -> out", "scheme", "bias", "activation", "input codes", "size"], rows),
            f"{len(layers)} {kinds} layers: {mebibytes(quantized)}, as float32 {mebibytes(before)}; "
            f"the rest of the file {mebibytes(found['bytes'] - quantized)}; "
            f"{len(found['shared'])} names share a tensor.",
        ]
    )
