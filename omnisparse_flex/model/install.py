"""What ``apply_omnisparse`` changes in a transformers model, and how it is taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from omnisparse_flex.model.compiled_module import CompiledDecoder
from omnisparse_flex.model.hf import attention_configs, register
from omnisparse_flex.model.switches import NAME
from omnisparse_flex.model.user_compile import own_call
from omnisparse_flex.model.visual_mask import VisualMaskHook, as_entry_mask, inert_hook, receiver_of

#: Said once of a model that sees, whose config names no visual tokens.
NO_IDS = (
    "the config names no image or video token id, so every token may be dropped, text as well: "
    "give apply_omnisparse a visual_mask"
)
VisualMaskArgument = Tensor | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None] | None


@dataclasses.dataclass(eq=False)
class Undo:
    """How to take ``apply_omnisparse`` back."""

    names: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    hooks: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self) -> None:
        """Take it back."""
        for config, name in self.names:
            if config._attn_implementation_internal == NAME:  # or else the user has set another since
                config._attn_implementation_internal = name
        for hook in self.hooks:
            hook.remove()


def install_in_transformers(
    model: Any, decoder: nn.Module, entry: CompiledDecoder, undo: Undo, visual_mask: VisualMaskArgument
) -> None:
    """Let a transformers model's decoder attend through us, and tell it which tokens are visual.

    Args:
        model: The model.
        decoder: Its text decoder.
        entry: What runs the decoder.
        undo: Filled with how to take it back.
        visual_mask: As in ``apply_omnisparse``.
    """
    register()
    entry.configs = attention_configs(decoder)
    for config in entry.configs:
        name = config._attn_implementation_internal
        undo.names.append((config, "sdpa" if name == NAME else name))
        config._attn_implementation_internal = NAME
    receiver = receiver_of(model, decoder)
    hook = VisualMaskHook(model, decoder if receiver is None else receiver, entry, visual_mask)
    for module in model.modules():
        _drop_stale_hooks(module)
    if receiver is None:
        entry.visual_mask = as_entry_mask(hook)
        # Without effect but one: a pickled decoder brings our attention's name along.
        undo.hooks.append(decoder.register_forward_pre_hook(inert_hook(), with_kwargs=True))
    else:
        undo.hooks.append(receiver.register_forward_pre_hook(hook, with_kwargs=True))
        # Who calls the receiver's ``forward`` (PEFT does), or the decoder itself, passes the hook by.
        entry.otherwise = as_entry_mask(VisualMaskHook(model, decoder, entry, visual_mask))
    if not hook.token_ids and visual_mask is None:
        if hasattr(model.config, "vision_config"):
            entry.note_once(NO_IDS)
        else:
            entry.backend.log.notes["no visual tokens known: every token is eligible for selection"] = None


def _drop_stale_hooks(module: nn.Module) -> None:
    """A deep copy keeps our hook but not our entry."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, VisualMaskHook) or hook is own_call:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
