"""The attention calls that the prefill benchmarks time: dense SDPA, ours, and our selection alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.masks.blocks.block_lists  # noqa: F401  (defines torch.ops.omnisparse.map_lists)
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import BLOCK, SCORERS, BlockSelection, grid_of, select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
SCALE = HEAD_DIM**-0.5
#: (sink_size, window_size): the defaults, then as little as can be, for densities below the defaults' floor.
ALWAYS_KEPT = ((64, 256), (64, 1), (0, 1))
#: A case whose density is further from what was asked for than this factor is not measured.
CLOSE = 1.25


@dataclasses.dataclass(frozen=True)
class Case:
    """One length at one kept share of the causal blocks.

    Attributes:
        tokens: N.
        asked: The share that was asked for.
        density: The share that is kept.
        config: The rules that keep it.
    """

    tokens: int
    asked: float
    density: float
    config: OmniSparseConfig


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: normal random, so that heads and rows keep scattered blocks."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator)
    key, value = (torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(2))
    return query, key, value


def select(query: Tensor, key: Tensor, config: OmniSparseConfig) -> BlockSelection:
    """The selection as the attention makes it."""
    return select_blocks(query, key, IndexMask(causal()), config, target=0.5, scale=SCALE)


def find_case(tokens: int, asked: float, query: Tensor, key: Tensor) -> Case | None:
    """The fixed budget whose kept share of the causal blocks is nearest to ``asked``; None if none is close."""
    for sink, window in ALWAYS_KEPT:

        def density(blocks: int, sink: int = sink, window: int = window) -> tuple[float, OmniSparseConfig]:
            config = OmniSparseConfig(
                target_recall=0.5,
                budget=blocks * BLOCK,
                lazy_threshold=None,
                sink_size=sink,
                window_size=window,
            )
            chosen = select(query, key, config)
            return (chosen.keep.sum() / chosen.layout.some.expand_as(chosen.keep).sum()).item(), config

        low, high = 0, tokens // BLOCK
        while low < high:  # the smallest budget that keeps at least what was asked for
            middle = (low + high) // 2
            low, high = (low, middle) if density(middle)[0] >= asked else (middle + 1, high)
        near = min((density(b) for b in {max(low - 1, 0), low}), key=lambda found: abs(found[0] - asked))
        if asked / CLOSE <= near[0] <= asked * CLOSE:
            return Case(tokens, asked, *near)
    return None


def dense(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Any]:
    """The baseline: PyTorch's own fused attention."""
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)


def sparse(config: OmniSparseConfig, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Any]:
    """Our attention as a compiled model runs it: a marker, rewritten by the passes, under Inductor."""
    backend = Backend(config, min_seq_len=0, inner="inductor")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.omnisparse.attn(query, key, value, None, None, True, SCALE, 0, 0.0)

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=backend, dynamic=False)
    compiled(query, key, value)
    if len(backend.log.report().rewritten) != 1:
        raise RuntimeError(f"the attention was not rewritten: {backend.log.report()}")
    return lambda: compiled(query, key, value)


def selection(config: OmniSparseConfig, query: Tensor, key: Tensor) -> Callable[[], Any]:
    """What our attention does before its kernel: choose the blocks, make their lists."""

    def lists(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        chosen = select(query, key, config)
        return tuple(torch.ops.omnisparse.map_lists(chosen.keep, chosen.layout.full))

    compiled = torch.compile(lists, dynamic=False)
    compiled(query, key)
    return lambda: compiled(query, key)


def scoring(name: str, query: Tensor, key: Tensor) -> Callable[[], Any]:
    """One scorer alone, compiled, the mask's own block maps given."""
    mask = IndexMask(causal())
    some = block_layout(mask, grid_of(query, key), OmniSparseConfig()).some

    def score(query: Tensor, key: Tensor, some: Tensor) -> Tensor:
        sides: dict[str, Any] = {"scale": SCALE, "block": BLOCK, "key_block": BLOCK, "adjust": None}
        mass = SCORERS[name](query, key, some, allowed=mask.pairs, **sides)
        realized: Tensor = torch.ops.omnisparse.realize(mass)
        return realized

    torch._dynamo.reset()
    compiled = torch.compile(score, dynamic=False)
    compiled(query, key, some)
    return lambda: compiled(query, key, some)
