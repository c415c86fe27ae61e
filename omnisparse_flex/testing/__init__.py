"""Checks and hypothesis strategies for attention masks and attention graphs, ours and yours.

A mask of your own is tested in one line::

    assert_mask_mod_equals(my_mask_mod, my_dense_mask)  # (B, H, L, S) bool

The strategies need hypothesis; everything else needs torch only.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.testing.graphs import assert_no_square, count_hops
from omnisparse_flex.testing.masks import (
    assert_block_mask_equals,
    assert_mask_mod_equals,
    expand_block_mask,
    expand_transposed,
)
from omnisparse_flex.testing.numerics import assert_close_to_oracle, tolerance
from omnisparse_flex.testing.oracle import dense_attention
from omnisparse_flex.types import MaskMod

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "AttentionShape",
    "MaskCase",
    "assert_block_mask_equals",
    "assert_close_to_oracle",
    "assert_mask_mod_equals",
    "assert_no_square",
    "attention_shapes",
    "configs",
    "count_hops",
    "dense_oracle",
    "expand_block_mask",
    "expand_transposed",
    "mask_mods",
    "tolerance",
]

#: The float64 reference, under the name that tests read best.
dense_oracle = dense_attention


class AttentionShape(NamedTuple):
    """Sizes of one attention call; lengths in tokens."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def heads(self) -> int:
        """Query heads: ``kv_heads * group``."""
        return self.kv_heads * self.group

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Normal query ``(B, Hq, L, D)``, key and value ``(B, Hkv, S, D)`` on the CPU, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        query_shape = (self.batch, self.heads, self.q_len, self.head_dim)
        kv_shape = (self.batch, self.kv_heads, self.kv_len, self.head_dim)
        query, key, value = (
            torch.randn(shape, generator=generator).to(dtype) for shape in (query_shape, kv_shape, kv_shape)
        )
        return query, key, value


class MaskCase(NamedTuple):
    """A mask in its two forms: ``mask_mod``, and ``dense`` as ``(B, 1, L, S)`` bool made without it."""

    name: str
    mask_mod: MaskMod
    dense: Tensor


def attention_shapes() -> SearchStrategy[AttentionShape]:
    """Shapes that find bugs: lengths 1 to 400, mostly around 128; GQA groups of 1, 2 and 7; batches of 1 to 3.

    Raises:
        ImportError: Without hypothesis.
    """
    return _strategies().attention_shapes()  # type: ignore[no-any-return]


def mask_mods(B: int, L: int, S: int) -> SearchStrategy[MaskCase]:
    """Masks of the zoo over ``B`` batch rows, ``L`` queries and ``S`` keys, and combinations of up to three.

    Rows and whole batch rows without an allowed key are drawn too.

    Raises:
        ImportError: Without hypothesis.
    """
    return _strategies().mask_mods(B, L, S)  # type: ignore[no-any-return]


def configs() -> SearchStrategy[OmniSparseConfig]:
    """Valid configs, for sequences of up to a few hundred tokens.

    Raises:
        ImportError: Without hypothesis.
    """
    return _strategies().configs()  # type: ignore[no-any-return]


def _strategies() -> ModuleType:
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the strategies of omnisparse_flex.testing need hypothesis: pip install hypothesis"
        ) from error
    return importlib.import_module("omnisparse_flex.testing.strategies")
