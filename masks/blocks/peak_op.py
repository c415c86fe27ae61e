"""The peak rule at one site: which rows and thresholds, and as one operator where the mask is plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.kernels.fallback import load
from omnisparse_flex.masks.blocks.layout import Layout
from omnisparse_flex.masks.blocks.mean_pool import block_mean, for_exact_products
from omnisparse_flex.masks.blocks.peak import (
    CANDIDATE,
    LOWEST,
    Maps,
    Peaks,
    PeakSite,
    base_threshold,
    extra_phases,
    find_peaks,
)
from omnisparse_flex.masks.blocks.peak_rows import Keys, LiveRows, live_rows
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.causal_padding import as_causal_padding
from omnisparse_flex.masks.expr.expr import KV, TRUE, B, Expr, Load, causal, conjunction
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask

KERNEL = ("find_peaks.find_peaks", "the kernel for sampled rows failed, they are multiplied in tensor code")
#: Products of one row of some query blocks with all keys that are in memory at once, where tensor code runs eagerly.
PAIRS = 2**26


def peaks_of(
    query: Tensor,
    key: Tensor,
    mask: IndexMask | OpaqueMask,
    layout: Layout,
    grid: Grid,
    *,
    own: Tensor,
    q_offset: Tensor | int,
    min_peak: Tensor | float,
    floor: Tensor | float,
    scale: float,
    last_rows: int,
    score: Callable[..., Tensor] | None,
) -> Peaks:
    """Apply the peak rule at one site.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        mask: The model's own mask.
        layout: The site's maps.
        grid: The site's blocks.
        own: int64 (L,), the key position of each query.
        q_offset: Position of query 0 among the keys, int or 0-d int tensor.
        min_peak: Share of a row that is a peak, a number or 0-d tensor; 0 keeps everything.
        floor: Share of a row's mass that its threshold must leave it, likewise; from 1 on, everything is kept.
        scale: Logit scale.
        last_rows: Rows of exact logits in all for the last two query blocks.
        score: The model's own change of a logit, or None.

    Returns:
        See ``find_peaks``. Where the mask is plain and logits are products alone, one operator: on a GPU its scratch
        is 2 bytes for each row of a program and key block, see ``peaks_in_one``.
    """
    live = live_rows(mask, grid, own)
    base = base_threshold(layout.some, min_peak, floor)
    plain = None
    if score is None and layout.some.shape[1] == layout.forced.shape[1] == layout.full.shape[1] == 1:
        plain = as_causal_padding(mask, grid.batch, grid.kv_len, query.device)
    if plain is None:
        keys = Keys(for_exact_products(key), block_mean(key, grid.kv_block), grid.kv_block)  # once for all rows
        maps = Maps(layout.full, layout.some, layout.forced)
        first = q_offset // grid.block
        made = find_peaks(PeakSite(query, keys, maps, live, base, floor, scale, first, score, mask), last_rows)
        return _everything_by_rule(made, base)
    made = torch.ops.omnisparse.find_peaks(
        query, key, layout.full, layout.some, layout.forced, live.places.to(torch.int32), live.count.to(torch.int32),
        base, torch.as_tensor(floor, dtype=torch.float32, device=query.device), plain.real, plain.offset, scale,
        grid.kv_block, last_rows,
    )  # fmt: skip
    return _everything_by_rule(Peaks(*made), base)


def _everything_by_rule(made: Peaks, base: Tensor) -> Peaks:
    """A threshold of 0 keeps every block, of query blocks without a live row (padding) too."""
    return made._replace(chosen=made.chosen | (base == 0).unsqueeze(-1))


def _find_peaks(
    query: Tensor, key: Tensor, full: Tensor, some: Tensor, forced: Tensor, places: Tensor, count: Tensor,
    base: Tensor, floor: Tensor, real: Tensor | None, offset: Tensor | None, scale: float, key_block: int,
    last_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*some.shape[:2], *full.shape[2:])
    maps = [x.expand(x.shape[0], 1, *shape[2:]).contiguous() for x in (full, some, forced)]
    takes = query.is_cuda and query.dtype != torch.float64 and query.shape[3] <= 256 and scale > 0
    keys = Keys(key, block_mean(key, key_block), key_block)
    if takes and (kernel := load(*KERNEL)) is not None:
        given = (*maps, places, count, base, floor, real, offset)
        numbers = (CANDIDATE, LOWEST)
        made = kernel(query, *keys[:2], *given, scale, key_block, extra_phases(last_rows), numbers)
        if made is not None:
            chosen, recall, scored = made
            return chosen, recall, scored
    live = LiveRows(places.to(torch.int64), count.to(torch.int64))
    parts: list[Expr] = [TRUE]
    buffers: list[Tensor] = []
    if offset is not None:
        parts, buffers = [causal(Load(0, ()))], [offset.reshape(())]
    if real is not None:
        parts, buffers = [*parts, Load(len(buffers), (B, KV))], [*buffers, real]
    mask = IndexMask(conjunction(*parts), tuple(buffers))
    keys = keys._replace(vectors=for_exact_products(key))
    first = 0 if offset is None else offset.reshape(()) // places.shape[3]
    site = PeakSite(query, keys, Maps(*maps), live, base, floor, scale, first, None, mask)
    chosen, recall, scored = find_peaks(site, last_rows, pairs=PAIRS)
    return chosen, recall, scored


def _fake(query: Tensor, key: Tensor, full: Tensor, some: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], some.shape[2], some.shape[3])
    recall = query.new_empty(shape[:3], dtype=torch.float32)
    return query.new_empty(shape, dtype=torch.bool), recall, torch.empty_like(recall)


_lib = torch.library.Library("omnisparse", "FRAGMENT")
_lib.define(
    "find_peaks(Tensor query, Tensor key, Tensor full, Tensor some, Tensor forced, Tensor places, Tensor count, "
    "Tensor base, Tensor floor, Tensor? real, Tensor? offset, float scale, int key_block, int last_rows) "
    "-> (Tensor, Tensor, Tensor)"
)
_lib.impl("find_peaks", _find_peaks, "CompositeExplicitAutograd")
torch.library.register_fake("omnisparse::find_peaks", _fake, lib=_lib)
