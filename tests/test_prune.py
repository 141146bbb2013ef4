"""prune_: masks as torch has them, exact shares, what is left dense, and failures that leave no trace."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from halfbyte.pruning import prune_, remove_masks_, sparsity
from models import TOKENS, Model, tied
from pruned import actions, loss_fn, zeros

DATA = [TOKENS, TOKENS + 1]


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "pattern", ["unstructured", "2:4", "1:4", "4:8", "block16x4", "block16x1", "block4x8"]
)
def test_every_method_reaches_every_pattern_exactly(method, pattern):
    model = Model(2)
    amount = None if ":" in pattern else 0.6
    share = 0.75 if pattern == "1:4" else 0.5
    prune_(model, amount, method=method, pattern=pattern, data=DATA, loss_fn=loss_fn)
    form = hb.sparse.pattern.Pattern.parse(pattern)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        n, k = module.weight.shape
        if not form.applies((n, k)):
            assert name == "head" and not prune.is_pruned(module)
            continue
        mask = module.weight_mask.bool()
        assert form.fits(mask)
        if form.kind == "nm":
            assert int((~mask).sum()) == share * n * k
        elif form.kind == "unstructured":
            assert int((~mask).sum()) == math.floor(round(0.6 * n * k, 6))
        else:
            units = form.units((~mask).float())
            assert int((units > 0).sum()) == math.floor(round(0.6 * units.numel(), 6))
        assert torch.equal(module.weight, module.weight_orig * module.weight_mask)


def test_masks_are_those_of_torch():
    model = Model(1)
    weight = model.blocks[0].up.weight
    prune_(model, 0.5)
    up = model.blocks[0].up
    assert up.weight_orig is weight and "weight" not in up._parameters
    assert up.weight_mask.dtype == torch.float32 and "weight_mask" in up._buffers
    assert prune.is_pruned(model)
    twin = Model(1)
    state = {k.replace("weight_orig", "weight"): v for k, v in model.state_dict().items() if "mask" not in k}
    twin.load_state_dict(state)
    prune.l1_unstructured(twin.blocks[0].up, "weight", 0.5)
    assert torch.equal(up.weight_mask, twin.blocks[0].up.weight_mask)
    prune.remove(up, "weight")
    assert up.weight is weight and int((weight == 0).sum()) == weight.numel() // 2
    assert isinstance(up._parameters["weight"], nn.Parameter)


def test_what_torch_masked_stays_masked_and_counts():
    model = Model(1)
    up = model.blocks[0].up
    prune.random_unstructured(up, "weight", 0.3)
    first = up.weight_mask.clone()
    prune_(model, 0.5)
    assert int((up.weight_mask == 0).sum()) == up.weight.numel() // 2
    assert not up.weight_mask[first == 0].any()
    ours = up.weight_mask.clone()
    prune.l1_unstructured(up, "weight", 0.5)  # torch goes on: half of what is left
    assert not up.weight_mask[ours == 0].any()
    assert int(up.weight_mask.sum()) == up.weight.numel() // 4
    prune.remove(up, "weight")
    assert "weight" in up._parameters


def test_a_second_call_goes_on_from_the_first():
    model = Model(1)
    prune_(model, 0.3, method="random")
    first = {n: b.clone() for n, b in model.named_buffers()}
    prune_(model, 0.7, method="magnitude")
    for name, buffer in model.named_buffers():
        assert int((buffer == 0).sum()) == math.floor(round(0.7 * buffer.numel(), 6))
        assert not buffer[first[name] == 0].any()
    before = {n: b.clone() for n, b in model.named_buffers()}
    prune_(model, 0.5)  # less than there is: nothing comes back
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    hooks = model.blocks[0].up._forward_pre_hooks
    assert len(hooks) == 1 and not isinstance(next(iter(hooks.values())), prune.PruningContainer)


def test_zeros_go_first():
    layer = nn.Linear(8, 8)
    layer.weight.data[2:4] = 0
    for method in ("magnitude", "random", "wanda"):
        copied = copy.deepcopy(layer)
        prune_(copied, 0.25, method=method, data=[torch.randn(3, 8)], seed=3)
        expected = torch.ones(8, 8)
        expected[2:4] = 0
        if method == "wanda":  # every row loses as much as the others
            assert (copied.weight_mask.sum(1) == 6).all()
        else:
            assert torch.equal(copied.weight_mask, expected)
    prune_(layer, 0.1)  # fewer go than are zero: masks take no more than was asked for
    assert int((layer.weight_mask == 0).sum()) == 6


def test_what_is_masked_counts_before_zeros_that_are_not():
    layer = nn.Linear(8, 8)
    layer.weight.data[:2] = 0
    mask = torch.ones(8, 8)
    mask[6:] = 0
    prune.custom_from_mask(layer, "weight", mask)
    prune_(layer, 0.375)
    assert (layer.weight_mask == 0).sum(1).tolist() == [8, 0, 0, 0, 0, 0, 8, 8]


def test_the_whole_model_shares_the_amount_of_scope_global():
    model = Model(2)
    model.blocks[1].up.weight.data *= 100
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    prune_(model, 0.4, scope="global")
    together = torch.cat([w.abs().flatten() for w in weights.values()])
    count = math.floor(round(0.4 * together.numel(), 6))
    limit = together.sort().values[count - 1]
    for name, weight in weights.items():
        mask = model.get_submodule(name).weight_mask
        assert torch.equal(mask == 0, weight.abs() <= limit), name
    assert sparsity(model).zeros == count
    assert zeros(model)["blocks.1.up"] < 0.02 * 512 < zeros(model)["blocks.0.up"]


def test_blocks_of_the_whole_model():
    model = Model(2)
    model.blocks[0].down.weight.data *= 0.01
    prune_(model, 0.25, scope="global", pattern="block16x4", exclude="head")
    assert {name: count for name, count in zeros(model).items() if count} == {"blocks.0.down": 512}


def test_ties_go_by_position():
    layer = nn.Linear(4, 2)
    nn.init.ones_(layer.weight)
    prune_(layer, 0.5)
    assert layer.weight_mask.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("threshold", [0.0, 0.125, 10])
def test_a_threshold_keeps_what_is_above_it(threshold):
    layer = nn.Linear(16, 8)
    layer.weight.data[0, :4] = torch.tensor([0.125, -0.125, 0.1251, 0])
    prune_(layer, threshold=threshold)
    assert torch.equal(layer.weight_mask == 1, layer.weight_orig.abs() > threshold)
    if threshold == 0.125:
        assert layer.weight_mask[0, :4].tolist() == [0, 0, 1, 0]


def test_random_follows_its_seed_and_leaves_torch_alone():
    state = torch.get_rng_state()
    masks = []
    for seed in (0, 0, 1):
        layer = nn.Linear(32, 32)
        layer.weight.data.fill_(1)
        torch.set_rng_state(state)
        prune_(layer, 0.5, method="random", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        masks.append(layer.weight_mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert 0.3 < masks[0][:16].mean() < 0.7  # and not the first half


def test_amounts_of_nothing_and_everything():
    model = Model(1)
    prune_(model, 0.0)
    assert sparsity(model).zeros == 0 and prune.is_pruned(model)
    prune_(model, 1.0)
    assert sparsity(model).amount == 1 and bool(model(TOKENS).isfinite().all())


def test_random_blocks_at_the_edge_go_as_often_as_others():
    gone = 0
    for seed in range(60):
        layer = nn.Linear(8, 17, bias=False)
        prune_(layer, 0.25, method="random", pattern="block16x4", seed=seed)
        gone += int(not layer.weight_mask[16].all())
    assert 15 < gone < 45  # one of four goes, two of them are of one row


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01),
}


@pytest.mark.usefixtures("one_thread_of_torch")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_survive_100_steps_of_an_optimizer_with_momentum(optimizer):
    model = Model(1)
    steps = OPTIMIZERS[optimizer](model.parameters())
    for count in range(110):
        if count == 10:  # by now there is momentum that would move a weight that was pruned
            prune_(model, 0.7)
            pruned = {n: b == 0 for n, b in model.named_buffers()}
            start = model.blocks[0].up.weight_orig.detach().clone()
        steps.zero_grad()
        loss_fn(model, TOKENS).backward()
        steps.step()
    model(TOKENS)
    moved = model.blocks[0].up.weight_orig.detach() != start
    assert moved[pruned["blocks.0.up.weight_mask"]].any(), "the momentum was to move them"
    for name, mask in pruned.items():
        weight = model.get_submodule(name.removesuffix(".weight_mask")).weight
        assert not weight[mask].any() and bool((weight[~mask] != 0).all())
    remove_masks_(model)
    for name, mask in pruned.items():
        weight = model.get_submodule(name.removesuffix(".weight_mask")).weight
        assert int((weight == 0).sum()) == int(mask.sum()) == math.floor(round(0.7 * mask.numel(), 6))


def test_remove_masks_takes_off_all_masks_whoever_put_them_on():
    model = Model(2)
    prune_(model, 0.5, include="blocks.0.*")
    prune.l1_unstructured(model.head, "bias", 3)
    prune.ln_structured(model.blocks[1].up, "weight", 0.5, n=2, dim=0)
    y = model(TOKENS)
    weight = model.blocks[0].up.weight_orig
    assert remove_masks_(model) is model
    assert not prune.is_pruned(model) and not list(model.named_buffers())
    assert model.blocks[0].up.weight is weight
    assert torch.equal(model(TOKENS), y) and int((model.head.bias == 0).sum()) == 3
    remove_masks_(model)
    assert torch.equal(model(TOKENS), y)
    with pytest.raises(hb.DTypeError):
        remove_masks_({"a": model})


def test_a_pruned_model_can_be_copied_quantized_and_saved_as_a_state():
    model = Model(1)
    prune_(model, 0.5)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS), model(TOKENS))
    fresh = prune_(Model(1), 0.0)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and zeros(fresh) == zeros(model)
    hb.quantize_(remove_masks_(model))
    codes = model.blocks[0].up.quantized.codes
    assert int((codes == 0).sum()) >= 256


def test_conv1d_is_pruned_as_the_linear_layer_that_it_is():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, linear = conv1d(48, 32), nn.Linear(32, 48)
    conv.weight.data, conv.bias = linear.weight.data.t().contiguous(), linear.bias
    for pattern, amount in (("2:4", None), ("block16x4", 0.5), ("unstructured", 0.3)):
        for method in ("magnitude", "wanda", "taylor", "sparsegpt"):
            a, b = copy.deepcopy(conv), copy.deepcopy(linear)
            data = [torch.randn(64, 32)]
            for layer in (a, b):
                prune_(layer, amount, pattern=pattern, method=method, data=data, loss_fn=loss_fn)
            assert a.weight_mask.shape == (32, 48) and torch.equal(a.weight_mask.t(), b.weight_mask)
            torch.testing.assert_close(a.weight.t(), b.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_other_dtypes_keep_theirs(dtype, method):
    model = Model(1).to(dtype)
    prune_(model, 0.5, method=method, data=DATA, loss_fn=loss_fn)
    assert model.blocks[0].up.weight_orig.dtype == model.blocks[0].up.weight.dtype == dtype
    assert zeros(model)["blocks.0.up"] == 256 and model(TOKENS).dtype == dtype


def test_layers_are_chosen_by_name():
    model = Model(2)
    prune_(model, 0.5, include=["blocks.*", "head"], exclude="re:.*\\.1\\.(up|down)")
    assert actions(model) == {
        "blocks.0.up": ("pruned", ""),
        "blocks.0.down": ("pruned", ""),
        "blocks.1.up": ("dense", "excluded"),
        "blocks.1.down": ("dense", "excluded"),
        "head": ("pruned", ""),
    }
    row = model._halfbyte_pruning[-1]
    assert {k: row[k] for k in ("shape", "pattern", "method", "amount")} == {
        "shape": (10, 16), "pattern": "unstructured", "method": "magnitude", "amount": 0.5,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"fits 'nothing\.\*'"):
        prune_(model, 0.6, exclude="nothing.*")


class Headed(Model):
    def get_output_embeddings(self):
        return self.head


def test_output_heads_stay_dense_unless_asked_for():
    assert "output head" in actions(prune_(Headed(1), 0.5))["head"][1]
    assert actions(prune_(Headed(1), 0.5, include="*"))["head"] == ("pruned", "")
    model = nn.Sequential()
    for name in ("dense", "lm_head", "score", "classifier", "qa_outputs"):
        model.add_module(name, nn.Linear(8, 8))
    prune_(model, 0.5)
    assert [name for name, (action, _) in actions(model).items() if action == "pruned"] == ["dense"]


def test_a_weight_tied_to_an_embedding_stays_unless_asked_for():
    model = prune_(tied(), 0.5)
    assert actions(model)["head"] == ("dense", "shares its weight with embed, which is not pruned")
    model = prune_(tied(), 0.5, include="head")
    assert model.head.weight_orig is model.embed.weight and zeros(model)["head"] == 80
    embedded = model.embed.weight.detach().clone()
    remove_masks_(model)
    assert torch.equal(model.embed.weight, embedded) and zeros(model)["head"] == 80
    with pytest.raises(hb.ModelError, match="an update of it would change"):
        prune_(tied(), 0.5, include="head", method="sparsegpt", data=DATA)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_layers_that_share_a_weight_share_its_mask(method):
    model = Model(2)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    prune_(model, 0.5, method=method, data=DATA, loss_fn=loss_fn)
    first, second = model.blocks[0].up, model.blocks[1].up
    assert first.weight_orig is second.weight_orig and torch.equal(first.weight_mask, second.weight_mask)
    rows = {row["name"]: row.get("tied_to") for row in model._halfbyte_pruning}
    assert rows["blocks.1.up"] == "blocks.0.up" and rows["blocks.0.up"] is None
    remove_masks_(model)
    assert first.weight is second.weight and int((first.weight == 0).sum()) == 256
    model = Model(2)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    prune_(model, 0.5, exclude="blocks.1.up")
    assert "shares its weight with blocks.1.up" in actions(model)["blocks.0.up"][1]


def test_a_layer_with_two_names_answers_to_both():
    model = Model(1)
    model.alias = nn.Sequential(model.head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_(model, 0.5, include="alias.0")
    assert [name for name, (action, _) in actions(model).items() if action == "pruned"] == ["head"]
    model = tied()
    model.alias = nn.Sequential(model.head)
    assert actions(prune_(model, 0.5, include="alias.0"))["head"] == ("pruned", "")


def test_what_has_no_plain_weight_stays_dense_and_says_so():
    class Mine(nn.Linear):
        pass

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(16, 16), Mine(16, 16), normed, nn.Linear(16, 2))
    prune_(model, 0.5, pattern="block16x4")
    reasons = [row["reason"] for row in sorted(model._halfbyte_pruning, key=lambda row: row["name"])]
    assert reasons[0] == "" and "Mine is a subclass" in reasons[1] and "subclass of nn.Linear" in reasons[2]
    assert reasons[3] == "smaller than one block of block16x4"
    with pytest.raises(hb.ModelError, match=r"nothing to prune .* 0: smaller than one group of 4:8"):
        prune_(nn.Sequential(nn.Linear(4, 8)), pattern="4:8")


def test_sparsity_reports_each_layer_and_all():
    model = Model(1)
    prune_(model, 0.5, include="*.up")
    found = sparsity(model)
    assert [(x.name, x.shape, x.zeros, x.masked) for x in found.layers] == [
        ("blocks.0.up", (32, 16), 256, True),
        ("blocks.0.down", (16, 32), 0, False),
        ("head", (10, 16), 0, False),
    ]
    assert (found.zeros, found.total, found.layers[0].amount) == (256, 1184, 0.5)
    assert "50.00%" in str(found) and "21.62%" in str(found)
    model.blocks[0].up.weight_orig.data.fill_(0)  # counted as the next call sees it
    assert zeros(model)["blocks.0.up"] == 512
    assert sparsity(nn.ReLU()).amount == 0
    with pytest.raises(hb.DTypeError, match="takes a model"):
        sparsity(torch.rand(2))
