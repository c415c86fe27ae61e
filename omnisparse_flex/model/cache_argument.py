"""The KV cache among a decoder's arguments: transformers renamed it in 5.24."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

#: The argument's name from transformers 5.24 on. Before, continuous batching used it for a paged cache.
NEW_NAME = "cache"
#: The argument's name before. A decorator of transformers' converts it until 5.40, in ``generate`` until 6.0.
OLD_NAME = "past_key_values"


def cache_name(forward: Callable[..., Any]) -> str:
    """The name under which ``forward`` takes a KV cache.

    Args:
        forward: A module's ``forward``, decorated or not.

    Returns:
        ``cache`` if that is one of its parameters, else ``past_key_values``.
    """
    function = getattr(forward, "__func__", forward)  # a bound method is made anew at each access
    name = _NAMES.get(function)
    if name is None:
        name = _NAMES[function] = NEW_NAME if NEW_NAME in inspect.signature(function).parameters else OLD_NAME
    return name


#: Signatures take microseconds that a decode step feels. Weak: a wrapped ``forward`` may hold its whole model.
_NAMES: weakref.WeakKeyDictionary[Callable[..., Any], str] = weakref.WeakKeyDictionary()


def as_cache_argument(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """``cache`` as the keyword argument of ``forward``, to be unpacked into a call."""
    return {cache_name(forward): cache}


def cache_in(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The KV cache among named arguments of ``forward``, or None.

    A callee of the new name is understood by the old one too, as transformers does; a callee of the old name
    may get something else as ``cache``.
    """
    cache = arguments.get(cache_name(forward))
    return arguments.get(OLD_NAME) if cache is None else cache


def with_cache_renamed(forward: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the cache under the name that ``forward`` declares.

    transformers renames the old argument in a decorator that Dynamo cannot trace: a decoder called by the old
    name falls into 15 graphs instead of one. So it is renamed before. Where both names are given the new one
    counts, as in transformers.

    Args:
        forward: What is called.
        arguments: Its keyword arguments.
    """
    if OLD_NAME not in arguments or cache_name(forward) == OLD_NAME:
        return arguments
    others = {key: value for key, value in arguments.items() if key != OLD_NAME}
    return {NEW_NAME: arguments[OLD_NAME], **others}


def cache_of(output: Any) -> Any:
    """The KV cache that a model's output carries, or None; asked by the old name, newer versions warn."""
    return getattr(output, NEW_NAME) if hasattr(output, NEW_NAME) else getattr(output, OLD_NAME)
