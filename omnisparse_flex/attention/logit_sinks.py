"""Logit sinks: one learned number per query head, the logit of a virtual key that has no value.

A sink joins the softmax's denominator and nothing else, so attention with it is attention
without it times ``sigmoid(lse - sink)``, with the log-sum-exp of the real keys' logits.
Where no differentiable log-sum-exp is at hand, the sink becomes a key (``dense_with_sinks`` for
SDPA, ``with_sink_block`` for FlexAttention).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.attention.lse_attention import attend_keys
from omnisparse_flex.errors import require

#: Logits before scaling that a sink's channels hold; float16 ends at 65504.
LARGEST = 6e4
#: Channels added to queries and keys that carry the sink: fused kernels want head_dim divisible by 8.
CHANNELS = 8


def check_sinks(sinks: Tensor, query: Tensor, name: str) -> None:
    """Refuse what is not one logit per head of ``query`` (B, Hq, L, D).

    Raises:
        ConfigError: Under ``name``, the argument that the user wrote.
    """
    require(isinstance(sinks, Tensor), name, "be a tensor", type(sinks).__name__)
    heads = query.shape[1]
    require(sinks.dim() == 1 and sinks.shape[0] == heads, name, f"have shape ({heads},)", tuple(sinks.shape))
    require(sinks.is_floating_point(), name, "be floating point", sinks.dtype)
    require(sinks.device == query.device, name, f"be on query's device {query.device}", sinks.device)


def discount(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Give the sinks their share of each row's mass.

    Args:
        out: (B, Hq, L, Dv), attention without sinks.
        lse: (B, Hq, L), natural log-sum-exp of its logits; float32 or float64.
        sinks: (Hq,).

    Returns:
        (B, Hq, L, Dv) in out's dtype. Differentiable in all three.
    """
    return (out * keys_share(lse, sinks).unsqueeze(-1)).to(out.dtype)


def keys_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What the sinks (Hq,) leave of each row's mass to its keys, whose log-sum-exp is ``lse`` (B, Hq, L)."""
    # A row without keys is 0 already; infinities would make its gradient NaN.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])


def dense_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """SDPA with sinks.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        sinks: (Hq,).
        mask: (B, 1 or Hq, L, S) bool (True = may attend) or additive, or None.
        is_causal: Query i sees keys up to i; only without a mask.
        scale: Logit scale.
        dropout: Probability.

    Returns:
        (B, Hq, L, Dv), differentiable in query, key, value and sinks. A query with no key gives 0.

    Our choice: the sink is a key in front, told apart by channels of its own, because SDPA gives no
    differentiable log-sum-exp. One query in front of all lets SDPA's upper-left causality show it to everybody.
    """
    if query.shape[2] == 1 and dropout == 0:
        return _one_query(query, key, value, sinks, mask, scale)
    dim, value_dim, kv_len = query.shape[3], value.shape[3], key.shape[2]
    # Two channels hold the sink's high and low bits: half precision would round a large sink. One that no logit
    # comes near, up or down, need not be told from a greater: its channel must stay finite, times 0 too.
    logit = (sinks.to(torch.promote_types(sinks.dtype, torch.float32)) / scale).clamp(-LARGEST, LARGEST)
    high = logit.detach().to(torch.bfloat16).to(logit.dtype)
    channels = F.pad(torch.stack([high, logit - high], -1), (0, CHANNELS - 2)).to(query.dtype)
    query = torch.cat([query, channels[:, None].expand(*query.shape[:3], CHANNELS)], 3)
    first = F.pad(key.new_ones(2), (dim, CHANNELS - 2)).expand(*key.shape[:2], 1, dim + CHANNELS)
    key = torch.cat([first, F.pad(key, (0, CHANNELS))], 2)
    value = F.pad(value, (0, CHANNELS if value_dim == dim else 0, 1, 0))
    if mask is None:
        if is_causal:
            query = F.pad(query, (0, 0, 1, 0))
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        return (out[:, :, 1:] if is_causal else out)[..., :value_dim]
    mask = F.pad(mask.expand(*mask.shape[:3], kv_len), (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    # A mask and enable_gqa together leave the fused CUDA kernels: repeat instead.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out[..., :value_dim]


def softmax_with_sinks(logits: Tensor, sinks: Tensor) -> Tensor:
    """Weights of the real keys, (B, Hq, L, S) in float32 (float64): they add up to less than 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat([logits, column], 3), 3)[..., :-1]


def _one_query(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A decoded token: its logits are few, and copies of all keys would cost more than reading them."""
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    if mask is None and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, sinks))):
        out, lse = (x.flatten(1, 2).unsqueeze(2) for x in attend_keys(rows, key, value, None, scale))
        return discount(out, lse, sinks).to(value.dtype)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (rows.to(wide) * scale @ key.to(wide).transpose(-1, -2)).flatten(1, 2).unsqueeze(2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = softmax_with_sinks(logits, sinks).to(value.dtype)
    summed: Tensor = weights.squeeze(2).unflatten(1, (key.shape[1], -1)) @ value
    return summed.flatten(1, 2).unsqueeze(2)


class SinkBlock(NamedTuple):
    """Operands of a flex call whose first block of keys holds the sinks, for kernels without a log-sum-exp.

    Attributes:
        key: (B, Hkv, block + S, D).
        value: (B, Hkv, block + S, Dv), 0 at the sink.
        keep: bool (B or 1, Hq or 1, NQ, 1 + NK).
        full: The same for blocks without a mask.
        mask_mod: Over the longer keys; its trailing arguments are those of the given one.
        score_mod: The same, with the sinks as one more trailing argument.
    """

    key: Tensor
    value: Tensor
    keep: Tensor
    full: Tensor
    mask_mod: Callable[..., Tensor]
    score_mod: Callable[..., Tensor]


def with_sink_block(
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    full: Tensor,
    mask_mod: Callable[..., Tensor],
    score_mod: Callable[..., Tensor],
    block: int,
) -> SinkBlock:
    """Put one block of keys in front, of which the first is every head's sink and the others are nobody's.

    Args:
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        keep: bool (B or 1, Hq or 1, NQ, NK).
        full: bool, broadcastable to ``keep``.
        mask_mod: ``(b, h, q, kv, *mask_buffers) -> bool``.
        score_mod: ``(score, b, h, q, kv, *score_buffers) -> score``.
        block: Keys of a block.
    """

    def mask_with_sink(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *buffers: Tensor) -> Tensor:
        own = mask_mod(b, h, q, torch.where(kv < block, 0, kv - block), *buffers)
        return (kv == 0) | ((kv >= block) & own)

    def score_with_sink(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *buffers: Tensor) -> Tensor:
        *others, sinks = buffers
        own = score_mod(score, b, h, q, torch.where(kv < block, 0, kv - block), *others)
        return torch.where(kv < block, sinks[h].to(own.dtype), own)

    # Realized: Inductor fails to bound what computes the maps once a concatenation has shifted its index.
    keep, full = (torch.ops.omnisparse.realize(x) for x in (keep, full))
    key, value = (F.pad(x, (0, 0, block, 0)) for x in (key, value))
    keep, full = F.pad(keep, (1, 0), value=True), F.pad(full, (1, 0), value=False)
    return SinkBlock(key, value, keep, full, mask_with_sink, score_with_sink)
