"""One call of FlexAttention: the operator under AOT tracing and eagerly, the function under Dynamo."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_hop
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from omnisparse_flex.masks.blocks.block_lists import block_mask_from_maps
from omnisparse_flex.masks.blocks.select import BLOCK


def call_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep: Tensor,
    full: Tensor,
    mask_mod: Callable[..., Tensor],
    mask_buffers: tuple[Tensor, ...],
    score_mod: Callable[..., Tensor],
    score_buffers: tuple[Tensor, ...],
    scale: float,
    needs_grad: bool,
    needs_lse: bool,
    enable_gqa: bool,
    key_block: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attend over the kept blocks.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        keep: bool (B or 1, Hq or 1, NQ, NK), blocks to compute.
        full: bool, broadcastable to ``keep``: blocks that run without ``mask_mod``.
        mask_mod: ``(b, h, q, kv, *mask_buffers) -> bool``.
        mask_buffers: Its trailing arguments.
        score_mod: ``(score, b, h, q, kv, *score_buffers) -> score``.
        score_buffers: Its trailing arguments; they may require gradients.
        scale: Logit scale.
        needs_grad: A backward will follow.
        needs_lse: The log-sum-exp is wanted too. Inductor's CPU kernel has none.
        enable_gqa: Hq is a multiple of Hkv, not the same.
        key_block: Keys of a block; ``BLOCK`` where a backward will follow.
        options: Kernel options.

    Returns:
        (B, Hq, L, Dv), and the natural log-sum-exp of the logits (B, Hq, L) or None; it is float32 (float64),
        differentiable, -inf or any number where a row has no key.
    """
    block_mask = block_mask_from_maps(
        keep,
        full,
        lambda b, h, q, kv: mask_mod(b, h, q, kv, *mask_buffers),
        (query.shape[2], key.shape[2]),
        BLOCK,
        transposed=needs_grad,
        key_block=key_block,
    )
    if torch.compiler.is_dynamo_compiling():
        how = (scale, needs_lse, enable_gqa, options)
        return _call_function(query, key, value, block_mask, score_mod, score_buffers, *how)
    # The public function refuses CPU gradients, and closures under AOT tracing: call the operator
    # itself, with every captured tensor as a trailing argument.
    complete = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": needs_grad or needs_lse,
        "OUTPUT_MAX": False,
        **options,
    }
    lists = (*block_mask.as_tuple()[:-1], mask_mod)
    # The stubs of the operator do not know that it takes the captured tensors.
    hop: Callable[..., Any] = flex_hop
    out, lse, *_ = hop(query, key, value, score_mod, lists, scale, complete, score_buffers, mask_buffers)
    return out, lse * math.log(2) if needs_lse else None  # the operator's own is to the base 2


def _call_function(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    score_mod: Callable[..., Tensor],
    score_buffers: tuple[Tensor, ...],
    scale: float,
    needs_lse: bool,
    enable_gqa: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The same call as Dynamo can trace it: captured tensors in closures."""
    flex: Callable[..., Any] = flex_attention  # its stubs have one overload for each way to ask
    found = flex(
        query,
        key,
        value,
        score_mod=lambda s, b, h, q, kv: score_mod(s, b, h, q, kv, *score_buffers),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        kernel_options=options or None,
        return_aux=AuxRequest(lse=True) if needs_lse else None,
    )
    return (found[0], found[1].lse) if needs_lse else (found, None)
