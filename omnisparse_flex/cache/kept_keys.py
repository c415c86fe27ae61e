"""Kept keys of heads that keep equally many: tensors for dense kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False, slots=True, frozen=True)
class KeptKeys:
    """Kept keys of heads that keep equally many. Immutable: a changed layer gets new ones.

    Attributes:
        heads: KV heads.
        keys: (B, len(heads), n, D).
        values: (B, len(heads), n, Dv).
        positions: int32 (B, len(heads), n), ascending; the cache's length beyond a row's count.
        counts: int64 (B, len(heads)), keys of each row that exist; None: all n.
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
        heads = torch.tensor(self.heads, device=key.device)[None, :, None]
        slots, allowed = self.positions.long(), self.allowed
        if allowed is not None:
            # Slots beyond a row's count write its first key once more.
            slots = torch.where(allowed, slots, slots[:, :, :1])
        for full, kept in ((key, self.keys), (value, self.values)):
            full[rows, heads, slots] = (
                kept if allowed is None else torch.where(allowed[..., None], kept, kept[:, :, :1])
            )

    def selected(self, rows: Tensor) -> KeptKeys:
        """The kept keys of a batch that consists of ``rows``, int64 (B',)."""
        # Lazy heads share the memory of their positions, also after the selection.
        shared = self.positions.stride(1) == 0
        positions = (self.positions[:, :1] if shared else self.positions)[rows].expand(-1, len(self.heads), -1)
        counts = None if self.counts is None else self.counts[rows]
        return KeptKeys(self.heads, self.keys[rows], self.values[rows], positions, counts)

    @property
    def bytes(self) -> int:
        """Device memory of the tensors."""
        tensors = [self.keys, self.values, self.positions, *([] if self.counts is None else [self.counts])]
        return sum(x.untyped_storage().nbytes() for x in tensors)


def take_keys(
    key: Tensor, value: Tensor, heads: tuple[int, ...], positions: Tensor, length: int, ragged: bool
) -> KeptKeys:
    """Copy kept keys out of full tensors.

    Args:
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        heads: KV heads.
        positions: int64 (B, len(heads), n), ascending; ``length`` stands for no token.
        length: Tokens in the cache.
        ragged: Whether any row has fewer keys.
    """
    rows = torch.arange(key.shape[0], device=key.device)[:, None, None]
    head = torch.tensor(heads, device=key.device)[None, :, None]
    slots = positions.clamp(max=length - 1)
    counts = (positions < length).sum(-1) if ragged else None
    # Lazy heads share one row of positions; converting the expanded tensor would copy it for each head.
    shared = positions.stride(1) == 0
    narrow = (positions[:, :1] if shared else positions).int().expand_as(positions)
    return KeptKeys(heads, key[rows, head, slots], value[rows, head, slots], narrow, counts)


def crop_kept(part: KeptKeys, length: int) -> KeptKeys:
    """The kept keys without tokens from position ``length`` on; waits for the device."""
    counts = ((part.positions < length) & (True if part.allowed is None else part.allowed)).sum(-1)
    width = int(counts.max())
    ragged = bool((counts < width).any())
    # Cloned: a view would keep the memory of what was cropped.
    keys, values = part.keys[:, :, :width].clone(), part.values[:, :, :width].clone()
    positions = part.positions[:, :, :width].clamp(max=length)
    return KeptKeys(part.heads, keys, values, positions, counts if ragged else None)


def head_table(parts: Sequence[KeptKeys]) -> tuple[Tensor, Tensor]:
    """Each KV head's place among the heads of ``parts``, int32 (Hkv,), and its number of keys, int32 (B, Hkv)."""
    heads = [head for part in parts for head in part.heads]
    counts = [part.counts_or_all() for part in parts]
    order = torch.tensor(heads, device=counts[0].device).argsort()
    return order.int(), torch.cat(counts, 1)[:, order].int()
