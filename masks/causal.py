"""Causal attention, with an offset for queries that continue a cached sequence."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks._checks import INT_DTYPES, describe, is_int
from omnisparse_flex.types import MaskMod


def causal(offset: int | Tensor = 0) -> MaskMod:
    """A query sees itself and every earlier key: ``kv_idx <= q_idx + offset``.

    Args:
        offset: Position of query 0 among the keys, in tokens: ``S - L`` when the last
            ``L`` of ``S`` tokens are the queries. An int is a constant of the compiled
            graph; a 0-d int tensor (on the queries' device) is read at run time, so one
            graph serves every offset.

    Returns:
        A ``mask_mod``. A negative offset leaves the first ``-offset`` rows without keys.

    Raises:
        ConfigError: If ``offset`` is neither an int nor a 0-d int tensor.

    Source: the causal mask of Vaswani et al., arXiv 1706.03762, section 3.2.3; aligned
    as in SDPA's ``is_causal`` (upper left) at offset 0.
    """
    if isinstance(offset, Tensor):
        ok, name = offset.dim() == 0 and offset.dtype in INT_DTYPES, "causal_offset"
    else:
        ok, name = is_int(offset), "causal_offset" if offset else "causal"
    if not ok:
        raise ConfigError(f"offset must be an int or a 0-d int tensor, got {describe(offset)}")

    def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    def causal_offset_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx + offset

    mask_mod = causal_mask if name == "causal" else causal_offset_mask
    mask_mod.__name__ = name
    return mask_mod
