"""Gradients of token attention on CUDA, a quarter of the KV heads at a time: the keys' are summed in float32.

Importing this module needs Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from omnisparse_flex.attention.tokens.key_lists import far_lists
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.kernels.attend_lists import KeyLists
from omnisparse_flex.kernels.attend_lists_backward import gradients
from omnisparse_flex.masks.tokens.select import TokenSelection

#: The lists of keys take the keys' and values' bytes divided by this.
LISTS = 8


def backward_in_head_chunks(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, near: KeyLists,
    selection: TokenSelection, config: OmniSparseConfig, scale: float, grad_query: Tensor, grad_key: Tensor,
    grad_value: Tensor,
) -> Tensor:  # fmt: skip
    """Gradients under a selection that was made.

    Args:
        grad: (B, Hq, L, D), of the output; last dimension contiguous.
        query: (B, Hq, L, D), last dimension contiguous.
        key: (B, Hkv, S, D), last dimension contiguous.
        value: (B, Hkv, S, D), last dimension contiguous.
        out: (B, Hq, L, D), last dimension contiguous.
        lse: float32 (B, Hq, L) contiguous.
        near: All rows over their always-kept keys.
        selection: The rest.
        config: Rules.
        scale: Logit scale.
        grad_query: (B, Hq, L, D), strides those of ``out``, written: query's gradient; it may be ``out``.
        grad_key: (B, Hkv, S, D), key's gradient is added to it.
        grad_value: (B, Hkv, S, D), value's gradient is added to it.

    Returns:
        float32 (B, Hq, L), each row's output along its gradient.
    """
    delta, group = torch.empty_like(lse), query.shape[1] // key.shape[1]
    for rows, heads in head_chunks(*key.shape[:2]):
        kv, q = (rows, heads), (rows, slice(heads.start * group, heads.stop * group))
        near_part = near.of(*kv)
        lists = itertools.chain([near_part], far_lists(_of_heads(selection, *kv), near_part, config, key, LISTS))
        inputs = (grad[q], query[q], key[kv], value[kv], out[q], lse[q], delta[q])
        sums = gradients(*inputs, grad_query[q], lists, scale)
        grad_key[kv].add_(sums[0])
        grad_value[kv].add_(sums[1])
        del sums  # before the next ones are made
    return delta


def head_chunks(batch: int, kv_heads: int) -> Iterator[tuple[slice, slice]]:
    """Batch rows and KV heads in parts of a quarter or less, where there are four: one row's heads, or whole rows."""
    rows, heads = (batch // 4, kv_heads) if batch >= 4 else (1, max(1, batch * kv_heads // 4))
    for row in range(0, batch, rows):
        for head in range(0, kv_heads, heads):
            yield slice(row, min(row + rows, batch)), slice(head, min(head + heads, kv_heads))


def _of_heads(selection: TokenSelection, rows: slice, heads: slice) -> TokenSelection:
    """The part that lists are made from."""
    return selection._replace(
        rows=selection.rows[rows, heads],
        row_count=selection.row_count[rows, heads],
        chosen=selection.chosen[rows, heads],
        key_count=selection.key_count[rows, heads],
    )
