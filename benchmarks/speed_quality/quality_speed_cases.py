"""What ``bench_quality_speed.py`` times: the rules of a quality test, the layers they are put to, what these keep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.video_needle.attention_inputs import Layer, widened
from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

QUALITY = Path(__file__).resolve().parents[1] / "results" / "video" / "compare.json"
#: The row of ``QUALITY`` whose rules are timed, and the dense checkpoint beside it, the better one.
CHECKPOINT, INFERENCE, DENSE = "tuned", "OmniSparse at recall 0.98", "dense longer"
HEADS, KV_HEADS, DIM = 28, 4, 128
K = 1024
#: Visual tokens of the quality test; lengths before and after are this factor away.
BASE, FACTOR = 32 * K, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """Some attention calls.

    Attributes:
        kind: ``"production"`` or ``"real"``: whose heads.
        data: What the tensors hold.
        tokens: Visual tokens.
        make: Makes the layers, the ones of a model or two to take in turn.
        share: Of the blocks, to be kept by a target of its own; None: the tested target, and times are summed.
        budget: Of the heads, in the place of the tested rules'; None: theirs.
    """

    kind: str
    data: str
    tokens: int
    make: Callable[[], list[Layer]]
    share: float | None = None
    budget: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind}, {self.tokens} visual tokens, {self.data}"


class Attention(nn.Module):
    """Causal attention as a model calls it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visual: Tensor) -> Tensor:
        """Which tokens are visual is for the selection alone."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def sparse(config: OmniSparseConfig, kernel: str = "auto") -> nn.Module:
    """Attention as ``apply_omnisparse`` makes it; a graph for each length, as the FLASH kernel needs it."""
    visual = lambda args, kwargs: args[3]  # noqa: E731
    return apply_omnisparse(Attention(), config, kernel=kernel, min_seq_len=0, visual_mask=visual, dynamic=False)


def operating_point() -> tuple[OmniSparseConfig, dict[int, dict[str, Any]]]:
    """The rules, and by visual tokens what they reached in the quality test, next to dense inference."""
    rows = json.loads(QUALITY.read_text())["rows"]
    tested = {r["length"]: r for r in rows if (r["checkpoint"], r["inference"]) == (CHECKPOINT, INFERENCE)}
    dense = {r["length"]: r for r in rows if (r["checkpoint"], r["inference"]) == (DENSE, "dense")}
    told = ("checkpoint", "inference", "accuracy", "interval", "questions", "density")
    quality = {
        length: {name: row[name] for name in told} | {"dense_accuracy": dense[length]["accuracy"]}
        for length, row in tested.items()
    }
    config = {**tested[BASE]["config"], "target_recall": tested[BASE]["target"]}
    return OmniSparseConfig.from_dict(config), quality


def shares(layer: Layer, config: OmniSparseConfig, target: float) -> tuple[float, float]:
    """Kept share of the causal blocks, and active share of the query blocks."""
    mask, scale = IndexMask(causal()), layer.query.shape[3] ** -0.5
    chosen = select_blocks(layer.query, layer.key, mask, config, target=target, scale=scale, visual=layer.visual)
    kept = chosen.keep.sum() / chosen.layout.some.expand_as(chosen.keep).sum()
    return kept.item(), chosen.active.float().mean().item()


def target_for(share: float, layer: Layer, config: OmniSparseConfig) -> float:
    """The smallest target recall that keeps at least a share of the blocks."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if shares(layer, config, middle)[0] >= share else (middle, high)
    return high


def production_layers(layers: list[Layer]) -> list[Layer]:
    """A model's layers at the production shape."""
    return [widened(layer, HEADS, KV_HEADS, DIM) for layer in layers]


def random_layers(like: Layer, count: int = 2) -> list[Layer]:
    """Random data of the production shape, as long as another layer and with its visual tokens."""
    generator = torch.Generator(like.query.device).manual_seed(0)

    def noise(heads: int) -> Tensor:
        shape, device = (1, heads, like.query.shape[2], DIM), like.query.device
        return torch.randn(shape, generator=generator, device=device, dtype=like.query.dtype)

    return [Layer(noise(HEADS), noise(KV_HEADS), noise(KV_HEADS), like.visual) for _ in range(count)]


def blank_layer(tokens: int, device: str) -> Layer:
    """A layer of no model, all of it visual: only its length counts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.zeros((1, 1, tokens, 1), device=device, dtype=dtype)
    return Layer(x, x, x, torch.ones((1, tokens), dtype=torch.bool, device=device))
