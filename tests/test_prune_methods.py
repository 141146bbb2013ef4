"""The methods of prune_ against their published formulas, written out; what a trained model loses by each."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from halfbyte.pruning import prune_
from halfbyte.pruning.inputs import call
from halfbyte.pruning.layers import Choice, find
from halfbyte.pruning.sequential import Passes, group_by_input, second_moment
from halfbyte.pruning.sparsegpt import inverse_factor, prune_weight
from halfbyte.sparse.pattern import PRUNED, Pattern
from models import Model
from pruned import loss_fn

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def tokens(count):
    return [torch.randint(0, 10, (4, 6)) for _ in range(count)]


def inputs_of(model, name, batches):
    """The rows that a layer was fed, stacked."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def lowest_of(scores, count):
    """The positions of the lowest `count` of a list, of equal ones the first."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def test_taylor_is_the_mean_of_the_absolute_products():
    model, batches = Model(1), tokens(5)
    twin = copy.deepcopy(model)
    prune_(model, 0.4, method="taylor", data=batches, loss_fn=loss_fn, include="blocks.*")
    weight = twin.blocks[0].down.weight
    total = torch.zeros_like(weight)
    signed = torch.zeros_like(weight)
    for batch in batches:
        twin.zero_grad()
        loss_fn(twin, batch).backward()
        total += (weight * weight.grad).abs().detach() / 5
        signed += (weight * weight.grad).detach() / 5
    gone = lowest_of(total.flatten().tolist(), math.floor(0.4 * weight.numel()))
    mask = model.blocks[0].down.weight_mask.flatten()
    assert gone == set((mask == 0).nonzero().flatten().tolist())
    assert gone != lowest_of(signed.flatten().tolist(), len(gone)), "the signed product would do as well"
    assert gone != lowest_of(signed.abs().flatten().tolist(), len(gone))


def test_taylor_takes_tied_layers_and_masks_together():
    model, batches = Model(2), tokens(2)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    prune_(model, 0.1, include="blocks.0.up,blocks.1.up".split(","))
    twin, first = copy.deepcopy(model), model.blocks[0].up.weight_mask.clone()
    prune_(model, 0.3, method="taylor", data=batches, loss_fn=loss_fn, include=["*.up"])
    total = 0
    for batch in batches:
        twin.zero_grad()
        loss_fn(twin, batch).backward()
        up = twin.blocks[0].up
        total = total + (up.weight_orig * up.weight_mask * up.weight_orig.grad).abs().detach()
    ranked = total.masked_fill(first == 0, -1)
    gone = lowest_of(ranked.flatten().tolist(), math.floor(0.3 * first.numel()))
    assert gone == set((model.blocks[1].up.weight_mask.flatten() == 0).nonzero().flatten().tolist())


def test_wanda_compares_within_each_row():
    model, batches = Model(1), tokens(3)
    x = inputs_of(model, "blocks.0.down", batches)
    weight = model.blocks[0].down.weight.detach().clone()
    prune_(model, 0.25, method="wanda", data=batches)
    norms = [math.sqrt(sum(v * v for v in column)) for column in x.t().tolist()]
    mask = model.blocks[0].down.weight_mask
    for row, kept in zip(weight.tolist(), mask.tolist(), strict=True):
        gone = lowest_of([abs(w) * n for w, n in zip(row, norms, strict=True)], 8)
        assert gone == {i for i, keep in enumerate(kept) if not keep}
    assert not torch.equal(mask, Pattern.parse("unstructured").select(weight.abs(), 0.25).float())


def test_wanda_in_groups_and_over_the_model():
    model, batches = Model(1), tokens(3)
    norms = {n: inputs_of(model, n, batches).norm(dim=0) for n in ("blocks.0.up", "blocks.0.down", "head")}
    scores = {n: model.get_submodule(n).weight.detach().abs() * norm for n, norm in norms.items()}
    grouped = prune_(copy.deepcopy(model), method="wanda", pattern="2:4", data=batches)
    for name, score in scores.items():
        best = torch.zeros_like(score).reshape(-1, 4)
        best.scatter_(1, score.reshape(-1, 4).topk(2).indices, 1.0)
        assert torch.equal(grouped.get_submodule(name).weight_mask, best.reshape(score.shape))
    prune_(model, 0.6, method="wanda", scope="global", data=batches)
    flat = torch.cat([score.flatten() for score in scores.values()])
    limit = flat.sort().values[math.floor(0.6 * len(flat))]
    for name, score in scores.items():
        assert torch.equal(model.get_submodule(name).weight_mask == 1, score >= limit)


def test_a_remainder_of_wanda_is_one_weight_of_some_rows():
    layer = nn.Linear(10, 7)
    prune_(layer, 0.25, method="wanda", data=[torch.randn(20, 10)])
    counts = (layer.weight_mask == 0).sum(1).tolist()
    assert sum(counts) == 17 and sorted(counts) == [2] * 4 + [3] * 3


def test_blocks_go_by_the_norm_or_the_sum_of_their_weights():
    layer = nn.Linear(8, 32)
    norms = torch.tensor([1.0] * 4 + [0.5] * 4)
    data = [torch.diag(norms)]
    values = torch.full((2, 2), 1.0)  # of blocks by row and column
    values[1, 0] = 0.9
    layer.weight.data = values.repeat_interleave(16, 0).repeat_interleave(4, 1)
    layer.weight.data[:16, :4] = 0.01
    layer.weight.data[3, 2] = 10  # its block has the largest norm and the least sum
    gone = {}
    for method in ("magnitude", "wanda"):
        pruned = copy.deepcopy(layer)
        prune_(pruned, 0.25, method=method, pattern="block16x4", data=data)
        gone[method] = (pruned.weight_mask[::16, ::4] == 0).nonzero().tolist()
    assert gone == {"magnitude": [[1, 0]], "wanda": [[0, 0]]}


def brute_force(weight, moment, keep_of):
    """SparseGPT by its definition: for each column, the optimal update of the ones after it (OBS), whose
    inverse Hessian is that of these columns alone. keep_of fills the mask as each column comes.
    """
    weight = weight.double().clone()
    k = weight.shape[1]
    hessian = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(k)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(k):
        inverse = torch.linalg.inv(hessian[j:, j:])
        keep_of(weight, keep, j, hessian)
        for i in range(len(weight)):
            if not keep[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0]
                weight[i, j] = 0
    return weight, keep


def error_of_each(weight, hessian, start, stop):
    """w^2 / [inv(H_j:)]_00, what taking a weight out costs once the columns before it are settled."""
    diagonal = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, stop)])
    return weight[:, start:stop].square() / diagonal


def correlated(rows, k):
    return torch.randn(rows, k) @ (torch.randn(k, k) / math.sqrt(k) + torch.eye(k) / 2)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:5"])
@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(pattern, amount):
    pattern = Pattern.parse(pattern)
    weight, x = torch.randn(6, 22), correlated(200, 22)
    moment = (x.t() @ x).double()

    def keep_of(w, keep, j, hessian):
        if pattern.kind == "nm" and j % pattern.m == 0:
            stop = min(j + pattern.m, 22)
            keep[:, j:stop] = pattern.select(error_of_each(w, hessian, j, stop).float())
        if pattern.kind == "unstructured" and j == 0:
            keep[:] = pattern.select(error_of_each(w, hessian, 0, 22), amount)

    expected, kept = brute_force(weight, moment, keep_of)
    share = pattern.amount or amount
    new, keep = prune_weight(weight, torch.ones(6, 22), *inverse_factor(moment), pattern, share)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(new, expected.float(), rtol=1e-4, atol=1e-4)
    assert not new[~keep].any()

    def loss(w):
        return float(((w - weight) @ x.t()).square().sum())

    assert loss(new) < 0.9 * loss(weight * keep)


def test_sparsegpt_chooses_128_columns_at_a_time_after_what_came_before():
    pattern = Pattern.parse("unstructured")
    weight, x = torch.randn(4, 300), correlated(900, 300)
    moment = (x.t() @ x).double()
    factor, dead = inverse_factor(moment)
    new, keep = prune_weight(weight, torch.ones(4, 300), factor, dead, pattern, 0.5)
    assert [int((~part).sum()) for part in keep.split(128, 1)] == [256, 256, 88]

    def keep_of(w, keep, j, hessian):
        if j % 128 == 0:
            errors = w[:, j : j + 128].square() / factor.diagonal()[j : j + 128].square()
            keep[:, j : j + 128] = pattern.select(errors, 0.5)

    expected, kept = brute_force(weight, moment, keep_of)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(new, expected.float(), rtol=1e-3, atol=1e-3)


def test_sparsegpt_in_blocks_keeps_whole_ones_and_makes_up_for_the_others():
    pattern = Pattern.parse("block16x4")
    weight, x = torch.randn(32, 160), correlated(600, 160)
    factor, dead = inverse_factor((x.t() @ x).double())
    new, keep = prune_weight(weight, torch.ones(32, 160), factor, dead, pattern, 0.5)
    assert pattern.fits(keep) and int((~keep).sum()) == 32 * 80
    magnitude = pattern.select(weight.square(), 0.5)
    losses = [float(((w - weight) @ x.t()).square().sum()) for w in (new, weight * keep, weight * magnitude)]
    assert losses[0] < 0.8 * min(losses[1:])


def test_sparsegpt_sets_dead_inputs_first_and_leaves_the_rest_of_them_alone():
    weight, x = torch.randn(8, 16), correlated(100, 16)
    x[:, [3, 7, 8]] = 0
    factor, dead = inverse_factor((x.t() @ x).double())
    assert dead.nonzero().flatten().tolist() == [3, 7, 8]
    new, keep = prune_weight(weight, torch.ones(8, 16), factor, dead, Pattern.parse("unstructured"), 0.125)
    assert not keep[:, 3].any() and not keep[:, 7].any() or int((~keep[:, dead]).sum()) == 16
    assert torch.equal(new[keep], weight[keep]), "nothing that matters went, so nothing was made up for"
    new, keep = prune_weight(weight, torch.ones(8, 16), factor, dead, Pattern.parse("unstructured"), 0.5)
    assert not keep[:, dead].any() and new.isfinite().all()
    zero = nn.Linear(16, 8)
    prune_(zero, 0.5, method="sparsegpt", data=[torch.zeros(4, 16)])
    assert zero.weight.isfinite().all() and int((zero.weight_mask == 0).sum()) == 64


def test_sparsegpt_keeps_what_was_pruned_pruned():
    weight, x = torch.randn(8, 160), correlated(300, 160)
    ranked = torch.ones(8, 160)
    ranked[:, 100:160] = PRUNED  # more than half of the second step's columns
    factor, dead = inverse_factor((x.t() @ x).double())
    weight = weight.masked_fill(ranked == PRUNED, 0)
    for amount, count in ((0.5, 640), (0.2, 480)):
        new, keep = prune_weight(weight, ranked, factor, dead, Pattern.parse("unstructured"), amount)
        assert int((~keep).sum()) == count and not keep[:, 100:].any() and not new[:, 100:].any()
    _, keep = prune_weight(weight, ranked, factor, dead, Pattern.parse("2:4"), 0.5)
    assert not keep[:, 100:].any() and int(keep.sum()) == 8 * 50


class Attention(nn.Module):
    """Layers that share an input, one called twice, one that some batches reach and one that none does."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.twice, self.rare, self.never = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, rare=False):
        x = x + self.o(functional.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))
        x = self.twice(x).relu()
        return self.rare(self.twice(x)) if rare else self.twice(x)


