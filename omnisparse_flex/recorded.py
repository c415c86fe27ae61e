"""A recorded decode step, and what records one."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from omnisparse_flex.slim_layer import SlimLayer


class Step(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Run its kernels again, on the memory that they were recorded with."""


class Recorder(Protocol):
    """What records steps: ``cuda_graphs.CudaGraphs``, or a test's stand-in."""

    bytes: int

    def serves(self, device: torch.device) -> bool:
        """Whether it can record on a device at all."""

    def takes(self, layers: Sequence[SlimLayer]) -> bool:
        """Whether the latest step of these layers ran on kernels that can be recorded."""

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
        """Record a step without running it; with it the result, which each replay fills anew."""

    def free(self) -> None:
        """Give all memory back."""


@dataclasses.dataclass(eq=False, slots=True)
class Recorded:
    """A recorded step, and all that it takes for granted.

    Attributes:
        key: What must be equal for a replay.
        number: The compiled graph's.
        inputs: What that reads, as ``Call.read`` says it.
        step: Replays it.
        outputs: Its outputs, which each replay fills anew.
        queries: Each layer's queries (B, Hq, 1, D), by layer.
        weights: The tensors among ``inputs``.
        addresses: Where they lay.
    """

    key: tuple[Any, ...]
    number: int
    inputs: list[Any]
    step: Step
    outputs: list[Any]
    queries: dict[int, Tensor]
    weights: list[weakref.ref[Tensor]]
    addresses: list[int]

    def holds(self) -> bool:
        """Whether its weights are where they were."""
        try:
            return [ref().data_ptr() for ref in self.weights] == self.addresses  # type: ignore[union-attr]
        except AttributeError:  # one of them is gone
            return False
