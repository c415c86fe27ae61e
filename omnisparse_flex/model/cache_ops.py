"""The operators through which a compiled decoder reaches its cache.

They are opaque to the compiler: what the cache holds, and how much of it, is decided when
they run, so that one decode graph serves every prompt, split of the heads and length.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from omnisparse_flex.errors import PassError
from omnisparse_flex.ops import define


class Calls(Protocol):
    """What the operators need of a cache."""

    def store_layer(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> None:
        """Take over a layer's full keys and values."""

    def restore_layer(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's full keys and values, new ones included."""

    def attend_layer(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, layer: int, scale: float,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Add new keys and attend over all that is kept."""


class Owner:
    """One changed model, as the operators know it: a number, and the cache of the call in progress in each thread."""

    def __init__(self) -> None:
        """Take a number that no other model has."""
        self.number = next(_numbers)
        self._calls = threading.local()
        _owners[self.number] = self

    @property
    def cache(self) -> Calls | None:
        """The cache of this thread's call, None outside of one."""
        calls: Calls | None = getattr(self._calls, "cache", None)
        return calls

    @cache.setter
    def cache(self, calls: Calls | None) -> None:
        self._calls.cache = calls


_numbers = itertools.count()
_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()


def _cache_of(number: int) -> Calls:
    owner = _owners.get(number)
    if owner is None or owner.cache is None:
        raise PassError(f"model {number} has no call with a cache in progress")
    return owner.cache


def _store(out: Tensor, query: Tensor, key: Tensor, value: Tensor, owner: int, layer: int, scale: float) -> None:
    # ``out`` is declared as written, though it is not: so the next layer waits for this one to be slimmed.
    _cache_of(owner).store_layer(query, key, value, layer, scale)


def _restore(key: Tensor, value: Tensor, past: int, owner: int, layer: int) -> tuple[Tensor, Tensor]:
    return _cache_of(owner).restore_layer(key, value, layer)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, sinks: Tensor | None, owner: int, layer: int,
    scale: float,
) -> Tensor:  # fmt: skip
    return _cache_of(owner).attend_layer(query, key, value, padding, layer, scale, sinks)


def _fake_store(out: Tensor, query: Tensor, key: Tensor, value: Tensor, owner: int, layer: int, scale: float) -> None:
    return None


def _fake_restore(key: Tensor, value: Tensor, past: int, owner: int, layer: int) -> tuple[Tensor, Tensor]:
    length = past + key.shape[2]
    return (
        key.new_empty(key.shape[0], key.shape[1], length, key.shape[3]),
        value.new_empty(value.shape[0], value.shape[1], length, value.shape[3]),
    )


def _fake_attend(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, sinks: Tensor | None, owner: int, layer: int,
    scale: float,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], value.shape[3])


for _schema, _run, _fake in (
    (
        "cache_store(Tensor(a!) out, Tensor query, Tensor key, Tensor value, int owner, int layer, float scale) -> ()",
        _store,
        _fake_store,
    ),
    (
        "cache_restore(Tensor key, Tensor value, SymInt past, int owner, int layer) -> (Tensor, Tensor)",
        _restore,
        _fake_restore,
    ),
    (
        "cache_attend(Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor? sinks, int owner, int layer, "
        "float scale) -> Tensor",
        _attend,
        _fake_attend,
    ),
):
    # A replayed CUDA graph would run the kernels and not the bookkeeping: the compiler must split around us.
    define(_schema, _run, _fake, tags=(torch.Tag.cudagraph_unsafe,))
    _packet = getattr(torch.ops.omnisparse, _schema.partition("(")[0])
    torch.fx.node.has_side_effect(_packet)
    torch.fx.node.has_side_effect(_packet.default)
