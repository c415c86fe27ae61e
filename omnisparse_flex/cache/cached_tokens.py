"""What is known about each token of a cache: whether it exists, may be dropped, and lies on the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.cache.choose_keys import Plan, droppable_tokens, make_plan
from omnisparse_flex.errors import ConfigError, require

#: Tokens by which the memory of ``CachedTokens.marks`` grows.
MARKS = 4096


class CachedTokens:
    """The tokens of a conversation, by position.

    Attributes:
        length: Tokens in the cache.
        batch: Rows of the batch, -1 while empty.
        device: Where the layers lie; None while empty.
        real: bool (B, length of the last turn), tokens that are no padding; None while empty.
        droppable: bool (B, length of the last turn), tokens whose keys a head may drop.
        hosted: bool (B, length of the last turn), tokens whose keys the host holds.
        has_droppable: Whether ``droppable`` holds any True.
        padded: The mask forbids a token of the last turn, or of a later call of several tokens.
        marks: bool (B, room), tokens that exist; None: all. Only kept while the cache is not ``padded``.
    """

    real: Tensor | None
    droppable: Tensor | None
    hosted: Tensor | None

    def __init__(self, sinks: int, window: int) -> None:
        """Start empty.

        Args:
            sinks: First tokens that are never droppable.
            window: Latest tokens that are never droppable.
        """
        self.sinks, self.window = sinks, window
        self.length, self.batch = 0, -1
        self.device: torch.device | None = None
        self.real = self.droppable = self.hosted = None
        self.has_droppable = self.padded = False
        self.marks: Tensor | None = None

    def mark(self, count: int, attention_mask: Tensor | None) -> None:
        """Store which of ``count`` new tokens exist; a single token is stored on the device, without a wait."""
        if attention_mask is None and self.marks is None:
            return
        stop = self.length + count
        new = None
        if attention_mask is not None:
            require(attention_mask.shape[1] >= stop, "attention_mask", f"cover {stop} tokens", attention_mask.shape)
            new = attention_mask[:, self.length : stop]
        if count > 1 and new is not None and not bool(new.all()):
            self.padded, self.marks = True, None
            return
        marks = self._writable_marks(stop)
        marks[:, self.length : stop] = True if new is None else new
        self.marks = marks

    def _writable_marks(self, stop: int) -> Tensor:
        """``marks`` with room for ``stop`` tokens."""
        # A tensor that was made in inference mode cannot be written outside of it.
        sealed = self.marks is not None and self.marks.is_inference() and not torch.is_inference_mode_enabled()
        if self.marks is not None and self.marks.shape[1] >= stop and not sealed:
            return self.marks
        grown = torch.ones(self.batch, stop + MARKS, dtype=torch.bool, device=self.device)
        if self.marks is not None:
            grown[:, : self.length] = self.marks[:, : self.length]
        return grown

    def plan_turn(self, count: int, attention_mask: Tensor | None, visual: Tensor | None) -> Plan:
        """Sort the tokens of the whole conversation into kept and droppable ones.

        Args:
            count: Tokens of the new turn.
            attention_mask: bool or int (B, at least length + count), or None: all tokens exist.
            visual: bool (B, length + count).

        Raises:
            ConfigError: If a mask is missing, too short, or differs for tokens that the cache holds.
        """
        if visual is None:
            raise ConfigError("visual_mask must be given to apply_omnisparse for a slim cache, got none for this model")
        length = self.length + count
        require(visual.shape[1] == length, "visual_mask", f"cover {length} tokens", tuple(visual.shape))
        real = self._real_tokens(length, attention_mask)
        visual = visual.to(real.device)
        text = real & ~visual
        droppable = droppable_tokens(visual, real, self.sinks, self.window)
        if self.droppable is not None:  # tokens on the host stay droppable, also those that are recent now
            known = self.droppable.shape[1]
            droppable[:, :known] |= self.droppable
        hosted = torch.zeros_like(droppable)
        if self.hosted is not None:
            hosted[:, : self.hosted.shape[1]] = self.hosted
        if not bool(text[:, -1].any()):
            # No question yet: a prompt in chunks, or one that ends in its video.
            droppable &= hosted
        plan = make_plan(droppable, hosted, real, text[:, self.length :], self.length)
        self.real, self.droppable, self.hosted = real, droppable, droppable.clone()
        self.has_droppable = plan.drop.shape[1] > 0
        self.padded, self.marks = not bool(real.all()), None
        return plan

    def _real_tokens(self, length: int, attention_mask: Tensor | None) -> Tensor:
        assert self.device is not None
        real = torch.ones(self.batch, length, dtype=torch.bool, device=self.device)
        if attention_mask is not None:
            require(attention_mask.shape[1] >= length, "attention_mask", f"cover {length} tokens", attention_mask.shape)
            real = attention_mask[:, :length].to(self.device, torch.bool)
        if self.real is not None:
            known = self.real.shape[1]
            same = bool((real[:, :known] == self.real).all())
            require(same, "attention_mask", "stay the same for tokens in the cache", "another one")
        return real

    def plan_refresh(self, length: int, queries: int) -> Plan:
        """The plan of a layer of ``length`` tokens whose latest ``queries`` show the pattern; decoded tokens stay."""
        assert self.droppable is not None and self.real is not None
        decoded = length - self.droppable.shape[1]
        droppable = F.pad(self.droppable, (0, decoded))
        real = F.pad(self.real, (0, decoded), value=True)
        first = length - queries
        return make_plan(droppable, droppable, real, real[:, first:], first)

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        self.length = length
        self.real, self.droppable, self.hosted = (
            None if x is None else x[:, :length].clone() for x in (self.real, self.droppable, self.hosted)
        )

    def select(self, rows: Tensor) -> None:
        """Make the batch consist of ``rows``, int64 (B',) on the device."""
        self.batch = len(rows)
        self.marks = None if self.marks is None else self.marks[rows]
        self.real, self.droppable, self.hosted = (
            None if x is None else x[rows] for x in (self.real, self.droppable, self.hosted)
        )
