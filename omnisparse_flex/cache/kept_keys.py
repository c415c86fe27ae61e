"""Kept keys of heads that keep equally many: what dense kernels can run on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False, slots=True, frozen=True)
class Rectangle:
    """Kept keys of heads that keep equally many. Never changed: what changes a layer gives it other rectangles.

    Attributes:
        heads: KV heads.
        keys: (B, len(heads), n, D).
        values: (B, len(heads), n, Dv).
        positions: int32 (B, len(heads), n), ascending; beyond a row's count, the cache's length.
        counts: int64 (B, len(heads)) where rows differ, or None: all n.
    """

    heads: tuple[int, ...]
    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor | None

    @property
    def allowed(self) -> Tensor | None:
        """Which keys count, bool (B, len(heads), n), or None: all."""
        if self.counts is None:
            return None
        return torch.arange(self.keys.shape[2], device=self.keys.device) < self.counts[..., None]

    def counts_or_all(self) -> Tensor:
        """Keys of each row and head that count, int64 (B, len(heads))."""
        if self.counts is not None:
            return self.counts
        return torch.full(self.keys.shape[:2], self.keys.shape[2], device=self.keys.device)

    def put_back(self, key: Tensor, value: Tensor) -> None:
        """Write the kept keys and values into full tensors (B, Hkv, S, D), at their positions."""
        rows = torch.arange(key.shape[0], device=key.device)[:, None, None]
        columns = torch.tensor(self.heads, device=key.device)[None, :, None]
        slots, allowed = self.positions.long(), self.allowed
        if allowed is not None:
            # What a row does not have goes where its first key goes, as that key.
            slots = torch.where(allowed, slots, slots[:, :, :1])
        for full, own in ((key, self.keys), (value, self.values)):
            full[rows, columns, slots] = own if allowed is None else torch.where(allowed[..., None], own, own[:, :, :1])

    def selected(self, rows: Tensor) -> Rectangle:
        """The rectangle of a batch that consists of ``rows``, int64 (B',)."""
        # A lazy rectangle's heads share their positions' memory, and shall go on sharing it.
        shared = self.positions.stride(1) == 0
        positions = (self.positions[:, :1] if shared else self.positions)[rows].expand(-1, len(self.heads), -1)
        counts = None if self.counts is None else self.counts[rows]
        return Rectangle(self.heads, self.keys[rows], self.values[rows], positions, counts)

    @property
    def bytes(self) -> int:
        """Device memory of the tensors."""
        tensors = [self.keys, self.values, self.positions, *([] if self.counts is None else [self.counts])]
        return sum(x.untyped_storage().nbytes() for x in tensors)


def cut(key: Tensor, value: Tensor, heads: tuple[int, ...], positions: Tensor, length: int, ragged: bool) -> Rectangle:
    """A rectangle of kept keys, copied out of full tensors.

    Args:
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        heads: KV heads.
        positions: int64 (B, len(heads), n), ascending; ``length`` stands for no token.
        length: Tokens in the cache.
        ragged: Whether any row has fewer.
    """
    rows = torch.arange(key.shape[0], device=key.device)[:, None, None]
    columns = torch.tensor(heads, device=key.device)[None, :, None]
    slots = positions.clamp(max=length - 1)
    counts = (positions < length).sum(-1) if ragged else None
    # Lazy heads share one row of positions; converting it expanded would make a copy for each head.
    shared = positions.stride(1) == 0
    narrow = (positions[:, :1] if shared else positions).int().expand_as(positions)
    return Rectangle(heads, key[rows, columns, slots], value[rows, columns, slots], narrow, counts)


def cropped(part: Rectangle, length: int) -> Rectangle:
    """The rectangle without tokens from position ``length`` on; waits for the device."""
    counts = ((part.positions < length) & (True if part.allowed is None else part.allowed)).sum(-1)
    most = int(counts.max())
    ragged = bool((counts < most).any())
    # Cloned: a view would keep the memory of what was cropped.
    keys, values = part.keys[:, :, :most].clone(), part.values[:, :, :most].clone()
    positions = part.positions[:, :, :most].clamp(max=length)
    return Rectangle(part.heads, keys, values, positions, counts if ragged else None)
