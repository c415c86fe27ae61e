"""One layer of the slim cache: kept keys of lazy and fetching heads, the tokens since, and what the host holds."""

from __future__ import annotations

import collections
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.cache.attend import TOKEN_KERNEL, attend_parts, takes_token
from omnisparse_flex.cache.choose_keys import (
    PATTERN_QUERIES,
    Chooser,
    Plan,
    droppable_mass,
    keep_all,
    kept_positions,
    pattern_mass,
)
from omnisparse_flex.cache.host_memory import Copies, HostCopy
from omnisparse_flex.cache.kept_keys import KeptKeys, crop_kept, head_table, take_keys
from omnisparse_flex.errors import PassError
from omnisparse_flex.kernels.fallback import load

#: Fewest and most tokens by which the memory for new tokens grows; in between it doubles. Our choice: a short answer
#: wastes little memory, and a long one rarely moves the tensors that a recorded step reads.
MIN_TAIL_STEP, MAX_TAIL_STEP = 64, 512
#: Attributes that the kernels of a decoded token are launched with. The contents of tables and counters are read on the
#: device.
BAKED = frozenset(("prefix", "kept", "tail_keys", "tail_values", "table", "counter"))
_versions = itertools.count()


class SlimLayer:
    """Keys and values of one decoder layer.

    Attributes:
        prefix: Tokens that the last choice of keys covered.
        tail: Tokens since then, kept in full by every head.
        kept: The prefix's kept keys, of the lazy and of the fetching heads.
        lazy: The lazy heads of the last choice.
        host: The droppable keys that the host holds.
        whole: The layer drops nothing, because the host had no memory for it.
        lossy: Keys were dropped for good.
        limit: Length of the tail at which the pattern is read anew.
        room: Fewest tokens that a new tail has memory for.
        version: A number that changes whenever an attribute in ``BAKED`` becomes another object.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    version: int

    def __init__(self, index: int) -> None:
        """Start empty."""
        self.index = index
        self.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; ``version`` changes by itself if it is in ``BAKED``."""
        attributes = self.__dict__
        if name in BAKED and (name not in attributes or attributes[name] is not value):
            attributes["version"] = next(_versions)
        attributes[name] = value

    def clear(self) -> None:
        """Forget everything and free it."""
        self.prefix = self.tail = self.limit = self.room = 0
        self.kept: tuple[KeptKeys, ...] = ()
        self.lazy: tuple[int, ...] = ()
        self.host = HostCopy()
        self.whole = self.lossy = False
        self.tail_keys: Tensor | None = None
        self.tail_values: Tensor | None = None
        self.queries: collections.deque[Tensor] = collections.deque(maxlen=PATTERN_QUERIES)
        self.table: tuple[Tensor, Tensor] | None = None
        self.counter: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the layer."""
        return self.prefix + self.tail

    @property
    def is_full(self) -> bool:
        """Whether the next token needs new memory."""
        return self.tail_keys is None or self.tail == self.tail_keys.shape[2]

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds tokens."""
        return self.length > 0

    def store(
        self, pattern: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, *,
        first: int, chooser: Chooser | None, copies: Copies | None,
    ) -> None:  # fmt: skip
        """Keep the chosen part of the layer's full keys and values.

        Args:
            pattern: (B, Hq, P, D), the queries of ``plan.queries``.
            key: (B, Hkv, plan.length, D).
            value: (B, Hkv, plan.length, Dv).
            plan: The plan of all layers.
            scale: Logit scale.
            first: Position of the query that ``plan.queries`` counts from.
            chooser: Splits the heads; None: keep everything on the device.
            copies: Streams for offloading; None: keys that are not chosen are dropped.
        """
        droppable = plan.drop.shape[1]
        choice = keep_all(plan, key.shape[1])
        if chooser is not None and droppable > 0 and not self.whole:
            mass = pattern_mass(pattern, key, first + plan.queries, plan.weights, plan.real, scale)
            choice = chooser(droppable_mass(mass, plan), self.index)
        drops = choice.drops(droppable)
        if copies is not None and (drops or self.host.spans) and not self._offload(key, value, plan, copies):
            choice, drops = keep_all(plan, key.shape[1]), False
        self.kept, self.table = (), None  # freed before the new ones are copied
        for heads, picked in ((choice.lazy, None), (choice.fetching, choice.picked)):
            if heads:
                kept = kept_positions(plan, picked, len(heads))
                self.kept += (take_keys(key, value, heads, kept, plan.length, plan.ragged),)
        self.lazy = choice.lazy
        self.lossy = self.lossy or (drops and copies is None)
        self.prefix, self.tail, self.counter = plan.length, 0, None
        self.tail_keys = self.tail_values = None
        self.queries.clear()

    def _offload(self, key: Tensor, value: Tensor, plan: Plan, copies: Copies) -> bool:
        """Copy all droppable tokens to the host; False, and a warning, if it has no memory for them."""
        try:
            self.host.add(key, value, plan, copies)
        except (RuntimeError, MemoryError) as error:
            self.host, self.whole = HostCopy(), True
            note = f"omnisparse: no host memory to offload layer {self.index}, it keeps a full cache: {error}"
            warnings.warn(note, stacklevel=2)
            return False
        return True

    def restore(self, length: int, key: Tensor, value: Tensor, copies: Copies | None) -> tuple[Tensor, Tensor]:
        """Full keys and values (B, Hkv, length, D or Dv), zeros where there is no token; see ``HostCopy``."""
        if self.lossy:
            raise PassError(f"layer {self.index} cannot restore what it dropped")
        full_key, full_value = self.host.fetched_tensors(length, key, value, copies)
        for part in self.kept:
            part.put_back(full_key, full_value)
        if self.tail:
            assert self.tail_keys is not None and self.tail_values is not None
            full_key[:, :, self.prefix : self.length] = self.tail_keys[:, :, : self.tail]
            full_value[:, :, self.prefix : self.length] = self.tail_values[:, :, : self.tail]
        return full_key, full_value

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens (B, Hkv, L, D) that every head keeps."""
        tail_keys, tail_values = self._room(key, value)
        stop = self.tail + key.shape[2]
        tail_keys[:, :, self.tail : stop] = key
        tail_values[:, :, self.tail : stop] = value
        self.tail, self.counter = stop, None

    def _room(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The tail's tensors, with room for these tokens."""
        stop = self.tail + key.shape[2]
        if self.tail_keys is None or self.tail_values is None or self.tail_keys.shape[2] < stop:
            step = min(max(MIN_TAIL_STEP, self.tail), MAX_TAIL_STEP)
            room = max(-(-stop // step) * step, self.room)
            grown = [x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in (key, value)]
            if self.tail_keys is not None and self.tail_values is not None:
                grown[0][:, :, : self.tail] = self.tail_keys[:, :, : self.tail]
                grown[1][:, :, : self.tail] = self.tail_values[:, :, : self.tail]
            self.tail_keys, self.tail_values = grown
        return self.tail_keys, self.tail_values

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Add tokens, and attend over everything the layer keeps.

        Args:
            query: (B, Hq, L, D).
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
            padding: bool (B, length), tokens that exist, or None: all. Read for the tail only.
            scale: Logit scale.
            sinks: (Hq,), logit of each head's virtual key without a value, or None.

        Returns:
            (B, Hq, L, Dv) in query's dtype.
        """
        if takes_token(query, value) and (kernel := load(*TOKEN_KERNEL)) is not None:
            token = (x.contiguous() for x in (query, key, value))
            sinks = None if sinks is None else sinks.contiguous()
            bits = None if padding is None else padding.contiguous().view(torch.uint8)
            tail = (*self._room(key, value), self._count(query.device), self.prefix)
            parts = [(part.keys, part.values) for part in self.kept]
            out: Tensor | None = kernel(*token, parts, *self._table(), *tail, bits, scale, sinks)
            if out is not None:
                self.tail += 1
                return out
        self.append(key, value)
        return self._attend_parts(query, padding, scale, sinks)

    def _count(self, device: torch.device) -> Tensor:
        """Number of tokens in the tail, int32 (1,), counted on the device so that decoding copies no number to it."""
        if self.counter is None:
            self.counter = torch.full((1,), self.tail, dtype=torch.int32, device=device)
        return self.counter

    def _table(self) -> tuple[Tensor, Tensor]:
        """``head_table`` of the kept keys, made once."""
        if self.table is None:
            self.table = head_table(self.kept)
        return self.table

    def _attend_parts(self, query: Tensor, padding: Tensor | None, scale: float, sinks: Tensor | None = None) -> Tensor:
        """``attend`` on dense kernels, part by part; the tokens are in the tail already."""
        assert self.tail_keys is not None and self.tail_values is not None
        tail = self.tail_keys[:, :, : self.tail], self.tail_values[:, :, : self.tail]
        real = None if padding is None else padding[:, self.prefix : self.length]
        return attend_parts(query, self.kept, *tail, real, scale, sinks)

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        self.table = self.counter = None
        self.host.cancel_fetch()
        self.queries.clear()
        if length >= self.prefix:
            self.tail = length - self.prefix
            return
        self.prefix, self.tail, self.tail_keys, self.tail_values = length, 0, None, None
        self.kept = tuple(crop_kept(part, length) for part in self.kept)
        self.host.crop(length)

    def select(self, rows: Tensor, listed: list[int]) -> None:
        """Make the batch consist of ``rows``, int64 (B',) on the device; ``listed`` are the same on the host."""
        self.table = None
        self.host.cancel_fetch()
        for _ in range(len(self.kept)):  # the old tensors are freed before the next ones are made
            self.kept = (*self.kept[1:], self.kept[0].selected(rows))
        if self.tail_keys is not None and self.tail_values is not None:
            self.tail_keys, self.tail_values = self.tail_keys[rows], self.tail_values[rows]
        self.queries = collections.deque((x[rows] for x in self.queries), maxlen=PATTERN_QUERIES)
        self.host.select(listed)
