"""Attention of a transformers model under the pairs that a rule keeps, whoever's rule it is, with true recall."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "quality_block_masks"
#: Queries handled at once.
STRETCH = 512
#: Queries of a block.
BLOCK = 128


class Kept(Protocol):
    """The pairs that a rule keeps in one layer."""

    def pairs(self, start: int, stop: int) -> Tensor:
        """Bool (B or 1, Hq, stop - start, stop): what queries ``start`` to ``stop`` keep, causality aside."""

    def share(self) -> float:
        """Kept share of the causal pairs, counted in the units that a kernel computes."""


#: ``(query, key, scale) -> Kept``; (B, Hq, N, D) and (B, Hkv, N, D).
Rule = Callable[[Tensor, Tensor, float], Kept]


class Blocks(NamedTuple):
    """Whole blocks.

    Attributes:
        keep: bool (B, Hq, NQ, NK), ``BLOCK`` queries by ``key_block`` keys.
        key_block: Keys of a block.
    """

    keep: Tensor
    key_block: int = BLOCK

    def pairs(self, start: int, stop: int) -> Tensor:
        """See ``Kept``."""
        keys = (torch.arange(stop, device=self.keep.device)) // self.key_block
        rows = torch.arange(start, stop, device=self.keep.device) // BLOCK
        return self.keep.index_select(2, rows).index_select(3, keys)

    def share(self) -> float:
        """See ``Kept``."""
        seen = causal_blocks(*self.keep.shape[2:], BLOCK // self.key_block, self.keep.device)
        return ((self.keep & seen).sum() / seen.expand_as(self.keep).sum()).item()


def causal_blocks(rows: int, columns: int, split: int, device: torch.device) -> Tensor:
    """Bool (rows, columns): blocks with an allowed pair, ``split`` key blocks to a block of queries."""
    last = (torch.arange(rows, device=device)[:, None] + 1) * split - 1
    return torch.arange(columns, device=device) <= last


class Books:
    """Sums over layers of one forward pass."""

    def __init__(self) -> None:
        self.kept: list[float] = []
        self.recalls: list[Tensor] = []

    def means(self) -> dict[str, float]:
        """``kept``, and the mean true recall of all rows, of the worst head, and of the head at the 5th percentile."""
        heads = torch.cat(self.recalls)
        low = {"recall_worst_head": heads.min().item(), "recall_5th": heads.quantile(0.05).item()}
        return {"kept": sum(self.kept) / len(self.kept), "recall": heads.mean().item(), **low}


class MaskAttention:
    """The attention function; a rule and its books for each use."""

    def __init__(self) -> None:
        self.rule: Rule | None = None
        self.books = Books()

    @contextlib.contextmanager
    def using(self, rule: Rule) -> Iterator[None]:
        """Forward passes inside run under ``rule``; ``books`` are those of the last one."""
        self.rule = rule
        try:
            yield
        finally:
            self.rule = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """Transformers' attention call: (B, H, N, D) in, (B, N, H, D) out. Causal, no padding, no cache."""
        assert self.rule is not None
        if module.layer_idx == 0:
            self.books = Books()
        kept = self.rule(query, key, scaling)
        out, recalls = torch.empty_like(query), []
        for start in range(0, query.shape[2], STRETCH):
            stop = min(start + STRETCH, query.shape[2])
            part = query[:, :, start:stop]
            out[:, :, start:stop], recall = attended(part, key, value, kept.pairs(start, stop), start, scaling)
            recalls.append(recall)
        self.books.kept.append(kept.share())
        self.books.recalls.append(torch.cat(recalls, -1).mean((0, 2)).cpu())
        return out.transpose(1, 2).contiguous(), None


def attended(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, R, D) of queries ``start`` onwards under ``keep``, and their true recall (B, Hq, R)."""
    stop, groups = start + query.shape[2], query.shape[1] // key.shape[1]
    rows = query.unflatten(1, (-1, groups)).flatten(2, 3)
    logits = (rows @ key[:, :, :stop].transpose(-1, -2) * scale).unflatten(2, (groups, -1)).flatten(1, 2)
    places = torch.arange(stop, device=query.device)
    logits.masked_fill_(places > places[start:, None], float("-inf"))
    mass = torch.softmax(logits.float(), -1)
    mass *= keep
    recall = mass.sum(-1)
    out = mass.to(value.dtype).unflatten(1, (-1, groups)).flatten(2, 3) @ value[:, :, :stop]
    return out.unflatten(2, (groups, -1)).flatten(1, 2) / recall.clamp(min=1e-20).unsqueeze(-1), recall


def install(model: nn.Module) -> MaskAttention:
    """Give the model the attention of masks."""
    attention = MaskAttention()
    AttentionInterface.register(NAME, attention.attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.config._attn_implementation = NAME
    return attention
