"""Token attention on CUDA: the same three steps as ``token_attention``, in Triton kernels.

Beside the output it holds no more than the layer's keys and values take: the selection is made, and attended to, a few
segments at a time, and is kept as bits.

Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnisparse_flex.guard import guarded
from omnisparse_flex.listed_gradients import listed_gradients
from omnisparse_flex.logit_sinks import keys_share
from omnisparse_flex.masks.plain import PlainMask
from omnisparse_flex.masks.quick_select import select_quickly
from omnisparse_flex.masks.rectangle_kernel import Lists, attend_lists
from omnisparse_flex.masks.segments import SegmentLayout
from omnisparse_flex.masks.select import BLOCK
from omnisparse_flex.masks.tokens import TokenSelection
from omnisparse_flex.quick_gradients import gradients_by_heads
from omnisparse_flex.site import Site
from omnisparse_flex.token_lists import far_lists, near_lists

#: The lists of keys take the keys' and values' bytes divided by this.
LISTS = 2

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Attended(NamedTuple):
    """What a forward pass leaves behind.

    Attributes:
        out: (B, Hq, L, D) contiguous.
        lse: float32 (B, Hq, L) contiguous, sinks included; -inf where the output is 0 whatever the values are.
        near: All rows over their always-kept keys.
        selection: The rest.
    """

    out: Tensor
    lse: Tensor
    near: Lists
    selection: TokenSelection


def attend_quickly(
    query: Tensor, key: Tensor, value: Tensor, site: Site, plain: PlainMask, segments: SegmentLayout, text: Tensor
) -> tuple[Tensor, TokenSelection] | None:
    """One attention site at token granularity.

    Args:
        query: (B, Hq, L, D), D a power of 2 from 16 to 256; float16, bfloat16 or float32.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, D).
        site: Rules, scale and logit sinks; nothing of it changes scores.
        plain: Its mask.
        segments: Its always-kept blocks.
        text: bool (B or 1, L), queries that are always active.

    Returns:
        (B, Hq, L, D), differentiable, and what was selected; None once the kernels failed to compile.

    Source: PAPER "Lazy + active in one output".
    """
    query, key, value = (_rowwise(x) for x in (query, key, value))
    done = _attended(query, key, value, site, plain, segments, text)
    if done is None:
        return None
    out: Tensor = _Attend.apply(query, key, value, site.sinks, site, done)  # type: ignore[no-untyped-call]
    return out, done.selection


@torch.no_grad()
def gradients_quickly(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    site: Site,
    plain: PlainMask,
    segments: SegmentLayout,
    text: Tensor,
) -> Gradients | None:
    """Gradients of query, key, value and the sinks where nothing but the inputs was kept: attends again.

    Args:
        grad: (B, Hq, L, D), of the output.
        query: As the rest, see ``attend_quickly``.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, D).
        site: Rules, scale and logit sinks.
        plain: Its mask.
        segments: Its always-kept blocks.
        text: bool (B or 1, L).

    Returns:
        Contiguous; None once the kernels failed to compile. The selection is a function of the inputs, so it is the
        same as forward.
    """
    query, key, value = (_rowwise(x) for x in (query, key, value))
    done = _attended(query, key, value, site, plain, segments, text)
    return None if done is None else _backward(grad, query, key, value, site, done, done.out)


@torch.no_grad()
def _attend(
    query: Tensor, key: Tensor, value: Tensor, site: Site, plain: PlainMask, segments: SegmentLayout, text: Tensor
) -> Attended:
    """Both parts, the second from where the first ends; then the sinks, which have no value, and the skipped rows."""
    assert site.config is not None
    config, scale = site.config, site.scale_for(query)
    real = None if plain.real is None else plain.real.contiguous().view(torch.uint8)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    near = near_lists(segments, key.shape, config.segment_size, PlainMask(plain.offset, real))
    attend_lists(query, key, value, out, lse, near, scale)
    selection = select_quickly(
        query, key, lse, segments, text, config, block=BLOCK, target=site.target, scale=scale, real=real
    )
    for far in far_lists(selection, near, config, key, LISTS):
        attend_lists(query, key, value, out, lse, far, scale, goes_on=True)
    if site.sinks is not None:
        out.mul_(keys_share(lse, site.sinks).unsqueeze(-1))
        lse = torch.logaddexp(lse, site.sinks.to(lse.dtype)[:, None])
    if config.lazy_mode == "skip":
        skipped = selection.lazy & ~selection.active
        out.masked_fill_(skipped.unsqueeze(-1), 0.0)
        lse.masked_fill_(skipped, -torch.inf)
    return Attended(out, lse, near, selection)


#: ``_gradients`` takes more shared memory than the forward kernels: it may be the one that a device cannot run.
_attended = guarded(_attend, "the token kernels failed, token attention runs in tensor code")
_gradients = guarded(gradients_by_heads, "the token kernels failed, gradients of token attention run in tensor code")


class _Attend(torch.autograd.Function):
    """What was attended; backward each part with the merged output and log-sum-exp, which makes it the union's."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, site: Site, done: Attended
    ) -> Tensor:
        near, (segments, *selected) = done.near, done.selection
        kept = (done.out, done.lse, near.keys, near.key_count, near.offset, near.real)
        ctx.save_for_backward(query, key, value, *kept, *selected)
        ctx.site, ctx.segments = site, segments
        return done.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, keys, key_count, offset, real, *selected = ctx.saved_tensors
        near = Lists(None, None, keys, key_count, BLOCK, ctx.site.config.segment_size, offset, real)
        done = Attended(out, lse, near, TokenSelection(ctx.segments, *selected))
        return *_backward(grad, query, key, value, ctx.site, done, torch.empty_like(out)), None, None


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, site: Site, done: Attended, grad_query: Tensor
) -> Gradients:
    """Gradients of what was attended; query's is written to ``grad_query``, which may be ``done.out``."""
    assert site.config is not None
    grad, scale = _rowwise(grad), site.scale_for(query)
    found = _gradients(grad, query, key, value, *done, site.config, scale, grad_query)
    if found is None:
        return listed_gradients(grad, query, key, value, done.selection, site)
    of_key, of_value, along = found
    return grad_query, of_key, of_value, None if site.sinks is None else _of_sinks(along, done.lse, site.sinks)


def _of_sinks(along: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks (Hq,): minus each one's share of a row's mass times that row's output along ``grad``."""
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    share = torch.where(lse == -torch.inf, 0.0, share)  # neither a key nor a sink
    return -(share * along).sum((0, 2)).to(sinks.dtype)


def _rowwise(x: Tensor) -> Tensor:
    """With its last dimension contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()
