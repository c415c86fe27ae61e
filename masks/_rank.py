"""Masks by rank: a key is seen where none of its ranks is above the query's."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.types import MaskMod


def by_rank(name: str, *ranks: tuple[Tensor, Tensor]) -> MaskMod:
    """A query sees a key if, in every pair of tables, the key's rank is at most the query's.

    Args:
        name: The mask's ``__name__``, an identifier.
        *ranks: Pairs of int tables, of the keys and of the queries, ``(N,)`` for all batch
            rows or ``(B, N)`` for each; one pair or more. A table may be both of its pair.

    Returns:
        A ``mask_mod``.

    Our choice: one form for every order of generation; a table costs 4 bytes a token.
    """
    # CPU Inductor cannot read a captured view.
    tables = [(keys.contiguous(), queries.contiguous()) for keys, queries in ranks]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        (keys, queries), *others = tables
        allowed = _at(keys, b, kv_idx) <= _at(queries, b, q_idx)
        for keys, queries in others:
            allowed = allowed & (_at(keys, b, kv_idx) <= _at(queries, b, q_idx))
        return allowed

    mask_mod.__name__ = name
    return mask_mod


def _at(table: Tensor, b: Tensor, index: Tensor) -> Tensor:
    return table[index] if table.dim() == 1 else table[b, index]
