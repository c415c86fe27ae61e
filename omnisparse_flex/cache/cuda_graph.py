"""Recording with CUDA graphs: one side stream for each device, one memory pool for each cache."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from omnisparse_flex.cache.layer import SlimLayer


class CudaGraphs:
    """Records steps as CUDA graphs; a ``replay.Recorder``.

    Steps of one cache are recorded one after the other into one memory pool: a new one takes the
    memory of the one before, whose results were copied out.

    Attributes:
        bytes: Device memory that the pool took: intermediate results of one step, and, for the first
            pool in a process, cuBLAS's workspace of the side stream.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self.free()

    def free(self) -> None:
        """Give the pool back; the recorded steps must not be replayed any more."""
        # Lives until the next one is recorded: a pool is usable for as long as it has a graph.
        self._latest: torch.cuda.CUDAGraph | None = None
        self.bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        """A copy records for itself."""
        return CudaGraphs()

    def serves(self, device: torch.device) -> bool:
        """Whether ``device`` is a CUDA device, and nobody else records on it just now."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def takes(self, layers: Sequence[SlimLayer]) -> bool:
        """Whether the layers' latest token went through the decode kernel, whose counters live on the device."""
        return all(x.counter is not None and x.table is not None for x in layers)

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Record a step; its kernels do not run.

        Args:
            step: Launches kernels on the current stream, and does not wait for them.
            device: A CUDA device.

        Returns:
            The graph, and what ``step`` returned: memory that each replay fills anew.

        Raises:
            Exception: Whatever ``step`` raises, or CUDA because of what it did.
        """
        with _ONE:
            return self._record(step, device)

    def _record(self, step: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_reserved(device)
        pool = torch.cuda.graph_pool_handle() if self._latest is None else self._latest.pool()
        # Not torch.cuda.graph: it empties the allocator's cache, which the next prompt would have to fill again.
        with torch.cuda.device(device), torch.cuda.stream(stream), _no_collection(), _own_casts():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = step()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says only that the recording is void
                    _end(graph, pool)
                raise
            _end(graph, pool)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._latest = graph
        self.bytes += torch.cuda.memory_reserved(device) - before
        return graph, result


#: Threads record one after the other: they share the side stream.
_ONE = threading.Lock()
#: Recordings that failed. The allocators may go on asking them whether they record.
_VOID: list[torch.cuda.CUDAGraph] = []


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _VOID.append(graph)
        # Before torch 2.12 the allocator was not told, and failed later (pytorch/pytorch#180395).
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        _free_generator()
        raise


def _free_generator() -> None:
    """Let the device draw random numbers again: until torch 2.12 a void recording leaves its generator recording.

    ("Offset increment outside graph capture encountered unexpectedly".) Another recording, of one kernel, ends that.
    """
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        graph.capture_end()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it ever saw."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """Autocast casts the weights anew inside the recording, and forgets these casts: nobody computed them yet.

    A cast that it remembers is gone when its region ends, and a recorded step stays. (Switching its memory off instead
    would fail the guards of compiled code.)
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: what it frees may call CUDA in ways that make a recording void."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
