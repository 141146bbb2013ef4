"""Hooks that transformers installs at the first call that asks for attentions, and leaves in the model."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from .attach import Fused

_CAPTURE = "transformers.utils.output_capturing"
_FLAG = "_output_capturing_hooks_installed"


class FusedTransformer(Fused):
    """A module of transformers. Their hooks would keep the stack from running for ever: they do nothing but
    record what a call asked for, and are installed again when they are missed.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._lock = threading.Lock()
        self._unfused_now = 0  # calls under way whose hooks must stay

    def original(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self._unfused_now += 1
        try:
            return super().original(module, *args, **kwargs)
        finally:
            with self._lock:
                self._unfused_now -= 1
            self.without_capture(module)

    def without_capture(self, module: nn.Module) -> None:
        """Removes them, while no call needs them."""
        if _FLAG not in vars(module):
            return
        with self._lock:
            if self._unfused_now:
                return
            for part in module.modules():
                vars(part).pop(_FLAG, None)
                hooks = part._forward_hooks
                for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "") == _CAPTURE]:
                    del hooks[key]
