"""Kernels of our own that may be absent or fail to compile: what else gives the same numbers then takes over."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def has_triton() -> bool:
    """Whether Triton is installed, without which no module of this folder but this one can be imported."""
    return importlib.util.find_spec("triton") is not None


def fits_kernels(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels that attend to listed keys take this head_dim and dtype: (B, Hq, L, D), (B, Hkv, S, Dv)."""
    dim = query.shape[3]
    is_power_of_2 = dim & (dim - 1) == 0
    return 16 <= dim <= 256 and is_power_of_2 and value.shape[3] == dim and query.dtype != torch.float64


@functools.cache
def load(kernel: str, failed: str) -> Callable[..., Any] | None:
    """A function of this folder that launches kernels, ``guarded``.

    Args:
        kernel: ``"module.function"``.
        failed: What to say once, before the error.

    Returns:
        The function, which gives None once it failed; None where Triton is not installed.
    """
    if not has_triton():
        return None
    module, _, name = kernel.partition(".")
    return guarded(getattr(importlib.import_module(f"omnisparse_flex.kernels.{module}"), name), failed)


def guarded(run: Callable[Concatenate[Tensor, P], R], failed: str) -> Callable[Concatenate[Tensor, P], R | None]:
    """``run`` until it fails once, then None.

    Triton launches on the current device, so the first argument's becomes that. A device that is
    out of memory, and a CUDA graph whose recording fails, say nothing about the kernels: such
    errors are raised, and the kernels stay in use.

    Args:
        run: A function that launches kernels.
        failed: What to say once, before the error.
    """
    working = [True]

    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        if not working[0]:
            return None
        try:
            with torch.cuda.device_of(first):
                return run(first, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a Triton that cannot compile it
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            working[0] = False
            warnings.warn(f"omnisparse: {failed}: {error}", stacklevel=2)
            return None

    return call
