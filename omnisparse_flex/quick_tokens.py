"""Token attention on CUDA: the same three steps as ``token_attention``, in Triton kernels.

Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnisparse_flex.guard import guarded
from omnisparse_flex.listed_gradients import listed_gradients
from omnisparse_flex.logit_sinks import discount
from omnisparse_flex.masks.blocks import block_lists
from omnisparse_flex.masks.plain import PlainMask
from omnisparse_flex.masks.quick_select import select_quickly
from omnisparse_flex.masks.rectangle_kernel import Lists, attend_lists
from omnisparse_flex.masks.segments import SegmentLayout
from omnisparse_flex.masks.select import BLOCK
from omnisparse_flex.masks.tokens import TokenSelection
from omnisparse_flex.rectangle_backward_kernel import gradients
from omnisparse_flex.site import Site


def attend_quickly(
    query: Tensor, key: Tensor, value: Tensor, site: Site, plain: PlainMask, segments: SegmentLayout, text: Tensor
) -> tuple[Tensor, TokenSelection]:
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
        (B, Hq, L, D), differentiable, and what was selected.

    Source: PAPER "Lazy + active in one output".
    """
    tensors = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
    real = None if plain.real is None else plain.real.contiguous().view(torch.uint8)
    found: list[TokenSelection] = []
    out: Tensor = _Attend.apply(*tensors, site.sinks, site, plain.offset, real, segments, text, found)  # type: ignore[no-untyped-call]
    return out, found[0]


def near_lists(segments: SegmentLayout, shape: torch.Size, segment: int, plain: PlainMask) -> Lists:
    """All rows over their segments' always-kept blocks; ``shape`` is key's, ``real`` of ``plain`` is uint8."""
    count, blocks = block_lists(segments.forced)
    size = (shape[0], shape[1], -1)
    return Lists(None, None, blocks.expand(*size, -1), count.expand(*size), BLOCK, segment, plain.offset, plain.real)


def far_lists(selection: TokenSelection, segment: int, plain: PlainMask) -> Lists:
    """The active rows over the chosen keys."""
    chosen = (selection.rows, selection.row_count, selection.keys, selection.key_count)
    return Lists(*chosen, 1, segment, plain.offset, plain.real)


#: ``gradients`` takes more shared memory than the forward kernels: it may be the one that a device cannot run.
_gradients = guarded(gradients, "the token kernels failed, gradients of token attention run in tensor code")


class _Attend(torch.autograd.Function):
    """Both parts forward; backward each part with the merged output and log-sum-exp, which makes it the union's.

    A sink is one more part, without a value: it enters the merged output and log-sum-exp, and only its own
    gradient is new.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, site: Site, offset: Tensor | None,
        real: Tensor | None, segments: SegmentLayout, text: Tensor, found: list[TokenSelection],
    ) -> Tensor:  # fmt: skip
        assert site.config is not None
        segment, scale, plain = site.config.segment_size, site.scale_for(query), PlainMask(offset, real)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        near = near_lists(segments, key.shape, segment, plain)
        attend_lists(query, key, value, out, lse, near, scale)
        selection = select_quickly(
            query, key, lse, segments, text, site.config, block=BLOCK, target=site.target, scale=scale, real=real
        )
        far = far_lists(selection, segment, plain)
        attend_lists(query, key, value, out, lse, far, scale, goes_on=True)
        if sinks is not None:
            out, lse = discount(out, lse, sinks), torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        found.append(selection)
        tensors = [(x.rows, x.row_count, x.keys, x.key_count) for x in (near, far)]
        ctx.save_for_backward(query, key, value, sinks, out, lse, offset, real, *tensors[0], *tensors[1])
        ctx.site, ctx.segments = site, segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse, offset, real, *lists = ctx.saved_tensors
        segment, scale = ctx.site.config.segment_size, ctx.site.scale_for(query)
        near_rows, near_row_count, near_keys, near_key_count, rows, row_count, keys, key_count = lists
        near = Lists(near_rows, near_row_count, near_keys, near_key_count, BLOCK, segment, offset, real)
        far = Lists(rows, row_count, keys, key_count, 1, segment, offset, real)
        found = _gradients(grad.contiguous(), query, key, value, out, lse, (near, far), scale)
        if found is None:
            chosen = (rows, row_count, keys, key_count)
            found = listed_gradients(grad, query, key, value, ctx.segments, chosen, ctx.site)
        of_sinks = None if sinks is None else _of_sinks(grad, out, lse, sinks)
        return (*found, of_sinks, None, None, None, None, None, None)


def _of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks (Hq,): minus each one's share of a row's mass times that row's output along ``grad``."""
    logit = sinks.to(lse.dtype)[:, None]
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(logit - lse))  # neither a key nor a sink
    along = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(share * along).sum((0, 2)).to(sinks.dtype)
