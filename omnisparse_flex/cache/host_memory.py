"""Droppable keys and values in host memory: written once, fetched again when a turn or the pattern changes."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.cache.choose_keys import Plan

#: Tokens copied to the host at a time; it bounds the device memory that a copy needs beside the layer itself.
CHUNK = 2048
#: Most copies to the host in progress at a time, each of one head's tokens.
IN_FLIGHT = 8


class Copies:
    """The side stream of one device, and its copies in progress; without effect on the CPU."""

    def __init__(self, device: torch.device) -> None:
        """Open a side stream on ``device`` if it is a CUDA device."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: collections.deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = collections.deque()

    def __deepcopy__(self, memo: dict[int, Any]) -> Copies:
        """A copied cache has a side stream of its own."""
        self.drain()
        return Copies(self.device)

    def to_host(self, host: Tensor, chunk: Tensor) -> None:
        """Copy a tensor to pinned memory; the tensor is kept alive until the copy is done."""
        if self.stream is None:
            host.copy_(chunk)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(chunk, non_blocking=True)
            event = self.stream.record_event()
        self.waiting.append((event, (chunk,)))
        while len(self.waiting) > IN_FLIGHT:
            self.waiting.popleft()[0].synchronize()

    def to_device(self, target: Tensor, host: Tensor) -> None:
        """Copy pinned memory into a contiguous part of a device tensor; call ``wait`` before reading it."""
        if self.stream is None:
            target.copy_(host)
            return
        with torch.cuda.stream(self.stream):
            target.copy_(host, non_blocking=True)

    def start(self) -> None:
        """Let the copies that follow wait for the current stream, which allocated the memory that they write."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Let the current stream wait for all copies to the device."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def drain(self) -> None:
        """Wait until the host holds everything sent to it."""
        while self.waiting:
            self.waiting.popleft()[0].synchronize()


@dataclasses.dataclass(eq=False, slots=True)
class HostSpan:
    """Keys and values of one turn's droppable tokens, for all KV heads.

    Attributes:
        keys: (B, Hkv, n, D), pinned for a CUDA device.
        values: (B, Hkv, n, Dv).
        positions: int64 (B, n) on the device, ascending; a row with fewer ends in larger numbers.
        counts: Tokens of each row.
        starts: First position of each row if its tokens are one contiguous run, else None.
        rows: The batch rows, as rows of ``keys``: reordering a batch moves no host memory.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: list[int]
    starts: list[int] | None
    rows: list[int]

    def bring(self, key: Tensor, value: Tensor, copies: Copies) -> None:
        """Write the span into full tensors (B, Hkv, S, D), at its positions."""
        for row, source in enumerate(self.rows):
            count = self.counts[source]
            if count == 0:
                continue
            for full, host in ((key, self.keys), (value, self.values)):
                if self.starts is not None:
                    start = self.starts[source]
                    for head in range(full.shape[1]):  # head by head: contiguous on both sides
                        copies.to_device(full[row, head, start : start + count], host[source, head, :count])
                else:
                    staging = torch.empty_like(host[source, :, :count], device=full.device)
                    copies.start()
                    copies.to_device(staging, host[source, :, :count])
                    copies.wait()
                    full[row].index_copy_(1, self.positions[source, :count], staging)

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        # Positions ascend, but the fillers behind a row's count may lie below the length of a later turn.
        below = (self.positions < length).sum(1).tolist()
        self.counts = [min(count, int(n)) for count, n in zip(self.counts, below, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Make the batch consist of these rows."""
        self.rows = [self.rows[row] for row in rows]

    @property
    def bytes(self) -> int:
        """Host memory of the tensors."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()


class HostCopy:
    """One layer's keys and values on the host, and the full tensors that they are copied back into.

    Attributes:
        spans: One span per turn that brought droppable tokens.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.spans: list[HostSpan] = []
        self._fetched: tuple[int, Tensor, Tensor] | None = None

    def add(self, key: Tensor, value: Tensor, plan: Plan, copies: Copies) -> None:
        """Copy the plan's droppable tokens that the host does not hold yet.

        Raises:
            RuntimeError: If there is no host memory for them.
        """
        positions = plan.fresh if self.spans else plan.drop
        if positions.shape[1]:
            self.spans.append(send(key, value, positions, plan.length, copies))

    def fetch(self, length: int, key: Tensor, value: Tensor, copies: Copies | None) -> None:
        """Start to copy the spans into full tensors; ``fetched_tensors`` finishes.

        Args:
            length: Tokens that the full tensors hold.
            key: Any (B, Hkv, *, D) of the layer's dtype and device.
            value: Any (B, Hkv, *, Dv).
            copies: Streams; None where nothing was offloaded.
        """
        full_key, full_value = (x.new_zeros(*x.shape[:2], length, x.shape[3]) for x in (key, value))
        if copies is not None and self.spans:
            copies.start()
            for span in self.spans:
                span.bring(full_key, full_value, copies)
        self._fetched = length, full_key, full_value

    def fetched_tensors(self, length: int, key: Tensor, value: Tensor, copies: Copies | None) -> tuple[Tensor, Tensor]:
        """The full tensors of ``fetch``, whose copies are done; zeros where the host holds nothing."""
        if self._fetched is None or self._fetched[0] != length:
            self.fetch(length, key, value, copies)
        assert self._fetched is not None
        _, full_key, full_value = self._fetched
        self._fetched = None
        if copies is not None:
            copies.wait()
        return full_key, full_value

    def cancel_fetch(self) -> None:
        """Drop the full tensors of a ``fetch`` that nobody waited for."""
        self._fetched = None

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        for span in self.spans:
            span.crop(length)

    def select(self, rows: list[int]) -> None:
        """Make the batch consist of these rows."""
        for span in self.spans:
            span.select(rows)

    @property
    def bytes(self) -> int:
        """Host memory of all spans."""
        return sum(span.bytes for span in self.spans)


def send(key: Tensor, value: Tensor, positions: Tensor, length: int, copies: Copies) -> HostSpan:
    """Copy tokens to host memory.

    Args:
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        positions: int64 (B, n), ascending; entries of ``length`` stand for no token.
        length: Tokens in the cache.
        copies: Where the copies run.

    Returns:
        The span; its copies may still be in progress.

    Raises:
        RuntimeError: If there is no host memory for it.
    """
    pinned = copies.stream is not None
    shape = (*key.shape[:2], positions.shape[1])
    keys = torch.empty(*shape, key.shape[3], dtype=key.dtype, pin_memory=pinned)
    values = torch.empty(*shape, value.shape[3], dtype=value.dtype, pin_memory=pinned)
    slots = positions.clamp(max=length - 1)
    for start in range(0, positions.shape[1], CHUNK):
        part = slots[:, None, start : start + CHUNK, None].expand(-1, key.shape[1], -1, -1)
        for source, host in ((key, keys), (value, values)):
            # Gathered into a tensor of its own: the compiler may reuse the memory of the layer's tensors at any time.
            chunk = source.gather(2, part.expand(-1, -1, -1, source.shape[3]))
            for row in range(key.shape[0]):
                for head in range(key.shape[1]):
                    copies.to_host(host[row, head, start : start + CHUNK], chunk[row, head])
    counts = [int(n) for n in (positions < length).sum(1).tolist()]
    first, last = positions[:, 0].tolist(), positions.masked_fill(positions >= length, -1).amax(1).tolist()
    runs = all(n == 0 or z - a + 1 == n for n, a, z in zip(counts, first, last, strict=True))
    rows = list(range(key.shape[0]))
    return HostSpan(keys, values, positions, counts, [int(a) for a in first] if runs else None, rows)
