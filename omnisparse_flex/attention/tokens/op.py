"""Token attention as one operator: opaque to whoever traces the graph around it.

How many keys and queries a segment gets is known at run time only, so the work is a loop
over segments, which neither AOTAutograd nor Inductor should unroll. What is constant about
a site lies in a registry, under a name that spells it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from omnisparse_flex.attention.call import SparseCall, registered
from omnisparse_flex.attention.tokens.dispatch import attend_tokens
from omnisparse_flex.attention.tokens.gradients import token_backward
from omnisparse_flex.masks.blocks.layout import Layout
from omnisparse_flex.masks.blocks.select import grid_of
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import STATS, SelectionStats
from omnisparse_flex.ops import define, register_autograd

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor[] layout, Tensor? visual, Tensor target, "
    "Tensor q_offset, Tensor[] mask_buffers, Tensor[] score_buffers, Tensor[] bias_buffers, str rules"
)


def call_token_op(query: Tensor, key: Tensor, value: Tensor, site: SparseCall) -> Tensor:
    """``attend_tokens`` through the operator; the arguments are the same."""
    device = query.device
    record = 0 if site.write is None else 1 + site.exact
    out, *measured = torch.ops.omnisparse.attend_tokens(
        query,
        key,
        value,
        site.sinks,
        [] if site.layout is None else list(site.layout),
        site.visual,
        torch.as_tensor(site.target, dtype=torch.float32, device=device),
        torch.as_tensor(site.q_offset, dtype=torch.int64, device=device),
        list(site.mask.buffers) if isinstance(site.mask, IndexMask) else [],
        list(site.score_buffers),
        list(site.bias_buffers),
        site.rules,
        record,
    )
    if site.write is not None:
        site.write(SelectionStats(*measured))
    result: Tensor = out
    return result


def _site(
    sinks: Tensor | None,
    layout: list[Tensor],
    visual: Tensor | None,
    target: Tensor,
    q_offset: Tensor,
    mask_buffers: list[Tensor],
    score_buffers: list[Tensor],
    bias_buffers: list[Tensor],
    rules: str,
) -> SparseCall:
    bare = registered(rules)
    assert isinstance(bare.mask, IndexMask)
    return dataclasses.replace(
        bare,
        mask=IndexMask(bare.mask.expr, tuple(mask_buffers)),
        target=target,
        score_buffers=tuple(score_buffers),
        bias_buffers=tuple(bias_buffers),
        visual=visual,
        q_offset=q_offset,
        sinks=sinks,
        layout=Layout(*layout) if layout else None,
        rules="",
    )


def _forward(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *constants, record = arguments
    stats: list[SelectionStats] = []
    site = _site(*constants)  # type: ignore[arg-type]
    if record:
        site = dataclasses.replace(site, write=stats.append, exact=record == 2)
    with torch.no_grad(), _without_autocast(query):
        out = attend_tokens(query, key, value, site)
    return (out.contiguous(), *(stats[0] if stats else _blank(query, key, site, 0)))


def _without_autocast(query: Tensor) -> torch.autocast:
    """Autocast off: the inputs have followed it already, and the backward, which has none, must select the same."""
    return torch.autocast(query.device.type, enabled=False)


def _blank(query: Tensor, key: Tensor, site: SparseCall, record: int) -> SelectionStats:
    """An empty record of the right sizes."""
    grid, choices = grid_of(query, key), site.config.choices(query.shape[1], key.shape[1])
    shape = (choices, grid.q_blocks, grid.kv_blocks) if record else (0, 0, 0)
    return SelectionStats(
        query.new_zeros(len(STATS) if record else 0, dtype=torch.float32),
        query.new_zeros(shape, dtype=torch.uint8),
        query.new_zeros((2, query.shape[1] if record == 2 else 0), dtype=torch.float32),
    )


def _fake(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, (*_, rules, record) = value.new_empty((*query.shape[:3], value.shape[3])), arguments
    return (out, *_blank(query, key, registered(rules), record))  # type: ignore[arg-type]


def _backward_impl(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *constants: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), _without_autocast(query):
        site = _site(sinks, *constants)  # type: ignore[arg-type]
        *of_inputs, of_sinks = token_backward(grad, query, key, value, site)
    dq, dk, dv = (x.contiguous() for x in of_inputs)
    return dq, dk, dv, query.new_empty(0) if of_sinks is None else of_sinks


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *constants: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return dq, dk, dv, query.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    """Save every tensor; lists are remembered by their lengths."""
    *arguments, _ = inputs
    tensors = [x for item in arguments for x in (item if isinstance(item, (list, tuple)) else [item])]
    ctx.save_for_backward(*(x for x in tensors if isinstance(x, Tensor)))
    ctx.form = [  # type: ignore[attr-defined]
        len(x) if isinstance(x, (list, tuple)) else x if isinstance(x, str) else x is not None for x in arguments
    ]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[object, ...]:
    saved = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    arguments: list[object] = []
    for form in ctx.form:  # type: ignore[attr-defined]
        if isinstance(form, str):
            arguments.append(form)
        elif isinstance(form, bool):
            arguments.append(saved.pop(0) if form else None)
        else:
            arguments.append([saved.pop(0) for _ in range(form)])
    *grads, of_sinks = torch.ops.omnisparse.attend_tokens_backward(grad, *arguments)
    others = [[None] * len(x) if isinstance(x, list) else None for x in arguments[4:]]
    return (*grads, None if arguments[3] is None else of_sinks, *others, None)


# record: 0 = nothing, 1 = statistics and picture, 2 = true recalls too.
define(f"attend_tokens({_TENSORS}, int record) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _fake)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
define(f"attend_tokens_backward(Tensor grad, {_TENSORS}) -> {_GRADIENTS}", _backward_impl, _backward_fake)
register_autograd("attend_tokens", _backward, _setup)
