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
#: No row yet: USE_TMA looked a few percent faster on an H200 (D = 128) when tried by hand, and waits for a script that
#: measures it and a test with a model's strides.
TRITON_OPTIONS: dict[tuple[int, int], Options] = {}
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
    kernel: str, query: Tensor, value: Tensor, dtype: torch.dtype, *, plain_scores: bool
) -> tuple[Options, str]:
    """Options of one site's kernel.

    Args:
        kernel: ``"auto"``, ``"triton"`` or ``"flash"``. Our choice: ``"auto"`` is Triton until the tests of
            the FLASH backend have passed on a GPU.
        query: (B, Hq, L, D), real or fake.
        value: (B, Hkv, S, Dv).
        dtype: What attention computes in, autocast considered.
        plain_scores: Logits are scaled dot products: no bias, soft cap or score_mod.

    Returns:
        The options, and why a wanted FLASH kernel is not taken ("" if it is, or was not wanted).
    """
    if query.device.type != "cuda":
        return (), ""
    capability = torch.cuda.get_device_capability(query.device)[0]
    if kernel == "flash":
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
