"""``sparse_attention``: the one call that a pass writes into the graph."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.logit_sinks import check_sinks
from omnisparse_flex.attention.scalar_graph import UntraceableError
from omnisparse_flex.attention.score_captures import with_captures
from omnisparse_flex.attention.trace_mask import trace_forbidden, trace_mask_mod
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import require
from omnisparse_flex.masks.expr.expr import Const, Load, causal, causal_offset, number_in
from omnisparse_flex.masks.expr.index_mask import NO_MASK, IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.types import MaskMod, ScoreMod


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: OmniSparseConfig,
    visual_mask: Tensor | None = None,
    is_causal: bool = True,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """OmniSparse attention over dense tensors; eagerly or under ``torch.compile``.

    Args:
        query: (B, Hq, L, D), float16 / bfloat16 / float32 (float64 eagerly).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        config: Selection rules. Only the first ``target_recall`` is used if it lists layers.
        visual_mask: bool (B, S), visual tokens. The text before and after them, and runs of text of 128 tokens and
            more, are always kept; shorter runs between them are eligible as they are. None: every token is eligible.
        is_causal: Query i sees keys up to i + S - L (lower-right causality).
        mask_mod: Further restriction, ``(b, h, q_idx, kv_idx) -> bool``, pointwise.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, pointwise.
        scale: Logit scale; None: 1 / sqrt(D).
        enable_gqa: Allow Hq to be a multiple of Hkv.
        sinks: (Hq,), logit of each head's virtual key, which joins the softmax's denominator and has no value, as in
            gpt-oss; it may require gradients. None: no sink.

    Returns:
        (B, Hq, L, Dv). A query with no allowed key gives 0.

    Raises:
        ConfigError: On mismatched shapes or types, before anything is computed.

    Source: PAPER "KV selection", "Query selection". Our choice: lower-right causality,
    because a query block after a cache is the common case. Recall is of the real tokens' mass:
    what is selected does not depend on ``sinks``.
    """
    _check(query, key, value, visual_mask, enable_gqa)
    config.check_head_dim(query.shape[3])
    if sinks is not None:
        check_sinks(sinks, query, "sinks")
    q_len, kv_len = query.shape[2], key.shape[2]
    order = causal_index_mask(kv_len - q_len, query.device) if is_causal else NO_MASK
    offset: Tensor | int = kv_len - q_len if is_causal else 0
    mask = order if mask_mod is None else _with_mask_mod(order, mask_mod, query.device)
    if score_mod is not None and isinstance(mask, IndexMask) and not torch.compiler.is_dynamo_compiling():
        mask = mask.intersect(trace_forbidden(score_mod, query.dtype, query.device))
    if mask_mod is not None and not is_causal and isinstance(mask, IndexMask):
        position = causal_offset(mask.expr)  # causality that came in the mask_mod says where queries sit
        offset = offset if position is None else number_in(position, mask.buffers, query.device)
    learned: tuple[Tensor, ...] = ()
    if score_mod is not None and torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
        score_mod, learned = with_captures(score_mod, query.dtype, query.device)
    site = SparseCall(
        config=config,
        target=config.recall_of(0),
        min_peak=config.min_peak_of(0),
        mask=mask,
        score_mod=score_mod,
        score_buffers=learned,
        scale=scale,
        visual=visual_mask,
        q_offset=offset,
        sinks=sinks,
    )
    return attend(query, key, value, site)


def causal_index_mask(offset: int | torch.SymInt, device: torch.device) -> IndexMask:
    """Causality with query 0 at position ``offset``; a symbolic offset becomes a captured tensor."""
    if isinstance(offset, int):
        return IndexMask(causal(Const(offset)))
    return IndexMask(causal(Load(0, ())), (scalar(offset, device),))


def scalar(value: float | torch.SymInt | torch.SymFloat, device: torch.device) -> Tensor:
    """A 0-d int64 or float32 tensor of a number or symbolic size."""
    dtype = torch.float32 if isinstance(value, (float, torch.SymFloat)) else torch.int64
    return torch.full((), value, dtype=dtype, device=device)  # type: ignore[arg-type]


def _with_mask_mod(order: IndexMask, mask_mod: MaskMod, device: torch.device) -> IndexMask | OpaqueMask:
    if torch.compiler.is_dynamo_compiling():
        return OpaqueMask(order, mask_mod)
    try:
        traced = trace_mask_mod(mask_mod, device)
        # What is allowed has no gradient, and the operator refuses tensors that want one.
        return order.intersect(dataclasses.replace(traced, buffers=tuple(x.detach() for x in traced.buffers)))
    except UntraceableError:
        return OpaqueMask(order, mask_mod)


def _check(query: Tensor, key: Tensor, value: Tensor, visual: Tensor | None, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(x.dim() == 4, name, "have shape (B, H, N, D)", tuple(x.shape))
        require(x.is_floating_point(), name, "be floating point", x.dtype)
        require(x.dtype == query.dtype, name, f"have query's dtype {query.dtype}", x.dtype)
        require(x.device == query.device, name, f"be on query's device {query.device}", x.device)
    batch, heads, kv_len = query.shape[0], query.shape[1], key.shape[2]
    require(query.shape[2] > 0, "query", "hold at least one token", tuple(query.shape))
    require(kv_len > 0, "key", "hold at least one token", tuple(key.shape))
    require(key.shape[:3] == value.shape[:3], "value", f"match key's {tuple(key.shape[:3])}", tuple(value.shape[:3]))
    require(key.shape[0] == batch, "key", f"have query's batch size {batch}", key.shape[0])
    require(key.shape[3] == query.shape[3], "key", f"have query's head_dim {query.shape[3]}", key.shape[3])
    rule = f"have heads that divide query's {heads}" if enable_gqa else f"have query's {heads} heads"
    fits = heads % key.shape[1] == 0 if enable_gqa else heads == key.shape[1]
    require(fits, "key", rule, key.shape[1])
    if visual is not None:
        require(visual.dtype == torch.bool, "visual_mask", "be bool", visual.dtype)
        rule = f"have shape {(batch, kv_len)}"
        require(tuple(visual.shape) == (batch, kv_len), "visual_mask", rule, tuple(visual.shape))
