"""The layers of a slim cache, and how one call of the decoder uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.cache.cached_tokens import CachedTokens
from omnisparse_flex.cache.choose_keys import PATTERN_QUERIES, Chooser, Plan
from omnisparse_flex.cache.host_memory import Copies
from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.errors import ConfigError, require

#: Decoded tokens after which a layer reads its pattern anew. Our choice: rare enough that the
#: copies cost less than the tokens between them.
REFRESH = 512
#: How a call uses the cache: first prompt, later prompt over everything, new tokens over what is kept.
PREFILL, TURN, DECODE = "prefill", "turn", "decode"


class SlimStore:
    """All layers of a cache; ``cache_ops.Calls`` while a call is in progress.

    Attributes:
        layers: One ``SlimLayer`` per decoder layer.
        chooser: Splits the heads of a layer.
        tokens: Which tokens exist, and which may be dropped.
        mode: How the call in progress uses the cache, None between calls.
        is_assisted: Assisted decoding runs: several tokens after a crop are a draft.
        cropped: The last change of the cache was a ``crop``.
        is_step: The call in progress decodes one token.
        captured_queries: Each layer's queries in the step that is being recorded, None outside of a recording.
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
        self.tokens = CachedTokens(self.sinks, self.window)
        self.mode: str | None = None
        self.broken = self.is_assisted = self.cropped = self.is_step = False
        self.copies: Copies | None = None
        self.plan: Plan | None = None
        self.captured_queries: dict[int, Tensor] | None = None
        self.ahead = False

    @property
    def length(self) -> int:
        """Tokens in the cache, dropped ones included."""
        return self.tokens.length

    @property
    def batch(self) -> int:
        """Rows of the batch, -1 while empty."""
        return self.tokens.batch

    @property
    def device(self) -> torch.device | None:
        """Where the layers lie; None while empty."""
        return self.tokens.device

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
            self.tokens.batch, self.tokens.device = batch, tokens.device
            self.copies = Copies(tokens.device) if self.offload else None
        mode = self._mode(count)
        if mode != DECODE:
            self.plan = self.tokens.plan_turn(count, attention_mask, visual)
        elif not self.tokens.padded:
            self.tokens.mark(count, attention_mask)
        self.mode, self.is_step = mode, mode == DECODE and count == 1

    def end(self, added: int) -> None:
        """Finish a call that added tokens.

        Raises:
            ConfigError: If attention did not go through the cache in every layer.
        """
        if self.plan is not None and self.copies is not None:
            self.copies.drain()  # copies in progress hold device memory
        self.mode, self.plan, self.cropped = None, None, False
        self.tokens.length += added
        lengths = {layer.length for layer in self.layers}
        if lengths != {self.length}:
            self.broken = True
            raise ConfigError(
                "model must pass keyword arguments on to its attention, got layers that never reached the cache"
            )

    def _mode(self, count: int) -> str:
        if self.length == 0:
            return PREFILL
        draft = self.is_assisted and self.cropped
        return DECODE if count == 1 or draft or self.lossy else TURN

    def store_layer(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> None:
        """Slim one layer; see ``SlimLayer.store``."""
        assert self.plan is not None
        pattern = self.plan.queries[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        first, slim = key.shape[2] - query.shape[2], self.layers[layer]
        slim.store(
            query.gather(2, pattern), key, value, self.plan, scale,
            first=first, chooser=self.chooser, copies=self.copies,
        )  # fmt: skip
        # Each layer reads its pattern anew at another token, so that no token pays for all layers.
        slim.limit = REFRESH - layer % REFRESH

    def restore_layer(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Full keys and values, those of the call included; the next layer's copies start."""
        slim, count = self.layers[layer], key.shape[2]
        past = slim.length
        full_key, full_value = slim.restore(past + count, key, value, self.copies)
        full_key[:, :, past:], full_value[:, :, past:] = key, value
        if layer + 1 < len(self.layers) and self.layers[layer + 1].host.spans:
            self.layers[layer + 1].host.fetch(past + count, key, value, self.copies)
        return full_key, full_value

    def attend_layer(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, layer: int, scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Add the call's keys and values to a layer, and attend over all it keeps."""
        slim = self.layers[layer]
        if self.ahead:  # the replayed token is void: this call decodes another one in its place
            self.ahead = False
            for each in self.layers:
                each.counter = None
        if slim.tail >= slim.limit:
            self._refresh(slim, key, value, scale)
        if self.captured_queries is not None:
            if not slim.lossy and self.tokens.has_droppable:
                self.captured_queries[layer] = query.clone()
        elif slim.tail > slim.limit - PATTERN_QUERIES:  # the next refresh reads the pattern from these queries
            slim.queries.extend(query[:, :, i : i + 1].clone() for i in range(query.shape[2]))
        return slim.attend(query, key, value, self.tokens.marks if padding is None else padding, scale, sinks)

    @property
    def changes(self) -> bool:
        """Whether the next token makes a layer read its pattern anew, or grow."""
        for layer in self.layers:  # noqa: SIM110 (a generator takes twice as long, before every token)
            if layer.tail >= layer.limit or layer.is_full:
                return True
        return False

    def replayed(self, queries: dict[int, Tensor]) -> None:
        """Update the layers after the replay of one recorded step.

        Args:
            queries: The queries of this step, (B, Hq, 1, D), by layer; layers that no refresh asks may be missing.
        """
        self.ahead = False
        for layer in self.layers:
            if layer.tail > layer.limit - PATTERN_QUERIES and layer.index in queries:
                layer.queries.append(queries[layer.index].clone())
            layer.tail += 1

    def _refresh(self, layer: SlimLayer, key: Tensor, value: Tensor, scale: float) -> None:
        """Move the layer's tail into its kept keys, and choose anew by the latest queries."""
        layer.limit = layer.tail + REFRESH
        if layer.lossy or not self.tokens.has_droppable or not layer.queries:
            return
        full_key, full_value = layer.restore(layer.length, key, value, self.copies)
        recent = torch.cat(list(layer.queries), 2)[:, :, -PATTERN_QUERIES:]
        plan = self.tokens.plan_refresh(layer.length, recent.shape[2])
        first = layer.length - recent.shape[2]
        layer.store(recent, full_key, full_value, plan, scale, first=first, chooser=self.chooser, copies=self.copies)
        layer.limit = layer.room = REFRESH  # in a long answer, the new tail gets room up to the next refresh

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        for layer in self.layers:
            layer.crop(length)
        self.tokens.crop(length)

    def select(self, rows: Tensor) -> None:
        """Make the batch consist of ``rows``, int64 (B',)."""
        rows = rows.to(self.device)
        listed = [int(row) for row in rows.tolist()]
        for layer in self.layers:
            layer.select(rows, listed)
        self.tokens.select(rows)
