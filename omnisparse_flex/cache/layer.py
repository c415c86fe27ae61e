"""One layer of the slim cache: two rectangles of kept keys, the tokens since, and the host's copy of the rest."""

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
    column_mass,
    droppable_mass,
    keep_all,
    kept_positions,
)
from omnisparse_flex.cache.host_memory import Copies, HostSpan, send
from omnisparse_flex.cache.kept_keys import Rectangle, cropped, cut
from omnisparse_flex.errors import PassError
from omnisparse_flex.kernels.fallback import load

#: Tokens that the memory for new tokens grows by at least and at most: it doubles in between. Our choice: a short
#: answer wastes little, and a long one seldom moves what a recorded step reads.
TAIL_STEP, TAIL_STEP_MOST = 64, 512
#: What the kernels of a decoded token are launched with; what a table or a counter says is read on the device.
BAKED = frozenset(("prefix", "rectangles", "tail_keys", "tail_values", "table", "counter"))
_versions = itertools.count()


class SlimLayer:
    """Keys and values of one decoder layer.

    Attributes:
        prefix: Tokens that the rectangles speak for.
        tail: Tokens since, held in full for every head.
        rectangles: Of lazy and of fetching heads.
        lazy: The lazy heads, as last chosen.
        host: What the host holds.
        whole: Nothing is ever dropped here: the host had no memory for it.
        lossy: Something was dropped for good.
        limit: Length of the tail at which the pattern is read anew.
        room: Tokens that a new tail has memory for, at least.
        version: Another number whenever one of ``BAKED`` is another object.
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
        """Whoever changes the layer need not announce it."""
        own = self.__dict__
        if name in BAKED and (name not in own or own[name] is not value):
            own["version"] = next(_versions)
        own[name] = value

    def clear(self) -> None:
        """Forget everything, and free it."""
        self.prefix = self.tail = self.limit = self.room = 0
        self.rectangles: tuple[Rectangle, ...] = ()
        self.lazy: tuple[int, ...] = ()
        self.host: list[HostSpan] = []
        self.whole = self.lossy = False
        self.tail_keys: Tensor | None = None
        self.tail_values: Tensor | None = None
        self.queries: collections.deque[Tensor] = collections.deque(maxlen=PATTERN_QUERIES)
        self.fetched: tuple[int, Tensor, Tensor] | None = None
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
        """Take over a layer's full keys and values, slimmed.

        Args:
            pattern: (B, Hq, P, D), the queries of ``plan.queries``.
            key: (B, Hkv, plan.length, D).
            value: (B, Hkv, plan.length, Dv).
            plan: What all layers share.
            scale: Logit scale.
            first: Position of the query that ``plan.queries`` counts from.
            chooser: Splits the heads; None: keep everything on the device.
            copies: Streams for offloading; None: what is not fetched is dropped.
        """
        droppable = plan.drop.shape[1]
        choice = keep_all(plan, key.shape[1])
        if chooser is not None and droppable > 0 and not self.whole:
            mass = column_mass(pattern, key, first + plan.queries, plan.weights, plan.real, scale)
            choice = chooser(droppable_mass(mass, plan), self.index)
        drops = choice.drops(droppable)
        if copies is not None and (drops or self.host) and not self._offload(key, value, plan, copies):
            choice, drops = keep_all(plan, key.shape[1]), False
        self.rectangles, self.table = (), None  # the old ones are freed before new ones are cut
        for heads, picked in ((choice.lazy, None), (choice.fetching, choice.picked)):
            if heads:
                kept = kept_positions(plan, picked, len(heads))
                self.rectangles += (cut(key, value, heads, kept, plan.length, plan.ragged),)
        self.lazy = choice.lazy
        self.lossy = self.lossy or (drops and copies is None)
        self.prefix, self.tail, self.counter = plan.length, 0, None
        self.tail_keys = self.tail_values = None
        self.queries.clear()

    def _offload(self, key: Tensor, value: Tensor, plan: Plan, copies: Copies) -> bool:
        """Let the host hold all droppable tokens; False, and a warning, if it has no memory for them."""
        positions = plan.fresh if self.host else plan.drop
        if positions.shape[1] == 0:
            return True
        try:
            self.host.append(send(key, value, positions, plan.length, copies))
        except (RuntimeError, MemoryError) as error:
            self.host, self.whole = [], True
            note = f"omnisparse: no host memory to offload layer {self.index}, it keeps a full cache: {error}"
            warnings.warn(note, stacklevel=2)
            return False
        return True

    def fetch(self, length: int, key: Tensor, value: Tensor, copies: Copies | None) -> None:
        """Begin to bring the host's part into full tensors; ``restore`` finishes.

        Args:
            length: Tokens that the full tensors shall hold.
            key: Any (B, Hkv, *, D) of the layer's dtype and device.
            value: Any (B, Hkv, *, Dv).
            copies: Streams; None where nothing was offloaded.
        """
        full = [x.new_zeros(*x.shape[:2], length, x.shape[3]) for x in (key, value)]
        if copies is not None and self.host:
            copies.start()
            for span in self.host:
                span.bring(full[0], full[1], copies)
        self.fetched = (length, full[0], full[1])

    def restore(self, length: int, key: Tensor, value: Tensor, copies: Copies | None) -> tuple[Tensor, Tensor]:
        """The full keys and values (B, Hkv, length, D or Dv) as they were; zeros for padding and beyond."""
        if self.lossy:
            raise PassError(f"layer {self.index} cannot restore what it dropped")
        if self.fetched is None or self.fetched[0] != length:
            self.fetch(length, key, value, copies)
        assert self.fetched is not None
        _, full_key, full_value = self.fetched
        self.fetched = None
        if copies is not None:
            copies.wait()
        for part in self.rectangles:
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
            step = min(max(TAIL_STEP, self.tail), TAIL_STEP_MOST)
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
            padding: bool (B, length) or None; of the tail only: a rectangle holds no padding.
            scale: Logit scale.
            sinks: (Hq,), logit of each head's virtual key without a value, or None.

        Returns:
            (B, Hq, L, Dv) in query's dtype.
        """
        if takes_token(query, value) and (kernel := load(*TOKEN_KERNEL)) is not None:
            own = (x.contiguous() for x in (query, key, value))
            bits = None if padding is None else padding.contiguous().view(torch.uint8)
            own_sinks = None if sinks is None else sinks.contiguous()
            tail = (*self._room(key, value), self._count(query.device), self.prefix)
            parts = [(part.keys, part.values) for part in self.rectangles]
            out: Tensor | None = kernel(*own, parts, *self._table(), *tail, bits, scale, own_sinks)
            if out is not None:
                self.tail += 1
                return out
        self.append(key, value)
        return self._attend_parts(query, padding, scale, sinks)

    def _count(self, device: torch.device) -> Tensor:
        """Tokens in the tail as the device counts them, int32 (1,): no number travels while it decodes."""
        if self.counter is None:
            self.counter = torch.full((1,), self.tail, dtype=torch.int32, device=device)
        return self.counter

    def _table(self) -> tuple[Tensor, Tensor]:
        """Each KV head's place in the rectangles, int32 (Hkv,); how many keys each row has, int32 (B, Hkv)."""
        if self.table is None:
            heads = [head for part in self.rectangles for head in part.heads]
            counts = [part.counts_or_all() for part in self.rectangles]
            order = torch.tensor(heads, device=counts[0].device).argsort()
            self.table = order.int(), torch.cat(counts, 1)[:, order].int()
        return self.table

    def _attend_parts(self, query: Tensor, padding: Tensor | None, scale: float, sinks: Tensor | None = None) -> Tensor:
        """``attend`` on dense kernels, part by part; the tokens are in the tail already."""
        assert self.tail_keys is not None and self.tail_values is not None
        tail = self.tail_keys[:, :, : self.tail], self.tail_values[:, :, : self.tail]
        real = None if padding is None else padding[:, self.prefix : self.length]
        return attend_parts(query, self.rectangles, *tail, real, scale, sinks)

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        self.fetched = self.table = self.counter = None
        self.queries.clear()
        if length >= self.prefix:
            self.tail = length - self.prefix
            return
        self.prefix, self.tail, self.tail_keys, self.tail_values = length, 0, None, None
        self.rectangles = tuple(cropped(rectangle, length) for rectangle in self.rectangles)
        for span in self.host:
            span.crop(length)

    def select(self, rows: Tensor, listed: list[int]) -> None:
        """Make the batch consist of ``rows``, int64 (B',) on the device; ``listed`` are the same on the host."""
        self.fetched = self.table = None
        for _ in range(len(self.rectangles)):  # the old one is freed before the next is made
            self.rectangles = (*self.rectangles[1:], self.rectangles[0].selected(rows))
        if self.tail_keys is not None and self.tail_values is not None:
            self.tail_keys, self.tail_values = self.tail_keys[rows], self.tail_values[rows]
        self.queries = collections.deque((x[rows] for x in self.queries), maxlen=PATTERN_QUERIES)
        for span in self.host:
            span.select(listed)
