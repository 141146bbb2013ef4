"""Calibration layer after layer: what layers are fed in a model whose earlier layers are pruned already.

The inputs of a group of layers come from passes that end there. Where groups lie in a chain of blocks, as
those of a transformer are, only the block of the group is run, on what the block before it returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .inputs import Forward, check_input, check_seen, watching
from .layers import Layer

Calls = list[Callable[[], object]]  # one for each batch


class _Enough(BaseException):  # no Exception, which the code of a model might catch
    """The rest of a forward pass is not needed."""


@dataclass(frozen=True)
class Group:
    """Layers that are fed the very same tensors, and how often a batch calls the first of them at most."""

    layers: list[Layer]
    calls: int


def group_by_input(layers: list[Layer], calls: Calls) -> list[Group]:
    """The layers in the order of their first calls; those that no input reaches are left out."""
    layer_of = {module: layer for layer in layers for module in layer.modules}
    keys: dict[str, tuple] = {}  # by layer: in its first batch, the inputs that it got
    times: dict[str, int] = {}
    for number, run in enumerate(calls):
        inputs: dict[str, list[tuple]] = {}
        alive = []  # memory must not be used again while its address stands for a tensor

        def see(module: nn.Module, x: Tensor, inputs=inputs, alive=alive) -> None:
            alive.append(x)
            version = 0 if x.is_inference() else x._version
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype, version)
            inputs.setdefault(layer_of[module].name, []).append(key)

        with watching(layer_of, see), torch.no_grad():
            run()
        for name, seen in inputs.items():
            keys.setdefault(name, (number, *seen))
            times[name] = max(times.get(name, 0), len(seen))
    check_seen(len(calls), keys, "sparsegpt")
    by_name = {layer.name: layer for layer in layers}
    groups: dict[tuple, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return [Group([by_name[name] for name in names], times[names[0]]) for names in groups.values()]


def second_moment(group: Group, calls: Calls) -> Tensor:
    """X'X of the inputs of a group over all tokens, [k, k] of float64. Calls end where they are known."""
    first, seen = group.layers[0], 0
    k = first.shape[1]
    total = torch.zeros(k, k, dtype=torch.float64, device=first.parameter.device)

    def see(module: nn.Module, x: Tensor) -> None:
        nonlocal seen
        rows = x.reshape(-1, k)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total.add_(rows.t() @ rows)
        seen += 1
        if seen == group.calls:
            raise _Enough

    with watching(first.modules, see), torch.no_grad():
        for run in calls:
            seen = 0
            with contextlib.suppress(_Enough):
                run()
    check_input(first.name, total)
    return total


class Passes:
    """What to call for the inputs of a group, in the model as it then is."""

    def __init__(self, model: nn.Module, layers: list[Layer], batches: list, forward: Forward):
        self.whole: Calls = [partial(forward, model, batch) for batch in batches]
        self.blocks = _blocks(model, layers)
        self.block_of = {m: i for i, block in enumerate(self.blocks) for m in block.modules()}
        self.chain: list[_Chain] | None = None  # of each batch; None: not recorded, empty: there is none
        self.at = 0  # the block that the chains stand before

    def of(self, group: Group) -> Calls:
        """A call for each batch, all of which reach the group. To be asked for group after group."""
        at = {self.block_of.get(module) for layer in group.layers for module in layer.modules}
        index = at.pop() if len(at) == 1 else None
        if index is None or index < self.at:
            return self.whole
        if self.chain is None:
            self.chain = _record(self.blocks, self.whole)
        if not self.chain:
            return self.whole
        with torch.no_grad():
            for step in range(self.at, index):
                for chain in self.chain:
                    chain.hidden = chain.run(step)
        self.at = index
        return [partial(chain.run, index) for chain in self.chain]


class _Chain:
    """The calls of blocks by one batch, each of which passes its output on to the next."""

    def __init__(self, blocks: list[nn.Module]):
        self.blocks = blocks
        self.hidden: Tensor | None = None  # what the next block to run is fed
        self.others: list[tuple[tuple, dict]] = []  # what else each block is given
        self.outputs: list[object] = []
        self.broken = False

    def record(self, run: Callable[[], object], factor: float = 1) -> _Chain:
        """Note the calls of a pass; in it the output of the first block is multiplied by `factor`."""
        handles = []
        try:
            for index, block in enumerate(self.blocks):
                before = partial(self._before, index)
                after = partial(self._after, factor if index == 0 else 1)
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after))
            run()
        finally:
            for handle in handles:
                handle.remove()
        self.broken |= len(self.outputs) != len(self.blocks)
        return self

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(self.outputs) != index or not (args and isinstance(args[0], Tensor)):
            self.broken = True
        elif index == 0:
            self.hidden = args[0]
        elif args[0] is not _first(self.outputs[-1]):
            self.broken = True
        self.others.append((args[1:], kwargs))

    def _after(self, factor: float, module: nn.Module, args: tuple, output: object) -> object:
        if factor != 1 and _first(output) is not None:
            scaled = _first(output) * factor
            output = scaled if isinstance(output, Tensor) else type(output)([scaled, *output[1:]])
        self.outputs.append(output)
        return output

    def run(self, index: int) -> Tensor | None:
        """What the block returns to the next one, as the model is now."""
        args, kwargs = self.others[index]
        return _first(self.blocks[index](self.hidden, *args, **kwargs))

    def repeats(self) -> bool:
        """Whether running the blocks on what was noted gives what the last of them returned."""
        start = self.hidden
        for index in range(len(self.blocks)):
            try:
                self.hidden = self.run(index)
            except Exception:  # they need more than their arguments
                return False
        same = self.hidden is not None and torch.equal(self.hidden, _first(self.outputs[-1]))
        self.hidden = start
        return same

    def told(self) -> list[Tensor | None]:
        """What blocks are given besides the output of the one before."""
        return [x for args, kwargs in self.others for x in _tensors([*args, *kwargs.values()])]


def _record(blocks: list[nn.Module], calls: Calls) -> list[_Chain]:
    """The chain of each batch; empty if the blocks are none, which the first batch shows.

    They are if each is fed what the one before returned, what else they are given hides nothing, as a cache
    would, and does not depend on what the first of them returns, and if run by themselves they repeat it all.
    """
    chains: list[_Chain] = []
    with torch.no_grad():
        for run in calls if blocks else ():
            chain = _Chain(blocks).record(run)
            if chain.broken or any(x is None for x in chain.told()):
                return []
            if not chains:
                other = _Chain(blocks).record(run, factor=1.5)
                pairs = zip(chain.told(), other.told(), strict=False)
                if other.broken or not all(torch.equal(*pair) for pair in pairs) or not chain.repeats():
                    return []
            chain.outputs.clear()
            chains.append(chain)
    return chains


def _blocks(model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
    """The children of a ModuleList or Sequential over which the layers are spread the most."""
    modules = {module for layer in layers for module in layer.modules}
    best, most = [], 0
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            counts = [sum(m in modules for m in child.modules()) for child in container]
            if counts and sum(counts) - max(counts) > most:
                best, most = list(container), sum(counts) - max(counts)
    return best if len(set(best)) == len(best) else []


def _first(output: object) -> Tensor | None:
    """What a block passes on: its output, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def _tensors(values: list) -> Iterator[Tensor | None]:
    """The tensors in arguments; None for what may hide others, or remember the call."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(list(value))
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))
        elif not isinstance(value, bool | int | float | str | torch.dtype | None):
            yield None
