"""The result of a calibration, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.report import table


@dataclasses.dataclass(frozen=True, slots=True)
class LayerTarget:
    """One layer's outcome.

    Attributes:
        layer: Decoder layer, 0-based.
        target: What the config asks of the estimator; 1.0: the layer is dense.
        recall: True mean recall of its worst head at that target, on the batches; 1.0 if dense.
        density: Kept share of the layer's block pairs, 0-1; 1.0 if dense.
        reason: Why it is dense; "" if it is sparse.
    """

    layer: int
    target: float
    recall: float
    density: float
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """The rules, and what was measured for them.

    Attributes:
        config: The rules, one ``target_recall`` per layer.
        target_recall: What the user wants.
        reserve: What every head had to reach on the batches.
        layers: One entry per layer.
    """

    config: OmniSparseConfig
    target_recall: float
    reserve: float
    layers: tuple[LayerTarget, ...]

    @property
    def dense(self) -> tuple[LayerTarget, ...]:
        """The layers that stay dense."""
        return tuple(layer for layer in self.layers if layer.reason)

    @property
    def density(self) -> float:
        """Kept share of the block pairs of the whole model, 0-1."""
        return sum(layer.density for layer in self.layers) / max(len(self.layers), 1)

    def named_dense(self) -> str:
        """The dense layers in a few words."""
        if not self.dense:
            return "no layer stays dense"
        numbers = ", ".join(str(layer.layer) for layer in self.dense)
        return f"{len(self.dense)} of {len(self.layers)} layers stay dense: {numbers}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "config": self.config.to_dict(),
            "target_recall": self.target_recall,
            "reserve": self.reserve,
            "density": self.density,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """A table, one line per layer."""
        rows = [["layer", "target_recall", "true recall, worst head", "density", "attention"]]
        for x in self.layers:
            outcome = f"dense: {x.reason}" if x.reason else "omnisparse"
            rows.append([str(x.layer), f"{x.target:.4f}", f"{x.recall:.3f}", f"{x.density:.3f}", outcome])
        head = f"true recall wanted {self.target_recall}, asked of the batches {self.reserve:.4f}; {self.named_dense()}"
        return "\n".join([head, f"density of the whole model: {self.density:.3f}", *table(rows)])
