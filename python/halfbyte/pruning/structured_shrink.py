"""Taking units away: new tensors for all layers first, then one swap that an error undoes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import quiet
from .structured_units import Group, Part

_MISSING = object()
_Change = tuple[Any, str, Any]  # (a dict, or an object with attributes; key; new value)


def shrink(groups: list[Group], keeps: list[Tensor | None]) -> None:
    """Leave each group the units `keeps` names (int64, ascending), all of them for None.

    Modules stay; their parameters and buffers are replaced. A config that says how many units there are gets
    the new number where all layers under it agree; `note` of the groups says where it does not.
    """
    changes = [*_tensors(groups, keeps), *_sizes(groups, keeps), *_settings(groups, keeps)]
    done: list[_Change] = []
    try:
        for owner, key, value in changes:
            done.append(
                (
                    owner,
                    key,
                    owner.get(key, _MISSING) if isinstance(owner, dict) else getattr(owner, key, _MISSING),
                )
            )
            _put(owner, key, value)
    except BaseException:
        for owner, key, value in reversed(done):
            _put(owner, key, value)
        raise


def _put(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    elif value is _MISSING:
        with contextlib.suppress(AttributeError):
            delattr(owner, key)
    else:
        setattr(owner, key, value)


def _tensors(groups: list[Group], keeps: list[Tensor | None]) -> list[_Change]:
    """The new parameters and buffers. One tensor may lose outputs in one group and inputs in another."""
    cuts: dict[tuple[nn.Module, str], list[tuple[Part, Tensor]]] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for part in group.parts() if keep is not None else ():
            cuts.setdefault((part.module, part.tensor), []).append((part, keep))
    changes: list[_Change] = []
    with torch.inference_mode(False), torch.no_grad():
        for (module, tensor), parts in cuts.items():
            old = getattr(module, tensor)
            new = old.detach()
            for part, keep in parts:
                index = part.positions[keep].flatten().sort().values
                new = new.index_select(part.axis, index.to(new.device))
            new = new.clone() if new.is_inference() else new
            if tensor in module._parameters:
                held, given = module._parameters, vars(old)
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                vars(new).update(given)
            else:
                held = module._buffers
            changes.append((held, tensor, new))
    return changes


def _sizes(groups: list[Group], keeps: list[Tensor | None]) -> list[_Change]:
    return [
        (vars(size.owner), size.attribute, len(keep) * size.per_unit)
        for group, keep in zip(groups, keeps, strict=True)
        if keep is not None
        for size in group.sizes
    ]


def _settings(groups: list[Group], keeps: list[Tensor | None]) -> list[_Change]:
    """What the configs say, where every layer that they speak of agrees."""
    wanted: dict[tuple[int, str], list[tuple[Group, Any, int]]] = {}
    for group, keep in zip(groups, keeps, strict=True):
        left = group.units if keep is None else len(keep)
        for size in group.settings:
            key = (id(size.owner), size.attribute)
            wanted.setdefault(key, []).append((group, size.owner, left * size.per_unit))
    changes: list[_Change] = []
    for (_, attribute), entries in wanted.items():
        config, values = entries[0][1], {value for *_, value in entries}
        if len(values) > 1:
            _note(entries, f"config.{attribute} stays {getattr(config, attribute)}: the layers differ")
        elif getattr(config, attribute) != (value := values.pop()):
            changes.append((config, attribute, value))
    changed = {id(config) for config, _, _ in changes}
    fixed = {
        (id(c), key): (c, key, value) for group in groups for c, key, value in group.fixed if id(c) in changed
    }
    changes += [change for change in fixed.values() if getattr(change[0], change[1], None) != change[2]]
    for identity in changed:
        own = [change for change in changes if id(change[0]) == identity]
        if reason := _refusal(own):
            entries = [entry for (i, _), entries in wanted.items() if i == identity for entry in entries]
            _note(entries, f"transformers will not save or read a config of these numbers: {reason}")
    return changes


def _note(entries: Iterable[tuple[Group, Any, int]], text: str) -> None:
    for group, *_ in entries:
        if text not in group.note:
            group.note = f"{group.note}; {text}" if group.note else text


def _refusal(changes: list[_Change]) -> str:
    """Why a config with these changes cannot be read back, empty where it can."""
    config = changes[0][0]
    if not hasattr(type(config), "from_dict") or not hasattr(config, "to_dict"):
        return ""
    try:
        with quiet():
            type(config).from_dict(config.to_dict() | {key: value for _, key, value in changes})
    except Exception as error:
        return str(error).strip().splitlines()[-1].strip()
    return ""
