"""The KV cache that keeps fewer keys: ``OmniSparseCache``, and the replay of its decode step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnisparse_flex.cache.hf_cache import OmniSparseCache as OmniSparseCache

# Imported on first use: modules that these names need import other modules of this folder.
_HOMES = {
    "OmniSparseCache": "omnisparse_flex.cache.hf_cache",
}
__all__ = ["OmniSparseCache"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
