"""The choice of blocks as one operator, compiled once for all layers.

Layers differ in their tensors alone. Written into the graph, the selection is lowered by Inductor in
every layer anew, some eighty kernels each time, which is most of what a model takes to compile. Here
the graph holds one opaque operator, and behind it lies one graph of its own for each set of rules.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from omnisparse_flex.attention.call import SparseCall, registered
from omnisparse_flex.compilation.cache_names import stable_name
from omnisparse_flex.compilation.dynamo_config import dynamo_settings
from omnisparse_flex.compilation.inductor import CompiledFn, compile_graph
from omnisparse_flex.errors import bug, raises_bugs
from omnisparse_flex.masks.blocks.layout import Layout
from omnisparse_flex.masks.blocks.select import BlockSelection, grid_of, select_blocks
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.ops import define

#: Graphs for one set of rules (a length, all lengths, one row and several, ...); past it the selection runs uncompiled.
RECOMPILE_LIMIT = 32
#: Sets of rules and inputs whose graphs are kept.
KEPT = 64
#: Graphs compiled so far in this process.
graphs = 0
#: Rules, with and without a record, whose compiled selection failed.
failed: set[tuple[str, bool]] = set()
#: What a graph of the selection calls; each has globals of its own, which hold its own.
FUNCTION: Callable[..., tuple[Tensor, ...]]
#: ``BlockSelection``'s tensors in the operator's order, their dtypes, and whether they have a key axis.
PARTS = (
    ("keep", torch.bool, True),
    ("recall", torch.float32, False),
    ("scored", torch.float32, False),
    ("mass", torch.float32, True),
    ("needs", torch.int64, False),
    ("budget", torch.int64, False),
    ("active", torch.bool, False),
    ("lazy", torch.bool, False),
    ("overflow", torch.bool, False),
)
#: How many of them, the first, are made whether there is a record or not.
ALWAYS = 3


def call_select_op(query: Tensor, key: Tensor, site: SparseCall) -> BlockSelection:
    """``select_blocks`` through the operator.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        site: A site with a layout and a name for its rules, whose logits are plain products.

    Returns:
        The selection; without ``site.write`` only ``layout`` and the first ``ALWAYS`` of ``PARTS`` hold anything.
    """
    assert site.layout is not None and isinstance(site.mask, IndexMask)
    parts = torch.ops.omnisparse.select_blocks(
        query,
        key,
        list(site.layout),
        torch.as_tensor(site.target, dtype=torch.float32, device=query.device),
        torch.as_tensor(site.peak, dtype=torch.float32, device=query.device),
        list(site.mask.buffers),
        site.rules,
        site.write is not None,
    )
    return BlockSelection(layout=site.layout, **{name: x for (name, *_), x in zip(PARTS, parts, strict=True)})


def _select(
    query: Tensor, key: Tensor, layout: Sequence[Tensor], target: Tensor, min_peak: Tensor, buffers: Sequence[Tensor],
    rules: str, record: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kind = (int(query.shape[1]), int(key.shape[1]), int(query.shape[3]), query.dtype, query.device.type)
    run = compiled(rules, record, len(layout), kind)
    limits = dynamo_settings(recompile_limit=RECOMPILE_LIMIT)
    # Dynamo guards on grad mode, autocast and dispatch keys: one state for all. The inputs have followed autocast.
    below = torch._C._AutoDispatchBelowADInplaceOrView()  # where a first call is, and later ones are not
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False), below, limits:
        inputs = (query.detach(), key.detach(), target, min_peak, *layout, *buffers)
        made = _run_or_plain(run, rules, record, len(layout), inputs)
    blank = (query.new_empty(0, dtype=dtype) for _, dtype, _ in PARTS[len(made) :])
    return (*made, *blank)


def _run_or_plain(
    run: Callable[..., tuple[Tensor, ...]], rules: str, record: bool, maps: int, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The compiled selection; where it fails, the same in tensor code, from then on."""
    if (rules, record) in failed:
        return _plain(rules, record, maps)(*inputs)
    try:
        return run(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if raises_bugs() or capturing:
            raise
        failed.add((rules, record))
        warnings.warn(f"omnisparse: {bug('the compiled selection', error)}; in tensor code there", stacklevel=2)
        return _plain(rules, record, maps)(*inputs)


def _plain(rules: str, record: bool, maps: int) -> Callable[..., tuple[Tensor, ...]]:
    """The selection by its rules' name, a function of tensors alone."""
    site = registered(rules)
    assert isinstance(site.mask, IndexMask)
    config, expr, scale = site.config, site.mask.expr, site.scale
    names = [name for name, *_ in PARTS][: len(PARTS) if record else ALWAYS]

    def select(query: Tensor, key: Tensor, target: Tensor, min_peak: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        chosen = select_blocks(
            query,
            key,
            IndexMask(expr, rest[maps:]),
            config,
            target=target,
            min_peak=min_peak,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            layout=Layout(*rest[:maps]),
        )
        # Copies: an operator's results may not share memory with its inputs, nor with each other.
        return tuple(torch.ops.omnisparse.realize(getattr(chosen, name)) for name in names)

    return select


@functools.lru_cache(KEPT)
def compiled(rules: str, record: bool, maps: int, kind: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """One graph for all layers with these rules and this ``kind`` of inputs (heads, width, dtype, device).

    It is compiled when first called, for one length, and once more for all when there is a second.
    """
    function = _plain(rules, record, maps)
    assert isinstance(function, types.FunctionType)
    # Dynamo takes it for one call, which AOTAutograd traces through: as in a model's graph.
    function = torch.compiler.allow_in_graph(stable_name(function, rules))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return FUNCTION(*tensors)  # noqa: F821

    # By its name Dynamo remembers which sizes of a function changed before: those of other rules say nothing.
    digest = hashlib.sha256(repr((rules, record, kind)).encode()).hexdigest()[:12]
    name = f"omnisparse_select_{digest}"
    named = types.FunctionType(
        run.__code__.replace(co_name=name), {"__builtins__": builtins, "FUNCTION": function}, name
    )
    return torch.compile(named, backend=_compile, dynamic=False if registered(rules).static else None)


def _compile(graph_module: GraphModule, inputs: Sequence[Any]) -> CompiledFn:
    global graphs
    graphs += 1
    # All layers run it, perhaps inside another recording: it must not be recorded by itself.
    return compile_graph(graph_module, inputs, options={"triton.cudagraphs": False})


def _fake(
    query: Tensor, key: Tensor, layout: Sequence[Tensor], target: Tensor, min_peak: Tensor, buffers: Sequence[Tensor],
    rules: str, record: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    config = registered(rules).config
    wanted, grid = len(PARTS) if record else ALWAYS, grid_of(query, key, config.split)
    shape = (query.shape[0], query.shape[1], grid.q_blocks, grid.kv_blocks)
    sizes = {name: shape if keys else shape[:3] for name, _, keys in PARTS}
    if config.budget == "peak":
        sizes["mass"] = (*shape[:3], 0)
    return tuple(
        query.new_empty(sizes[name] if i < wanted else (0,), dtype=dtype) for i, (name, dtype, _) in enumerate(PARTS)
    )


# record: all of the selection, for statistics; else the first ``ALWAYS`` parts, and the rest empty.
define(
    "select_blocks(Tensor query, Tensor key, Tensor[] layout, Tensor target, Tensor min_peak, "
    "Tensor[] mask_buffers, str rules, bool record) "
    f"-> ({', '.join(['Tensor'] * len(PARTS))})",
    _select,
    _fake,
)
