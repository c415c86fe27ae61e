"""What training minimises: the answers, and what can be told of events where they are seen and where they are named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.video_needle.data import IGNORE
from benchmarks.video_needle.vocabulary import IDS, KINDS, TOLD


def narration_loss(logits: Tensor, narration: Tensor) -> Tensor:
    """Mean over classes of words of how well each class is told apart, other words left aside.

    Args:
        logits: float32 (T, vocabulary).
        narration: int64 (T, classes), ids or -100.
    """
    losses = []
    for column, words in enumerate(TOLD):
        first = IDS[words[0]]
        wanted = narration[:, column]
        wanted = torch.where(wanted == IGNORE, IGNORE, wanted - first)
        losses.append(F.cross_entropy(logits[:, first : first + len(words)], wanted, ignore_index=IGNORE))
    # A batch may show no digit at all: the mean of nothing is NaN.
    return torch.stack(losses).nan_to_num(0.0).mean()


def task_losses(logits: Tensor, answers: Tensor, narration: Tensor, text: int, early: Sequence[Tensor] = ()) -> Tensor:
    """Losses of the answers, of narration at visual tokens and of narration at names.

    Args:
        logits: float32 (B, N, vocabulary).
        answers: As in ``Batch``, on the same device.
        narration: As in ``Batch``.
        text: Index of the first word of the questions.
        early: Logits read between layers; visual tokens have to narrate there, too.

    Returns:
        float32 (3,).
    """
    answer = F.cross_entropy(logits[:, text:].flatten(0, 1), answers[:, text:].flatten(), ignore_index=IGNORE)
    seen, named = (
        narration_loss(logits[:, part].flatten(0, 1), narration[:, part].flatten(0, 1))
        for part in (slice(0, text), slice(text, None))
    )
    for state in early:
        seen = seen + narration_loss(state[:, :text].flatten(0, 1), narration[:, :text].flatten(0, 1))
    return torch.stack([answer, seen / (1 + len(early)), named])


def count_hits(logits: Tensor, answers: Tensor, kinds: Tensor, text: int) -> Tensor:
    """Right answers and questions by kind.

    Args:
        logits: (B, N, vocabulary).
        answers: As in ``Batch``.
        kinds: As in ``Batch``.
        text: Index of the first word of the questions.

    Returns:
        float32 (2, kinds), on the device of ``logits``.
    """
    answers, kinds = answers[:, text:], kinds[:, text:]
    right = logits[:, text:].detach().argmax(-1) == answers
    asked = kinds[..., None] == torch.arange(len(KINDS), device=kinds.device)
    return torch.stack([(asked & right[..., None]).sum((0, 1)), asked.sum((0, 1))]).float()
