"""Hypothesis strategies behind ``omnisparse_flex.testing``; imported only when one is called.

The dense masks here are built from triangles, slices and loops, never from a ``mask_mod``:
they are what the factories are tested against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from omnisparse_flex.config import KEY_BLOCKS, SCORINGS, Budget, OmniSparseConfig
from omnisparse_flex.masks.causal import causal
from omnisparse_flex.masks.combine import intersect, union
from omnisparse_flex.masks.document import document, document_ids
from omnisparse_flex.masks.near_to_far import near_to_far
from omnisparse_flex.masks.padding import padding
from omnisparse_flex.masks.sinks_and_window import sinks_and_window
from omnisparse_flex.masks.sliding_window import sliding_window
from omnisparse_flex.masks.visual_text import visual_text
from omnisparse_flex.masks.zipar import zipar
from omnisparse_flex.testing.cases import AttentionShape, MaskCase
from omnisparse_flex.types import MaskMod

# Around the 128-token block side, and far under it.
_LENGTHS = st.sampled_from((1, 7, 127, 128, 129, 257, 400)) | st.integers(1, 400)


@st.composite
def attention_shapes(draw: st.DrawFn) -> AttentionShape:
    """See ``omnisparse_flex.testing.attention_shapes``."""
    q_len = draw(_LENGTHS)
    return AttentionShape(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(st.sampled_from((1, 2, 7))),
        q_len=q_len,
        kv_len=draw(st.just(q_len) | _LENGTHS),
        head_dim=draw(st.sampled_from((16, 24, 32, 64))),
    )


@st.composite
def configs(draw: st.DrawFn) -> OmniSparseConfig:
    """See ``omnisparse_flex.testing.configs``."""
    shared: dict[str, Any] = {
        "target_recall": draw(st.floats(0.05, 1.0)),
        "key_block": draw(st.sampled_from(KEY_BLOCKS)),
        "last_rows": 2 * draw(st.integers(0, 130)),
        "sink_size": draw(st.integers(0, 200)),
        "window_size": draw(st.integers(1, 300)),
    }
    if draw(st.booleans()):
        return OmniSparseConfig(min_peak=draw(st.floats(0.0, 0.99)), **shared)
    max_kv_budget = draw(st.none() | st.integers(0, 512))
    budgets: tuple[Budget, ...] = ("flattest_head", "per_head")
    fixed = st.integers(0, 512 if max_kv_budget is None else max_kv_budget)
    return OmniSparseConfig(
        scoring=draw(st.sampled_from(("auto", *(x for x in SCORINGS["block"] if x != "sampled_rows")))),
        budget=draw(st.sampled_from(budgets) | fixed),
        max_kv_budget=max_kv_budget,
        lazy_threshold=draw(st.sampled_from((None, "auto")) | st.floats(0.0, 1.0)),
        **shared,
    )


@st.composite
def mask_mods(draw: st.DrawFn, B: int, L: int, S: int) -> MaskCase:
    """See ``omnisparse_flex.testing.mask_mods``."""
    cases = [_draw_one(draw, B, L, S) for _ in range(draw(st.integers(1, 3)))]
    if len(cases) == 1:
        return cases[0]
    both = draw(st.booleans())
    combine = intersect if both else union
    mask_mod = combine(*(case.mask_mod for case in cases))
    dense = torch.stack([case.dense for case in cases])
    return MaskCase(mask_mod.__name__, mask_mod, dense.all(dim=0) if both else dense.any(dim=0))


def _draw_one(draw: st.DrawFn, B: int, L: int, S: int) -> MaskCase:
    makers = (_causal, _window, _sinks, _document, _padding, _visual_text, _near_to_far, _zipar)
    maker: Callable[[st.DrawFn, int, int, int], tuple[MaskMod, Tensor]] = draw(st.sampled_from(makers))
    mask_mod, dense = maker(draw, B, L, S)
    return MaskCase(mask_mod.__name__, mask_mod, dense.expand(B, 1, L, S).contiguous())


def _causal(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    offset = draw(st.just(S - L) | st.integers(-3, S))
    at_run_time = draw(st.booleans())
    return causal(torch.tensor(offset) if at_run_time else offset), _all(L, S).tril(offset)


def _window(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    size = draw(st.integers(1, max(L, S)))
    return sliding_window(size), _all(L, S).tril().triu(1 - size)


def _sinks(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    sink_size, window_size = draw(st.integers(0, S)), draw(st.integers(1, max(L, S)))
    dense = _all(L, S).triu(1 - window_size)
    dense[:, :sink_size] = True
    return sinks_and_window(sink_size, window_size), dense.tril()


def _document(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    total = max(L, S)
    lengths = [_cut(draw, total) for _ in range(B)]
    dense = torch.zeros(B, 1, total, total, dtype=torch.bool)
    for b, row in enumerate(lengths):
        for start, end in itertools.pairwise(itertools.accumulate(row, initial=0)):
            dense[b, :, start:end, start:end] = True
    return document(document_ids(lengths, device="cpu")), dense[..., :L, :S]


def _padding(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    valid = torch.zeros(B, S, dtype=torch.bool)
    left = draw(st.booleans())
    for b in range(B):
        tokens = draw(st.integers(0, S))  # 0: a batch row in which nothing may be seen
        valid[b, S - tokens if left else 0 : S if left else tokens] = True
    return padding(valid), valid.repeat_interleave(L, dim=0).view(B, 1, L, S)


def _visual_text(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    total = max(L, S)
    visual = torch.zeros(B, total, dtype=torch.bool)
    dense = _all(total, total).tril().repeat(B, 1, 1, 1)
    for b in range(B):
        bounds = list(itertools.accumulate(_cut(draw, total), initial=0))
        for start, end in list(itertools.pairwise(bounds))[draw(st.integers(0, 1)) :: 2]:
            visual[b, start:end] = True
            dense[b, :, start:end, start:end] = True
    return visual_text(visual), dense[..., :L, :S]


def _near_to_far(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    total = max(L, S)
    frames = draw(st.integers(1, min(3, total)))
    height = draw(st.integers(1, min(12, total // frames)))
    width = total // (frames * height)
    prefix = total - frames * height * width
    distance = torch.tensor([sum(thw) for thw in itertools.product(range(frames), range(height), range(width))])
    dense = _all(total, total).tril()
    order = draw(st.sampled_from(("raster", "shells")))
    distance = distance if order == "raster" else distance.sort().values
    dense[prefix:, prefix:] = distance <= distance[:, None]
    return near_to_far(prefix, frames, height, width, device="cpu", order=order), dense[:L, :S]


def _zipar(draw: st.DrawFn, B: int, L: int, S: int) -> tuple[MaskMod, Tensor]:
    total = max(L, S)
    eol = total > 1 and draw(st.booleans())
    room = total if eol else total + 1  # without ends of lines, rows - 1 copies stand behind the grid
    rows = draw(st.integers(1, min(6, room // 2)))
    columns = draw(st.integers(1, room // rows - 1))
    prefix = room - rows * (columns + 1)
    windows = st.lists(st.integers(1, columns), min_size=rows - 1, max_size=rows - 1)
    starts = [list(itertools.accumulate(draw(windows), initial=0)) for _ in range(B)]
    dense = torch.stack([_decoded(total, prefix, columns, row, eol) for row in starts])
    mask_mod = zipar(prefix, rows, columns, torch.tensor(starts, device="cpu"), eol=eol, device="cpu")
    return mask_mod, dense[:, None, :L, :S]


def _decoded(total: int, prefix: int, columns: int, starts: list[int], eol: bool) -> Tensor:
    """What each token sees while ZipAR decodes: the decoding itself, step by step."""
    rows, line = len(starts), columns + eol
    place = torch.arange(total)
    fed: list[list[int]] = [[] for _ in range(starts[-1] + columns + 1)]
    gone: list[list[int]] = [[] for _ in fed]
    for row, start in enumerate(starts):
        for column in range(columns):
            fed[start + column].append(prefix + row * line + column)
        end = prefix + row * line + columns if eol else prefix + rows * columns + row
        if row + 1 < rows or eol:
            fed[starts[row + 1] - 1 if row + 1 < rows else start + columns].append(end)
        if row + 1 < rows and not eol:
            place[end] = prefix + (row + 1) * columns - 1
            gone[start + columns - 1].append(end)
    dense, there = _all(total, total).tril(), torch.zeros(total, dtype=torch.bool)
    there[:prefix] = True
    taken = torch.zeros_like(there)
    for arrived, left in zip(fed, gone, strict=True):
        there[arrived], taken[left] = True, True
        for token in arrived:
            dense[token] = there & ~taken & (place <= place[token])
    return dense


def _cut(draw: st.DrawFn, total: int) -> list[int]:
    """Up to five positive lengths that sum to ``total``."""
    cuts = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=4))
    bounds = sorted({0, total, *(cut for cut in cuts if cut < total)})
    return [end - start for start, end in itertools.pairwise(bounds)]


def _all(L: int, S: int) -> Tensor:
    return torch.ones(L, S, dtype=torch.bool)