def test_layers_that_are_fed_the_same_are_one_group():
    model = Attention()
    batches = [torch.randn(3, 16), (torch.randn(3, 16), True)]
    layers, _ = find(model, Choice(None, None), Pattern.parse("unstructured"), updates=True)
    calls = Passes(model, layers, batches, call).whole
    groups = group_by_input(layers, calls)
    named = [([layer.name for layer in group.layers], group.calls) for group in groups]
    assert named == [(["q", "k", "v"], 1), (["o"], 1), (["twice"], 2), (["rare"], 1)]
    seen = []
    model.twice.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    moment = second_moment(groups[2], calls)
    assert len(seen) == 4
    torch.testing.assert_close(moment, sum(x.double().t() @ x.double() for x in seen), rtol=1e-5, atol=1e-5)
    later = []
    model.rare.register_forward_hook(lambda m, args, y: later.append(y))
    second_moment(groups[0], calls)
    assert not later, "the pass ends where the inputs of the group are known"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor"])
def test_a_layer_that_data_does_not_reach_stays_dense_and_is_named(method):
    model = Attention()
    data = [(torch.randn(3, 16), True)]
    with pytest.warns(UserWarning, match="data did not reach never; they stay"):
        prune_(model, 0.5, method=method, data=data, loss_fn=lambda m, b: m(*b).square().sum())
    rows = {row["name"]: (row["action"], row["reason"]) for row in model._halfbyte_pruning}
    assert rows["never"] == ("dense", "data did not reach it") and rows["rare"][0] == "pruned"
    assert not hasattr(model.never, "weight_mask") and int((model.q.weight_mask == 0).sum()) == 128


