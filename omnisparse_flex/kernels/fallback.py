"""Kernels of our own that may fail to compile: what else gives the same numbers then takes over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


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
