"""Dynamo's settings for the length of a call."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any


def dynamo_settings(**changes: Any) -> AbstractContextManager[None]:
    """``torch._dynamo.config.patch``, which may be entered with every call and by several threads at once.

    In torch 2.13 settings are a thread's own; each patch makes a context variable that its thread keeps for ever, and
    can itself be entered again and again: one is enough. In 2.11 they are the process's, and calls that overlap would
    restore one another's.
    """
    from torch.utils import _config_module

    if hasattr(_config_module, "ContextVar"):
        return _kept(tuple(sorted(changes.items())))
    return _shared(changes)


@functools.cache
def _kept(changes: tuple[tuple[str, Any], ...]) -> AbstractContextManager[None]:
    import torch._dynamo

    made: AbstractContextManager[None] = torch._dynamo.config.patch(dict(changes))
    return made


#: Values that calls in progress want, the latest last, after the user's own; by setting.
_wanted: dict[str, list[Any]] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def _shared(changes: dict[str, Any]) -> Iterator[None]:
    """Settings of the process: the user's own come back when the last of the calls that overlap ends."""
    import torch._dynamo

    config = torch._dynamo.config
    with _lock:
        for name, value in changes.items():
            _wanted.setdefault(name, [getattr(config, name)]).append(value)
            setattr(config, name, value)
    try:
        yield
    finally:
        with _lock:
            for name, value in changes.items():
                left = _wanted[name]
                left.reverse()
                left.remove(value)
                left.reverse()
                setattr(config, name, left[-1])
                if len(left) == 1:
                    del _wanted[name]
