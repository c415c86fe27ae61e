"""Which flex kernel a site runs on, and how it is tuned."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

KERNELS = ("auto", "triton", "flash")
Options = tuple[tuple[str, Any], ...]

#: Options of the Triton kernel by (compute capability, head_dim); () elsewhere: Inductor's own.
#: Measured by benchmarks/bench_prefill.py and benchmarks/bench_train.py.
#: H200, 10 % of the blocks: 2.17 against 2.27 ms at 32K, 29.7 against 31.6 ms at 128K. No gain, or worse:
#: ROWS_GUARANTEED_SAFE, 4 warps (3.0 ms), 64 keys a step.
TRITON_OPTIONS: dict[tuple[int, int], Options] = {(9, 128): (("USE_TMA", True),)}
FLASH: Options = (("BACKEND", "FLASH"),)
#: What the FLASH backend was run with.
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIMS = (64, 128)
FLASH_CAPABILITY = 9


def has_flash() -> bool:
    """Whether FlexAttention's FLASH backend is installed (the package ``flash-attn-4``)."""
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec("flash_attn.cute") is not None
    return False


def kernel_options(
    kernel: str, query: Tensor, value: Tensor, dtype: torch.dtype, *, plain_scores: bool, needs_grad: bool
) -> tuple[Options, str]:
    """Options of one site's kernel.

    Args:
        kernel: ``"auto"``, ``"triton"`` or ``"flash"``.
        query: (B, Hq, L, D), real or fake.
        value: (B, Hkv, S, Dv).
        dtype: What attention computes in, autocast considered.
        plain_scores: Logits are scaled dot products: no bias, soft cap or score_mod.
        needs_grad: A backward will follow; ``"auto"`` then stays with Triton, whose backward is tested.

    Returns:
        The options, and why a wanted FLASH kernel is not taken ("" if it is, or was not wanted).
    """
    if query.device.type != "cuda":
        return (), ""
    capability = torch.cuda.get_device_capability(query.device)[0]
    if kernel == "flash" or (kernel == "auto" and not needs_grad and has_flash()):
        reason = _flash_refuses(query, value, dtype, capability, plain_scores)
        if not reason:
            return FLASH, ""
        return TRITON_OPTIONS.get((capability, int(query.shape[3])), ()), reason
    return TRITON_OPTIONS.get((capability, int(query.shape[3])), ()), ""


def _flash_refuses(query: Tensor, value: Tensor, dtype: torch.dtype, capability: int, plain_scores: bool) -> str:
    if capability != FLASH_CAPABILITY:
        return f"compute capability {capability}.x"
    if dtype not in FLASH_DTYPES:
        return f"dtype {dtype}"
    if query.shape[3] not in FLASH_HEAD_DIMS or value.shape[3] != query.shape[3]:
        return f"head_dim {int(query.shape[3])}"
    return "" if plain_scores else "logits with a bias, soft cap or score_mod"
