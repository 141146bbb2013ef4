"""llama.cpp on a GGUF file, through the low-level functions of the package llama-cpp-python.

A decode step is one llama_decode and numpy's argmax of the last token's logits, read where llama.cpp keeps
them: none of the package's own sampling or copying of logits.
"""

import ctypes
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from ..engine import fastest
from . import UnavailableError

# The file type that llama.cpp's own quantizer makes from the given file first; None: the file as it is.
FILE_TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "file": None,
}
_FLASH = {
    "flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "no flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_UBATCHES = (256, 512)  # tokens that are computed together; 512 is llama.cpp's default
_TRIAL_S = 1.0
_REPACKED = re.compile(r"CPU_REPACK model buffer size = +([\d.]+ \w+)")
_log: list[str] = []


@llama_cpp.llama_log_callback
def _keep_log(level, text, user_data):  # noqa: ARG001 (the C signature)
    _log.append(text.decode(errors="replace"))


class Model:
    """A GGUF file in memory, quantized by llama.cpp first where `kind` says so."""

    def __init__(self, path: Path, kind: str):
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(None))
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:  # the loaded file stays mapped
            if (file_type := FILE_TYPES[kind]) is not None:
                path = _quantize(path, Path(folder, f"{kind}.gguf"), file_type)
            _log.clear()
            self.model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params()
            )
        if not self.model:
            raise UnavailableError(f"llama.cpp cannot load {path.name}: {_last_words()}")
        repacked = _REPACKED.search("".join(_log))
        self.repacked = repacked[1] if repacked else "nothing"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def __del__(self):
        if getattr(self, "model", None):
            llama_cpp.llama_model_free(self.model)

    @property
    def weight_bytes(self) -> int:
        """Of all tensors in the file's types, without what is repacked beside them."""
        return llama_cpp.llama_model_size(self.model)

    def describe(self) -> str:
        """Model, file type, version and how its kernels get the weights."""
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self.model, text, len(text))
        how = f"{self.repacked} interleaved for its kernels"
        return f"llama-cpp-python {llama_cpp.__version__}, {text.value.decode()}, {how}"


class Context:
    """A key-value cache for at most `tokens` tokens, and what is computed with it."""

    def __init__(self, model: Model, tokens: int, threads: int, flash: str, ubatch: int):
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = tokens
        settings.n_ubatch = ubatch
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = _FLASH[flash]
        self.model = model  # which its context needs alive
        self.context = llama_cpp.llama_init_from_model(model.model, settings)
        if not self.context:
            raise UnavailableError(f"llama.cpp made no context, {flash}: {_last_words()}")
        self.memory = llama_cpp.llama_get_memory(self.context)

    def __del__(self):
        if getattr(self, "context", None):
            llama_cpp.llama_free(self.context)

    def crop(self, tokens: int) -> None:
        """Forget everything after the first `tokens` tokens."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, tokens, -1)

    def append(self, ids: Sequence[int]) -> int:
        """Run `ids` after what the cache holds: the likeliest next token."""
        # This batch has positions from the cache's end on and asks for the logits of its last token only.
        array = (llama_cpp.llama_token * len(ids))(*ids)
        self._decode(llama_cpp.llama_batch_get_one(array, len(ids)))
        return int(self._logits(-1, 1).argmax())

    def loss(self, ids: Sequence[int]) -> float:
        """Mean negative log-likelihood, in nats, of the tokens after the first; empties the cache."""
        self.crop(0)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            self._decode(batch)
            logits = self._logits(0, len(ids))[:-1].astype(np.float64)
        finally:
            llama_cpp.llama_batch_free(batch)
            self.crop(0)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), list(ids[1:])]
        return float((np.log(np.exp(logits).sum(axis=1)) - chosen).mean())

    def _decode(self, batch) -> None:
        if (status := llama_cpp.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}: {_last_words()}")

    def _logits(self, first: int, rows: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, first)
        return np.ctypeslib.as_array(pointer, (rows, self.model.vocabulary))


class Prefill:
    """Seconds to run the prompt and find the next token, by the fastest context."""

    def __init__(self, name: str, contexts: Mapping[str, Context], ids: Sequence[int]):
        self.name, self.ids = f"prefill {name}", ids
        self.chosen = fastest({how: lambda c=c: self._run(c) for how, c in contexts.items()}, _TRIAL_S)
        self.context = contexts[self.chosen]

    def _run(self, context: Context) -> None:
        context.crop(0)
        context.append(self.ids)

    def sample(self) -> float:
        start = time.perf_counter()
        self._run(self.context)
        return time.perf_counter() - start


class Decode:
    """Seconds for `tokens` tokens after the prompt, one at a time, by the fastest context."""

    def __init__(self, name: str, contexts: Mapping[str, Context], ids: Sequence[int], tokens: int):
        self.name, self.ids, self.tokens = f"decode {name}", ids, tokens
        for context in contexts.values():
            self._prefill(context)
        token = ids[-1]
        self.chosen = fastest({how: lambda c=c: self._one(c, token) for how, c in contexts.items()}, _TRIAL_S)
        self.context = contexts[self.chosen]

    def _prefill(self, context: Context) -> int:
        context.crop(0)
        return context.append(self.ids)

    def _one(self, context: Context, token: int) -> None:
        context.append([token])
        context.crop(len(self.ids))

    def sample(self) -> float:
        token = self._prefill(self.context)  # others use the context, too
        start = time.perf_counter()
        for _ in range(self.tokens):
            token = self.context.append([token])
        return time.perf_counter() - start


def contexts(model: Model, tokens: int, threads: int) -> dict[str, Context]:
    """Every way to run the model that may be the fastest, for at most `tokens` tokens."""
    return {
        f"{flash}, ubatch {ubatch}": Context(model, tokens, threads, flash, ubatch)
        for flash in _FLASH
        for ubatch in _UBATCHES
    }


def _quantize(source: Path, target: Path, file_type: int) -> Path:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = file_type
    settings.allow_requantize = True  # a quantized file stands for the numbers that it holds
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings) != 0:
        raise UnavailableError(f"llama.cpp cannot quantize {source.name}: {_last_words()}")
    return target


def _last_words() -> str:
    return next((line.strip() for line in reversed(_log) if line.strip()), "it does not say why")
