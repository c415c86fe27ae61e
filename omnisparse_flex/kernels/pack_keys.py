"""Prepares keys for the estimates: means of keys, and the keys in the form that the mass kernel multiplies.

Importing this module needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Keys of a program.
KEYS = 64
#: Largest float8_e4m3 number.
FLOAT8_MAX = 448.0
#: State of a key: no row may attend to it; its mass counts; it is not finite, so every row fetches it.
ABSENT, WHOLE, BROKEN = 0, 1, 2


class ReadyKeys(NamedTuple):
    """Keys as the mass kernel takes them.

    Attributes:
        keys: (B, Hkv, S, D), the keys themselves, or in float8, scaled by head; last dimension contiguous. Of narrow
            scores (B, Hkv, S, dims).
        gain: float32 (B, Hkv), what undoes the scaling.
        state: uint8 (B, Hkv, S), what each key's mass means.
        columns: int32 (B, Hkv, dims) contiguous, the coordinates that narrow scores multiply; None: all.
    """

    keys: Tensor
    gain: Tensor
    state: Tensor
    columns: Tensor | None


@triton.jit(do_not_specialize=["kv_len", "count"])
def _ready(key, finite, factor, means, packed, columns, k_b, k_h, k_n, kv_len, count,
           KV_HEADS: tl.constexpr, DIM: tl.constexpr, POOL: tl.constexpr, KEYS: tl.constexpr, TOP: tl.constexpr,
           PACKS: tl.constexpr, NARROW: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Means of a tile of keys, and the keys as they are multiplied; keys that are not finite are zeros in both."""
    tile, row = tl.program_id(0), tl.program_id(1)
    places, dims = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, DIM)
    slots = row.to(tl.int64) * kv_len + places
    exists = places < kv_len
    counts = exists & (tl.load(finite + slots, mask=exists, other=0) != 0)
    start = key + (row // KV_HEADS).to(tl.int64) * k_b + (row % KV_HEADS).to(tl.int64) * k_h
    k = tl.load(start + places.to(tl.int64)[:, None] * k_n + dims, mask=counts[:, None], other=0.0).to(tl.float32)
    if PACKS:
        multiplied, packed_dims = k, tl.arange(0, WIDTH)
        if NARROW:
            chosen = tl.load(columns + row * WIDTH + packed_dims)
            at = start + places.to(tl.int64)[:, None] * k_n + chosen
            multiplied = tl.load(at, mask=counts[:, None], other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(multiplied * tl.load(factor + row), -TOP), TOP)
        tl.store(
            packed + slots[:, None] * WIDTH + packed_dims, scaled.to(packed.dtype.element_ty), mask=exists[:, None]
        )
    sums = tl.sum(tl.reshape(k, (KEYS // POOL, POOL, DIM)), 1)
    pools = tile * (KEYS // POOL) + tl.arange(0, KEYS // POOL)
    sizes = tl.maximum(tl.minimum(kv_len - pools * POOL, POOL), 1).to(tl.float32)
    at = means + (row.to(tl.int64) * count + pools)[:, None] * DIM + dims
    tl.store(at, (sums / sizes[:, None]).to(means.dtype.element_ty), mask=(pools < count)[:, None])


def packed_type(query: Tensor, dims: int) -> torch.dtype:
    """What products of the estimate are computed in: float8 where the device multiplies it, else the query's own.

    Rows of less than 32 numbers (``dims``) are too short for a float8 product. Devices of ROCm have capabilities too,
    and another float8.
    """
    ours = query.is_cuda and torch.version.hip is None and dims >= 32
    if ours and torch.cuda.get_device_capability(query.device) >= (9, 0):
        return torch.float8_e4m3fn
    return query.dtype


def ready_keys(
    key: Tensor, real: Tensor | None, pool: int, dtype: torch.dtype, columns: Tensor | None = None
) -> tuple[Tensor, ReadyKeys]:
    """Means of the keys, and the keys for the mass kernel; no copy of the keys but the float8 or narrow one is made.

    Args:
        key: (B, Hkv, S, D), last dimension contiguous.
        real: uint8 (B, S), 0 = nobody sees the key; or None.
        pool: Keys to a mean.
        dtype: float8_e4m3fn, or key's own.
        columns: int32 (B, Hkv, dims) contiguous, the coordinates that are multiplied; None: all.

    Returns:
        Means (B, Hkv, S / pool rounded up, D) in key's dtype, 0 standing for keys that are not finite; and the keys.
    """
    batch, kv_heads, kv_len, dim = key.shape
    low, high = torch.aminmax(key, dim=-1)
    finite = (low > -torch.inf) & (high < torch.inf)  # NaN is neither
    state = torch.where(finite, WHOLE, BROKEN).to(torch.uint8)
    if real is not None:
        state *= real[:, None]
    scales, width = dtype != key.dtype, dim if columns is None else columns.shape[2]
    packs = scales or columns is not None
    peak = torch.where(finite, torch.maximum(high, -low), 0.0).amax(-1).float()
    # Finite where all keys are 0.
    factor = FLOAT8_MAX / peak.clamp(min=1e-30) if scales else torch.ones_like(peak)
    count = triton.cdiv(kv_len, pool)
    means = torch.empty((batch, kv_heads, count, dim), dtype=key.dtype, device=key.device)
    packed = torch.empty((*key.shape[:3], width), dtype=dtype, device=key.device) if packs else key
    _ready[(triton.cdiv(kv_len, KEYS), batch * kv_heads)](
        key, finite.view(torch.uint8), factor, means, packed, state if columns is None else columns, *key.stride()[:3],
        kv_len, count, KV_HEADS=kv_heads, DIM=dim, POOL=pool, KEYS=KEYS, TOP=torch.finfo(dtype).max, PACKS=packs,
        NARROW=columns is not None, WIDTH=width, num_warps=8,
    )  # fmt: skip
    return means, ReadyKeys(packed, 1.0 / factor, state, columns)
