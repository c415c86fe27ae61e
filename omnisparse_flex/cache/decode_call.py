"""One call of a decoder with an ``OmniSparseCache``: what comes before it, what runs, and what comes after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from omnisparse_flex.errors import ConfigError, require

if TYPE_CHECKING:
    from omnisparse_flex.model.compiled_module import CompiledDecoder


class DecodeCall:
    """A prefill, a later turn or a decode step, from the cache's check of it to the cache's new length."""

    def __init__(self, decoder: CompiledDecoder, cache: Any, kwargs: dict[str, Any]) -> None:
        """Check the call.

        Args:
            decoder: The decoder.
            cache: The ``OmniSparseCache``.
            kwargs: The decoder's keyword arguments.

        Raises:
            ConfigError: On a call that the cache cannot serve.
        """
        self.decoder, self.cache, self.store = decoder, cache, cache.store
        is_ours = decoder.module is cache.decoder()
        require(is_ours, "cache", "be used with the model it was made for", type(decoder.module).__name__)
        tokens = tokens_of(kwargs)
        if not isinstance(tokens, Tensor):
            raise ConfigError(f"input_ids or inputs_embeds must be a tensor, got {type(tokens).__name__}")
        busy = cache.mode is not None or decoder.owner.cache is not None
        require(not busy, "model", "run one call with a cache at a time", "a call in progress (in another thread?)")
        self.tokens: Tensor = tokens

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder, or replay a recorded step of it; returns its result."""
        cache, store, owner = self.cache, self.store, self.decoder.owner
        store.begin(self.tokens, kwargs.get("attention_mask"), cache._omnisparse_visual)
        cache.mode, cache.owner, owner.cache = store.mode, owner.number, store
        try:
            # A keyword argument of ours reaches every layer's attention.
            result = self._run_or_replay(args, {**kwargs, "omnisparse_cache": cache})
        except BaseException:
            store.broken = True
            raise
        finally:
            cache.mode = store.mode = owner.cache = None
        store.end(self.tokens.shape[1])
        cache.set_length()
        return result

    def _run_or_replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        store, replay = self.store, self.cache.replay
        if store.is_step and not store.tokens.padded and isinstance(kwargs.get("position_ids"), Tensor):
            # ``store.tokens.marks`` holds its zeros. Without the mask, the decode graph does not depend on the length.
            kwargs.update({"attention_mask": None} if "attention_mask" in kwargs else {})
        if replay is None:
            return self.decoder.run(args, kwargs)
        return replay.run(self.decoder, self.cache, args, kwargs)


def tokens_of(kwargs: dict[str, Any]) -> Any:
    """The call's embeddings or input ids."""
    embeddings = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeddings is None else embeddings
