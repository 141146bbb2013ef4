"""What `fuse_` did with a model that is measured, in one line for its row."""

from __future__ import annotations


def describe(model) -> str:
    """Such as `BERT encoder: 6 blocks in one call`; and calls that were not fused, with the reason."""
    import halfbyte as hb

    parts = []
    for row in hb.fusion_report(model).rows:
        if row.blocks:
            parts.append(f"{row.kind}: {row.blocks} {'block' if row.blocks == 1 else 'blocks'} in one call")
        elif row.reason:
            parts.append(f"{row.name or type(model).__name__} left alone: {row.reason}")
        parts += [f"{count} calls not fused: {why}" for why, count in row.unfused_calls.items()]
    return "; ".join(parts) or "nothing to fuse"
