"""Which flex kernel a site runs on, and how it is tuned."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import is_concrete_int

KERNELS = ("auto", "triton", "flash")
Options = tuple[tuple[str, Any], ...]

FLASH: Options = (("BACKEND", "FLASH"),)
#: The Triton kernel's tile of keys may not be wider than a block of them; Inductor's own is, of half precision, D = 64.
NARROW: Options = (("fwd_BLOCK_N", 64),)
#: Where FLASH was run with blocks of 64 keys.
FLASH_NARROW_HEAD_DIM = 128
#: What the FLASH backend was run with.
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIMS = (64, 128)
FLASH_CAPABILITY = 9
#: A block of queries. Shorter calls (decoding) were never run.
FLASH_MIN_QUERIES = 128


def has_flash() -> bool:
    """Whether FlexAttention's FLASH backend is installed (the package ``flash-attn-4``)."""
    with contextlib.suppress(ImportError):
        # By its name: flash-attn 2 ships a folder ``cute`` too, which FlexAttention cannot use.
        importlib.metadata.version("flash-attn-4")
        return importlib.util.find_spec("flash_attn.cute") is not None
    return False


def kernel_options(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    *,
    plain_scores: bool,
    captures: bool,
    sinks: bool = False,
    narrow: bool = False,
) -> tuple[Options, str]:
    """Options of one site's kernel.

    Args:
        kernel: ``"auto"`` (FLASH where it is installed and takes the site, else Triton), ``"triton"`` or ``"flash"``.
        query: (B, Hq, L, D), real or fake.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        dtype: What attention computes in, autocast considered.
        plain_scores: Logits are scaled dot products: no bias, soft cap or score_mod.
        captures: The mask reads tensors.
        sinks: The site has logit sinks.
        narrow: Key blocks of 64.

    Returns:
        The options, and why a wanted FLASH kernel is not taken ("" if it is, or was not wanted).
    """
    if query.device.type != "cuda":
        return (), ""
    wanted = kernel == "flash" or (kernel == "auto" and has_flash())
    reason = ""
    if wanted:
        reason = _flash_refuses(query, key, value, dtype) or _flash_refuses_mods(plain_scores, captures, sinks)
        if not reason and narrow and query.shape[3] != FLASH_NARROW_HEAD_DIM:
            reason = f"key blocks of 64 at head_dim {int(query.shape[3])}"
        if not reason:
            return FLASH, ""
    return NARROW if narrow and dtype in FLASH_DTYPES else (), reason


def notes(refused: Iterable[tuple[int, str]]) -> list[str]:
    """Lines for the report, one for each reason.

    Args:
        refused: (layer, why FLASH does not take it or ""), in order.
    """
    layers: dict[str, list[str]] = {}
    for layer, reason in refused:
        if reason:
            layers.setdefault(reason, []).append(str(layer))
    return [f"FLASH does not take {why}: layers {', '.join(own)} run the Triton kernel" for why, own in layers.items()]


def _flash_refuses(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> str:
    capability = torch.cuda.get_device_capability(query.device)[0]
    if capability != FLASH_CAPABILITY:
        return f"compute capability {capability}.x"
    if dtype not in FLASH_DTYPES:
        return f"dtype {dtype}"
    # Torch 2.11 crashed there (together with a captured tensor); alone, symbols have only been timed.
    if not all(is_concrete_int(size) for x in (query, key) for size in x.shape):
        return "a graph for several lengths (symbolic sizes)"
    if query.shape[3] not in FLASH_HEAD_DIMS or value.shape[3] != query.shape[3]:
        return f"head_dim {int(query.shape[3])}"
    if query.shape[2] < FLASH_MIN_QUERIES:
        return f"{query.shape[2]} queries"
    # Its backward adds up query gradients in no fixed order.
    return "deterministic algorithms" if torch.are_deterministic_algorithms_enabled() else ""


def _flash_refuses_mods(plain_scores: bool, captures: bool, sinks: bool) -> str:
    if sinks:  # its log-sum-exp has no gradient
        return "logit sinks"
    if not plain_scores:
        return "logits with a bias, soft cap or score_mod"
    # Torch 2.11 frees what the mask captures before the kernel reads it (pytorch/pytorch#181800; fixed in 2.13).
    return "a mask that reads tensors" if captures else ""
