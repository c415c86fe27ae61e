"""Causal attention to the latest tokens only."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.masks._checks import check_count
from omnisparse_flex.types import MaskMod


def sliding_window(size: int) -> MaskMod:
    """A query sees itself and the ``size - 1`` keys before it: ``q_idx - size < kv_idx <= q_idx``.

    Args:
        size: Window in tokens, the query itself included; at least 1.

    Returns:
        A ``mask_mod``.

    Raises:
        ConfigError: If ``size`` is not an int of at least 1.

    Source: Longformer, arXiv 2004.05150, section 3.1, in the causal form of Mistral 7B,
    arXiv 2310.06825, section 2. Our choice: the window counts the query, as in
    transformers' ``sliding_window``.
    """
    check_count("size", size, minimum=1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (kv_idx > q_idx - size)

    mask_mod.__name__ = f"sliding_window_{size}"
    return mask_mod
