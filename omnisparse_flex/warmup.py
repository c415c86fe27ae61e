"""Sparsity that comes on slowly: the target recall falls from 1 to the config's over the first training steps."""

from __future__ import annotations

import torch
from torch import nn

from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.compiled_module import compiled_decoder_of


class RecallWarmup:
    """Lower a model's target recall in a straight line; the graphs read it, so nothing compiles again.

    At a recall of 1 every key is kept for the queries that are active; lazy queries are as
    lazy as ever, and layers that the config makes dense stay dense.

    Args:
        model: What ``apply_omnisparse`` returned; applying again ends the warm-up.
        steps: Calls of ``step`` until the config's own targets hold.

    Raises:
        ConfigError: If ``steps`` is not an int of at least 1, or the model is not ours.

    Source: our choice; PAPER asks only that training and inference select alike, which they do at every step.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        """Start at a recall of 1."""
        require(
            isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1,
            "steps",
            "be an int of at least 1",
            steps,
        )
        entry = compiled_decoder_of(model)
        if entry is None:
            raise ConfigError(f"model must be one that apply_omnisparse returned, got {type(model).__name__}")
        self.steps, self.taken = steps, 0
        self._state = entry.state
        self._final = entry.state.recall.clone()
        self._write()

    def step(self) -> None:
        """Go one step further; call it after ``optimizer.step()``. Beyond the last step nothing changes."""
        self.taken = min(self.taken + 1, self.steps)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        recall = self._state.recall
        final = self._final.to(recall.device)
        share = self.taken / self.steps
        # Exact at both ends: only a recall of 1 keeps everything.
        recall.copy_(final if share == 1 else 1.0 - (1.0 - final) * share)
