"""A recorded decode step, and what records one."""

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


class Places:
    """Where tensors lie; none of them is kept alive."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Note where they lie now."""
        self.tensors = [weakref.ref(x) for x in tensors]
        self.addresses = self._addresses()

    def hold(self) -> bool:
        """Whether all of them are there still."""
        try:
            return self._addresses() == self.addresses
        except TypeError:  # one of them is gone
            return False

    def _addresses(self) -> list[int]:
        # A few hundred weights, for every token: hence no Python code for each.
        return list(map(Tensor.data_ptr, [ref() for ref in self.tensors]))  # type: ignore[arg-type]


class Memory:
    """Whether memory that is only read is still allocated: then its reader can start before more is asked.

    ``Places`` of hundreds of weights take too long before every token, and yet a kernel must not read what was given
    back to the driver. The memory itself says so when it is freed.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watch the memory of these tensors."""
        self._freed: list[object] = []
        self._storages = [weakref.ref(x.untyped_storage(), self._freed.append) for x in tensors]
        # Where the Python object of a storage does not live as long as the storage, one must look.
        self._places = Places(tensors) if self._freed else None

    def lasts(self) -> bool:
        """Whether nothing of it was freed."""
        return not self._freed if self._places is None else self._places.hold()


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
        memory: Of these.
        written: What the step writes: the layers' tails and counters.
    """

    key: tuple[Any, ...]
    number: int
    inputs: list[Any]
    step: Step
    outputs: list[Any]
    queries: dict[int, Tensor]
    weights: Places
    memory: Memory
    written: Places

    def is_safe(self) -> bool:
        """Whether a replay reads and writes no memory that is somebody else's by now."""
        return self.memory.lasts() and self.written.hold()
