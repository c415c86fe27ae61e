"""Bounds of an index expression over blocks of queries and keys, by interval arithmetic.

A mask over N x N pairs costs O((N / block)^2) to summarise this way: a block is *full*
where the lower bound of the mask is true, *empty* where the upper bound is false. Both
errors are safe: the truth is always inside the interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.expr.expr import Apply, Const, Expr, Index, Load, axes, evaluate, plain_load
from omnisparse_flex.masks.expr.intervals import RULES


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of one attention site.

    Attributes:
        batch: Number of batch rows.
        heads: Number of query heads.
        q_len: Number of queries.
        kv_len: Number of keys.
        block: Side of a query block, in tokens.
        device: Where bounds are computed.
        split: Key blocks beside each other in the width of a query block; it divides ``block``.
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    block: int
    device: torch.device
    split: int = 1

    @property
    def kv_block(self) -> int:
        """Side of a key block, in tokens."""
        return self.block // self.split

    @property
    def q_blocks(self) -> int:
        """Number of query blocks, the last one possibly ragged."""
        return (self.q_len + self.block - 1) // self.block

    @property
    def kv_blocks(self) -> int:
        """Number of key blocks, the last one possibly ragged."""
        return (self.kv_len + self.kv_block - 1) // self.kv_block


#: (lowest, highest) value in each block, broadcastable to (B, H, NQ, NK). None: nothing is known.
Bounds = tuple[Tensor, Tensor] | None


def block_bounds(expr: Expr, buffers: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """Which blocks a boolean expression surely fills, and which it may touch.

    Args:
        expr: A boolean expression.
        buffers: The captured tensors that its loads refer to.
        grid: Lengths and block sizes.

    Returns:
        ``(full, some)``: bool tensors (B or 1, H or 1, NQ, NK). ``full`` implies that
        every pair of the block is allowed; a block not in ``some`` has no allowed pair.
        A ragged last key block is never full (kernels must check its end).
    """
    bounds = _bounds(expr, buffers, grid)
    shape = (1, 1, grid.q_blocks, grid.kv_blocks)
    if bounds is None:
        full = torch.zeros(shape, dtype=torch.bool, device=grid.device)
        return full, ~full
    low, high = (torch.broadcast_to(x.to(torch.bool), torch.broadcast_shapes(x.shape, shape)) for x in bounds)
    kv = torch.arange(grid.kv_blocks, device=grid.device)
    return low & ((kv + 1) * grid.kv_block <= grid.kv_len), high


def _bounds(expr: Expr, buffers: Sequence[Tensor], grid: Grid) -> Bounds:
    match expr:
        case Const(value):
            exact = torch.full((1, 1, 1, 1), value, device=grid.device)
            return exact, exact
        case Index(axis):
            return _axis_bounds(axis, grid)
        case Load(slot, at):
            return _load_bounds(buffers[slot], at, buffers, grid)
        case Apply(op, args):
            parts = [_bounds(arg, buffers, grid) for arg in args]
            if op in ("and", "or"):
                return _logical(op, parts, grid)
            known = all(part is not None for part in parts)
            return RULES[op](*parts) if known and op in RULES else None


def _axis_bounds(axis: str, grid: Grid) -> tuple[Tensor, Tensor]:
    if axis == "b":
        exact = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1, 1)
        return exact, exact
    if axis == "h":
        exact = torch.arange(grid.heads, device=grid.device).view(1, -1, 1, 1)
        return exact, exact
    length, count, block = _of_axis(axis, grid)
    shape = (1, 1, -1, 1) if axis == "q" else (1, 1, 1, -1)
    first = torch.arange(count, device=grid.device) * block
    last = (first + block - 1).clamp(max=length - 1)
    return first.view(shape), last.view(shape)


def _of_axis(axis: str, grid: Grid) -> tuple[int, int, int]:
    """Tokens, blocks and a block's side of queries (``"q"``) or keys."""
    if axis == "q":
        return grid.q_len, grid.q_blocks, grid.block
    return grid.kv_len, grid.kv_blocks, grid.kv_block


def _load_bounds(buffer: Tensor, at: tuple[Expr, ...], buffers: Sequence[Tensor], grid: Grid) -> Bounds:
    """Bounds of a captured tensor's element.

    Dimensions read at plain q or kv, or at q // n or kv // n, are pooled block by block; dimensions read at an
    expression of batch and head alone are looked up; any other dimension is bounded over
    its whole extent. Rows and columns keep (q, kv) as the last two axes.
    """
    low = high = buffer
    if buffer.dtype.is_floating_point:
        # A comparison with NaN is false; one with a bound that is NaN would say so of its whole block.
        low, high = (torch.where(buffer.isnan(), bound, buffer) for bound in (-torch.inf, torch.inf))
    pooled: list[Expr] = []
    strided: dict[Expr, Expr] = {}
    for dim, index in reversed(list(enumerate(at))):
        if isinstance(index, Index) and index.axis in ("q", "kv"):
            length, count, block = _of_axis(index.axis, grid)
            if index in pooled or buffer.shape[dim] < length:
                return None
            low = _pool(low.narrow(dim, 0, length), dim, count, block, highest=False)
            high = _pool(high.narrow(dim, 0, length), dim, count, block, highest=True)
            pooled.append(index)
        elif (stride := _stride(index)) is not None and index.args[0] not in pooled:  # type: ignore[union-attr]
            axis = index.args[0]  # type: ignore[union-attr]
            places = _strided_places(axis, stride, grid)
            if buffer.shape[dim] * stride < (grid.q_len if axis == Index("q") else grid.kv_len):
                return None
            low, high = _pool_places(low, dim, places, highest=False), _pool_places(high, dim, places, highest=True)
            strided[index] = axis
            pooled.append(axis)
        elif not axes(index) <= {"b", "h"}:
            low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
    at = tuple(strided.get(index, index) for index in at)
    return _read(low, at, pooled, buffers, grid), _read(high, at, pooled, buffers, grid)


