"""Timing on a CUDA device, and the fastest dense attention to compare with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from omnisparse_flex.attention.flex_options import has_flash
from omnisparse_flex.calibration.timing import Function

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


def causal_blocks(tokens: int, device: str, block: int = 128) -> BlockMask:
    """Causality as FlexAttention's block lists: the diagonal in part, what is before it in full."""
    count = -(-tokens // block)
    rows = torch.arange(count, device=device, dtype=torch.int32)
    own_first = ((rows[:, None] + rows) % count).to(torch.int32)[None, None]
    before = rows.expand(1, 1, count, count).contiguous()
    return BlockMask.from_kv_blocks(
        torch.ones_like(rows)[None, None],
        own_first,
        rows[None, None],
        before,
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, q, kv: q >= kv,
        seq_lengths=(tokens, tokens),
    )


@functools.cache
def flex_dense(tokens: int, scale: float, device: str = "cuda") -> Function:
    """FlexAttention's own dense causal attention at one length; compiled when first called."""
    mask, compiled = causal_blocks(tokens, device), torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
