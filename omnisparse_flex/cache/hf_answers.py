"""The parts of transformers' ``Cache`` that are the same for every ``OmniSparseCache``; which models it takes."""

from __future__ import annotations

import functools
from typing import Any

from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.errors import require


class CacheAnswers:
    """Methods of a transformers ``Cache`` that depend on the number of layers and the length alone."""

    layers: list[SlimLayer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        raise NotImplementedError

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the logical keys."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No maximum."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: ``apply_omnisparse`` compiles the decoder, not ``generate``."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: ``crop`` restores the state before the cropped tokens."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """No layer slides."""
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        """No layer is linear."""
        return [False] * len(self.layers)

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer holds keys."""
        return [False] * len(self.layers)


@functools.cache
def with_transformers_base(cls: type[Any]) -> type[Any]:
    """A subclass of ``cls`` with its name that is a transformers ``Cache``, too; imports transformers."""
    from transformers import Cache

    return type(cls.__name__, (cls, Cache), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def full_attention_layers(decoder: Any) -> int:
    """Number of decoder layers.

    Raises:
        ConfigError: Unless every layer has full attention over keys of its own.
    """
    config = getattr(decoder, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    require(isinstance(layers, int), "model", "be a transformers model", type(decoder).__name__)
    kinds = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
    require(kinds == ["full_attention"], "model", "have full attention in every layer", kinds)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    require(shared == 0, "model", "have keys of its own in every layer", f"{shared} layers that share them")
    crossed = getattr(config, "cross_attention_layers", None) or []
    require(not crossed, "model", "have no layers that attend to an image's own keys", f"layers {crossed}")
    return layers  # type: ignore[return-value]
