"""Run-time state: what a model keeps between calls, and what one call hands to its attention sites."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks.promise import RECORD
from omnisparse_flex.types import StateTensors


class RunState:
    """The tensors of one call that compiled graphs read beside the module's own inputs.

    It travels as a keyword argument to every layer's attention: whichever pieces Dynamo makes of a decoder, each
    finds it among its inputs, and so does a recomputation in the backward. Not a pytree: what casts or moves a
    module's arguments (mixed precision, dispatch to several devices) leaves it alone.

    Attributes:
        tensors: What it reads.
        eager: Layers whose attention ran outside every graph, and so densely.
    """

    def __init__(self, tensors: StateTensors[Tensor]) -> None:
        """Hold the tensors of one call."""
        # Fields are set here: class attributes would cost Dynamo extra compiles.
        self.tensors = tensors
        self.eager: set[int] = set()


class ModelState:
    """What one changed model keeps between calls.

    Targets and the tensors to be written are the model's: a ``collect_stats`` in one thread sees the ``generate`` that
    another one runs. The visual mask is of one call, and so of the thread that makes it.

    Attributes:
        recall: As in ``StateTensors``, and so are ``stats``, ``maps``, ``recalls`` and ``promises``.
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
        self._calls.told = True

    def was_told(self) -> bool:
        """Whether ``visual`` was set for the call that begins now, since the last time that this was asked."""
        told: bool = getattr(self._calls, "told", False)
        self._calls.told = False
        return told

    def to(self, device: torch.device) -> None:
        """Move what a model always keeps."""
        with torch.inference_mode(False):  # it is written to outside of it too
            self.recall = self.recall.to(device)
            self.promises = self.promises.to(device)

    @property
    def collects(self) -> bool:
        """Whether a call writes statistics."""
        return self.stats is not None or self.maps is not None or self.recalls is not None

    def of_call(self) -> RunState:
        """What this thread's call hands to its attention sites."""
        return RunState(StateTensors(self.visual, self.recall, self.stats, self.maps, self.recalls, self.promises))
