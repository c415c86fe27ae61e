"""Next-token distributions of windows of real text, against dense attention's: loss, KL divergence, agreement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Positions whose vocabulary-wide logits are in memory at once.
ROWS = 512
#: Every so many positions KL divergence and agreement are taken: a second product with the vocabulary each.
EVERY = 4


class Window(NamedTuple):
    """Consecutive tokens of a text.

    Attributes:
        text: Name of the text.
        number: 0-based number of the window in it.
        ids: int (N,).
    """

    text: str
    number: int
    ids: Tensor

    @property
    def name(self) -> str:
        """``8192:manual:0``: length, text, number."""
        return f"{len(self.ids)}:{self.text}:{self.number}"


def windows_of(texts: dict[str, Tensor], tokens: int, count: int) -> Iterator[Window]:
    """The first ``count`` windows of each text, the texts in turn."""
    for number in range(count):
        for text, ids in texts.items():
            yield Window(text, number, ids[number * tokens : (number + 1) * tokens])


@torch.inference_mode()
def hidden_states(model: Any, window: Window) -> Tensor:
    """What the decoder hands to the output matrix: (N - 1, width), the last position left out."""
    ids = window.ids.long().to(next(model.parameters()).device)
    found: Tensor = model.model(ids[None], use_cache=False).last_hidden_state[0, :-1]
    return found


def dense_states(model: Any, window: Window, folder: Path) -> Tensor:
    """``hidden_states`` of the unchanged model, kept in ``folder``."""
    file = folder / f"{window.name.replace(':', '-')}.pt"
    if file.exists():
        return torch.load(file)
    folder.mkdir(parents=True, exist_ok=True)
    found = hidden_states(model, window)
    torch.save(found, file)
    return found


@torch.inference_mode()
def against_dense(head: nn.Module, own: Tensor, dense: Tensor, ids: Tensor) -> dict[str, float]:
    """Judge one window.

    Args:
        head: The output matrix, (..., width) -> (..., vocabulary).
        own: (N - 1, width), of the rule.
        dense: (N - 1, width), of dense attention.
        ids: int (N,), the tokens.

    Returns:
        ``nll`` and ``late`` (second half) in nats per token, ``kl``: mean KL(dense || own), and ``top1``: share of
        positions where both prefer the same token, the last two on every ``EVERY``-th position.
    """
    losses, divergence, agreed = [], [], []
    targets = ids[1:].long().to(own.device)
    for start in range(0, len(own), ROWS):
        part = slice(start, start + ROWS)
        logits = head(own[part]).float()
        losses.append(F.cross_entropy(logits, targets[part], reduction="none"))
        ours, theirs = logits[::EVERY], head(dense[part][::EVERY]).float()
        logs = [torch.log_softmax(x, -1) for x in (theirs, ours)]
        divergence.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
        agreed.append(ours.argmax(-1) == theirs.argmax(-1))
    loss = torch.cat(losses)
    return {
        "nll": loss.mean().item(),
        "late": loss[len(loss) // 2 :].mean().item(),
        "kl": torch.cat(divergence).mean().item(),
        "top1": torch.cat(agreed).float().mean().item(),
    }
