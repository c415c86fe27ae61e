"""Heads that predict a token's neighbours, one for each axis of a grid, and the mixing of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnisparse_flex.errors import require
from omnisparse_flex.masks._checks import check_count, is_int

MIXINGS = ("mean", "gate")


class NeighborHeads(nn.Module):
    """Predicts the next token along each axis of a grid from a decoder's hidden states.

    The head of the columns ("right") reads the output of layer ``n``, that of the rows ("below") one layer deeper, that
    of the frames ("next frame") the last. A token gets the logits of the heads whose neighbour exists, mixed; the
    grid's first token those of all heads at the condition's last token.

    Attributes:
        grid: Frames, rows and columns; one frame for an image.
        axes: Axes with a head, 2 for an image and 3 for a video.

    Source: NAR, arXiv 2503.10696, section 3 (dimension-oriented heads, the mean of their logits). Our choice: the
    learned gate, one weight for each head from its own input, starts as the mean; a raster model's head may be
    the start of all, for training it further.
    """

    def __init__(
        self,
        decoder: Any,
        vocab_size: int,
        grid: Sequence[int],
        mixing: str = "mean",
        head: nn.Linear | None = None,
    ) -> None:
        """Heads for one decoder and one grid.

        Args:
            decoder: A decoder of transformers without its language-model head, of at least ``axes`` layers.
            vocab_size: Symbols of a grid token; their ids are 0 to ``vocab_size - 1`` of the decoder's embedding.
            grid: ``(rows, columns)`` of an image, or ``(frames, rows, columns)``.
            mixing: ``"mean"`` of the logits, or ``"gate"``, weights that are learned.
            head: A raster model's head, ``(hidden, vocab_size)`` or larger, that each head copies; None: random.

        Raises:
            ConfigError: For a grid that is none, an unknown ``mixing``, a decoder of too few layers, or a ``head``
                of other sizes.
        """
        super().__init__()
        pair = isinstance(grid, Sequence) and len(grid) in (2, 3) and all(is_int(extent) for extent in grid)
        require(pair, "grid", "be (rows, columns) or (frames, rows, columns)", grid)
        for extent in grid:
            check_count("grid's extents", extent, minimum=1)
        check_count("vocab_size", vocab_size, minimum=1)
        require(mixing in MIXINGS, "mixing", f"be one of {', '.join(MIXINGS)}", mixing)
        config = decoder.config.get_text_config(decoder=True)
        frames, rows, columns = (1, *grid) if len(grid) == 2 else grid
        self.axes, self.grid = len(grid), (int(frames), int(rows), int(columns))
        layers, width = config.num_hidden_layers, config.hidden_size
        require(layers >= self.axes, "decoder", f"have at least {self.axes} layers", layers)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(self.axes))
        self.heads = nn.ModuleList(nn.Linear(width, vocab_size, bias=False) for _ in range(self.axes))
        self.gates = nn.ModuleList(nn.Linear(width, 1) for _ in range(self.axes)) if mixing == "gate" else None
        for parameter in [] if self.gates is None else self.gates.parameters():
            nn.init.zeros_(parameter)
        if head is not None:
            fits = head.in_features == width and head.out_features >= vocab_size
            require(fits, "head", f"map {width} features to {vocab_size} symbols", tuple(head.weight.shape))
            for own in self.heads.parameters():
                own.data.copy_(head.weight.data[:vocab_size])
        self.to(dtype=decoder.dtype, device=decoder.device)

    def states(self, hidden_states: Sequence[Tensor]) -> list[Tensor]:
        """What each head reads, of a decoder's ``hidden_states`` (the embeddings' output first): columns first."""
        return list(hidden_states[len(hidden_states) - self.axes :])

    def sources(self, prefix: int, device: torch.device | None = None) -> Tensor:
        """Where each head finds the neighbour of each grid token, in a sequence of a prefix and the raster.

        Args:
            prefix: Tokens before the grid, at least 1.
            device: Where the table lives; None: the default.

        Returns:
            int64 ``(axes, tokens)``; -1 where the neighbour does not exist.
        """
        index = torch.arange(torch.Size(self.grid).numel(), device=device)
        rows, columns = self.grid[1:]
        axes = ((1, index % columns), (columns, index // columns % rows), (rows * columns, index // (rows * columns)))
        table = torch.stack(
            [torch.where(place > 0, prefix + index - stride, -1) for stride, place in axes[: self.axes]]
        )
        table[:, 0] = prefix - 1
        return table

    def forward(self, states: Sequence[Tensor], sources: Tensor) -> Tensor:
        """Mixed logits.

        Args:
            states: ``(B, N, hidden)`` for each head, as ``states`` returns them.
            sources: int64 ``(axes, M)``, the index in N from which each head predicts a token; -1: it does not.

        Returns:
            ``(B, M, vocab_size)``.
        """
        read = [state[:, source.clamp(min=0)] for state, source in zip(states, sources, strict=True)]
        there = (sources >= 0)[:, None, :, None]
        if self.gates is None:
            weights = there / there.sum(dim=0)
        else:
            gates = torch.stack([gate(state) for gate, state in zip(self.gates, read, strict=True)])
            weights = gates.masked_fill(~there, -torch.inf).softmax(dim=0)
        mixed = torch.zeros((), dtype=read[0].dtype, device=read[0].device)
        for weight, norm, head, state in zip(weights, self.norms, self.heads, read, strict=True):
            mixed = mixed + weight.to(state.dtype) * head(norm(state))
        return mixed
