"""Running a model on calibration batches, as it is used, and what its linear layers are fed then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import DTypeError, ModelError, NonFiniteError
from .layers import Layer
from .state import State

Forward = Callable[[nn.Module, object], object]


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block, in which transformers' models make no cache of keys and values; after
    it the modules, and torch's generator of the CPU, as before.
    """
    before = State(model, values=False)
    with torch.random.fork_rng(devices=[]):
        try:
            model.eval()
            for config, attributes in before.configs:
                if attributes.get("use_cache"):
                    config.use_cache = False
            yield
        finally:
            before.restore()


def batches_of(data: object, method: str, progress: bool) -> Iterable:
    """The batches of `data`, tracked; DTypeError if it is no iterable of batches."""
    if data is None:
        raise DTypeError(f"prune_: method {method!r} needs data, an iterable of batches for the model")
    if isinstance(data, Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise DTypeError(
            f"prune_: data is a {type(data).__name__}; it must be an iterable of batches: put a single batch "
            "into a list"
        )
    return tracked(data, method, "batch", progress)


def call(model: nn.Module, batch: object) -> object:
    """The model's output: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Within the block `see` gets the input of each module, as it came."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and x.numel():  # the layer itself explains what is wrong with another one
            see(module, x.detach())

    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_norms(
    model: nn.Module, layers: list[Layer], batches: Iterable, forward: Forward
) -> dict[str, Tensor]:
    """||x_j||_2 of each input feature over all tokens, float64 [k], of the layers that an input reached."""
    layer_of = {module: layer for layer in layers for module in layer.modules}
    squares: dict[str, Tensor] = {}

    def see(module: nn.Module, x: Tensor) -> None:
        name = layer_of[module].name
        added = x.reshape(-1, x.shape[-1]).double().square().sum(0)
        squares[name] = squares[name] + added if name in squares else added

    with watching(layer_of, see), torch.no_grad():
        seen = 0
        for batch in batches:
            forward(model, batch)
            seen += 1
    check_seen(seen, squares, "wanda")
    for name, square in squares.items():
        check_input(name, square)
    return {name: square.sqrt() for name, square in squares.items()}


def tracked(items: Iterable, what: str, unit: str, wanted: bool) -> Iterator:
    """The items, with a bar on a terminal once the work has lasted for a second, where tqdm is installed."""
    bar = None
    with contextlib.suppress(Exception):
        from tqdm import tqdm

        total = len(items) if hasattr(items, "__len__") else None
        off = None if wanted else True  # None: where there is no terminal
        bar = tqdm(total=total, desc=what, unit=unit, delay=1, leave=False, disable=off)
    try:
        for item in items:
            yield item
            with contextlib.suppress(Exception):
                bar.update()
    finally:
        with contextlib.suppress(Exception):
            bar.close()


def check_seen(batches: int, reached: Mapping, method: str) -> None:
    """ModelError if there was no batch, or no layer had an input."""
    if not batches:
        raise ModelError(f"prune_: data has no batches; method {method!r} needs at least one")
    if not reached:
        raise ModelError("prune_: data reached none of the layers to prune; does the model call them?")


def check_input(name: str, moments: Tensor) -> None:
    """NonFiniteError if what was summed over inputs is not finite."""
    if not moments.isfinite().all():
        raise NonFiniteError(
            f"prune_: an input of {name or 'the model'} holds a NaN or an infinity, or overflows when squared"
        )
