"""Dynamo's settings for the length of a call."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any


def dynamo_settings(**changes: Any) -> AbstractContextManager[None]:
    """``torch._dynamo.config.patch``, which may be entered with every call.

    In torch 2.13 each patch makes a context variable that its thread keeps for ever, and can itself be entered
    again and again, in several threads: one is enough. In 2.11 a patch is entered once.
    """
    from torch.utils import _config_module

    if hasattr(_config_module, "ContextVar"):
        return _kept(tuple(sorted(changes.items())))
    return _patch(changes)


@functools.cache
def _kept(changes: tuple[tuple[str, Any], ...]) -> AbstractContextManager[None]:
    return _patch(dict(changes))


def _patch(changes: dict[str, Any]) -> AbstractContextManager[None]:
    import torch._dynamo

    made: AbstractContextManager[None] = torch._dynamo.config.patch(changes)
    return made
