"""Timing on a CUDA device, and the fastest dense attention to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnisparse_flex.kernel_choice import has_flash
from omnisparse_flex.timing import Function

#: Parts of the names of attention kernels: Inductor's flex templates, and the CuTe kernels of the FLASH backend.
ATTENTION_KERNELS = ("flex_attention", "FlashAttention", "flash", "cudnn", "fmha", "cutlass")


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
