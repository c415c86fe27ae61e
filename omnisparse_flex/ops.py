"""How our operators are defined, and primitives that a compiler shall not look into.

``realize`` is a copy that Inductor cannot fuse away. ``sort_rows`` is a sort that Inductor does not write itself:
Triton takes up to a minute to compile a sort fused with what surrounds it. ``write_row`` writes a layer's record into
the row of a table: with the layer's number in its kernels, Inductor would compile them anew for every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_lib = torch.library.Library("omnisparse", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()) -> None:
    """Define an operator ``omnisparse::name`` that no compiler looks into.

    Args:
        schema: Its signature, with its name.
        run: What it does.
        fake: What gives results of the same sizes and dtypes without values.
        tags: Its tags.
    """
    name = schema.partition("(")[0]
    _lib.define(schema, tags=tags)
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"omnisparse::{name}", fake, lib=_lib)


def register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
    """Give the operator ``omnisparse::name`` a backward, and a function that saves what it needs."""
    torch.library.register_autograd(f"omnisparse::{name}", backward, setup_context=setup, lib=_lib)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _sort_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(x.contiguous(), dim=-1, descending=True, stable=True)
    return values, order


def _write_row(table: Tensor, row: Tensor, index: int, added_from: int) -> None:
    part = tuple(slice(min(a, b)) for a, b in zip(table.shape[1:], row.shape, strict=True))
    place, row = table[index][part], row[part].to(table.device)
    place[:added_from].copy_(row[:added_from])
    if added_from < row.shape[0]:
        place[added_from:].add_(row[added_from:])


define("realize(Tensor x) -> Tensor", _copy, _like)
define("sort_rows(Tensor x) -> (Tensor, Tensor)", _sort_rows, lambda x: (_like(x), _like(x, torch.int64)))
# Entries from ``added_from`` on are added to what is there, others replace it; both are cropped to the smaller size.
define("write_row(Tensor(a!) table, Tensor row, int index, int added_from) -> ()", _write_row, lambda *_: None)
register_autograd("realize", lambda ctx, grad: grad)
