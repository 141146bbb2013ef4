"""fuse_: blocks of a model that run in one call into the core, and what is left to their own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from ..modules import check_module, join
from . import bert, llama, patterns, torch_encoder
from .attach import Fused, attach, check_attachable, detach, fused_of
from .report import FusionReport, FusionRow
from .stack import CannotFuse

# What fuses a module: a family says which subclass of Fused, None for a module that it does not know, or
# raises CannotFuse for one that it knows and leaves alone. The first answer counts.
_Family = Callable[[nn.Module], type[Fused] | None]
_FAMILIES: tuple[_Family, ...] = (bert.family, llama.family, torch_encoder.family, patterns.family)
_NOT_ASKED = "fuse_ has not been called on it"


def fuse_(model: nn.Module) -> nn.Module:
    """Have the blocks of `model` that halfbyte knows run as fused operators, in place; returns the model.

    Known are, of transformers, BERT (which MiniLM is), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA,
    MPNet, Llama, Mistral and Qwen2; torch.nn.TransformerEncoder and TransformerEncoderLayer; wherever they
    are in the model. And, among quantized layers of other modules, a linear layer with the norm before it
    and the activation, the gate's product and the residual sum after it. Layers may be of any scheme and any
    mixture, float32 included.

    Blocks run in one call into the core, with float32 between their layers, so that results differ from the
    unfused ones by roundings. Modules, parameters and buffers stay where and what they are: state_dict, save,
    summary and quantize_ work as before, in any order (patterns are looked for where layers are quantized
    already). What a call cannot do fused (gradients, dropout in training mode, a hook inside a block,
    attention weights as output, an unusual mask, torch.compile) runs the module's own forward;
    `fusion_report` counts such calls, and names the blocks that are left alone.

    Raises DTypeError for what is no module. Calling it again looks at what is not fused yet.
    """
    check_module(model, "fuse_")
    for _, module, fused, _ in list(_found(model)):
        if fused is not None and fused_of(module) is not fused:
            attach(module, fused)
            if fused.whole:
                for part in module.modules():
                    if part is not module:
                        detach(part)
    return model


def unfuse_(model: nn.Module) -> nn.Module:
    """Give every module of `model` its own forward back, in place; returns the model."""
    check_module(model, "unfuse_")
    for module in model.modules():
        detach(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What is fused in `model`, what is left alone and why, and how many calls went which way.

    Layers that have not run yet are packed.
    """
    check_module(model, "fusion_report")
    rows = []
    for name, module, fused, reason in _found(model):
        if fused is None:
            rows.append(FusionRow(name, type(module).__name__, 0, "", reason, 0, {}))
        elif fused_of(module) is not fused:
            rows.append(FusionRow(name, fused.kind, 0, "", _NOT_ASKED, 0, {}))
        else:
            reason = fused.obstacle()
            blocks = 0 if reason else fused.blocks(module)
            what = "" if reason else fused.what
            reason = reason or fused.left(module)
            rows.append(FusionRow(name, fused.kind, blocks, what, reason, fused.calls, dict(fused.unfused)))
    return FusionReport(tuple(rows))


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module, Fused | None, str]]:
    """The modules that are fused or can be, with the object that does it; and those that are left alone, with
    the reason. What is inside of a fused one is not looked at, patterns excepted.
    """
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        fused, reason = _look_at(module)
        if fused is not None or reason:
            yield name, module, fused, reason
        if fused is None or not fused.whole:
            children = reversed(module._modules.items())
            stack += [(join(name, attribute), child) for attribute, child in children if child is not None]


def _look_at(module: nn.Module) -> tuple[Fused | None, str]:
    """What fuses a module, or why it is left alone, or neither."""
    if (fused := fused_of(module)) is not None:
        return fused, ""
    try:
        for family in _FAMILIES:
            if (cls := family(module)) is not None:
                fused = cls(module)
                check_attachable(module, fused)
                return fused, ""
    except CannotFuse as reason:
        return None, str(reason)
    return None, ""
