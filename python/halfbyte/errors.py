"""The exceptions of halfbyte: each is a HalfbyteError and the built-in exception that one would expect."""

from __future__ import annotations


class HalfbyteError(Exception):
    """Base of every exception that halfbyte raises on purpose."""


class SchemeError(HalfbyteError, ValueError):
    """A quantization scheme that does not parse, or that no kernel runs."""


class PatternError(HalfbyteError, ValueError):
    """Zeros or indices that are not those of a sparse pattern; the message says where."""


class DTypeError(HalfbyteError, TypeError):
    """An argument of a type or dtype that the operation does not take."""


class ShapeError(HalfbyteError, ValueError):
    """An argument whose shape does not fit."""


class DeviceError(HalfbyteError, ValueError):
    """A tensor that is not dense memory of the device that is needed: another one, the meta device, a sparse
    layout.
    """


class CudaError(HalfbyteError, RuntimeError):
    """The CUDA library does not load, or a call of it failed; the message says why."""


class NonFiniteError(HalfbyteError, ValueError):
    """A NaN or an infinity where the numbers must be finite; the message names the layer and the row."""


class ModelError(HalfbyteError, ValueError):
    """A model on which the request makes no sense, such as one with nothing to quantize."""


class FormatError(HalfbyteError, ValueError):
    """A saved model that is truncated, corrupt, foreign, from a newer version, or of another model."""


class IsaError(HalfbyteError, ValueError, RuntimeError):
    """An instruction set whose name is unknown, or that this machine lacks."""
