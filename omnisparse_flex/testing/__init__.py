"""Checks and hypothesis strategies for attention masks and attention graphs, ours and yours.

A mask of your own is tested in one line::

    assert_mask_mod_equals(my_mask_mod, my_dense_mask)  # (B, H, L, S) bool

The strategies need hypothesis; everything else needs torch only.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.testing.cases import AttentionShape, MaskCase
from omnisparse_flex.testing.graphs import assert_no_square, count_hops
from omnisparse_flex.testing.masks import (
    assert_block_mask_equals,
    assert_mask_mod_equals,
    expand_block_mask,
    expand_transposed,
)
from omnisparse_flex.testing.numerics import assert_close_to_oracle, tolerance
from omnisparse_flex.testing.oracle import dense_attention

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
