"""Training steps as CUDA graphs: launching this small model's kernels takes several times as long as running them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omnisparse_flex.cache.cuda_graph import CudaGraphs

#: Steps of a shape that run plainly before it is recorded: compilers, libraries and optimizers have then settled.
WARM = 3


class Recorder:
    """A function of CUDA tensors and all it changes, recorded once for each shape of its tensors and then replayed.

    The first ``WARM`` calls of a shape run plainly, on a stream that is not the default one: as recordings are.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """Keep what to run: of tensors, returns a tensor, never waits for the device, leaves no gradients."""
        self.function = function
        self.recorder = CudaGraphs()
        self.stream: torch.cuda.Stream | None = None
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        """What ``function`` returns for these tensors, in memory of its own."""
        key = tuple(x.shape for x in given)
        if key not in self.graphs and self.calls.get(key, 0) < WARM:
            self.calls[key] = self.calls.get(key, 0) + 1
            return self._plain(given)
        if key not in self.graphs:
            try:
                self.graphs[key] = self._record(given)
            except RuntimeError as error:
                warnings.warn(f"not recorded, steps run plainly: {str(error).splitlines()[0]}", stacklevel=2)
                self.calls[key] = -(1 << 60)
                return self._plain(given)
        graph, kept, result = self.graphs[key]
        for mine, new in zip(kept, given, strict=True):
            mine.copy_(new, non_blocking=True)
        graph.replay()
        return result.clone()

    def forget(self) -> None:
        """Record anew: tensors that the function changes are others now."""
        self.calls.clear()
        self.graphs.clear()

    def _plain(self, given: Sequence[Tensor]) -> Tensor:
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(*given)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(self, given: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        kept = [x.clone() for x in given]
        graph, result = self.recorder.record(lambda: self.function(*kept), kept[0].device)
        return graph, kept, result
