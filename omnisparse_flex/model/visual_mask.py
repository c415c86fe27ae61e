"""Which tokens of a call are visual, and how the decoder is told."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.model.cache_argument import cache_in
from omnisparse_flex.model.cache_history import HISTORY, history_of
from omnisparse_flex.model.compiled_module import APART, CompiledDecoder, VisualMask, check_visual
from omnisparse_flex.model.hf import register
from omnisparse_flex.model.wrappers import refuse_replica

#: Where model configs keep the ids of visual placeholder tokens.
VISUAL_TOKEN_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index", "image_patch_id")
#: Said once where a model with visual tokens gets embeddings alone.
UNKNOWN = (
    "a call had inputs_embeds without input_ids: which of its tokens are visual is unknown, and each may be dropped "
    "(give apply_omnisparse a visual_mask)"
)


class VisualMaskHook:
    """A forward pre-hook that tells the decoder which tokens are visual.

    It sits on the innermost module that still receives ``input_ids`` and keeps the history
    on the cache, so that decoding and later turns see the whole conversation.
    """

    def __init__(self, model: Any, receiver: nn.Module, entry: CompiledDecoder, given: Any) -> None:
        """Prepare the hook.

        Args:
            model: Its config names the visual token ids.
            receiver: The hooked module.
            entry: Where the mask goes.
            given: The user's mask, bool (B, N), a callable ``(args, kwargs) -> mask``, or None.
        """
        self.token_ids = sorted(_visual_ids(model.config))
        self.forward = type(receiver).forward
        self.signature = inspect.signature(receiver.forward)
        self.entry: CompiledDecoder | None = entry
        self.given = given
        self.apart = torch._dynamo.disable(self.note, reason=APART)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has no entry: its hook does nothing, and drags no compiled graph along."""
        return inert_hook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the mask of this call in the entry's state."""
        if self.entry is None:
            return
        if torch.compiler.is_dynamo_compiling():  # the user's own: what Dynamo traced would not reach the entry
            self.apart(module, args, kwargs)
        else:
            self.note(module, args, kwargs)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the mask, in eager code."""
        assert self.entry is not None
        refuse_replica(module)
        # The first step of a call: what is there yet is left of one that an exception ended before the decoder.
        getattr(cache_in(module.forward, kwargs), "omnisparse_later", []).clear()
        self.entry.prepare(kwargs, functools.partial(self.tell, self.entry, args, kwargs))

    def tell(self, entry: CompiledDecoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the entry the mask of a call with these arguments."""
        entry.state.visual = self.of_call(args, kwargs)

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """``visual`` from arguments alone."""
        named = {**self.signature.bind_partial(*args, **kwargs).arguments}
        named.update(named.pop("kwargs", {}))
        mask = self.visual(args, kwargs, named)
        if mask is None and self.token_ids and self.given is None and self.entry is not None:
            self.entry.note_once(UNKNOWN)
        return mask

    def visual(self, args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]) -> Tensor | None:
        """The mask over all keys of this call, bool (B, S), or None: every token is eligible."""
        tokens = self._own(args, kwargs, named)
        cache = cache_in(self.forward, named)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if tokens is None and (past == 0 or getattr(cache, HISTORY, None) is None):
            return None
        if tokens is None:
            size = _size_of(named)
            assert size is not None
            tokens = torch.zeros(size, dtype=torch.bool, device=_device_of(named))
        if cache is not None:
            history = history_of(cache, past, tokens)
            tokens = torch.cat([history, tokens], dim=1)
            setattr(cache, HISTORY, tokens)
        torch._dynamo.maybe_mark_dynamic(tokens, 1)
        return tokens

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]) -> Tensor | None:
        """Visual tokens among this call's inputs."""
        size = _size_of(named)
        if self.given is not None:
            mask = self.given(args, kwargs) if callable(self.given) else self.given
            if size is None or (not callable(self.given) and size[1] == 1):
                return None  # a fixed mask says nothing about a decoded token
            return check_visual(mask, *size)
        ids = named.get("input_ids")
        if ids is not None and self.token_ids:
            # Numbers, not a tensor of them: that would be copied to the device, and waited for, with every token.
            visual: Tensor = functools.reduce(torch.logical_or, [ids == token for token in self.token_ids])
            return visual
        kinds = named.get("mm_token_type_ids")
        if kinds is not None and size is not None and tuple(kinds.shape) == size:
            return kinds > 0  # type: ignore[no-any-return]
        return None


def _visual_ids(config: Any) -> set[int]:
    """Token ids of visual placeholders that a config or one of its parts names."""
    ids = (getattr(config, field, None) for field in VISUAL_TOKEN_FIELDS)
    found = {token for token in ids if isinstance(token, int)}
    for part in vars(config).values():
        if hasattr(part, "get_text_config"):  # a config too
            found |= _visual_ids(part)
    return found


def _size_of(named: dict[str, Any]) -> tuple[int, int] | None:
    for name in ("input_ids", "inputs_embeds"):
        if named.get(name) is not None:
            return named[name].shape[0], named[name].shape[1]
    return None


def _device_of(named: dict[str, Any]) -> torch.device:
    source = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    device: torch.device = source.device
    return device


def inert_hook() -> VisualMaskHook:
    """What a copy has in place of its original's hook; its config may name us in a process that does not know us."""
    register()
    twin = object.__new__(VisualMaskHook)
    twin.entry = None
    return twin


def receiver_of(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The innermost module around ``decoder`` that receives ``input_ids``; None: the decoder itself."""
    for name, module in model.named_modules():
        if module is decoder:
            return model.get_submodule(name.rpartition(".")[0]) if name else None
    raise ConfigError(f"model must contain its decoder, got {type(decoder).__name__} elsewhere")


def as_entry_mask(hook: VisualMaskHook) -> VisualMask:
    """The hook's rule in the form the entry itself calls, for a decoder that receives ``input_ids``."""
    return hook.of_call
