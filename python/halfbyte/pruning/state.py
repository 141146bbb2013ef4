"""What a model was like, to return to: its modules' attributes, and the values of its tensors."""

from __future__ import annotations

from torch import Tensor, nn, no_grad


class State:
    """A moment of a model.

    Attributes, parameters, buffers, hooks and submodules of every module, and its `config`, are remembered as
    objects; with `values` a copy of every parameter and buffer too.
    """

    def __init__(self, model: nn.Module, values: bool):
        self.modules = [(module, _contents(module)) for module in model.modules()]
        configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "__dict__")}
        self.configs = [(config, dict(vars(config))) for config in configs.values()]
        tensors = [*model.parameters(), *model.buffers()] if values else []
        self.values: list[tuple[Tensor, Tensor]] = [(t, t.detach().clone()) for t in tensors]

    def restore(self) -> None:
        """Bring the model back. Gradients are not touched, but for those of changed values, which go."""
        for module, (attributes, inner) in self.modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in inner.items():  # the same dicts, since handles of hooks refer to them
                attributes[name].clear()
                attributes[name].update(content)
        for config, attributes in self.configs:
            vars(config).clear()
            vars(config).update(attributes)
        with no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
                tensor.grad = None


def _contents(module: nn.Module) -> tuple[dict, dict[str, dict]]:
    attributes = dict(vars(module))
    inner = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
    return attributes, inner
