"""Measure a device's costs: short prefills, dense and sparse, with the head shape of the user's model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnisparse_flex.backend import Backend
from omnisparse_flex.calibration.fit import Sample, fit
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.calibration.timing import milliseconds
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.cost_model import Costs, Shape
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

#: Prefill lengths by device type.
LENGTHS = {"cuda": (2048, 4096, 8192, 16384, 32768), "cpu": (1024, 2048, 4096)}
#: On random data all blocks have the same mass, so a target of 0.2 keeps 20 % of them.
SHARES = (0.2, 0.5)
DENSE = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def measure_costs(shape: Shape, device: torch.device, progress: Progress) -> Costs:
    """Time dense and sparse prefill at a few lengths and fit the cost model; minutes, most of them compiling.

    Args:
        shape: Heads.
        device: CPU or CUDA; bfloat16 on CUDA, float32 on the CPU.
        progress: Prints a line per step.

    Returns:
        The costs.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples = []
    dense: dict[int, float] = {}
    for share in SHARES:
        config = OmniSparseConfig(target_recall=share, budget="per_head")
        attend = compiled_attention(config, progress=progress)
        for tokens in LENGTHS[device.type]:
            inputs = _inputs(tokens, shape, device, dtype)
            if tokens not in dense:
                with progress.step(f"dense attention, {tokens} tokens"):
                    dense[tokens] = min(_dense_times(inputs))
            with torch.no_grad(), progress.step(f"sparse attention, {tokens} tokens, {share:.0%} of the blocks"):
                ours = milliseconds(attend, [inputs]).median
            samples.append(Sample(tokens, shape, kept_share(config, *inputs[:2]), ours, dense[tokens]))
    return fit(samples)


def _inputs(tokens: int, shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    query, key, value = (torch.randn(1, h, tokens, shape.head_dim, device=device, dtype=dtype) for h in heads)
    return query, key, value


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def compiled_attention(
    config: OmniSparseConfig, *, kernel: str = "auto", dynamic: bool = True, progress: Progress | None = None
) -> Callable[..., Tensor]:
    """Our causal attention as a compiled model runs it.

    Args:
        config: Its rules.
        kernel: As in ``apply_omnisparse``.
        dynamic: One graph for all lengths; False: one for each, as the FLASH kernel needs it.
        progress: Prints what is being compiled; None: silent.

    Returns:
        ``(query, key, value) -> output``, (B, H, N, D) each.
    """
    backend = Backend(config, min_seq_len=0, inner="inductor", kernel=kernel)
    backend.compile_hook = progress.compile_hook("sparse attention") if progress else None

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attention(query, key, value)

    torch._dynamo.reset()  # compiled versions of the same code object would accumulate
    # With fullgraph, too many lengths raise an error instead of running dense.
    compiled = torch.compile(attention, backend=backend, dynamic=None if dynamic else False, fullgraph=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for x in (query, key, value) if dynamic else ():
            torch._dynamo.maybe_mark_dynamic(x, 2)
        return compiled(query, key, value)

    return attend


def _dense_times(inputs: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """Milliseconds of every SDPA kernel that takes these inputs; at least one does."""

    def time_of(choice: contextlib.AbstractContextManager[Any]) -> float:
        with torch.no_grad(), choice:
            return milliseconds(_attention, [inputs]).median

    times = [time_of(contextlib.nullcontext())]
    for kind in DENSE if inputs[0].is_cuda else ():
        with contextlib.suppress(RuntimeError):  # this kernel does not take them
            times.append(time_of(sdpa_kernel(kind)))
    return times


def kept_share(config: OmniSparseConfig, query: Tensor, key: Tensor) -> float:
    """Kept blocks over causal blocks of the selection that ``compiled_attention`` makes, 0-1."""
    mask, scale = IndexMask(causal()), query.shape[3] ** -0.5
    chosen = select_blocks(query, key, mask, config, target=config.recall_of(0), scale=scale)
    return float(chosen.keep.sum() / chosen.layout.some.expand_as(chosen.keep).sum())
