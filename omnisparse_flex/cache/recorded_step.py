"""A recorded decode step, and the protocols of what records and replays it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from omnisparse_flex.cache.layer import SlimLayer


class Step(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Run the recorded kernels again, on the memory that they were recorded with."""


class Recorder(Protocol):
    """Records steps: ``cuda_graph.CudaGraphs``, or a test double."""

    bytes: int

    def serves(self, device: torch.device) -> bool:
        """Whether it can record on a device at all."""

    def takes(self, layers: Sequence[SlimLayer]) -> bool:
        """Whether the latest step of these layers ran on kernels that can be recorded."""

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
        """Record a step without running it; returns it and its result, which each replay overwrites."""

    def free(self) -> None:
        """Give all memory back."""


class TensorAddresses:
    """The addresses of some tensors, which are not kept alive by it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Store the current addresses."""
        self.tensors = [weakref.ref(x) for x in tensors]
        self.addresses = self._addresses()

    def hold(self) -> bool:
        """Whether all tensors still exist at the same addresses."""
        try:
            return self._addresses() == self.addresses
        except TypeError:  # a tensor was freed
            return False

    def _addresses(self) -> list[int]:
        # Called for every token with a few hundred weights: a Python loop would take too long.
        return list(map(Tensor.data_ptr, [ref() for ref in self.tensors]))  # type: ignore[arg-type]


class StorageWatch:
    """Tells whether the memory of some tensors is still allocated.

    A kernel must not read memory that was given back to the driver. Comparing the addresses of hundreds of weights
    (``TensorAddresses``) before every token takes too long; a weak reference to each storage is called back when the
    storage is freed, so the check is one look at a list.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watch the storages of these tensors."""
        self._freed: list[object] = []
        self._storages = [weakref.ref(x.untyped_storage(), self._freed.append) for x in tensors]
        # In a torch whose Python storage objects are freed before the storage itself, compare addresses instead.
        self._places = TensorAddresses(tensors) if self._freed else None

    def lasts(self) -> bool:
        """Whether none of the storages was freed."""
        return not self._freed if self._places is None else self._places.hold()


@dataclasses.dataclass(eq=False, slots=True)
class RecordedStep:
    """A recorded step, and what must be unchanged for a replay of it.

    Attributes:
        key: What must be equal for a replay.
        number: Number of the compiled graph.
        inputs: What the graph reads, as ``FlatCall.read`` returns it.
        step: Replays the graph's kernels.
        outputs: The graph's outputs, overwritten by each replay.
        queries: Each layer's queries (B, Hq, 1, D), by layer.
        weights: The tensors among ``inputs``.
        memory: The storages of ``weights``.
        written: Tensors that the step writes: the layers' tails and counters.
    """

    key: tuple[Any, ...]
    number: int
    inputs: list[Any]
    step: Step
    outputs: list[Any]
    queries: dict[int, Tensor]
    weights: TensorAddresses
    memory: StorageWatch
    written: TensorAddresses

    def is_safe(self) -> bool:
        """Whether all memory that a replay reads and writes still belongs to the same tensors."""
        return self.memory.lasts() and self.written.hold()
