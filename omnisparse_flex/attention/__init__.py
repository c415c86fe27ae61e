"""Sparse attention as a function: ``sparse_attention``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnisparse_flex.attention.functional import sparse_attention as sparse_attention

# Imported on first use: modules that these names need import other modules of this folder.
_HOMES = {
    "sparse_attention": "omnisparse_flex.attention.functional",
}
__all__ = ["sparse_attention"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
