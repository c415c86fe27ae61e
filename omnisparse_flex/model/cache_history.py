"""What a KV cache remembers beside its keys: which of its tokens are visual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.model.cache_argument import NEW_NAME, OLD_NAME

#: Attribute under which a cache remembers which of its tokens are visual.
HISTORY = "_omnisparse_visual"


def history_of(cache: Any, past: int, tokens: Tensor) -> Tensor:
    """What the cache remembers, trimmed to its length; unknown tokens count as text, which is always kept.

    Args:
        cache: The KV cache.
        past: Its length.
        tokens: bool (B, L), the call's own visual tokens.

    Returns:
        bool (B, past).
    """
    known: Tensor | None = getattr(cache, HISTORY, None)
    unknown = torch.zeros((tokens.shape[0], past), dtype=torch.bool, device=tokens.device)
    if known is None or known.shape[0] != tokens.shape[0] or known.shape[1] < past:
        return unknown
    return known[:, :past].to(tokens.device)


def remember(output: Any, given: Any, visual: Tensor | None) -> Any:
    """Let a cache that nobody gave to the model know which of its tokens are visual.

    Args:
        output: The decoder's; it holds a cache that the decoder made for itself.
        given: The cache that the decoder got, or None: SmolVLM makes one outside its decoder.
        visual: bool (B, S) of the call, or None: every token is eligible.

    Returns:
        The output.
    """
    cache = _made_by(output) if given is None else given
    if visual is None or cache is None or getattr(cache, HISTORY, None) is visual:
        return output
    # A cache may hold more than this call: that of somebody else's making. It remembers nothing then.
    if int(cache.get_seq_length()) == visual.shape[1]:
        setattr(cache, HISTORY, visual)
    return output


def _made_by(output: Any) -> Any:
    """The KV cache in a decoder's output, a tuple or an object with names, or None."""
    name = NEW_NAME if hasattr(output, NEW_NAME) else OLD_NAME
    parts = output if isinstance(output, tuple) else (getattr(output, name, None),)
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
