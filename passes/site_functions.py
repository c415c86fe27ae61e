"""The named functions that ``lower`` writes: a site's constants in their closures, tensors as operands."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.attention.block_sparse import attend, autocast_dtype
from omnisparse_flex.attention.call import AttentionCall, SparseCall
from omnisparse_flex.attention.functional import scalar
from omnisparse_flex.compilation.cache_names import stable_name
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.block_lists import map_of_lists
from omnisparse_flex.masks.blocks.layout import Layout, block_layout
from omnisparse_flex.masks.blocks.promise import COUNTED_FROM, one_call
from omnisparse_flex.masks.blocks.select import grid_of
from omnisparse_flex.masks.expr.expr import Expr, number_in
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import SelectionStats
from omnisparse_flex.passes.nodes import value_of
from omnisparse_flex.passes.state import Site
from omnisparse_flex.types import StateTensors


@dataclasses.dataclass(frozen=True, slots=True)
class Constants:
    """What is constant about one site; its ``repr`` tells all of it, as ``stable_name`` asks.

    Attributes:
        layer: Decoder layer.
        target: Recall where no tensor says it.
        min_peak: Share of a row that is a peak.
        expr: The mask.
        offset: Position of query 0.
        leaves: Number of tensors that ``expr`` reads.
        bias_leaves: Number of tensors that the bias reads.
        fixed: Further fields of the ``SparseCall``, or, without rules, of the dense ``AttentionCall``.
    """

    layer: int
    target: float
    min_peak: float
    expr: Expr
    offset: Expr | None
    leaves: int
    bias_leaves: int
    fixed: dict[str, Any]

    def attention(
        self, query: Tensor, key: Tensor, sinks: Tensor | None, layout: Layout | None, *operands: Any
    ) -> AttentionCall:
        """The site with this call's tensors: ``operands`` are the state's, the mask's, the bias' and the score's."""
        count = len(StateTensors._fields)
        state: StateTensors[Tensor] = StateTensors(*operands[:count])
        leaves, scores = operands[count:], self.leaves + self.bias_leaves
        mask, q_offset = _mask(self.expr, self.offset, query, key, leaves[: self.leaves])
        scored: dict[str, Any] = {
            "bias_buffers": _as_tensors(leaves[self.leaves : scores], query, key),
            "score_buffers": leaves[scores:],
        }
        if "config" not in self.fixed:
            return AttentionCall(mask=mask, sinks=sinks, **scored, **self.fixed)
        return SparseCall(
            mask=mask,
            target=self.target if state.recall is None else _recall_of(state.recall, self.layer, query.device),
            min_peak=self.min_peak,
            visual=None if state.visual is None else state.visual.to(query.device),
            q_offset=q_offset,
            sinks=sinks,
            layout=layout,
            write=None if state.stats is None else functools.partial(_write, self.layer, state),
            exact=state.recalls is not None,
            note=None if state.promises is None else functools.partial(_note, self.layer, state.promises),
            **scored,
            **self.fixed,
        )


def layout_function(site: Site, config: OmniSparseConfig) -> Callable[..., Layout]:
    """``(query, key, visual, *leaves)`` to the layout of all layers with this mask and these lengths."""
    expr, offset = site.expr, site.offset

    def call(query: Tensor, key: Tensor, visual: Tensor | None, *leaves: Any) -> Layout:
        mask, q_offset = _mask(expr, offset, query, key, leaves)
        visual = None if visual is None else visual.to(query.device)
        return block_layout(mask, grid_of(query, key, config.split), config, visual=visual, q_offset=q_offset)

    return stable_name(_renamed(call, "omnisparse_layout"), None)


def layer_function(site: Site, constants: Constants) -> Callable[..., Tensor]:
    """``(query, key, value, sinks, layout, *state, *leaves, *score operands)`` to the attention's output."""

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *operands: Any) -> Tensor:
        return attend(query, key, value, constants.attention(query, key, sinks, *operands))

    return _named(call, f"omnisparse_layer_{site.layer}", site)


def listed_function(block: int) -> Callable[..., Tensor]:
    """``(counts, indices, keys)`` to the map of blocks of ``block`` keys that they list."""

    def call(counts: Tensor, indices: Tensor, kv_len: int) -> Tensor:
        return map_of_lists(counts, indices, (kv_len + block - 1) // block)

    return stable_name(_renamed(call, "omnisparse_listed"), None)


def _named(call: Callable[..., Any], name: str, site: Site) -> Callable[..., Any]:
    function = _renamed(call, name)
    if site.mods is not None:
        return function  # it closes over a score graph, which has no name: AOTAutograd does not cache such a graph
    return stable_name(function, autocast_dtype(value_of(site.query).device.type))


def _renamed(function: Callable[..., Any], name: str) -> types.FunctionType:
    """A copy under another name, for FX to print."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)


def _recall_of(recall: Tensor, layer: int, device: torch.device) -> Tensor:
    """One layer's target, realized: kernels of all layers then read the same place and share their code."""
    target: Tensor = torch.ops.omnisparse.realize(recall[layer].to(device))
    return target


def _write(layer: int, state: StateTensors[Tensor], measured: SelectionStats) -> None:
    """Write one site's statistics into the rows of its layer; a picture is cropped to fit."""
    records = (state.stats, measured.stats), (state.maps, measured.block_map), (state.recalls, measured.recalls)
    for table, row in records:
        if table is not None:
            torch.ops.omnisparse.write_row(table, row, layer, row.shape[0])


def _note(layer: int, promises: Tensor, recall: Tensor, some: Tensor, target: Tensor | float) -> None:
    """Add one call to the record of a layer."""
    torch.ops.omnisparse.write_row(promises, one_call(recall, some, target), layer, COUNTED_FROM)


def _mask(
    expr: Expr, offset: Expr | None, query: Tensor, key: Tensor, leaves: Sequence[Any]
) -> tuple[IndexMask, Tensor | int]:
    """The lifted mask over its leaves, and the position of query 0."""
    mask = IndexMask(expr, _as_tensors(leaves, query, key))
    return mask, 0 if offset is None else number_in(offset, mask.buffers, query.device)


def _as_tensors(leaves: Sequence[Any], query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Leaves as tensors; None stands for S - L."""
    values = (key.shape[2] - query.shape[2] if x is None else x for x in leaves)
    return tuple(x if isinstance(x, Tensor) else scalar(x, query.device) for x in values)
