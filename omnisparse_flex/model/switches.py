"""What switches a changed model off, or asks it for what sparse attention cannot give: said, never silent."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from omnisparse_flex.errors import ConfigError

#: The attention implementation's name inside transformers.
NAME = "omnisparse"
#: Set to a non-empty value other than 0, every model runs densely, without code changes.
DISABLE_VARIABLE = "OMNISPARSE_DISABLE"
#: Said once for each model whose config names us and that nobody applied us to.
NOT_APPLIED = (
    "attention is dense: the model is a copy of a changed one, or its config names the attention "
    "'omnisparse' (from_pretrained's attn_implementation, another model's config), but apply_omnisparse did not "
    "change it; call apply_omnisparse(model)"
)


class _Calls(threading.local):
    """How many calls are in progress in this thread whose attention is a changed model's, or dense on purpose."""

    depth = 0


_calls = _Calls()
_told: dict[int, weakref.ref[Any]] = {}


def is_disabled() -> bool:
    """Whether ``OMNISPARSE_DISABLE`` asks for dense attention everywhere."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


@contextlib.contextmanager
def expected_call() -> Iterator[None]:
    """Around a call of a changed model, or of what shall run densely: no warning that attention is dense."""
    _calls.depth += 1
    try:
        yield
    finally:
        _calls.depth -= 1


def warn_if_not_applied(config: Any) -> None:
    """Say once that a model's attention is ours by name alone.

    Args:
        config: What the attention module reads its attention's name from.
    """
    if not _is_expected():
        warn_once(config, NOT_APPLIED)


def warn_once(config: Any, text: str) -> bool:
    """Say of a model why it is dense, if nothing was said of it yet.

    Dynamo runs this while it traces: who compiles such a model is told as well.

    Args:
        config: The model's.
        text: The reason.

    Returns:
        True, for Dynamo.
    """
    if _told.get(id(config), lambda: None)() is not config:
        _told[id(config)] = weakref.ref(config)
        warnings.warn(f"omnisparse: {text}", stacklevel=2)
    return True


def _is_expected() -> bool:
    """Whether this thread is inside ``expected_call``, or everything is switched off."""
    return bool(_calls.depth or is_disabled())


for _function in (warn_once, _is_expected):
    # What ``torch.compiler.assume_constant_result`` sets; that decorator would load Dynamo at import.
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def is_off(configs: Sequence[Any], kwargs: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether a changed model is to run densely, and by whose word.

    Args:
        configs: Those that ``apply_omnisparse`` gave our name; ``set_attn_implementation`` gives them another.
        kwargs: The call's.
        say: Warns once.

    Raises:
        ConfigError: If another attention has our place and the call has our cache, which that cannot read.
    """
    other = next((x for c in configs if (x := c._attn_implementation_internal) != NAME), None)
    if other is None:
        return is_disabled()
    if "omnisparse_cache" in kwargs:
        raise ConfigError(f"model must attend by {NAME!r} with an OmniSparseCache, got {other!r}")
    say(f"set_attn_implementation({other!r}) switched OmniSparse off: attention is dense (apply_omnisparse again)")
    return True


def refuse_weights(module: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse to return attention weights: sparse attention makes no matrix of them.

    Raises:
        ConfigError: If the call or the config asks for them.
    """
    asked = kwargs.get("output_attentions")
    asked = getattr(getattr(module, "config", None), "output_attentions", False) if asked is None else asked
    if asked:
        raise ConfigError(
            "output_attentions must be False, got True: sparse attention makes no matrix of weights "
            "(remove_omnisparse(model) and set_attn_implementation('eager') give them)"
        )
