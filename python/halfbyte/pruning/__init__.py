"""Pruning: which weights of a model go, the masks that hold them at zero, and schedules with fine-tuning."""

from __future__ import annotations

from .masks import LayerSparsity, Sparsity, remove_masks_, sparsity
from .prune import prune_
from .schedule import PruneSchedule, Step

__all__ = ["LayerSparsity", "PruneSchedule", "Sparsity", "Step", "prune_", "remove_masks_", "sparsity"]
