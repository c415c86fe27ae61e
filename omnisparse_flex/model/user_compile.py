"""A changed model, or a part of it, that its user compiles too."""

from __future__ import annotations

from typing import Any

from torch import nn

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.model.compiled_module import CompiledDecoder
from omnisparse_flex.model.switches import warn_if_not_applied, warn_once

#: Said once to who compiles the changed module itself.
REPLACED = "module.compile() took the place of OmniSparse: attention is dense (remove, compile the whole model instead)"


def refuse_compiled(model: nn.Module) -> None:
    """Refuse models that the user compiled: their graph would swallow ours.

    Raises:
        ConfigError: If ``model`` or a part of it is compiled by somebody else.
    """
    if hasattr(model, "_orig_mod"):
        raise ConfigError(f"model must not be compiled yet, got {type(model).__name__}: apply before torch.compile")
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl
        if (compiled is not None and not isinstance(compiled, CompiledDecoder)) or hasattr(module, "_orig_mod"):
            raise ConfigError(f"model must not be compiled yet, got a compiled part {name or 'model'!r}")


def own_call(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of every changed module, without effect but three.

    Dynamo calls a module without hooks by its ``forward`` and never sees the entry. Who compiles the module itself,
    by ``module.compile()``, is told that this takes the entry's place. And so is who runs a copy of a plain module:
    a transformers model's attention function tells it itself.
    """
    if _is_replaced(module):
        warn_once(getattr(module, "config", module), REPLACED)
    elif module._compiled_call_impl is None and not hasattr(module, "config"):
        warn_if_not_applied(module)


def was_replaced(model: nn.Module) -> bool:
    """Whether a part of a changed model was compiled by its own ``compile()`` afterwards."""
    return any(own_call in module._forward_pre_hooks.values() and _is_replaced(module) for module in model.modules())


def _is_replaced(module: nn.Module) -> bool:
    compiled = module._compiled_call_impl
    compiled = getattr(compiled, "__wrapped__", compiled)  # what only watches the call stands in front of it
    return compiled is not None and not isinstance(compiled, CompiledDecoder)
