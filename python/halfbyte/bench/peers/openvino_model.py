"""OpenVINO on a whole encoder, compiled for each shape: float32, bfloat16, and int8 as nncf makes it.

`int8_static` is nncf's post-training quantization, calibrated beforehand: no range is measured at run time.
`int8_dynamic` has int8 weights and quantizes activations at run time, which needs no data, as ours.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping

import openvino
import torch

from ..engine import fastest
from . import UnavailableError
from .models import Build, Encoder, Forward, Output
from .openvino_weights import version

_NAMES = ("input_ids", "attention_mask")
_DYNAMIC = openvino.PartialShape([-1, -1])
# Activations are quantized in groups of this many along the rows. OpenVINO 2026.4 ignores groups as long as a
# row and leaves the activations in float.
_GROUPS = (32, 128)
_TRIAL_S = 0.3  # for each candidate
_PRECISION = "INFERENCE_PRECISION_HINT"
_PRECISIONS = ("f32", "bf16")  # of what stays in float


def fp32(task: Encoder) -> Build:
    """Every operator in float32."""
    return _builds(task, _converted(task), {"float32": _precision("f32")}, "")


def bfloat16(task: Encoder) -> Build:
    """Products in bfloat16, as OpenVINO chooses by itself on machines that have it."""
    return _builds(task, _converted(task), {"bfloat16": _precision("bf16")}, "")


def int8_static(task: Encoder) -> Build:
    """nncf.quantize with its preset for transformers; the rest in float32 or bfloat16."""
    with _silent():
        import nncf

        batches = [{name: batch[name].numpy() for name in _NAMES} for batch in task.calibration()]
        quantized = nncf.quantize(
            _converted(task),
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
        )
    variants = {f"rest in {name}": _precision(name) for name in _PRECISIONS}
    return _builds(task, quantized, variants, f"nncf.quantize, {len(batches)} passages, ")


def int8_dynamic(task: Encoder) -> Build:
    """nncf.compress_weights to symmetric int8; activations are quantized by group at run time."""
    with _silent():
        import nncf

        compressed = nncf.compress_weights(_converted(task), mode=nncf.CompressWeightsMode.INT8_SYM)
    variants = {
        f"activations g{group}, rest in {name}": _precision(name)
        | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
        for group in _GROUPS
        for name in _PRECISIONS
    }
    return _builds(task, compressed, variants, "nncf.compress_weights INT8_SYM, ")


class _Encoder(torch.nn.Module):
    """The model with positional arguments and one output, which openvino.convert_model traces."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _converted(task: Encoder) -> openvino.Model:
    ids = torch.ones(2, 8, dtype=torch.int64)
    with _silent(), torch.no_grad():
        return openvino.convert_model(
            _Encoder(task.model).eval(),
            example_input=dict.fromkeys(_NAMES, ids),
            input=[(name, _DYNAMIC, openvino.Type.i64) for name in _NAMES],
        )


def _precision(name: str) -> dict[str, str]:
    return {_PRECISION: name}


def _builds(task: Encoder, model: openvino.Model, variants: Mapping[str, dict[str, str]], what: str) -> Build:
    """For each shape, the fastest of the model compiled with each of the hints."""

    def build(inputs) -> Forward:
        calls = {name: _call(model, inputs, task.threads, hints) for name, hints in variants.items()}
        chosen, tried = next(iter(calls)), ""
        if len(calls) > 1:
            chosen = fastest(
                {name: lambda call=call: call(**inputs) for name, call in calls.items()}, _TRIAL_S
            )
            tried = f", the fastest of {len(calls)}"
        return Forward(calls[chosen], f"OpenVINO {version()} {what}{chosen}{tried}; static shape")

    return build


def _call(model: openvino.Model, inputs, threads: int, hints: dict[str, str]) -> Callable[..., Output]:
    """Compile for the shape of `inputs`, for latency; inputs are shared, the output is read in place."""
    shaped = model.clone()
    shaped.reshape({name: list(inputs[name].shape) for name in _NAMES})
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
    compiled = openvino.Core().compile_model(shaped, "CPU", {**settings, **hints})
    got = compiled.get_property(_PRECISION).to_string()
    if got != hints[_PRECISION]:
        raise UnavailableError(f"runs in {got} on this CPU where {hints[_PRECISION]} was asked for")
    request = compiled.create_infer_request()
    result = Output(torch.from_numpy(request.get_output_tensor().data))

    def call(**batch) -> Output:
        for name in _NAMES:
            request.set_tensor(name, openvino.Tensor(batch[name].numpy(), shared_memory=True))
        request.infer()
        return result

    return call


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars of the conversion."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
