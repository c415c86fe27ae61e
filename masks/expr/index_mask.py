"""A boolean mask as data: an expression plus the small tensors it reads."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import (
    KV,
    TRUE,
    Apply,
    Expr,
    Load,
    Loader,
    axes,
    causal_offset,
    conjunction,
    conjuncts,
    evaluate,
    plain_load,
    shift_slots,
    walk,
)
from omnisparse_flex.masks.expr.terms import mask_bounds


@dataclasses.dataclass(frozen=True, slots=True)
class IndexMask:
    """Which (batch, head, query, key) pairs a model's own mask allows.

    Attributes:
        expr: Boolean expression over the four indices.
        buffers: The captured tensors that the expression's loads name by slot.
    """

    expr: Expr
    buffers: tuple[Tensor, ...] = ()

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """``pairs``, so that a mask is a ``mask_mod``; Dynamo of torch 2.11 cannot trace this spelling."""
        return self.pairs(b, h, q, kv)

    def pairs(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """The mask as an ordinary ``mask_mod`` over its own buffers."""
        return evaluate(self.expr, plain_load(self.buffers), b, h, q, kv)

    def at(self, load: Loader, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """The mask with its buffers read through ``load``."""
        return evaluate(self.expr, load, b, h, q, kv)

    def bounds(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """``(full, some)`` per block; see ``terms.mask_bounds``."""
        return mask_bounds(self.expr, self.buffers, grid)

    def intersect(self, other: IndexMask) -> IndexMask:
        """Pairs that both masks allow."""
        moved = shift_slots(other.expr, len(self.buffers))
        return IndexMask(conjunction(self.expr, moved), (*self.buffers, *other.buffers))

    @property
    def first_key_unaligned(self) -> bool:
        """Whether a row's first allowed key may lie inside a block (padding, packing)."""
        return any(isinstance(node, Load) and "kv" in axes(node) for node in walk(self.expr))

    @property
    def rescue_blocks(self) -> Literal["none", "first", "all"]:
        """Which allowed blocks of a row stay so that a query that may not see its own position keeps a key.

        ``none``: there is no such query (one causal band or no mask). ``first``: causality
        and a choice of keys (padding): if any key is allowed, the first allowed one is.
        ``all``: nothing is known.
        """
        parts = {part for part in conjuncts(self.expr) if axes(part)}
        others = {part for part in parts if not _is_band(part)}
        if not others and len(parts) <= 1:
            return "none"
        return "first" if all("q" not in axes(part) for part in others) else "all"


#: Every pair is allowed.
NO_MASK = IndexMask(TRUE)


def _is_band(part: Expr) -> bool:
    return isinstance(part, Apply) and part.op in ("le", "ge") and KV in part.args and causal_offset(part) is not None
