"""Two primitives that a compiler shall not look into.

``realize`` is a copy that Inductor cannot fuse away. ``sort_rows`` is a sort that Inductor does not write itself:
Triton takes up to a minute to compile a sort fused with what surrounds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_lib = torch.library.Library("omnisparse", "DEF")

_lib.define("realize(Tensor x) -> Tensor")
_lib.define("sort_rows(Tensor x) -> (Tensor, Tensor)")


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _sort_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(x.contiguous(), dim=-1, descending=True, stable=True)
    return values, order


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
