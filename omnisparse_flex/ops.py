"""Primitives that a compiler shall not look into.

``realize`` is a copy that Inductor cannot fuse away. ``sort_rows`` is a sort that Inductor does not write itself:
Triton takes up to a minute to compile a sort fused with what surrounds it. ``write_row`` writes a layer's record into
the row of a table: with the layer's number in its kernels, Inductor would compile them anew for every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

_lib = torch.library.Library("omnisparse", "DEF")

_lib.define("realize(Tensor x) -> Tensor")
_lib.define("sort_rows(Tensor x) -> (Tensor, Tensor)")
# Entries from ``added_from`` on are added to what is there, others replace it; both are cropped to the smaller size.
_lib.define("write_row(Tensor(a!) table, Tensor row, int index, int added_from) -> ()")


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _sort_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(x.contiguous(), dim=-1, descending=True, stable=True)
    return values, order


def _write_row(table: Tensor, row: Tensor, index: int, added_from: int) -> None:
    part = tuple(slice(min(a, b)) for a, b in zip(table.shape[1:], row.shape, strict=True))
    place, row = table[index][part], row[part].to(table.device)
    place[:added_from].copy_(row[:added_from])
    if added_from < row.shape[0]:
        place[added_from:].add_(row[added_from:])


_lib.impl("write_row", _write_row, "CompositeExplicitAutograd")
torch.library.register_fake("omnisparse::write_row", lambda table, row, index, added_from: None, lib=_lib)
_lib.impl("realize", _copy, "CompositeExplicitAutograd")
_lib.impl("sort_rows", _sort_rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "omnisparse::sort_rows",
    lambda x: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, dtype=torch.int64, memory_format=torch.contiguous_format),
    ),
    lib=_lib,
)
torch.library.register_fake(
    "omnisparse::realize", lambda x: torch.empty_like(x, memory_format=torch.contiguous_format), lib=_lib
)
torch.library.register_autograd("omnisparse::realize", lambda ctx, grad: grad, lib=_lib)
