"""What tests ask of a pruned model: its zeros, its report, and that a failure left no trace."""

from __future__ import annotations

import torch

from halfbyte.pruning import sparsity


def loss_fn(model, batch):
    return model(batch).square().mean()


def zeros(model):
    return {layer.name: layer.zeros for layer in sparsity(model).layers}


def actions(model):
    return {row["name"]: (row["action"], row["reason"]) for row in model._halfbyte_pruning}


def photograph(model):
    """All that prune_ might touch."""
    modules = [
        (name, id(m), m.training, {k: id(v) for k, v in vars(m).items()}, *map(list, hooks_of(m)))
        for name, m in model.named_modules()
    ]
    values = {name: t.detach().clone() for name, t in model.state_dict().items()}
    grads = [(id(p), id(p.grad), p.requires_grad) for p in model.parameters()]
    return modules, values, grads, torch.get_rng_state()


def hooks_of(module):
    hooks = module._forward_pre_hooks.items(), module._forward_hooks.items()
    return [*hooks, module._buffers, module._parameters]


def assert_same(model, before):
    after = photograph(model)
    assert after[0] == before[0] and after[2] == before[2] and torch.equal(after[3], before[3])
    assert list(after[1]) == list(before[1])
    for name, value in after[1].items():
        if not value.is_meta:
            assert torch.equal(value.nan_to_num(99), before[1][name].nan_to_num(99)), name
