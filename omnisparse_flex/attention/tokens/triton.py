"""Token attention on CUDA: the same three steps as ``tensor_code``, in Triton kernels.

Beside its results it holds no more than the layer's keys and values take: queries attend a chunk after the other, a
chunk's selection is made and attended to a few segments at a time, and is kept as bits.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.logit_sinks import keys_share
from omnisparse_flex.attention.tokens.key_lists import far_lists, near_lists
from omnisparse_flex.attention.tokens.query_chunks import QueryChunk, concat_selections, query_chunks
from omnisparse_flex.attention.tokens.tensor_code import recompute_backward
from omnisparse_flex.attention.tokens.triton_backward import backward_in_head_chunks
from omnisparse_flex.kernels.attend_lists import KeyLists, attend_lists
from omnisparse_flex.kernels.fallback import guarded
from omnisparse_flex.kernels.head_dims import sums_of_squares
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.expr.causal_padding import CausalPaddingMask
from omnisparse_flex.masks.tokens.head_dims import top_dims_of, top_head_dims
from omnisparse_flex.masks.tokens.segments import SegmentLayout
from omnisparse_flex.masks.tokens.select import TokenSelection
from omnisparse_flex.masks.tokens.select_triton import select_tokens_triton

#: The lists of keys take the keys' and values' bytes divided by this.
LISTS = 2
#: Stands for a tensor that autograd keeps.
SAVED = object()

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class AttendedChunk(NamedTuple):
    """What the forward pass of a chunk leaves behind beside its output.

    Attributes:
        heads: Its query heads.
        queries: Its queries.
        lse: float32 (B, heads, queries) contiguous, sinks included; -inf where the output is 0 whatever values are.
        near: All rows over their always-kept keys.
        selection: The rest.
    """

    heads: slice
    queries: slice
    lse: Tensor
    near: KeyLists
    selection: TokenSelection


def attend_tokens_triton(
    query: Tensor, key: Tensor, value: Tensor, site: SparseCall, mask: CausalPaddingMask, segments: SegmentLayout,
    text: Tensor, keep: bool,
) -> tuple[Tensor, TokenSelection | None] | None:  # fmt: skip
    """One attention site at token granularity.

    Args:
        query: (B, Hq, L, D), D a power of 2 from 16 to 256; float16, bfloat16 or float32.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, D).
        site: Rules, scale and logit sinks; nothing of it changes scores.
        mask: Its mask.
        segments: Its always-kept blocks.
        text: bool (B or 1, L), queries that are always active.
        keep: Whether the selection is wanted.

    Returns:
        (B, Hq, L, D), differentiable, and what was selected, or None; None once the kernels failed to compile.

    Source: PAPER "Lazy + active in one output".
    """
    query, key, value = (_rowwise(x) for x in (query, key, value))
    learning = [x for x in (query, key, value, site.sinks) if x is not None and x.requires_grad]
    learns = torch.is_grad_enabled() and len(learning) > 0
    out, parts = torch.empty(query.shape, dtype=query.dtype, device=query.device), []
    for chunk in _query_chunks(query, key, site, mask, segments, text):
        at = (slice(None), chunk.heads, chunk.queries)
        done = _attend_guarded(query[at], key, value, site, chunk, out[at])
        if done is None:
            return None
        if keep or learns:
            parts.append(done)
        del done  # before the next one is made
    if learns:
        done_parts = (out, segments, parts)
        out = _AttendWithGradients.apply(query, key, value, site.sinks, site, done_parts)  # type: ignore[no-untyped-call]
    return out, concat_selections(segments, [(x.heads, x.selection) for x in parts]) if keep else None


@torch.no_grad()
def token_backward_triton(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, site: SparseCall, mask: CausalPaddingMask,
    segments: SegmentLayout, text: Tensor,
) -> Gradients | None:  # fmt: skip
    """Gradients where nothing but the inputs was kept: each chunk attends again, and selects the same again.

    The arguments are those of ``attend_tokens_triton`` and ``grad`` (B, Hq, L, D) of its output.

    Returns:
        Of query, key, value and the sinks; None once kernels failed to compile.
    """
    grad, query, key, value = (_rowwise(x) for x in (grad, query, key, value))
    grads = _empty_gradients(query, key, value, site.sinks)
    for chunk in _query_chunks(query, key, site, mask, segments, text):
        # The output lies where query's gradient will.
        out = grads[0][:, chunk.heads, chunk.queries]
        done = _attend_guarded(query[:, chunk.heads, chunk.queries], key, value, site, chunk, out)
        if done is None or not _add_gradients(grads, grad, query, key, value, site, done, out):
            return None
        del done  # before the next one is made
    return grads


@torch.no_grad()
def _attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, site: SparseCall, chunk: QueryChunk, out: Tensor
) -> AttendedChunk:
    """Both parts, the second from where the first ends; then the sinks, which have no value.

    Query and ``out``, which is written, are those of the chunk.
    """
    config, scale, mask = site.config, site.scale_for(query), chunk.mask
    sinks = None if site.sinks is None else site.sinks[chunk.heads]
    real = None if mask.real is None else mask.real.contiguous().view(torch.uint8)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    near = near_lists(chunk.segments, key.shape, config.segment_size, CausalPaddingMask(mask.offset, real))
    attend_lists(query, key, value, out, lse, near, scale)
    selection = select_tokens_triton(
        query, key, lse, chunk.segments, chunk.text, config, block=BLOCK, target=site.target, scale=scale, real=real,
        columns=chunk.columns,
    )  # fmt: skip
    for far in far_lists(selection, near, config, key, LISTS):
        attend_lists(query, key, value, out, lse, far, scale, goes_on=True)
    if sinks is not None:
        out.mul_(keys_share(lse, sinks).unsqueeze(-1))
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return AttendedChunk(chunk.heads, chunk.queries, lse, near, selection)


_attend_guarded = guarded(_attend_chunk, "the token kernels failed, token attention runs in tensor code")
_squares_guarded = guarded(
    sums_of_squares, "the kernel that ranks the head dimensions failed, they are found in tensor code"
)
#: It takes more shared memory than the forward kernels, so it may be the only one that a device cannot run.
_backward_guarded = guarded(
    backward_in_head_chunks, "the token kernels failed, gradients of token attention run in tensor code"
)


class _AttendWithGradients(torch.autograd.Function):
    """What was attended; backward each part with the merged output and log-sum-exp, which makes it the union's."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, site: SparseCall,
        done: tuple[Tensor, SegmentLayout, list[AttendedChunk]],
    ) -> Tensor:  # fmt: skip
        out, *kept = done
        # Saved like the inputs, so that checkpointing drops them and a backward pass frees them.
        leaves, ctx.form = pytree.tree_flatten(kept)
        ctx.site, ctx.leaves = site, [SAVED if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(query, key, value, out, *(x for x in leaves if isinstance(x, Tensor)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        tensors = iter(saved)
        segments, parts = pytree.tree_unflatten([next(tensors) if x is SAVED else x for x in ctx.leaves], ctx.form)
        grad, grads = _rowwise(grad), _empty_gradients(query, key, value, ctx.site.sinks)
        for done in parts:
            if not _add_gradients(grads, grad, query, key, value, ctx.site, done, out[:, done.heads, done.queries]):
                selection = concat_selections(segments, [(x.heads, x.selection) for x in parts])
                return *recompute_backward(grad, query, key, value, selection, ctx.site), None, None
        return *grads, None, None


def _query_chunks(
    query: Tensor, key: Tensor, site: SparseCall, mask: CausalPaddingMask, segments: SegmentLayout, text: Tensor
) -> Iterator[QueryChunk]:
    """The chunks of a site."""
    (heads, kv_heads), config, columns = (query.shape[1], key.shape[1]), site.config, None
    if config.scoring_dims is not None:
        # Of the whole call: those of a chunk could differ.
        columns = _top_head_dims(query, key, config.choices(heads, kv_heads), config.scoring_dims)
    return query_chunks(key, heads // kv_heads, config, mask, segments, text, columns)


def _top_head_dims(query: Tensor, key: Tensor, choices: int, dims: int) -> Tensor:
    """``top_head_dims`` in one launch for queries and one for keys, int32."""
    of_query, of_key = _squares_guarded(query), _squares_guarded(key)
    if of_query is None or of_key is None:
        return top_head_dims(query, key, choices, dims).int()
    return top_dims_of(of_query, of_key, choices, dims).int()


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Gradients:
    """Where chunks write query's gradient, and add those of the others."""
    of_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    of_key, of_value = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    return of_query, of_key, of_value, None if sinks is None else torch.zeros_like(sinks)


def _add_gradients(
    grads: Gradients, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, site: SparseCall, done: AttendedChunk,
    out: Tensor,
) -> bool:  # fmt: skip
    """Add the gradients of a chunk, whose output is ``out``; False once the kernels failed to compile."""
    of_query, of_key, of_value, of_sinks = grads
    at = (slice(None), done.heads, done.queries)
    inputs = (grad[at], query[at], key, value, out, done.lse, done.near, done.selection, site.config)
    delta = _backward_guarded(*inputs, site.scale_for(query), of_query[at], of_key, of_value)
    if delta is not None and of_sinks is not None and site.sinks is not None:
        of_sinks[done.heads] += _sink_gradients(delta, done.lse, site.sinks[done.heads])
    return delta is not None


def _sink_gradients(delta: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks (Hq,): minus each one's share of a row's mass times that row's output along ``grad``."""
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    share = torch.where(lse == -torch.inf, 0.0, share)  # neither a key nor a sink
    return -(share * delta).sum((0, 2))


def _rowwise(x: Tensor) -> Tensor:
    """With its last dimension contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()
