"""A mask in the form that a decoder's attention takes: bool, additive, or a BlockMask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.types import MaskMod

#: Attention functions that take a bool mask. ``omnisparse`` is what ``apply_omnisparse`` installs; it stays dense here.
TAKE_BOOL = ("sdpa", "omnisparse")
ADDS_THE_MASK = "eager"
TAKES_BLOCKS = "flex_attention"


def attention_of(config: Any) -> str:
    """The attention function of a decoder, by transformers' name.

    Args:
        config: A decoder's own config (``config.get_text_config(decoder=True)``).

    Returns:
        One of ``sdpa``, ``omnisparse``, ``eager`` and ``flex_attention``.

    Raises:
        ConfigError: If its attention takes no mask, or a layer has a sliding window.
    """
    name = config._attn_implementation
    known = (*TAKE_BOOL, ADDS_THE_MASK, TAKES_BLOCKS)
    require(name in known, "attn_implementation", f"take a mask ({', '.join(known)})", name)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        require(window is None, "sliding_window", "be None: rows above lie outside a window", window)
    elif others := sorted(set(kinds) - {"full_attention"}):
        raise ConfigError(f"layer_types must be full_attention in every layer, got {', '.join(others)}")
    return str(name)


def in_form(
    attention: str,
    mask_mod: MaskMod,
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | BlockMask:
    """``mask_mod`` as the 4-D ``attention_mask`` of a transformers decoder.

    Args:
        attention: As ``attention_of`` returns it.
        mask_mod: Over ``queries`` and ``keys``.
        batch: Batch rows of the mask; 1 where it is the same in all.
        queries: Tokens of the forward.
        keys: Slots of the KV cache after it.
        device: Where the mask lives.
        dtype: Of the hidden states, for an additive mask.

    Returns:
        ``(batch, 1, queries, keys)``: bool, True where a key is seen; for ``eager`` 0 there and the least
        number of ``dtype`` elsewhere, for it adds what it gets and would add True as 1; for ``flex_attention``
        a BlockMask.
    """
    if attention == TAKES_BLOCKS:
        return create_block_mask(mask_mod, batch if batch > 1 else None, None, queries, keys, device=device)
    b, q, kv = (torch.arange(extent, device=device) for extent in (batch, queries, keys))
    seen = mask_mod(b[:, None, None, None], b.new_zeros(()), q[:, None], kv)
    seen = seen.expand(batch, 1, queries, keys)
    if attention == ADDS_THE_MASK:
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    return seen
