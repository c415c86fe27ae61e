"""Packed sequences: several documents in one row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks._checks import check_count, check_int_map
from omnisparse_flex.types import MaskMod


def document(ids: Tensor) -> MaskMod:
    """A query sees every key of its own document, earlier or later.

    Args:
        ids: ``(B, N)`` int, the document of each token; equal ids see one another, also
            where they are not neighbours. On the queries' device.

    Returns:
        A ``mask_mod``; ``intersect(causal(), document(ids))`` is causal packing.

    Raises:
        ConfigError: If ``ids`` is not a 2-D int tensor.

    Source: sequence packing as in FlexAttention's document mask, arXiv 2412.05496.
    """
    check_int_map("ids", ids, "(B, N)")
    ids = ids.contiguous()  # CPU Inductor cannot read a captured view

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ids[b, q_idx] == ids[b, kv_idx]

    mask_mod.__name__ = "document"
    return mask_mod


def document_ids(lengths: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Tensor:
    """The ``ids`` that ``document`` takes, from the lengths of the packed documents.

    Args:
        lengths: For each batch row, the tokens of its documents in order; all rows have
            the same sum ``N``. ``[[100, 28]]`` is one row of two documents.
        device: Where the ids live; None: the default device.

    Returns:
        ``(B, N)`` int32: 0 for the first document of a row, 1 for the second, and so on.

    Raises:
        ConfigError: If there is no row, a row is no sequence, a length is not an int of at
            least 1, or rows differ in their sum.
    """
    for row in lengths:
        if not isinstance(row, Sequence):
            raise ConfigError(f"lengths must hold one sequence of lengths for each batch row, got {lengths!r}")
        for length in row:
            check_count("lengths", length, minimum=1)
    totals = {sum(row) for row in lengths}
    if len(totals) != 1 or 0 in totals:
        raise ConfigError(f"lengths must sum to the same positive total in every row, got {lengths!r}")
    packed = [[doc for doc, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(packed, dtype=torch.int32, device=device)
