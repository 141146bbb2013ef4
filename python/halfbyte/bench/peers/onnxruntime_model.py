"""onnxruntime on a whole BERT encoder, in float32 and in dynamic int8, exported for each shape.

Both take the faster of two graphs: the exported one, which the session fuses as it sees fit, and what
onnxruntime.transformers makes of it. The latter recognizes attention, SkipLayerNormalization and BiasGelu by
the operators that BERT had when it was written. transformers computes the mask and the scaling of scores in
another order today, so that attention would stay a dozen operators; `_Encoder` runs the model's own modules
in the order that is recognized.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

from ..engine import fastest
from . import UnavailableError
from .models import Build, Encoder, Forward, Output
from .onnxruntime_int8 import session_options

_OPSET = 17  # has LayerNormalization; read by every onnxruntime since 1.12
_MASKED = -10000.0  # added to the scores of padding; the optimizer looks for it
_NAMES = ("input_ids", "attention_mask")
_TRIAL_S = 0.3  # for each candidate
_FLOAT = 1  # onnx.TensorProto.FLOAT: what the outputs of fused operators are, which have no shape inference
_PLAIN, _FUSED = "the session", "onnxruntime.transformers"


def fp32(task: Encoder) -> Build:
    """float32."""
    return lambda inputs: _build(task, inputs, lambda source, target: source, "float32")


def int8(task: Encoder) -> Build:
    """quantize_dynamic with per-channel int8 weights."""
    return lambda inputs: _build(task, inputs, _quantized, "quantize_dynamic, per-channel int8 weights")


class _Encoder(torch.nn.Module):
    """last_hidden_state of a transformers BertModel, in the operators that the optimizer recognizes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        if (kind := model.config.model_type) != "bert":
            raise UnavailableError(f"written for BERT; the model is {kind!r}")

    def forward(self, input_ids, attention_mask):
        heads = self.model.config.num_attention_heads
        batch, tokens = input_ids.shape
        mask = (1.0 - attention_mask[:, None, None, :].float()) * _MASKED
        embeddings = self.model.embeddings
        x = embeddings.word_embeddings(input_ids)
        x = x + embeddings.token_type_embeddings(torch.zeros_like(input_ids))
        x = embeddings.LayerNorm(x + embeddings.position_embeddings(torch.arange(tokens)[None]))
        for layer in self.model.encoder.layer:
            attention = layer.attention
            q, k, v = (
                project(x).view(batch, tokens, heads, -1).permute(0, 2, 1, 3)
                for project in (attention.self.query, attention.self.key, attention.self.value)
            )
            scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + mask
            mixed = torch.matmul(torch.softmax(scores, -1), v).permute(0, 2, 1, 3).contiguous()
            mixed = attention.output.dense(mixed.view(batch, tokens, -1))
            x = attention.output.LayerNorm(mixed + x)
            wide = torch.nn.functional.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(layer.output.dense(wide) + x)
        return x


def _build(task: Encoder, inputs, convert, what: str) -> Forward:
    """The fastest of the two graphs for this shape, each through `convert(source, target) -> path`."""
    with tempfile.TemporaryDirectory() as folder, _silent():
        plain, fused = Path(folder, "plain.onnx"), Path(folder, "fused.onnx")
        _export(task.model, inputs, plain)
        config, options = task.model.config, FusionOptions("bert")
        optimized = optimize_model(
            str(plain), "bert", config.num_attention_heads, config.hidden_size, options, opt_level=0
        )
        if not (found := optimized.get_fused_operator_statistics())["Attention"]:
            raise UnavailableError(f"its optimizer found no attention to fuse, only {found}")
        optimized.save_model_to_file(str(fused))
        paths = {
            name: convert(path, path.with_suffix(".converted"))
            for name, path in ((_PLAIN, plain), (_FUSED, fused))
        }
        calls = {name: _session_call(path, inputs, task.threads) for name, path in paths.items()}
    chosen = fastest({name: lambda call=call: call(**inputs) for name, call in calls.items()}, _TRIAL_S)
    how = f"{what}, fused by {chosen} (the faster of {' and '.join(calls)}), static shape, I/O binding"
    return Forward(calls[chosen], f"onnxruntime {onnxruntime.__version__} {how}")


def _export(model, inputs, path: Path) -> None:
    with torch.no_grad():
        torch.onnx.export(
            _Encoder(model).eval(), tuple(inputs[name] for name in _NAMES), str(path),
            input_names=_NAMES, output_names=["y"], opset_version=_OPSET, dynamo=False,
        )  # fmt: skip


def _quantized(source: Path, target: Path) -> Path:
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": _FLOAT},
    )
    return target


def _session_call(path: Path, inputs, threads: int):
    """A forward pass of a graph; inputs are bound where they lie, the output to one buffer."""
    session = onnxruntime.InferenceSession(
        path.read_bytes(), session_options(threads), providers=["CPUExecutionProvider"]
    )
    (output,) = session.get_outputs()
    y = np.empty((*inputs["input_ids"].shape, output.shape[-1]), np.float32)
    result = Output(torch.from_numpy(y))
    binding = session.io_binding()
    binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(y))
    names = [value.name for value in session.get_inputs()]

    def call(**batch) -> Output:
        for name in names:
            binding.bind_cpu_input(name, batch[name].numpy())
        session.run_with_iobinding(binding)
        return result

    return call


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter and the quantizer print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
