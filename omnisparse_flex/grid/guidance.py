"""Classifier-free guidance in one doubled batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.errors import require


@dataclass(frozen=True)
class Guidance:
    """Scale of the guidance, and the prompt without the condition.

    Attributes:
        scale: Of the difference between both predictions; 1 is no guidance.
        ids: int64 ``(B, P)``, or None for the prompt's last token alone, as in transformers.
        mask: ``(B, P)``, 0 at padding; None: no padding.
    """

    scale: float
    ids: Tensor | None
    mask: Tensor | None


def split_guidance(processors: Any) -> tuple[Guidance | None, list[Any]]:
    """Take guidance out of the logits processors that ``generate`` made.

    transformers' own guidance calls the model for one more token at each call. Here both prompts are rows of one
    batch, so only its scale and its prompt are used.

    Args:
        processors: A ``LogitsProcessorList``.

    Returns:
        The guidance, or None, and the other processors in their order.
    """
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Unbatched

    found = [processor for processor in processors if isinstance(processor, Unbatched)]
    others = [processor for processor in processors if not isinstance(processor, Unbatched)]
    if not found:
        return None, others
    require(len(found) == 1, "logits_processor", "hold one guidance at most", len(found))
    context: dict[str, Any] = found[0].unconditional_context
    return Guidance(found[0].guidance_scale, context["input_ids"], context["attention_mask"]), others


def guided(logits: Tensor, scale: float) -> Tensor:
    """Mix the predictions of a doubled batch.

    Args:
        logits: ``(2 * B, ..., V)``, rows with the condition first.
        scale: 1 gives those with the condition, 0 those without.

    Returns:
        ``(B, ..., V)``: ``u + scale * (c - u)`` of log-probabilities.

    Source: classifier-free guidance, arXiv 2207.12598, in the form of transformers' logits processor.
    """
    with_it, without = torch.log_softmax(logits, dim=-1).chunk(2)
    return without + scale * (with_it - without)


def doubled(ids: Tensor, mask: Tensor, guidance: Guidance, pad: int) -> tuple[Tensor, Tensor]:
    """The prompt's rows, then the rows without the condition, padded on the left to one length.

    Args:
        ids: int64 ``(B, P)``.
        mask: bool ``(B, P)``.
        guidance: Its prompt may have 1, B, or a divisor of B rows.
        pad: The id that padding gets.

    Returns:
        ids and mask ``(2 * B, P')``.

    Raises:
        ConfigError: If the rows of ``negative_prompt_ids`` do not divide those of the prompt.
    """
    others = ids[:, -1:] if guidance.ids is None else guidance.ids.to(ids.device)
    kept = torch.ones_like(others) if guidance.mask is None else guidance.mask.to(ids.device)
    repeats, rest = divmod(len(ids), len(others))
    require(rest == 0, "negative_prompt_ids", f"have rows that divide {len(ids)}", len(others))
    rows = ((ids, mask), (others.repeat_interleave(repeats, 0), kept.bool().repeat_interleave(repeats, 0)))
    length = max(tokens.shape[1] for tokens, _ in rows)

    def padded(tokens: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tokens, (length - tokens.shape[1], 0), value=value)

    return torch.cat([padded(row, pad) for row, _ in rows]), torch.cat([padded(kept, False) for _, kept in rows])
