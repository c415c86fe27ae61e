"""The layers of a slim cache, and how one call of the decoder uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.cache.choose_keys import PATTERN_QUERIES, Chooser, Plan, droppable_tokens, make_plan
from omnisparse_flex.cache.host_memory import Copies
from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.errors import ConfigError, require

#: Decoded tokens after which a layer reads its pattern anew. Our choice: rare enough that the
#: copies cost less than the tokens between them.
REFRESH = 512
#: Tokens by which the memory for the marks of masked tokens grows.
MARKS = 4096
#: How a call uses the cache: first prompt, later prompt over everything, new tokens over what is kept.
PREFILL, TURN, DECODE = "prefill", "turn", "decode"


class SlimStore:
    """All layers of a cache; ``cache_ops.Calls`` while a call is in progress.

    Attributes:
        layers: One ``SlimLayer`` per decoder layer.
        chooser: Splits the heads of a layer.
        mode: How the call in progress uses the cache, None between calls.
        recording: Assisted decoding runs: several tokens after a crop are a draft.
        cropped: ``crop`` was the last thing that happened.
        is_step: The call in progress decodes one token.
        padded: The mask forbids a token of the last turn, or of a later call of several tokens.
        marks: bool (B, room), which tokens exist, by position; None: all. Of caches that are not ``padded``.
        recorded: Each layer's queries in the step that is being recorded, or None: none is.
        ahead: The device has decoded a token that the layers do not count yet.
    """

    def __init__(self, layers: list[SlimLayer], chooser: Chooser, offload: bool, sinks: int, window: int) -> None:
        """Start empty.

        Args:
            layers: The layers.
            chooser: Splits the heads of a layer.
            offload: Keep droppable keys on the host.
            sinks: First tokens that are always kept.
            window: Latest tokens that are always kept.
        """
        self.layers, self.chooser, self.offload = layers, chooser, offload
        self.sinks, self.window = sinks, window
        self.clear()

    def clear(self) -> None:
        """Forget everything and free it."""
        for layer in self.layers:
            layer.clear()
        self.mode: str | None = None
        self.broken = self.recording = self.cropped = self.is_step = False
        self.length, self.batch = 0, -1
        self.device: torch.device | None = None
        self.copies: Copies | None = None
        self.plan: Plan | None = None
        self.real = self.droppable = self.hosted = None  # bool (B, length of the last turn)
        self.has_droppable = self.padded = False
        self.marks: Tensor | None = None
        self.recorded: dict[int, Tensor] | None = None
        self.ahead = False

    real: Tensor | None
    droppable: Tensor | None
    hosted: Tensor | None

    @property
    def lossy(self) -> bool:
        """Whether something was dropped for good."""
        return any(layer.lossy for layer in self.layers)

    def begin(self, tokens: Tensor, attention_mask: Any, visual: Tensor | None) -> None:
        """Prepare a call.

        Args:
            tokens: The call's input ids or embeddings, (B, L, ...).
            attention_mask: As the decoder received it.
            visual: bool (B, length with the call), or None if nobody knows.

        Raises:
            ConfigError: On a call that the cache cannot serve.
        """
        require(not self.broken, "cache", "be reset after a call that failed", "a half-written cache")
        require(not torch.is_grad_enabled(), "cache", "be used without gradients (torch.no_grad)", "gradients enabled")
        batch, count = int(tokens.shape[0]), int(tokens.shape[1])
        rule = "be None or of two dimensions with OmniSparseCache"
        plain = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
        require(plain, "attention_mask", rule, type(attention_mask).__name__)
        if self.length:
            if batch != self.batch or tokens.device != self.device:  # the texts take longer than the comparison
                require(batch == self.batch, "batch size", f"be the cache's {self.batch}", batch)
                require(False, "device", f"be the cache's {self.device}", tokens.device)
        else:
            self.batch, self.device = batch, tokens.device
            self.copies = Copies(tokens.device) if self.offload else None
        mode = self._mode(count)
        if mode != DECODE:
            self._plan(count, attention_mask, visual)
        elif not self.padded:
            self._mark(count, attention_mask)
        self.mode, self.is_step = mode, mode == DECODE and count == 1

    def end(self, added: int) -> None:
        """Finish a call that added tokens.

        Raises:
            ConfigError: If attention did not go through the cache in every layer.
        """
        if self.plan is not None and self.copies is not None:
            self.copies.drain()  # what is under way holds device memory
        self.mode, self.plan, self.cropped = None, None, False
        self.length += added
        lengths = {layer.length for layer in self.layers}
        if lengths != {self.length}:
            self.broken = True
            raise ConfigError(
                "model must pass keyword arguments on to its attention, got layers that never reached the cache"
            )

    def _mode(self, count: int) -> str:
        if self.length == 0:
            return PREFILL
        draft = self.recording and self.cropped
        return DECODE if count == 1 or draft or self.lossy else TURN

    def _mark(self, count: int, attention_mask: Tensor | None) -> None:
        """Note which of the new tokens exist; a single one is noted on the device, without a wait for it."""
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
        # What inference mode made cannot be written outside of it.
        sealed = self.marks is not None and self.marks.is_inference() and not torch.is_inference_mode_enabled()
        if self.marks is None or self.marks.shape[1] < stop or sealed:
            grown = torch.ones(self.batch, stop + MARKS, dtype=torch.bool, device=self.device)
            if self.marks is not None:
                grown[:, : self.length] = self.marks[:, : self.length]
            self.marks = grown
        self.marks[:, self.length : stop] = True if new is None else new

    def _plan(self, count: int, attention_mask: Tensor | None, visual: Tensor | None) -> None:
        """Sort the tokens of the whole conversation into kept and droppable ones."""
        if visual is None:
            raise ConfigError("visual_mask must be given to apply_omnisparse for a slim cache, got none for this model")
        length = self.length + count
        require(visual.shape[1] == length, "visual_mask", f"cover {length} tokens", tuple(visual.shape))
        real = self._real_tokens(length, attention_mask)
        visual = visual.to(real.device)
        text = real & ~visual
        droppable = droppable_tokens(visual, real, self.sinks, self.window)
        if self.droppable is not None:  # what the host has stays droppable, whatever is recent now
            known = self.droppable.shape[1]
            droppable[:, :known] |= self.droppable
        hosted = torch.zeros_like(droppable)
        if self.hosted is not None:
            hosted[:, : self.hosted.shape[1]] = self.hosted
        if not bool(text[:, -1].any()):
            # No question yet: a prompt in chunks, or one that ends in its video.
            droppable &= hosted
        self.plan = make_plan(droppable, hosted, real, text[:, self.length :], self.length)
        self.real, self.droppable, self.hosted = real, droppable, droppable.clone()
        self.has_droppable = self.plan.drop.shape[1] > 0
        self.padded, self.marks = not bool(real.all()), None

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

    def store_layer(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> None:
        """Slim one layer; see ``SlimLayer.store``."""
        assert self.plan is not None
        chosen = self.plan.queries[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        first, own = key.shape[2] - query.shape[2], self.layers[layer]
        own.store(
            query.gather(2, chosen), key, value, self.plan, scale,
            first=first, chooser=self.chooser, copies=self.copies,
        )  # fmt: skip
        # Layers read their pattern anew at one token each: none pays for all, and then it is quiet for long.
        own.limit = REFRESH - layer % REFRESH

    def restore_layer(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Full keys and values, those of the call included; the next layer's copies start."""
        own, count = self.layers[layer], key.shape[2]
        past = own.length
        full_key, full_value = own.restore(past + count, key, value, self.copies)
        full_key[:, :, past:], full_value[:, :, past:] = key, value
        if layer + 1 < len(self.layers) and self.layers[layer + 1].host:
            self.layers[layer + 1].fetch(past + count, key, value, self.copies)
        return full_key, full_value

    def attend_layer(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, layer: int, scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Add the call's keys and values to a layer, and attend over all it keeps."""
        own = self.layers[layer]
        if self.ahead:  # that token is void: this call decodes another one in its place
            self.ahead = False
            for other in self.layers:
                other.counter = None
        if own.tail >= own.limit:
            self._refresh(own, key, value, scale)
        if self.recorded is not None:
            if not own.lossy and self.has_droppable:
                self.recorded[layer] = query.clone()
        elif own.tail > own.limit - PATTERN_QUERIES:  # those that the next reading will ask
            own.queries.extend(query[:, :, i : i + 1].clone() for i in range(query.shape[2]))
        return own.attend(query, key, value, self.marks if padding is None else padding, scale, sinks)

    @property
    def changes(self) -> bool:
        """Whether the next token makes a layer read its pattern anew, or grow."""
        for own in self.layers:  # noqa: SIM110 (a generator takes twice as long, before every token)
            if own.tail >= own.limit or own.is_full:
                return True
        return False

    def replayed(self, queries: dict[int, Tensor]) -> None:
        """Note what a replay of one recorded step did on the device.

        Args:
            queries: The layers' queries of this step, (B, Hq, 1, D), by layer; what a refresh will not ask may lack.
        """
        self.ahead = False
        for own in self.layers:
            if own.tail > own.limit - PATTERN_QUERIES and own.index in queries:
                own.queries.append(queries[own.index].clone())
            own.tail += 1

    def _refresh(self, own: SlimLayer, key: Tensor, value: Tensor, scale: float) -> None:
        """Move the tail into the rectangles, and choose anew by what the latest tokens look at."""
        own.limit = own.tail + REFRESH
        if own.lossy or not self.has_droppable or not own.queries:
            return
        assert self.droppable is not None and self.real is not None
        full_key, full_value = own.restore(own.length, key, value, self.copies)
        since = own.length - self.droppable.shape[1]
        droppable = torch.nn.functional.pad(self.droppable, (0, since))
        real = torch.nn.functional.pad(self.real, (0, since), value=True)
        recent = torch.cat(list(own.queries), 2)[:, :, -PATTERN_QUERIES:]
        first = own.length - recent.shape[2]
        plan = make_plan(droppable, droppable, real, real[:, first:], first)
        own.store(recent, full_key, full_value, plan, scale, first=first, chooser=self.chooser, copies=self.copies)
        own.limit = own.room = REFRESH  # a long answer: room for all of the tail that comes now

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        for layer in self.layers:
            layer.crop(length)
        self.length = length
        self.real, self.droppable, self.hosted = (
            None if x is None else x[:, :length].clone() for x in (self.real, self.droppable, self.hosted)
        )

    def select(self, rows: Tensor) -> None:
        """Make the batch consist of ``rows``, int64 (B',)."""
        rows = rows.to(self.device)
        listed = [int(row) for row in rows.tolist()]
        for layer in self.layers:
            layer.select(rows, listed)
        self.batch = len(listed)
        self.marks = None if self.marks is None else self.marks[rows]
        self.real, self.droppable, self.hosted = (
            None if x is None else x[rows] for x in (self.real, self.droppable, self.hosted)
        )
