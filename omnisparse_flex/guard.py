"""Kernels of our own that may fail to compile: what else gives the same numbers then takes over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def guarded(run: Callable[P, R], failed: str) -> Callable[P, R | None]:
    """``run`` until it fails once, then None.

    Args:
        run: A function that launches kernels.
        failed: What to say once, before the error.

    What fails while a CUDA graph is recorded is raised: it says nothing about the kernels.
    """
    working = [True]

    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        if not working[0]:
            return None
        try:
            return run(*args, **kwargs)
        except Exception as error:  # a Triton that cannot compile it
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            working[0] = False
            warnings.warn(f"omnisparse: {failed}: {error}", stacklevel=2)
            return None

    return call