def test_sparsegpt_prunes_a_layer_for_what_the_pruned_ones_feed_it():
    model, data = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), [torch.randn(64, 16)]
    first, second = copy.deepcopy(model), model[2].weight.detach().clone()
    prune_(first, 0.5, method="sparsegpt", data=data, include="0")
    x = torch.relu(first[0](data[0])).detach()
    factor, dead = inverse_factor((x.t() @ x).double())
    expected, _ = prune_weight(
        second, torch.ones(8, 24), factor, dead, Pattern.parse("unstructured"), 0.5
    )
    prune_(model, 0.5, method="sparsegpt", data=data)
    assert torch.equal(model[0].weight, first[0].weight)
    torch.testing.assert_close(model[2].weight, expected)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_batches_are_given_as_they_are_meant(method):
    model = Attention()
    x = torch.randn(3, 16)
    ways = [
        ([(x, True)], None),
        ([[x, True]], None),
        ([{"x": x, "rare": True}], None),
        ([{"images": x, "labels": 3}], lambda m, b: m(b["images"], rare=True)),
        (iter([(x, True)]), None),
    ]
    masks = []
    for data, forward in ways:
        pruned = copy.deepcopy(model)
        prune_(pruned, 0.5, method=method, data=data, forward=forward, exclude="never")
        masks.append(torch.stack([m.weight for _, m in pruned.named_modules() if hasattr(m, "weight_mask")]))
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])


