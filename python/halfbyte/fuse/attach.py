"""How a fused module is called: an object in the place of its `forward` runs the stack, or steps aside."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .stack import CannotFuse, FusedStack

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_tracing = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_grad_enabled = torch.is_grad_enabled
_autocast = torch.is_autocast_enabled


class RanUnfused(CannotFuse):
    """Why nothing of a call was fused, of one that is over: its result is there."""

    def __init__(self, reason: str, result: Any):
        super().__init__(reason)
        self.result = result


class Fused:
    """The instance attribute `forward` of a module that is fused; a family of models is a subclass.

    The module stays as it is, so that state_dict, hooks of its own and everything that walks the model see
    what they saw before. A call goes to `run`; where that raises CannotFuse the forward of the module's class
    runs, and the reason is counted. So `run` raises it before it changes anything, or RanUnfused.

    A subclass has `kind` and `what`, for the report, and defines:
      build(module)   -> (stack, extra): FusedStack(spec), and whatever else was derived from the module; both
                      are made again when the parts of the module are no longer what they were. Raises
                      CannotFuse for a variant that it does not know.
      run(module, stack, extra, **arguments)   one call; positional arguments have got their names.
      check(module)   raises CannotFuse for a variant that it does not know; packs nothing.
      blocks(module)  how many blocks it takes over.
    """

    kind = ""  # "BERT encoder"
    what = ""  # that one call does
    whole = True  # everything inside the module is taken over with it
    __name__ = "forward"  # of the method that it stands for, as its signature is

    def __init__(self, module: nn.Module):
        # No cycle: a model goes when its last reference goes.
        self._module = weakref.ref(module)
        self.calls = 0  # that were fused
        self.unfused: Counter[str] = Counter()  # reason: calls
        self._built: _Built | None = None

    def check(self, module: nn.Module) -> None:
        raise NotImplementedError

    def blocks(self, module: nn.Module) -> int:
        raise NotImplementedError

    def left(self, module: nn.Module) -> str:
        """Why some of what it could take over is left alone, as the module is now."""
        return ""

    def build(self, module: nn.Module) -> tuple[FusedStack, Any]:
        raise NotImplementedError

    def run(self, module: nn.Module, stack: FusedStack, extra: Any, **arguments: Any) -> Any:
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(
                "the module that this fused forward was made for is gone; was it copied by copy.copy? "
                "Call halfbyte.fuse_ on the copy"
            )
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> Any:  # which torch.export reads
        return type(self.module).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if is_compiling():
            return type(module).forward(module, *args, **kwargs)
        try:
            if reason := recorder():
                raise CannotFuse(reason)
            if _grad_enabled() and self._trains(module):
                raise CannotFuse("a gradient is wanted: call it under torch.no_grad() or inference_mode()")
            built = self._ready(module)
            names = argument_names(type(module))
            arguments = kwargs if not args else dict(zip(names, args, strict=False)) | kwargs
            if len(arguments) != len(args) + len(kwargs):
                raise CannotFuse("its arguments do not fit")  # its own forward says which
            result = self.run(module, built.stack, built.extra, **arguments)
        except CannotFuse as raised:
            obstacle = raised
        else:
            self.calls += 1
            return result
        if (reason := str(obstacle)) not in self.unfused:
            warnings.warn(
                f"a {type(module).__name__} that is fused runs its own forward: {reason}. This is said once; "
                "halfbyte.fusion_report(model) counts such calls",
                stacklevel=3,
            )
        self.unfused[reason] += 1
        if isinstance(obstacle, RanUnfused):
            return obstacle.result
        return self.original(module, *args, **kwargs)

    def obstacle(self) -> str:
        """Why the module would be left alone as it is now, if it would."""
        try:
            self._ready(self.module)
        except CannotFuse as reason:
            return str(reason)
        return ""

    def _ready(self, module: nn.Module) -> _Built:
        """What was built of the module as it is now."""
        built = self._built
        if built is None or not built.current(module):
            self._built = built = None  # frees what the new one would not share
            built = self._built = _Built(module, *self.build(module))
        return built

    def _trains(self, module: nn.Module) -> bool:
        """Whether autograd would follow a call, into a parameter."""
        if (built := self._built) is not None and built.current(module):
            return any(p is not None and p.requires_grad for held in built.parameters for p in held.values())
        return any(p.requires_grad for p in module.parameters())

    def original(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward that the module's class has."""
        return type(module).forward(module, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return type(self), (self.module,)


class _Built:
    """What was made of a module, and what it was made of."""

    def __init__(self, module: nn.Module, stack: FusedStack, extra: Any):
        self.stack = stack
        self.extra = extra
        self._children = list(module._modules.values())
        self.parameters = [m._parameters for m in module.modules() if m._parameters]
        # The memory of a parameter tells whether its values are the ones that were packed: no other may get
        # it, as one can by `model.bfloat16().float()`.
        self._memory = [p.detach() for p in module.parameters()]

    def current(self, module: nn.Module) -> bool:
        return list(module._modules.values()) == self._children and self.stack.unchanged()


def check_attachable(module: nn.Module, fused: Fused) -> None:
    """CannotFuse where `fused` may not take the place of the module's forward."""
    if "forward" in vars(module):
        raise CannotFuse("its forward was replaced on the instance")
    fused.check(module)


def attach(module: nn.Module, fused: Fused) -> None:
    """Put `fused` in the place of the module's forward."""
    vars(module)["forward"] = fused


def detach(module: nn.Module) -> None:
    """Give a module its own forward back."""
    if fused_of(module) is not None:
        del vars(module)["forward"]


def fused_of(module: nn.Module) -> Fused | None:
    """What `attach` put there."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, Fused) else None


def needs_grad(x: Tensor) -> bool:
    """Whether autograd would follow a call, into its input."""
    return x.requires_grad and _grad_enabled()


def check_input(x: Tensor) -> None:
    """CannotFuse unless `x` is what the core reads: a plain tensor in memory; nor if a gradient is wanted."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise CannotFuse(f"its input is a {type(x).__name__}")
    if not x.is_cpu or x.layout is not torch.strided or x.is_nested or x.dtype not in _FLOATS:
        raise CannotFuse(f"its input is of {x.dtype} on {x.device} ({x.layout})")
    if needs_grad(x):
        raise CannotFuse("a gradient of its input is wanted")


def recorder() -> str:
    """What has to see each operation of this call, if anything."""
    if _tracing() is not None or _modes() or _transforms() is not None or forward_ad._current_level >= 0:
        return "something records its operations (tracing, a dispatch mode, torch.func)"
    return "torch.autocast is on" if _autocast("cpu") else ""


@cache
def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Of the positional arguments of its forward, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(cls.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]
