"""From logits to tokens of a raster: guidance, logits processors, and the draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omnisparse_flex.grid.guidance import guided


class Picker:
    """The raster behind the prompt, and how its tokens are picked.

    Attributes:
        raster: int64 ``(B, tokens)``; padding where nothing was picked yet.
    """

    def __init__(
        self,
        prompt: Tensor,
        raster: Tensor,
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
        do_sample: bool,
        scale: float | None,
    ) -> None:
        """Nothing is picked yet.

        Args:
            prompt: int64 ``(B, P)``, which logits processors see before the raster.
            raster: int64 ``(B, tokens)``, its known tokens in place.
            processors: Logits processors without guidance, ``(ids, scores (B, V)) -> scores``.
            do_sample: Draw, or take the most probable token.
            scale: Of guidance, where batches are doubled; None: they are not.
        """
        self.raster = raster
        self._prompt, self._processors, self._do_sample, self._scale = prompt, processors, do_sample, scale

    def put(self, places: Sequence[int], logits: Tensor) -> None:
        """Pick tokens and put them into the raster.

        Args:
            places: A of the raster.
            logits: ``(B, A, V)``, of the doubled batch under guidance.
        """
        if places:
            drawn = self.probabilities(places, logits).transpose(0, 1)  # (A, B, V)
            tokens = [torch.multinomial(rows, 1) if self._do_sample else rows.argmax(-1, True) for rows in drawn]
            self.raster[:, places] = torch.cat(tokens, dim=1)

    def probabilities(self, places: Sequence[int], logits: Tensor) -> Tensor:
        """float32 ``(B, A, V)`` from which tokens are drawn; greedy decoding gives one-hot rows."""
        scores = logits.float() if self._scale is None else guided(logits.float(), self._scale)
        picked = []
        for place, row in zip(places, scores.unbind(dim=1), strict=True):
            prefix = torch.cat([self._prompt, self.raster[:, :place]], dim=1)
            for processor in self._processors:
                row = processor(prefix, row)
            picked.append(row)
        scores = torch.stack(picked, dim=1)
        if self._do_sample:
            return torch.softmax(scores, dim=-1)
        return torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).float()
