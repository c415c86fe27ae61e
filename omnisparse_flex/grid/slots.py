"""A KV cache filled in order of arrival, and where in the sequence each slot's token stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.errors import require
from omnisparse_flex.masks._rank import by_rank
from omnisparse_flex.types import MaskMod

#: The place of a slot that nobody sees: behind every token.
HIDDEN = torch.iinfo(torch.int32).max


class Slots:
    """The table "slot -> place" of a KV cache.

    Keys carry their own position, so a cache need not lie in raster order. A query sees the slots
    whose place is not behind its own; slots that are empty, padded or replaced are hidden.

    Our choice: caches of transformers only append, and a static cache that held raster slots would
    show those not yet generated as zeros, each with a share of the softmax.
    """

    def __init__(self, prompt: Tensor, tokens: int, cache: Any) -> None:
        """Slots for a prompt that is in ``cache`` already, and for tokens to come.

        Args:
            prompt: bool ``(B, P)``, False at padding.
            tokens: How many more tokens may arrive.
            cache: A DynamicCache, which grows, or a StaticCache, whose empty slots are keys as well.
        """
        batch, self._prompt = prompt.shape
        self.used = self._prompt
        self.static = static_length(cache)
        length = self.static or self.used + tokens
        self.places = torch.full((batch, length), HIDDEN, dtype=torch.int32, device=prompt.device)
        index = torch.arange(self.used, dtype=torch.int32, device=prompt.device)
        self.places[:, : self.used] = torch.where(prompt, index, HIDDEN)

    @property
    def keys(self) -> int:
        """Slots that a forward sees as keys."""
        return self.static or self.used

    def prompt(self) -> MaskMod:
        """The prompt's own causal ``mask_mod``; a padded query sees every slot, for one without keys may become NaN."""
        places = self.places[:, : self.used]
        return by_rank("prompt", (self.places, places))

    def add(self, places: Sequence[int], dead: int = 0) -> MaskMod:
        """Give the next slots to tokens that are fed in one forward.

        Args:
            places: Where each stands, counted from the prompt's first slot.
            dead: Tokens behind them that only fill the forward up: they see the prompt, and nobody sees them.

        Returns:
            The forward's ``mask_mod``, ``len(places) + dead`` queries over ``keys`` slots.
        """
        stands = torch.tensor([*places, *[HIDDEN] * dead], dtype=torch.int32, device=self.places.device)
        self.places[:, self.used : self.used + len(stands)] = stands
        self.used += len(stands)
        return by_rank("slots", (self.places, torch.where(stands == HIDDEN, self._prompt - 1, stands)))

    def hide(self, slot: int) -> None:
        """Let nobody see a slot from now on."""
        self.places[:, slot] = HIDDEN


def static_length(cache: Any) -> int | None:
    """Slots of a StaticCache; None for a cache that grows."""
    layers = getattr(cache, "layers", None)
    length = getattr(layers[0], "max_cache_len", None) if layers else None
    return None if length is None else int(length)


def check_cache(cache: Any) -> int | None:
    """Refuse a KV cache that cannot be filled in order of arrival.

    Args:
        cache: What the caller or ``generate`` gave.

    Returns:
        Slots of a StaticCache; None for a cache that grows.

    Raises:
        ConfigError: If it is not an empty DynamicCache or StaticCache.
    """
    from transformers import DynamicCache, StaticCache

    known = isinstance(cache, (DynamicCache, StaticCache))
    require(known, "cache", "be a DynamicCache or a StaticCache", type(cache).__name__)
    require(int(cache.get_seq_length()) == 0, "cache", "be empty", int(cache.get_seq_length()))
    return static_length(cache)