#: Fewest consecutive positions that share an element of a table for it to be pooled block by block.
_MIN_STRIDE = 8


def _stride(index: Expr) -> int | None:
    """``n`` of the index ``q // n`` or ``kv // n``."""
    match index:
        case Apply("floor_divide", (Index("q" | "kv"), Const(n))) if isinstance(n, int) and n >= _MIN_STRIDE:
            return n
    return None


def _strided_places(axis: Expr, stride: int, grid: Grid) -> list[Tensor]:
    """Elements of a table that each block's positions read: int64 tensors (blocks,), enough of them to name all."""
    length, count, block = _of_axis("q" if axis == Index("q") else "kv", grid)
    first = torch.arange(count, device=grid.device) * block
    last = (first + block - 1).clamp(max=length - 1) // stride
    places = [torch.minimum(first // stride + step, last) for step in range((block + stride - 2) // stride + 1)]
    # Realized: Inductor fails to bound an indirect index that it can follow back to a clamp.
    return [torch.ops.omnisparse.realize(x) for x in places]


def _pool_places(x: Tensor, dim: int, places: Sequence[Tensor], *, highest: bool) -> Tensor:
    """Maximum (or minimum) of what each block reads of ``dim``."""
    result, *others = [x.index_select(dim, place) for place in places]
    for other in others:
        if x.dtype == torch.bool:
            result = result | other if highest else result & other
        else:
            result = torch.maximum(result, other) if highest else torch.minimum(result, other)
    return result


def _read(pool: Tensor, at: tuple[Expr, ...], pooled: list[Expr], buffers: Sequence[Tensor], grid: Grid) -> Tensor:
    """Look the pooled tensor up at batch, head and block indices; (B or 1, H or 1, NQ or 1, NK or 1)."""
    indices: list[Tensor] = []
    for index in at:
        if index in pooled:
            axis = 2 if index == Index("q") else 3
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            count = grid.q_blocks if axis == 2 else grid.kv_blocks
            indices.append(torch.arange(count, device=grid.device).view(shape))
        elif axes(index) <= {"b", "h"}:
            indices.append(_exact_index(index, buffers, grid))
        else:
            indices.append(torch.zeros((1, 1, 1, 1), dtype=torch.long, device=grid.device))
    return pool[tuple(indices)] if indices else pool.view(1, 1, 1, 1)


def _exact_index(index: Expr, buffers: Sequence[Tensor], grid: Grid) -> Tensor:
    """An index of batch and head alone, at each of them: int64 (B or 1, H or 1, 1, 1)."""
    b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1, 1)
    h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1, 1)
    origin = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=grid.device)
    at: Tensor = evaluate(index, plain_load(buffers), b, h, origin, origin).long()
    return at


def any_in_blocks(x: Tensor, dim: int, count: int, block: int) -> Tensor:
    """Whether each block of a bool tensor's ``dim`` holds a true element."""
    return _pool(x, dim, count, block, highest=True)


def all_in_blocks(x: Tensor, dim: int, count: int, block: int) -> Tensor:
    """Whether each block of a bool tensor's ``dim`` holds true elements alone; places past the end do not count."""
    return _pool(x, dim, count, block, highest=False)


def _pool(x: Tensor, dim: int, count: int, block: int, *, highest: bool) -> Tensor:
    """Maximum (or minimum) over blocks of ``dim``; the ragged end does not count."""
    if x.dtype == torch.bool:
        # In float: Inductor's C++ code for padded bool reductions does not compile.
        return _pool(x.to(torch.float32), dim, count, block, highest=highest) > 0
    limits = torch.finfo(x.dtype) if x.dtype.is_floating_point else torch.iinfo(x.dtype)
    missing = [0, 0] * (x.dim() - 1 - dim) + [0, count * block - x.shape[dim]]
    # F.pad carries its value as a double, in which the largest int64 would wrap to the smallest.
    largest = 2**62 if x.dtype == torch.int64 else limits.max
    padded: Tensor = F.pad(x, missing, value=limits.min if highest else largest)
    blocks: Tensor = padded.unflatten(dim, (count, block))
    return blocks.amax(dim + 1) if highest else blocks.amin(dim + 1)


def _logical(op: str, parts: list[Bounds], grid: Grid) -> Bounds:
    """And / or, which stay informative when one side is unknown."""
    unknown = (
        torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=grid.device),
        torch.ones((1, 1, 1, 1), dtype=torch.bool, device=grid.device),
    )
    (a_low, a_high), (b_low, b_high) = (part if part is not None else unknown for part in parts)
    return (a_low & b_low, a_high & b_high) if op == "and" else (a_low | b_low, a_high | b_high)
