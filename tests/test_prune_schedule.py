"""PruneSchedule: the amounts of its steps, masks over fine-tuning, the stop rule and what it restores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from halfbyte.pruning import PruneSchedule, prune_, sparsity
from models import TOKENS, Model
from pruned import assert_same, loss_fn, photograph

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def train(model, step=None, count=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        loss_fn(model, TOKENS).backward()
        optimizer.step()


def test_amounts_follow_the_published_curves():
    cubic = PruneSchedule(Model(1), 0.8, 4)
    assert cubic.amounts == pytest.approx([0.8 * (1 - (1 - i / 4) ** 3) for i in (1, 2, 3, 4)])
    assert PruneSchedule(Model(1), 0.8, 4, "linear").amounts == pytest.approx((0.2, 0.4, 0.6, 0.8))
    assert PruneSchedule(Model(1), 0.8, 4, "one-shot").amounts == (0.8, 0.8, 0.8, 0.8)
    for kind in ("one-shot", "linear", "cubic"):
        assert PruneSchedule(Model(1), 0.7, 3, kind).amounts[-1] == 0.7
        assert PruneSchedule(Model(1), 0.7, kind=kind).amounts == (0.7,)


@pytest.mark.parametrize("kind", ["one-shot", "linear", "cubic"])
def test_each_step_reaches_its_amount_and_nothing_comes_back(kind):
    model = Model(1)
    schedule = PruneSchedule(model, 0.8, 4, kind, pattern="unstructured")
    before, amounts = None, []
    for step in schedule:
        masks = torch.cat([b.flatten() for b in model.buffers()])
        assert before is None or not masks[before == 0].any()
        for layer in sparsity(model).layers:
            assert layer.zeros == math.floor(round(step.amount * layer.total, 6))
        assert step.sparsity == pytest.approx(sparsity(model).amount)
        train(model)
        before = masks
        amounts.append(step.amount)
    model(TOKENS)
    assert sparsity(model).amount == pytest.approx(0.8, abs=0.002) and not schedule.stopped
    assert tuple(amounts) == schedule.amounts and [s.number for s in schedule.history] == [1, 2, 3, 4]
    assert schedule.baseline is None and all(s.metric is None and s.kept for s in schedule.history)


def test_one_shot_prunes_once():
    model, passes = nn.Linear(16, 16), []

    def forward(model, batch):
        passes.append(1)
        return model(batch)

    counts = []
    options = {"method": "wanda", "data": [torch.randn(64, 16)], "forward": forward}
    for _ in PruneSchedule(model, 0.5, 3, "one-shot", **options):
        counts.append(len(passes))
    assert counts == [1, 1, 1] and sparsity(model).amount == 0.5
    for _ in PruneSchedule(model, None, 2, "one-shot", pattern="1:4"):
        assert sparsity(model).amount >= 0.75


def test_run_calls_fine_tune_in_each_step():
    model, seen = Model(1), []
    schedule = PruneSchedule(
        model, 0.6, 3, fine_tune=lambda m, step: seen.append((m, step.number)), metric=lambda m: 1.0
    )
    assert schedule.run() is model
    assert seen == [(model, 1), (model, 2), (model, 3)]
    assert schedule.baseline == 1 and [step.metric for step in schedule.history] == [1, 1, 1]


def scores(*values):
    """A metric that returns these one after another."""
    left = list(values)
    return lambda model: left.pop(0)


def test_a_metric_that_falls_too_far_brings_the_last_good_state_back():
    model = Model(1)
    schedule = PruneSchedule(model, 0.9, 4, "linear", metric=scores(1.0, 0.99, 0.95, 0.5), tolerance=0.05)
    good = {}
    for step in schedule:
        train(model)
        model(TOKENS)
        if step.number == 2:
            good = {n: t.clone() for n, t in model.state_dict().items()}
            output = model(TOKENS)
    assert schedule.stopped and [s.kept for s in schedule.history] == [True, True, False]
    assert [s.metric for s in schedule.history] == [0.99, 0.95, 0.5]
    assert list(model.state_dict()) == list(good)
    assert all(torch.equal(t, good[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(TOKENS), output) and sparsity(model).amount == pytest.approx(0.45, abs=0.01)
    assert all(p.grad is None for p in model.parameters())
    train(model)  # and it can go on being trained, and pruned
    prune_(model, 0.6)
    assert sparsity(model).amount == pytest.approx(0.6, abs=0.01)


def test_a_first_step_that_falls_too_far_leaves_no_mask_behind():
    model = Model(1)
    before = photograph(model)
    weights = {n: p for n, p in model.named_parameters()}
    schedule = PruneSchedule(model, 0.9, 2, metric=scores(1.0, math.nan), tolerance=0.5, fine_tune=train)
    schedule.run()
    assert schedule.stopped and len(schedule.history) == 1 and not prune.is_pruned(model)
    assert_same(model, before)
    assert all(p is weights[n] for n, p in model.named_parameters())


def test_handles_of_hooks_work_after_a_return():
    model, calls = Model(1), []
    handle = model.blocks[0].up.register_forward_hook(lambda *args: calls.append(1))
    PruneSchedule(model, 0.9, metric=scores(1, 0), tolerance=0, fine_tune=train).run()
    calls.clear()
    model(TOKENS)
    handle.remove()
    model(TOKENS)
    assert calls == [1]


def test_a_metric_alone_only_records():
    model = Model(1)
    schedule = PruneSchedule(model, 0.9, 2, metric=scores(1.0, -5.0, 2.0), fine_tune=train)
    schedule.run()
    assert not schedule.stopped and [s.metric for s in schedule.history] == [-5, 2]
    assert sparsity(model).amount == pytest.approx(0.9, abs=0.01)


def test_a_loop_can_be_left():
    model = Model(1)
    schedule = PruneSchedule(model, 0.9, 3, "linear", metric=scores(1.0), tolerance=0.1)
    for _ in schedule:
        break
    assert sparsity(model).amount == pytest.approx(0.3, abs=0.01) and len(schedule.history) == 1
    with pytest.raises(hb.ModelError, match="a schedule runs once"):
        next(iter(schedule))


class Mlp(nn.Module):
    """With a config, as models of transformers have it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 6))
        self.config = type("Config", (), {})()
        self.config.intermediate_size = 20

    def forward(self, x):
        return self.layers(x)


