"""One forward of a stock causal LM for tokens that stand anywhere behind the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from omnisparse_flex.grid.attention_mask import TAKES_BLOCKS, attention_of, in_form
from omnisparse_flex.grid.slots import Slots
from omnisparse_flex.model.cache_argument import as_cache_argument
from omnisparse_flex.types import MaskMod


class Stepper:
    """A model with its KV cache in order of arrival.

    Attributes:
        forwards: Calls of the model.
        cache: The KV cache.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        cache: Any,
        tokens: int,
        rest: dict[str, Any],
        width: int | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            model: A causal LM.
            ids: int64 ``(B, P)``, the prompts.
            mask: bool ``(B, P)``, False at padding on the left.
            cache: An empty KV cache.
            tokens: How many tokens may be fed behind the prompt.
            rest: What else the prompt's forward takes.
            width: Tokens of every forward behind the prompt, dead ones included; None: only those that are fed.
        """
        self.forwards, self.cache, self._width = 0, cache, width
        self._model, self._ids, self._mask, self._rest = model, ids, mask, rest
        self._attention = attention_of(model.config.get_text_config(decoder=True))
        self._lengths = mask.sum(dim=1, keepdim=True)
        self._slots = Slots(mask, tokens, cache)

    def prompt(self) -> Tensor:
        """Feed the prompt; logits ``(B, 1, V)`` of its last token."""
        mask = self._mask
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if self._attention == TAKES_BLOCKS:  # transformers would compile the making of its own block mask
            seen: Any = self._in_form(self._slots.prompt(), self._ids.shape[1])
        else:
            seen = None if bool(mask.all()) else mask.long()
        return self._call(self._ids, attention_mask=seen, position_ids=positions, **self._rest)[:, -1:]

    def feed(self, tokens: Tensor, places: Sequence[int]) -> Tensor:
        """Feed tokens that see every slot up to their own place, and one another.

        Args:
            tokens: int64 ``(B, Q)``; half of the prompts' rows where those are doubled.
            places: Q places behind the prompt, in raster order; the first is 0.

        Returns:
            Logits ``(B, Q, V)`` for each prompt.
        """
        rows, length = self._ids.shape
        dead = 0 if self._width is None else self._width - len(places)
        seen = self._slots.add([length + place for place in places], dead)
        mask = self._in_form(seen, len(places) + dead)
        positions = self._lengths + torch.tensor([*places, *[0] * dead], device=tokens.device)
        ids = F.pad(tokens.repeat(rows // len(tokens), 1), (0, dead))
        return self._call(ids, attention_mask=mask, position_ids=positions)[:, : len(places)]

    @property
    def next_slot(self) -> int:
        """The slot that the next token gets."""
        return self._slots.used

    def hide(self, slots: Sequence[int]) -> None:
        """Let nobody see these slots from now on."""
        for slot in slots:
            self._slots.hide(slot)

    def _in_form(self, seen: MaskMod, queries: int) -> Tensor | BlockMask:
        rows, keys, device = len(self._ids), self._slots.keys, self._ids.device
        return in_form(self._attention, seen, rows, queries, keys, device, self._model.dtype)

    def _call(self, ids: Tensor, **arguments: Any) -> Tensor:
        self.forwards += 1
        cache = as_cache_argument(self._model.forward, self.cache)
        logits: Tensor = self._model(input_ids=ids, use_cache=True, return_dict=True, **cache, **arguments).logits
        return logits
