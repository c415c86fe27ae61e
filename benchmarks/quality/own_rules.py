"""The library's block rules that are measured side by side with others', and the paper's."""

from __future__ import annotations

from omnisparse_flex import OmniSparseConfig

#: The rules that were the default before the peak rule.
COUNTED = OmniSparseConfig(target_recall=0.98, key_block=128, scoring="mean_pool", budget="per_head", window_size=256)


def peak(key_block: int, window: int) -> OmniSparseConfig:
    """The peak rule with this width of key blocks and this window."""
    return OmniSparseConfig(budget="peak", target_recall=0.6, key_block=key_block, window_size=window)


#: Row -> rules of blocks.
BLOCK_RULES = {
    "counted mass": COUNTED,
    **{f"peak, {k} keys, window {w}": peak(k, w) for k in (64, 128) for w in (128, 256)},
}
