"""``sparse_attention``: the one call that a pass writes into the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from omnisparse_flex.attention import sink_copies
from omnisparse_flex.attention.call import AttentionCall, SparseCall
from omnisparse_flex.attention.flex import call_flex
from omnisparse_flex.attention.logit_sinks import check_sinks, discount, with_sink_block
from omnisparse_flex.attention.scalar_graph import UntraceableError
from omnisparse_flex.attention.score_captures import with_captures
from omnisparse_flex.attention.select import choose
from omnisparse_flex.attention.sink_copies import original_position, spread_first_blocks
from omnisparse_flex.attention.tokens.dispatch import attend_tokens
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.attention.trace_mask import trace_forbidden, trace_mask_mod
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import require
from omnisparse_flex.masks.blocks.block_lists import wider
from omnisparse_flex.masks.blocks.select import BLOCK, dense_selection
from omnisparse_flex.masks.expr.captures import Captures
from omnisparse_flex.masks.expr.expr import Const, Load, causal, causal_offset, number_in
from omnisparse_flex.masks.expr.index_mask import NO_MASK, IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.types import MaskMod, ScoreMod

#: head_dim range of the flex kernels.
HEAD_DIMS = range(16, 257)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def attend(query: Tensor, key: Tensor, value: Tensor, site: AttentionCall) -> Tensor:
    """Run one attention site: select, build the block lists, call flex.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        site: The rest.

    Returns:
        (B, Hq, L, Dv).
    """
    query, key, value = autocast(*_distinct(query, key, value))
    if isinstance(site, SparseCall) and site.config.granularity == "token":
        return call_token_op(query, key, value, site) if site.rules else attend_tokens(query, key, value, site)
    # Numbers, also where Dynamo made every size a symbol: the kernels' templates divide by them.
    heads, kv_heads = int(query.shape[1]), int(key.shape[1])
    scale = site.scale_for(query)
    keep, full = _maps(query.detach(), key.detach(), site)
    needs_grad = _needs_grad(query, key, value, *site.bias_buffers, *site.score_buffers)
    map_block = BLOCK // site.config.split if isinstance(site, SparseCall) else BLOCK
    key_block = BLOCK if needs_grad else map_block  # the backward takes no narrow blocks

    # Where block lists are ignored, or wider than the map, it is one more captured tensor: realized,
    # because the Triton template cannot read through what computes it.
    has_map = isinstance(site, SparseCall) and (not site.lists or key_block > map_block)
    selection = (torch.ops.omnisparse.realize(keep),) if has_map else ()
    captures = Captures.of((*site.mask.buffers, *selection), query.device)
    copied = _first_blocks_to_copy(key, site) if needs_grad else 0
    mask_mod = _mask_of_call(site, captures, map_block=map_block if has_map else 0, copied=copied)
    score_captures = Captures.of(site.bias_buffers, query.device)
    score_mod = _score_of_call(site, score_captures, copied=copied)
    score_buffers = (*site.score_buffers, *score_captures.tensors)

    if key_block > map_block:
        keep, full = wider(keep, full, key_block // map_block)
    if copied > 0:
        key, value, keep, full = spread_first_blocks(key, value, keep, full, count=copied, block=BLOCK)
    needs_lse = site.sinks is not None and _has_lse(query, site)
    if site.sinks is not None and not needs_lse:
        operands = (key, value, keep, full, mask_mod, score_mod)
        key, value, keep, full, mask_mod, score_mod = with_sink_block(*operands, key_block)
        score_buffers = (*score_buffers, torch.ops.omnisparse.realize(site.sinks))
    out, lse = call_flex(
        query,
        key,
        value,
        keep=keep,
        full=full,
        needs_grad=needs_grad,
        mask_mod=mask_mod,
        mask_buffers=captures.tensors,
        score_mod=score_mod,
        score_buffers=score_buffers,
        scale=scale,
        needs_lse=needs_lse,
        enable_gqa=heads != kv_heads,
        key_block=key_block,
        options=dict(site.kernel_options),
    )
    return out if site.sinks is None or lse is None else discount(out, lse, site.sinks)


def _has_lse(query: Tensor, site: AttentionCall) -> bool:
    """Whether the flex kernel that runs ``site`` returns its log-sum-exp; Inductor's on the CPU does not."""
    return query.device.type != "cpu" or not (site.lists or torch.compiler.is_dynamo_compiling())


def _maps(query: Tensor, key: Tensor, site: AttentionCall) -> tuple[Tensor, Tensor]:
    """The kept and the full block maps of a site."""
    if not isinstance(site, SparseCall):
        return dense_selection(query, key, site.mask)
    selection = choose(query, key, site)
    return selection.keep, selection.layout.full


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _first_blocks_to_copy(key: Tensor, site: AttentionCall) -> int:
    """First blocks that ``spread_first_blocks`` repeats; 0 where they need not hold the sinks, or it does not pay."""
    if not isinstance(site, SparseCall) or not site.lists or site.mask.first_key_unaligned:
        return 0
    if key.shape[2] < sink_copies.MIN_KEYS:
        return 0
    return (site.config.sink_size + BLOCK - 1) // BLOCK


def _mask_of_call(site: AttentionCall, captures: Captures, *, map_block: int, copied: int) -> Callable[..., Tensor]:
    """The site's mask, and in it the map of kept blocks of ``map_block`` keys, if not 0; captures trailing."""

    def omnisparse_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *arguments: Tensor) -> Tensor:
        load, kv = captures.loader(arguments), original_position(kv, count=copied, block=BLOCK)
        allowed = site.mask.at(load, b, h, q, kv)
        if map_block > 0:
            allowed = allowed & load(len(site.mask.buffers), (b, h, q // BLOCK, kv // map_block))
        return allowed

    return omnisparse_mask


def _score_of_call(site: AttentionCall, captures: Captures, *, copied: int) -> Callable[..., Tensor]:
    """The site's score change; captures trailing."""
    count = len(site.score_buffers)

    def omnisparse_score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *arguments: Tensor) -> Tensor:
        load = captures.loader(arguments[count:])
        kv = original_position(kv, count=copied, block=BLOCK)
        return site.score(load, score, b, h, q, kv, *arguments[:count])

    return omnisparse_score


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


def autocast_dtype(device: str) -> torch.dtype | None:
    """The ambient autocast dtype of a device type, None outside autocast."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # asking for meta raises
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """Follow autocast as SDPA does; the flex operator is not on its list."""
    dtype = autocast_dtype(tensors[0].device.type)
    return [x if dtype is None or x.dtype not in DTYPES else x.to(dtype) for x in tensors]


def _distinct(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The flex templates of torch 2.11 refuse one tensor in two roles."""
    return (
        query,
        torch.ops.omnisparse.realize(key) if key is query else key,
        torch.ops.omnisparse.realize(value) if value is key or value is query else value,
    )


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
