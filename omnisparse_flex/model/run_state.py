"""Run-time state: what a model keeps between calls, and what one call hands to its attention sites."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks.promise import RECORD


class RunState:
    """The tensors of one call that compiled graphs read beside the module's own inputs.

    It travels as a keyword argument to every layer's attention: whichever pieces Dynamo makes of a decoder, each
    finds it among its inputs, and so does a recomputation in the backward. Not a pytree: what casts or moves a
    module's arguments (mixed precision, dispatch to several devices) leaves it alone.

    Attributes:
        visual: bool (B, S), tokens eligible for selection, or None: all.
        recall: float32 (layers,), target recall of each layer.
        stats: float32 (layers, len(STATS)) to be written, or None.
        maps: uint8 (layers, H, rows, columns) to be painted, or None.
        recalls: float32 (layers, 2, Hq) for mean and minimum true recall, or None.
        promises: float32 (layers, len(RECORD)), what each layer kept of what it promised; always written.
        eager: Layers whose attention ran outside every graph, and so densely.
    """

    # All fields are set here: class attributes would cost Dynamo extra compiles.
    def __init__(
        self, visual: Tensor | None, recall: Tensor, stats: Tensor | None, maps: Tensor | None, recalls: Tensor | None,
        promises: Tensor,
    ) -> None:  # fmt: skip
        """Hold the tensors of one call."""
        self.visual = visual
        self.recall = recall
        self.stats = stats
        self.maps = maps
        self.recalls = recalls
        self.promises = promises
        self.eager: set[int] = set()


class State:
    """What one changed model keeps between calls.

    Targets and the tensors to be written are the model's: a ``collect_stats`` in one thread sees the ``generate`` that
    another one runs. The visual mask is of one call, and so of the thread that makes it.

    Attributes:
        recall: As in ``RunState``.
        stats: As in ``RunState``.
        maps: As in ``RunState``.
        recalls: As in ``RunState``.
        promises: As in ``RunState``.
    """

    def __init__(self, recall: Tensor) -> None:
        """Start without a visual mask and without statistics."""
        self.recall = recall
        self.promises = torch.zeros((recall.shape[0], len(RECORD)), dtype=torch.float32)
        self.stats: Tensor | None = None
        self.maps: Tensor | None = None
        self.recalls: Tensor | None = None
        self._calls = threading.local()

    @property
    def visual(self) -> Tensor | None:
        """Bool (B, S), tokens eligible for selection in this thread's next or latest call, or None: all."""
        mask: Tensor | None = getattr(self._calls, "visual", None)
        return mask

    @visual.setter
    def visual(self, mask: Tensor | None) -> None:
        self._calls.visual = mask

    @property
    def collects(self) -> bool:
        """Whether a call writes statistics."""
        return self.stats is not None or self.maps is not None or self.recalls is not None

    def of_call(self) -> RunState:
        """What this thread's call hands to its attention sites."""
        return RunState(self.visual, self.recall, self.stats, self.maps, self.recalls, self.promises)
