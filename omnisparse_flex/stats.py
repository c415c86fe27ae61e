"""What each layer kept: density, budgets, active queries, recall."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from omnisparse_flex.errors import require
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.statistics import STATS
from omnisparse_flex.model.compiled_module import CompiledDecoder, compiled_decoder_of
from omnisparse_flex.model.decoder_facts import head_shapes
from omnisparse_flex.model.run_state import ModelState
from omnisparse_flex.passes.nodes import shape_of
from omnisparse_flex.report import table

#: Largest number of heads, query blocks and key blocks that a picture holds.
MAP_LIMIT = (64, 256, 256)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer of the last sparse forward.

    Attributes:
        layer: Decoder layer, 0-based.
        density: Kept share of the layer's dense causal attention FLOPs, selection included; 0-1.
        budget: Mean number of tokens beyond the always-kept ones of an active query block.
        active_share: Share of query blocks that are active.
        discarded_share: Share of the lazy query blocks that fetch nothing.
        flattest_head: Query head with the largest need; of tokens the KV head, unless ``gqa_choice="head"``.
        estimated_recall: The estimator's own mean recall (uncalibrated).
        worst_estimated_recall: Its minimum over heads and query blocks.
        overflow_rows: Query blocks whose need exceeded ``max_kv_budget``.
        true_recall: Mean true recall of each query head; empty without ``exact=True``. Of the tokens' mass: a
            logit sink's is not counted.
        worst_true_recall: Minimum true recall of each query head.
    """

    layer: int
    density: float
    budget: float
    active_share: float
    discarded_share: float
    flattest_head: int
    estimated_recall: float
    worst_estimated_recall: float
    overflow_rows: int
    true_recall: tuple[float, ...] = ()
    worst_true_recall: tuple[float, ...] = ()


@dataclasses.dataclass(eq=False)
class Stats:
    """Filled by the forwards that run inside ``collect_stats``; the last sparse one counts.

    Attributes:
        layers: Number of decoder layers, dense ones included.
    """

    layers: int
    raw: Tensor
    maps: Tensor | None
    recalls: Tensor | None

    def per_layer(self) -> list[LayerStats]:
        """The sparse layers, in order; dense ones are absent."""
        rows = self.raw.cpu()
        return [self._layer(i, rows[i]) for i in range(len(rows)) if rows[i, STATS.index("allowed_blocks")] > 0]

    @property
    def density(self) -> float:
        """Kept share of the dense causal attention FLOPs of the whole model; dense layers count 1."""
        sparse = self.per_layer()
        total = max(self.layers, len(sparse), 1)
        return (sum(layer.density for layer in sparse) + total - len(sparse)) / total

    def block_maps(self, layer: int) -> Tensor | None:
        """uint8 (H, rows, columns) of ``masks.statistics`` cell values for one layer, or None."""
        return None if self.maps is None else self.maps[layer].cpu()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {"density": self.density, "layers": [dataclasses.asdict(layer) for layer in self.per_layer()]}

    def __str__(self) -> str:
        """A table, one line per sparse layer."""
        head = ["layer", "density", "budget", "active", "discarded", "flattest", "recall (uncalibrated)", "worst"]
        sparse = self.per_layer()
        exact = any(layer.true_recall for layer in sparse)
        rows = [head + (["true recall", "worst head"] if exact else [])]
        for s in sparse:
            row = [str(s.layer), f"{s.density:.3f}", f"{s.budget:.0f}", f"{s.active_share:.2f}"]
            row += [f"{s.discarded_share:.2f}", str(s.flattest_head), f"{s.estimated_recall:.3f}"]
            row += [f"{s.worst_estimated_recall:.3f}"]
            if exact:
                mean = sum(s.true_recall) / max(len(s.true_recall), 1)
                row += [f"{mean:.3f}", f"{min(s.true_recall, default=0.0):.3f}"]
            rows.append(row)
        return "\n".join([f"density of the whole model: {self.density:.3f}", *table(rows)])

    def _layer(self, layer: int, row: Tensor) -> LayerStats:
        value = dict(zip(STATS, row.tolist(), strict=True))
        mean, worst = ((), ()) if self.recalls is None else (tuple(x) for x in self.recalls[layer].cpu().tolist())
        return LayerStats(
            layer=layer,
            density=(value["kept_blocks"] + value["selection_blocks"]) / value["allowed_blocks"],
            budget=value["budget"] * BLOCK,
            active_share=value["active_share"],
            discarded_share=value["discarded_share"],
            flattest_head=int(value["flattest_head"]),
            estimated_recall=value["estimated_recall"],
            worst_estimated_recall=value["worst_estimated_recall"],
            overflow_rows=int(value["overflow_rows"]),
            true_recall=mean,
            worst_true_recall=worst,
        )


@contextlib.contextmanager
def collect_stats(model: nn.Module, exact: bool = False, *, maps: bool = False) -> Iterator[Stats]:
    """Record what each layer keeps while the context is open.

    Entering may compile a second variant of the graph; outside it costs nothing. Layers
    inside activation checkpoints record nothing.

    Args:
        model: A model that ``apply_omnisparse`` changed.
        exact: Also measure the true recall of every head on sampled query rows.
        maps: Also keep the block maps of the first batch row, for pictures.

    Yields:
        The ``Stats`` object, filled by each forward.

    Raises:
        ConfigError: If the model was not changed.
    """
    entry = compiled_decoder_of(model)
    require(entry is not None, "model", "be changed by apply_omnisparse", type(model).__name__)
    assert entry is not None
    rows = entry.state.recall.shape[0]
    parameter = next(entry.module.parameters(), None)
    device = entry.state.recall.device if parameter is None else parameter.device
    stats = Stats(
        layers=_layer_count(entry),
        raw=torch.zeros((rows, len(STATS)), device=device),
        maps=torch.zeros((rows, *MAP_LIMIT), dtype=torch.uint8, device=device) if maps else None,
        recalls=torch.zeros((rows, 2, _query_heads(entry)), device=device) if exact else None,
    )
    state: ModelState = entry.state
    state.stats, state.maps, state.recalls = stats.raw, stats.maps, stats.recalls
    try:
        yield stats
    finally:
        state.stats = state.maps = state.recalls = None


def _layer_count(entry: CompiledDecoder) -> int:
    config = getattr(entry.module, "config", None)
    stated = getattr(config, "num_hidden_layers", None)
    return stated if isinstance(stated, int) else len({site.layer for site in entry.backend.log.sites})


def _query_heads(entry: CompiledDecoder) -> int:
    """What the config states, or else what the last compiled graph has."""
    heads = max((shape.heads for shape in head_shapes(getattr(entry.module, "config", None))), default=None)
    if not isinstance(heads, int) and entry.backend.last is not None and entry.backend.last.sites:
        heads = max(int(shape_of(site.query)[1]) for site in entry.backend.last.sites)
    rule = "be False for a module that has not run yet and whose config states no num_attention_heads"
    require(isinstance(heads, int), "exact", rule, True)
    assert isinstance(heads, int)
    return heads
