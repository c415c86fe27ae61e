"""The adaptive window: a row starts when seeing more of the row above no longer changes its first token."""

from __future__ import annotations

import torch
from torch import Tensor


class FirstToken:
    """The candidates for the first token of the next row, one for each row of the batch.

    At each step the token is predicted again, with one more token of the row above in sight. A candidate that
    follows the last prediction ``p`` is kept with probability ``min(1, q(x) / p(x))`` under the new one ``q``, else
    drawn anew from ``max(0, q - p)``, so that it follows ``q``. The row starts once every candidate was kept.

    Source: ZipAR, arXiv 2412.04062 (ICML 2025), adaptive window. Our choice: rows of a batch start together, when
    all their candidates are kept; a candidate that waits for others is tested again at every step.
    """

    def __init__(self) -> None:
        """No prediction yet."""
        self._probabilities = self._tokens = torch.empty(0)

    @property
    def tokens(self) -> Tensor:
        """int64 ``(B,)``, the candidates; each follows the last prediction."""
        return self._tokens

    def test(self, probabilities: Tensor) -> bool:
        """Take the next prediction.

        Args:
            probabilities: ``(B, V)``; greedy decoding gives one-hot rows.

        Returns:
            Whether every candidate was kept; False at the first call.
        """
        before, self._probabilities = self._probabilities, probabilities
        if not len(before):
            self._tokens = torch.multinomial(probabilities, 1)[:, 0]
            return False
        now, then = (p.gather(1, self._tokens[:, None])[:, 0] for p in (probabilities, before))
        kept = torch.rand_like(now) * then < now
        gained = (probabilities - before).clamp(min=0)
        gained = torch.where(gained.sum(-1, keepdim=True) > 0, gained, probabilities)
        self._tokens = torch.where(kept, self._tokens, torch.multinomial(gained, 1)[:, 0])
        return bool(kept.all())