def test_conditional_updates_do_not_touch_biases_and_other_layers():
    model = Model(1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    prune_(model, 0.5, method="sparsegpt", data=tokens(3), include="blocks.*.up")
    for name, parameter in model.named_parameters():
        changed = name == "blocks.0.up.weight_orig"
        assert torch.equal(parameter, before[name.replace("_orig", "")]) != changed, name


def task(generator, k=64, latent=24):
    """Batches of correlated features of unequal scale, as hidden states are, and the labels of a teacher."""
    mix = torch.randn(latent, k, generator=generator) / latent**0.5
    scales = torch.randn(k, generator=generator).exp()
    hidden, out = (torch.randn(n, m, generator=generator) / m**0.5 for n, m in ((48, latent), (10, 48)))

    def batch(count):
        z = torch.randn(count, latent, generator=generator)
        x = (z @ mix + 0.3 * torch.randn(count, k, generator=generator)) * scales
        return x, (functional.relu(z @ hidden.t()) @ out.t()).argmax(1)

    return batch


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def trained():
    """A classifier, calibration batches, and its loss on others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = task(torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    adam = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, total_steps=800)
    for _ in range(800):
        adam.zero_grad()
        cross_entropy(model, batch(128)).backward()
        adam.step()
        rate.step()
    held_out = batch(4096)
    torch.set_num_threads(threads)
    return model, [batch(256) for _ in range(4)], lambda model: cross_entropy(model, held_out).item()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_losses_of_a_trained_model_order_as_published(trained, pattern):
    """sparsegpt <= wanda <= magnitude at 50 %: so for each of 40 seeds."""
    model, data, loss = trained
    losses = {}
    for method in ("sparsegpt", "wanda", "magnitude", "random"):
        pruned = copy.deepcopy(model)
        prune_(pruned, 0.5, method=method, pattern=pattern, data=data, forward=lambda m, b: m(b[0]))
        losses[method] = loss(pruned)
    assert loss(model) < losses["sparsegpt"] < losses["wanda"] < losses["magnitude"] < losses["random"]


def test_sparsegpt_in_blocks_loses_less_than_magnitude(trained):
    model, data, loss = trained
    losses = []
    for method in ("sparsegpt", "magnitude"):
        pruned = copy.deepcopy(model)
        options = {"pattern": "block16x4", "exclude": "4", "data": data, "forward": lambda m, b: m(b[0])}
        losses.append(loss(prune_(pruned, 0.5, method=method, **options)))
    assert losses[0] < losses[1]
