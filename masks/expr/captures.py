"""Captured tensors in the form that each device's flex kernels can read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.expr.expr import Loader


@dataclasses.dataclass(frozen=True, slots=True)
class Captures:
    """Small tensors as trailing arguments of a flex call, and how to read them back.

    On CUDA they travel as they are. The C++ template of Inductor reads neither fused views
    nor sizes that are symbols, so on the CPU each travels flat, realized, next to its
    strides, and is read without bounds that would name a symbol.

    Attributes:
        tensors: What to pass as trailing arguments.
        ranks: Number of dimensions of each captured tensor.
        flat: Whether the CPU form is used.
    """

    tensors: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    flat: bool

    @classmethod
    def of(cls, buffers: Sequence[Tensor], device: torch.device) -> Captures:
        """Prepare ``buffers`` for a flex call on ``device``."""
        # Only eager kernels have gradients on the CPU, and theirs come through ordinary indexing alone.
        learned = torch.is_grad_enabled() and any(x.requires_grad for x in buffers)
        flat = device.type == "cpu" and not learned
        ranks = tuple(x.dim() for x in buffers)
        if not flat:
            return cls(tuple(buffers), ranks, flat)
        tensors: list[Tensor] = []
        for buffer in buffers:
            tensors.append(torch.ops.omnisparse.realize(buffer.reshape(-1) if buffer.dim() else buffer))
            for size in buffer.shape:
                extent = torch.full((), size, dtype=torch.int64, device=device)
                tensors.append(torch.ops.omnisparse.realize(extent))
        return cls(tuple(tensors), ranks, flat)

    def loader(self, arguments: Sequence[Tensor]) -> Loader:
        """The ``load(slot, indices)`` function over the trailing ``arguments`` of the call."""
        if not self.flat:
            return lambda slot, at: arguments[slot][at] if at else arguments[slot]
        starts = [sum(self.ranks[:slot]) + slot for slot in range(len(self.ranks))]

        def load(slot: int, at: tuple[Tensor, ...]) -> Tensor:
            data, *extents = arguments[starts[slot] : starts[slot] + 1 + self.ranks[slot]]
            if not at:
                return data
            index = torch.zeros_like(at[0])
            for extent, place in zip(extents, at, strict=True):
                index = index * extent + torch.where(place < 0, place + extent, place)
            element: Tensor = torch.ops.aten._unsafe_masked_index(data, index >= 0, [index], 0)
            return element

        return load