def test_a_structured_schedule_shrinks_and_comes_back():
    model, x = Mlp(), torch.randn(5, 8)
    options = {"pattern": "neuron", "include": "layers.0", "metric": scores(1, 1, 0), "tolerance": 0.1}
    schedule = PruneSchedule(model, 0.5, 2, "linear", **options)
    sizes, outputs = [], []
    for step in schedule:
        sizes.append(model.layers[0].out_features)
        assert step.sparsity == pytest.approx(step.amount)
        model.config.intermediate_size = sizes[-1]
        with torch.no_grad():
            model.layers[2].weight += 1
        outputs.append(model(x))
    assert sizes == [15, 10] and schedule.stopped
    assert model.layers[0].out_features == model.config.intermediate_size == 15
    assert torch.equal(model(x), outputs[0])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"amount": 1.1}, hb.SchemeError, "amount is 1.1"),
        ({"amount": None}, hb.DTypeError, "amount must be"),
        ({"kind": "quadratic"}, hb.SchemeError, "kind is 'quadratic'"),
        ({"steps": 0}, hb.DTypeError, "steps must be"),
        ({"steps": 2.0}, hb.DTypeError, "steps must be"),
        ({"steps": True}, hb.DTypeError, "steps must be"),
        ({"pattern": "2:4", "amount": None, "steps": 2}, hb.SchemeError, 'kind="one-shot"'),
        ({"pattern": "3x3"}, hb.SchemeError, "no pattern of zeros"),
        ({"threshold": 0.1}, hb.SchemeError, "a threshold is for prune_"),
        ({"data": iter([TOKENS])}, hb.DTypeError, "pass a list"),
        ({"tolerance": 0.1}, hb.DTypeError, "needs a metric"),
        ({"tolerance": -0.1, "metric": len}, hb.SchemeError, "tolerance is -0.1"),
        ({"tolerance": math.nan, "metric": len}, hb.SchemeError, "tolerance is nan"),
        ({"metric": 3}, hb.DTypeError, "metric must be a function"),
        ({"fine_tune": 3}, hb.DTypeError, "fine_tune must be a function"),
        ({"metod": "wanda"}, TypeError, "metod"),
        ({"model": 3}, hb.DTypeError, "takes a model"),
    ],
)
def test_bad_arguments_are_errors_at_once(options, error, says):
    with pytest.raises(error, match=says):
        PruneSchedule(**{"model": Model(1), "amount": 0.5, **options})


def test_failures_while_it_runs_say_what_is_wrong():
    with pytest.raises(hb.DTypeError, match="run needs fine_tune"):
        PruneSchedule(Model(1), 0.5).run()
    with pytest.raises(hb.DTypeError, match="must return a number, not str"):
        list(PruneSchedule(Model(1), 0.5, metric=lambda m: "good"))
    with pytest.raises(hb.NonFiniteError, match="NaN before anything is pruned"):
        list(PruneSchedule(Model(1), 0.5, metric=lambda m: math.nan, tolerance=0))
    model = Model(1)
    schedule = PruneSchedule(model, 0.5, 2, method="wanda", data=[TOKENS])
    with pytest.raises(hb.NonFiniteError, match=r"blocks\.0\.down"):
        for _ in schedule:
            model.blocks[0].down.weight_orig.data[0, 0] = math.nan
            before = photograph(model)
    assert_same(model, before)
