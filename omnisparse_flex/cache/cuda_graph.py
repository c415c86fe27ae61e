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
    """Records steps as CUDA graphs; a ``recorded_step.Recorder``.

    The steps of one cache share a memory pool: a new recording reuses the memory of the one before, whose results
    were copied.

    Attributes:
        bytes: Device memory of the pool: intermediate results of one step, and, for the first pool of a process,
            cuBLAS's workspace of the side stream.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self.free()

    def free(self) -> None:
        """Free the pool; its recorded steps must not be replayed any more."""
        # Kept until the next recording: a pool can be reused as long as one of its graphs exists.
        self._latest: torch.cuda.CUDAGraph | None = None
        self.bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        """A copy makes recordings of its own."""
        return CudaGraphs()

    def serves(self, device: torch.device) -> bool:
        """Whether ``device`` is a CUDA device on which no other recording is in progress."""
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
            The graph, and the result of ``step``, whose tensors each replay overwrites.

        Raises:
            Exception: Errors of ``step``, and of CUDA where it cannot record an operation.
        """
        with _RECORDING:
            return self._record(step, device)

    def _record(self, step: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_reserved(device)
        pool = torch.cuda.graph_pool_handle() if self._latest is None else self._latest.pool()
        # torch.cuda.graph would empty the allocator's cache, which the next prompt would have to fill again.
        with torch.cuda.device(device), torch.cuda.stream(stream), _no_collection(), _own_casts():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = step()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it only says that the recording is void
                    _end(graph, pool)
                raise
            _end(graph, pool)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._latest = graph
        self.bytes += torch.cuda.memory_reserved(device) - before
        return graph, result


#: Only one thread records at a time, because all share the side stream.
_RECORDING = threading.Lock()
#: Failed recordings, kept because the allocators may still ask them whether they record.
_VOID: list[torch.cuda.CUDAGraph] = []


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _VOID.append(graph)
        # Before torch 2.12 the allocator was not notified, and failed later (pytorch/pytorch#180395).
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        _free_generator()
        raise


def _free_generator() -> None:
    """Let the device draw random numbers again.

    Until torch 2.12 a void recording leaves the generator in recording mode ("Offset increment outside graph capture
    encountered unexpectedly"). Another recording, of one kernel, ends that mode.
    """
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        graph.capture_end()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps a workspace for each stream that it was used on."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """Let autocast cast the weights inside the recording, and drop these casts afterwards.

    A cast from before the recording is freed when its autocast region ends, but the recorded step would still read it.
    A cast inside the recording has no values yet. (Switching autocast's cache off would fail the guards of compiled
    code.)
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Switch garbage collection off: freeing an object may call CUDA in ways that make a recording void."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
