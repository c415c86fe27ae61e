"""The operators that carry an attention site and a call's run-time state through Dynamo and AOTAutograd.

``attn`` marks an attention site in a captured graph; left alone it decomposes to dense SDPA. It takes the call's
run-time state (``types.StateTensors``) as operands, for the passes to read. ``bind`` carries the same into the graph of
a module whose attention has no marker, or whose layers hand no keyword arguments on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.attention.logit_sinks import dense_with_sinks, softmax_with_sinks

_lib = torch.library.Library("omnisparse", "FRAGMENT")
_lib.define(
    "attn(Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor? mask, bool is_causal, "
    "float scale, int layer, float softcap, Tensor? sinks=None, Tensor? visual=None, Tensor? recall=None, "
    "Tensor? stats=None, Tensor? maps=None, Tensor? recalls=None, Tensor? promises=None) -> Tensor"
)
_lib.define(
    "bind(Tensor? visual, Tensor recall, Tensor? stats, Tensor? maps, Tensor? recalls, Tensor? promises=None) -> Tensor"
)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    layer: int,
    softcap: float,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """What the marker means, densely: (B, Hq, L, D) queries over (B, Hkv, S, D) keys.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        padding: bool (B, S), keys that exist, or None.
        mask: (B, 1 or Hq, L, S) bool (True = may attend) or additive, or None.
        is_causal: Apply lower-right causality (query i sits at i + S - L) when ``mask`` is None.
        scale: Logit scale.
        layer: Decoder layer number; carried for the passes, without effect here.
        softcap: ``c`` of ``c * tanh(logit / c)``; 0: none.
        sinks: (Hq,), logit of each head's virtual key without a value, or None; never soft-capped.
        dropout: Probability; the marker itself has none. Not with both a soft cap and sinks.

    Returns:
        (B, Hq, L, Dv). A query with no key gives 0.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None and padding is None and softcap == 0 and (q_len == kv_len or q_len == 1 or not is_causal):
        # SDPA takes no symbolic bool.
        upper_left = True if is_causal and q_len > 1 else False  # noqa: SIM210
        if sinks is not None:
            return dense_with_sinks(query, key, value, sinks, None, upper_left, scale, dropout)
        return F.scaled_dot_product_attention(query, key, value, is_causal=upper_left, scale=scale, enable_gqa=True)
    if mask is None and is_causal:
        rows = torch.arange(q_len, device=query.device)[:, None] + (kv_len - q_len)
        mask = (torch.arange(kv_len, device=query.device) <= rows)[None, None]
    if padding is not None:
        keys = padding[:, None, None, :]
        mask = keys if mask is None else mask & keys
    if softcap == 0 and sinks is not None:
        return dense_with_sinks(query, key, value, sinks, mask, False, scale, dropout)
    # A mask and enable_gqa together leave the fused CUDA kernels: repeat instead.
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap == 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    logits = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        return softmax_with_sinks(logits, sinks).to(value.dtype) @ value
    weights = torch.softmax(logits.float(), -1).nan_to_num(0.0).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    layer: int,
    softcap: float,
    sinks: Tensor | None = None,
    *state: Tensor | None,
) -> Tensor:
    """The marker left alone: dense, and nothing is made of the state."""
    return dense_attention(query, key, value, padding, mask, is_causal, scale, layer, softcap, sinks)


def _bind(
    visual: Tensor | None, recall: Tensor, stats: Tensor | None, maps: Tensor | None, recalls: Tensor | None,
    promises: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A node that Dynamo must keep; the passes thread its operands to every site and erase it."""
    return recall.detach().clone()


_lib.impl("attn", _attn, "CompositeImplicitAutograd")
_lib.impl("bind", _bind, "CompositeImplicitAutograd")
torch.fx.node.has_side_effect(torch.ops.omnisparse.bind)
torch.fx.node.has_side_effect(torch.ops.omnisparse.bind.default)
