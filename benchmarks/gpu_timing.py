"""Timing on a CUDA device, and the fastest dense attention to compare with."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnisparse_flex.kernel_choice import has_flash

#: Parts of the names of attention kernels: Inductor's flex templates, and the CuTe kernels of the FLASH backend.
ATTENTION_KERNELS = ("flex_attention", "FlashAttention", "flash", "cudnn", "fmha", "cutlass")

#: Calls of a timed run.
QUEUED = 4

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one function.

    Attributes:
        median: Of all runs.
        low: Fastest run.
        high: Slowest run.
    """

    median: float
    low: float
    high: float


def milliseconds(
    function: Function, inputs: Sequence[tuple[Any, ...]], *, runs: int = 7, warm_up: int = 2, queued: int = QUEUED
) -> Timing:
    """Time ``function`` over rotated inputs.

    Args:
        function: Called with one element of ``inputs`` at a time.
        inputs: Several sets, so that no run finds its inputs in the cache.
        runs: Timed runs.
        warm_up: Calls before them.
        queued: Calls of a run, launched one after the other as a model launches its layers: what the
            host does is then hidden where, and only where, it takes less time than the device.

    Returns:
        Of one call, by CUDA events; by the wall clock without a GPU.
    """
    on_gpu = torch.cuda.is_available()
    turns = itertools.cycle(inputs)
    for _ in range(warm_up):
        function(*next(turns))
    times = []
    for _ in range(runs):
        if on_gpu:
            torch.cuda.synchronize()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(queued):
                function(*next(turns))
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / queued)
        else:
            begin = time.perf_counter()
            function(*next(turns))
            times.append(1e3 * (time.perf_counter() - begin))
    return Timing(statistics.median(times), min(times), max(times))


def captured(function: Function, inputs: Sequence[tuple[Any, ...]]) -> Function:
    """``function`` over these inputs as CUDA graphs, one replayed after the other: no host in the time.

    That it can be captured also proves that nothing in it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for chosen in inputs:
            function(*chosen)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for chosen in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(*chosen)
        graphs.append(graph)
    turns = itertools.cycle(graphs)
    return lambda: next(turns).replay()


def kernel_milliseconds(function: Function, inputs: tuple[Any, ...], *, runs: int = 3) -> dict[str, float]:
    """Device time of each kernel in one call of ``function``, by name: the mean of ``runs`` calls."""
    function(*inputs)
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(runs):
            function(*inputs)
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e3 / runs
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0
    }


def attention_share(kernels: dict[str, float]) -> float:
    """Milliseconds of the attention kernels among ``kernel_milliseconds``."""
    return sum(ms for name, ms in kernels.items() if any(part in name for part in ATTENTION_KERNELS))


def dense_attention(scale: float) -> dict[str, Function]:
    """Dense causal attention by every fast kernel at hand: name -> (query, key, value) -> output.

    Inputs are (B, H, N, D); FlashAttention-4's are transposed views of them.
    """

    def sdpa(kind: SDPBackend) -> Function:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

        return attend

    if not torch.cuda.is_available():
        return {"sdpa": sdpa(SDPBackend.FLASH_ATTENTION)}
    found = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if has_flash():
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

        def flash4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            turned = (x.transpose(1, 2) for x in (query, key, value))
            out = flash_attn_func(*turned, causal=True, softmax_scale=scale)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found["fa4"] = flash4
    return found
