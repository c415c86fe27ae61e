"""What is fixed for a whole fine-tuning experiment."""

from __future__ import annotations

import dataclasses
from typing import Any

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.errors import require


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan; every row of one JSON has the same.

    Attributes:
        tokens: Length of a window, in training and inference.
        steps: Optimizer steps of each run.
        rows: Windows of an optimizer step.
        windows: Most held-out windows of a text.
        lr: Peak learning rate.
        dense_layers: First layers that stay dense.
        train_density: Whole-model density of the pretrained model on a training window; its target is trained with.
        densities: Whole-model densities of sparse inference.
        base: Further fields of the ``OmniSparseConfig``.
        more_text: Train on ``prepare.training_only`` too.
        warmup: Steps over which the target falls from 1 to that of training.
    """

    tokens: int = 8192
    steps: int = 160
    rows: int = 2
    windows: int = 8
    lr: float = 1e-4
    dense_layers: int = 1
    train_density: float = 0.19
    densities: tuple[float, ...] = (0.16, 0.19, 0.3)
    base: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"budget": "per_head", "lazy_threshold": None, "window_size": 128}
    )
    more_text: bool = False
    warmup: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("tokens", "steps", "rows", "windows", "dense_layers"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        require(0 <= self.warmup <= self.steps, "warmup", "be at least 0 and at most steps", self.warmup)
        require(0 < self.lr < 1, "lr", "be in (0, 1)", self.lr)
        for density in (self.train_density, *self.densities):
            require(0 < density < 1, "densities", "be in (0, 1)", density)
        self.config("mean_pool", self.dense_layers + 1)

    def config(self, scoring: str, layers: int) -> OmniSparseConfig:
        """The rules; the sparse layers' target is replaced at run time.

        Args:
            scoring: An estimator.
            layers: Of the model.
        """
        recalls = [1.0] * self.dense_layers + [0.5] * (layers - self.dense_layers)
        return OmniSparseConfig.from_dict({**self.base, "scoring": scoring, "target_recall": recalls})
