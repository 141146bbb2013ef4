"""sparsegpt's calibration: blocks run by themselves give what passes through the whole model give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halfbyte.pruning import prune_, sequential
from models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def tokens(count):
    return [torch.randint(0, 10, (2, 4 + i)) for i in range(count)]


class Told(nn.Module):
    """A chain of blocks that are told something besides: `tell` says what the second one gets."""

    def __init__(self, tell):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Listener() for _ in range(3))
        self.last, self.tell = nn.Linear(16, 16), tell

    def forward(self, x):
        x = self.first(x)
        start = x
        for block in self.blocks:
            x = block(x, self.tell(start, x), scale=2.0)
        return self.last(x)


class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, other=None, scale=1.0):
        if isinstance(other, Memory):
            other = other.add(x)
        x = self.a(torch.tanh(x)) * scale
        return x + self.b(torch.tanh(x if other is None else x + other)), "more"


class Memory:
    """As caches are: what it gives depends on what was added before."""

    def __init__(self):
        self.kept = []

    def add(self, x):
        self.kept.append(x)
        return sum(self.kept)


class Chain(Told):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)[0]
        return self.last(x)


class Skips(Told):
    def forward(self, x):
        x = start = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(x + start if i == 2 else x)[0]
        return self.last(x)


class Twice(Told):
    def forward(self, x):
        x = self.first(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)[0]
        return self.last(x)


class Tells(Told):
    def forward(self, x):
        x = start = self.first(x)
        memory = Memory()
        for block in self.blocks:
            x = block(x, memory if self.tell == "memory" else self.tell(start, x), scale=2.0)[0]
        return self.last(x)


MODELS = {
    "blocks": (lambda: Chain(None), True),
    "a constant": (lambda: Tells(lambda start, x: torch.ones(16)), True),
    "what came before the blocks": (lambda: Tells(lambda start, x: start), True),
    "what the block before returned": (lambda: Tells(lambda start, x: x), False),
    "what depends on that": (lambda: Tells(lambda start, x: x.mean(0)), False),
    "a memory": (lambda: Tells("memory"), False),
    "sums between blocks": (lambda: Skips(None), False),
    "blocks called twice": (lambda: Twice(None), False),
    "layers one after another": (lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))), True),
}


def pruned_both_ways(monkeypatch, model, data, **options):
    """Weights after sparsegpt with and without chains, and whether a chain was found."""
    found, record = [], sequential._record
    monkeypatch.setattr(sequential, "_record", lambda *args: found.append(record(*args)) or found[-1])
    chained = prune_(copy.deepcopy(model), 0.5, method="sparsegpt", data=data, **options)
    monkeypatch.setattr(sequential, "_record", lambda *args: [])
    whole = prune_(model, 0.5, method="sparsegpt", data=data, **options)
    assert len(found) == 1
    weights = zip(chained.state_dict().items(), whole.state_dict().values(), strict=True)
    for (name, one), other in weights:
        assert torch.equal(one, other), name
    return bool(found[0])


@pytest.mark.parametrize("case", MODELS)
def test_blocks_by_themselves_give_the_same_weights(monkeypatch, case):
    make, is_chain = MODELS[case]
    data = [torch.randn(20, 16), torch.randn(7, 16)]
    assert pruned_both_ways(monkeypatch, make(), data) == is_chain


def test_blocks_of_a_model_with_an_embedding(monkeypatch):
    assert pruned_both_ways(monkeypatch, Model(3), tokens(3))


def test_passes_through_the_whole_model_are_few():
    model, data = Chain(None), [torch.randn(9, 16) for _ in range(4)]
    calls = {"first": 0, "blocks.0": 0, "blocks.2.b": 0}
    for name in calls:
        def count(module, args, name=name):
            calls[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)
    prune_(model, 0.5, method="sparsegpt", data=data)
    # first: to find the groups, for itself, for the chains (the first batch once more), for the last layer.
    assert calls["first"] == 4 + 4 + 5 + 4
    # blocks.0: not for the first layer, but once more to see whether it repeats, for a, for b, and to go on.
    assert calls["blocks.0"] == 4 + 5 + 1 + 3 * 4 + 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_models_of_transformers(monkeypatch, family):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48}
    if family == "llama":
        config = transformers.LlamaConfig(**sizes, **wide, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
    elif family == "gpt2":
        config = transformers.GPT2Config(**sizes, n_embd=32, n_head=4, n_layer=3, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **wide))
    else:
        config = transformers.T5Config(
            **sizes, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    data = [{"input_ids": torch.randint(3, 32, (4, 12 + i))} for i in range(3)]
    if family == "t5":
        data = [batch | {"decoder_input_ids": batch["input_ids"][:, :5]} for batch in data]
    assert model.config.use_cache or family == "bert"
    assert pruned_both_ways(monkeypatch, model, data)
    assert model.config.use_cache or family == "bert"
    rows = {row["name"]: row for row in model._halfbyte_pruning}
    assert len([row for row in rows.values() if row["action"] == "pruned"]) >= 12
    heads = [row["reason"] for name, row in rows.items() if name in ("lm_head", "classifier")]
    assert heads == ["an output head; name it in include to prune it"]
    zeros = [row["amount"] for row in rows.values() if row["action"] == "pruned"]
    assert zeros == [0.5] * len(zeros)
