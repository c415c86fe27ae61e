"""Keys that are not there: padding, on either side."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.masks._checks import check_bool_map
from omnisparse_flex.types import MaskMod


def padding(valid: Tensor) -> MaskMod:
    """Every query sees the valid keys of its batch row, and no padded one.

    Args:
        valid: ``(B, S)`` bool over keys, True at real tokens: a tokenizer's
            ``attention_mask.bool()``, padded left or right. On the keys' device.

    Returns:
        A ``mask_mod``. A row without a valid key sees nothing. Queries are not masked:
        what padded queries return is for the caller to ignore.

    Raises:
        ConfigError: If ``valid`` is not a 2-D bool tensor.

    Source: transformers' 2-D ``attention_mask``.
    """
    check_bool_map("valid", valid, "(B, S)")
    valid = valid.contiguous()  # CPU Inductor cannot read a captured view

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return valid[b, kv_idx]

    mask_mod.__name__ = "padding"
    return mask_mod
