"""What a ``mask_mod`` or a ``BlockMask`` denotes, pair by pair; public through ``omnisparse_flex.testing``."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from omnisparse_flex.errors import require
from omnisparse_flex.testing.oracle import expand_block_map, materialize_mask
from omnisparse_flex.types import MaskMod

#: One direction of a ``BlockMask``: how many blocks of each row are listed, and which.
_Lists: TypeAlias = tuple[Tensor | None, Tensor | None]


def assert_mask_mod_equals(mask_mod: MaskMod, dense: Tensor) -> None:
    """Check a ``mask_mod`` on every pair, called both on broadcast indices and under ``vmap``.

    Args:
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``.
        dense: ``(B, H, L, S)`` bool, what it should denote.

    Raises:
        AssertionError: Naming the first ``(b, h, q, kv)`` that differs.
        ConfigError: If ``dense`` is not a 4-D bool tensor, or ``mask_mod`` returns no bool tensor.
    """
    B, H, L, S = _dense_shape(dense)
    name = getattr(mask_mod, "__name__", "mask_mod")
    _assert_same(f"{name} on broadcast indices", materialize_mask(mask_mod, B, H, L, S, dense.device), dense)
    _assert_same(f"{name} under vmap", create_mask(mask_mod, B, H, L, S, device=dense.device), dense)


def expand_block_mask(block_mask: BlockMask, batch: int | None = None, heads: int | None = None) -> Tensor:
    """The token mask that FlexAttention's forward reads from a ``BlockMask``.

    Args:
        block_mask: Its kv-lists are read: ``mask_mod`` holds in partial blocks, full blocks are whole.
        batch: Batch rows to expand to; None: as many as the lists have.
        heads: Query heads to expand to; None: as many as the lists have.

    Returns:
        ``(B, H, L, S)`` bool.

    Raises:
        AssertionError: If a list names a block twice or outside the sequence: kernels
            would count it twice, or read past the end.
    """
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return _expand(block_mask, lists, full, batch, heads, transposed=False)


def expand_transposed(block_mask: BlockMask, batch: int | None = None, heads: int | None = None) -> Tensor:
    """The token mask that FlexAttention's backward reads from a ``BlockMask``: as above, from the q-lists.

    Args:
        block_mask: With transposed lists (``q_indices``).
        batch: Batch rows to expand to; None: as many as the lists have.
        heads: Query heads to expand to; None: as many as the lists have.

    Returns:
        ``(B, H, L, S)`` bool.

    Raises:
        AssertionError: As ``expand_block_mask``.
        ConfigError: If there are no transposed lists.
    """
    require(block_mask.q_indices is not None, "block_mask", "carry transposed lists", block_mask.q_indices)
    lists = (block_mask.q_num_blocks, block_mask.q_indices)
    full = (block_mask.full_q_num_blocks, block_mask.full_q_indices)
    return _expand(block_mask, lists, full, batch, heads, transposed=True)


def assert_block_mask_equals(block_mask: BlockMask, dense: Tensor) -> None:
    """Check a ``BlockMask`` on every pair: its kv-lists, and its transposed lists where it has them.

    Args:
        block_mask: The lists and their ``mask_mod``.
        dense: ``(B, H, L, S)`` bool, what it should denote.

    Raises:
        AssertionError: Naming the first ``(b, h, q, kv)`` that differs, or a malformed list.
        ConfigError: If ``dense`` is not a 4-D bool tensor.
    """
    B, H, L, S = _dense_shape(dense)
    if tuple(block_mask.seq_lengths) != (L, S):
        raise AssertionError(f"block_mask is over {block_mask.seq_lengths} tokens, expected {(L, S)}")
    _assert_same("block_mask (kv-lists)", expand_block_mask(block_mask, B, H), dense)
    if block_mask.q_indices is not None:
        _assert_same("block_mask (transposed lists)", expand_transposed(block_mask, B, H), dense)


def _dense_shape(dense: Tensor) -> tuple[int, int, int, int]:
    described = (dense.dtype, tuple(dense.shape))
    is_map = dense.dim() == 4 and dense.dtype == torch.bool
    require(is_map, "dense", "be a bool tensor of shape (B, H, L, S)", described)
    B, H, L, S = dense.shape
    return B, H, L, S


def _assert_same(what: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} is of shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    differing = (actual != expected).nonzero()
    if len(differing):
        b, h, q, kv = differing[0].tolist()
        allowed, expected_here = bool(actual[b, h, q, kv]), bool(expected[b, h, q, kv])
        raise AssertionError(
            f"{what} is {allowed} at (b={b}, h={h}, q={q}, kv={kv}), expected {expected_here}; "
            f"{len(differing)} of {expected.numel()} pairs differ"
        )


def _expand(
    block_mask: BlockMask, lists: _Lists, full: _Lists, batch: int | None, heads: int | None, *, transposed: bool
) -> Tensor:
    """Tokens of the partial ``lists`` under ``mask_mod``, and of the ``full`` ones."""
    L, S = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    others = math.ceil(L / block_q) if transposed else math.ceil(S / block_k)
    partial, whole = _block_map(lists, others), _block_map(full, others)
    if partial is None:
        raise AssertionError("block_mask has no list of partial blocks")
    if whole is None:
        whole = torch.zeros_like(partial)
    if (partial & whole).any():
        raise AssertionError("block_mask lists a block as partial and as full: kernels would count it twice")
    if transposed:
        partial, whole = partial.mT, whole.mT
    B, H = batch or partial.shape[0], heads or partial.shape[1]
    allowed = materialize_mask(block_mask.mask_mod, B, H, L, S, partial.device)
    partial, whole = (expand_block_map(keep, L, S, (block_q, block_k)) for keep in (partial, whole))
    return (partial & allowed) | whole


def _block_map(lists: _Lists, columns: int) -> Tensor | None:
    """``(B, H, rows, columns)`` bool over blocks from the lists ``(counts, indices)``."""
    counts, indices = lists
    if counts is None or indices is None:
        return None
    # What stands after the count is undefined: it is sent to a spare column.
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    if (used & ((indices < 0) | (indices >= columns))).any():
        raise AssertionError(f"block_mask lists a block outside the {columns} blocks of the sequence")
    listed = torch.where(used, indices, columns).long()
    times = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.int64, device=indices.device)
    times = times.scatter_add_(-1, listed, torch.ones_like(listed))[..., :columns]
    if (times > 1).any():
        raise AssertionError("block_mask lists a block twice in one row: kernels would count it twice")
    return times.bool()
