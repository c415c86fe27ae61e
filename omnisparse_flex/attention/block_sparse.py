"""One attention site over blocks: select, build the block lists, call FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omnisparse_flex.attention import sink_copies
from omnisparse_flex.attention.call import AttentionCall, SparseCall
from omnisparse_flex.attention.flex import call_flex
from omnisparse_flex.attention.logit_sinks import discount, with_sink_block
from omnisparse_flex.attention.select import choose
from omnisparse_flex.attention.sink_copies import original_position, spread_first_blocks
from omnisparse_flex.attention.tokens.dispatch import attend_tokens
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.masks.blocks.block_lists import wider
from omnisparse_flex.masks.blocks.select import BLOCK, dense_selection
from omnisparse_flex.masks.expr.captures import Captures

#: head_dim range of the flex kernels.
HEAD_DIMS = range(16, 257)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    is_grouped = int(query.shape[1]) != int(key.shape[1])
    keep, full = _maps(query.detach(), key.detach(), site)
    needs_grad = _needs_grad(query, key, value, *site.bias_buffers, *site.score_buffers)
    map_block = BLOCK // site.config.split if isinstance(site, SparseCall) else BLOCK
    key_block = BLOCK if needs_grad else map_block  # the backward takes no narrow blocks
    # Where block lists are ignored, or wider than the map, the mask reads the map.
    reads_map = isinstance(site, SparseCall) and (not site.lists or key_block > map_block)
    copied = _first_blocks_to_copy(key, site) if needs_grad else 0
    shown = keep if reads_map else None
    mask_mod, mask_buffers, score_mod, score_buffers = _mods(site, query.device, shown, map_block, copied)
    if key_block > map_block:
        keep, full = wider(keep, full, key_block // map_block)
    if copied > 0:
        key, value, keep, full = spread_first_blocks(key, value, keep, full, count=copied, block=BLOCK)
    needs_lse = site.sinks is not None and _has_lse(query, site)
    if site.sinks is not None and not needs_lse:
        with_block = with_sink_block(key, value, keep, full, mask_mod, score_mod, key_block)
        key, value, keep, full, mask_mod, score_mod = with_block
        score_buffers = (*score_buffers, torch.ops.omnisparse.realize(site.sinks))
    out, lse = call_flex(
        query,
        key,
        value,
        keep=keep,
        full=full,
        needs_grad=needs_grad,
        mask_mod=mask_mod,
        mask_buffers=mask_buffers,
        score_mod=score_mod,
        score_buffers=score_buffers,
        scale=site.scale_for(query),
        needs_lse=needs_lse,
        enable_gqa=is_grouped,
        key_block=key_block,
        options=dict(site.kernel_options),
    )
    return out if site.sinks is None or lse is None else discount(out, lse, site.sinks)


Mods = tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[..., Tensor], tuple[Tensor, ...]]


def _mods(site: AttentionCall, device: torch.device, kept_map: Tensor | None, map_block: int, copied: int) -> Mods:
    """The mask function of a flex call and what it captures, then the score function and what that captures."""
    # Realized, because the Triton template cannot read through what computes it.
    selection = () if kept_map is None else (torch.ops.omnisparse.realize(kept_map),)
    captures = Captures.of((*site.mask.buffers, *selection), device)
    mask_mod = _mask_of_call(site, captures, map_block=map_block if selection else 0, copied=copied)
    score_captures = Captures.of(site.bias_buffers, device)
    score_mod = _score_of_call(site, score_captures, copied=copied)
    return mask_mod, captures.tensors, score_mod, (*site.score_buffers, *score_captures.tensors)


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
