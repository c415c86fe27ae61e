"""Attention of a transformers model under the pairs that a rule keeps, whoever's rule it is, with true recall."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from omnisparse_flex.attention.functional import causal_index_mask
from omnisparse_flex.masks.statistics import sampled_rows, true_recall

NAME = "quality_block_masks"
#: Queries handled at once.
STRETCH = 512
#: Queries of a block.
BLOCK = 128


class Kept(Protocol):
    """The pairs that a rule keeps in one layer."""

    def pairs(self, start: int, stop: int) -> Tensor:
        """Bool (B or 1, Hq, stop - start, stop): what queries ``start`` to ``stop`` keep, causality aside."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Exact attention under the pairs: (B, Hq, N, D)."""

    def share(self) -> float:
        """Kept share of the causal pairs, counted in the units that a kernel computes."""


#: ``(query, key, scale) -> Kept``; (B, Hq, N, D) and (B, Hkv, N, D).
Rule = Callable[[Tensor, Tensor, float], Kept]


class Blocks(NamedTuple):
    """Whole blocks.

    Attributes:
        keep: bool (B, Hq, NQ, NK), ``BLOCK`` queries by ``key_block`` keys.
        key_block: Keys of a block.
        told: Further numbers, such as what the rule itself says that it keeps.
    """

    keep: Tensor
    key_block: int = BLOCK
    told: dict[str, float] = {}  # noqa: RUF012  (never changed)

    def pairs(self, start: int, stop: int) -> Tensor:
        """See ``Kept``."""
        keys = (torch.arange(stop, device=self.keep.device)) // self.key_block
        rows = torch.arange(start, stop, device=self.keep.device) // BLOCK
        return self.keep.index_select(2, rows).index_select(3, keys)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See ``Kept``."""
        out, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
        columns = torch.arange(key.shape[2], device=query.device)
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in self.keep.shape[:3])).tolist():
            first, last = i * BLOCK, (i + 1) * BLOCK
            chosen = columns[:last][self.keep[b, h, i].repeat_interleave(self.key_block)[:last]]
            rows, keys = query[b, h, first:last], key[b, h // groups, chosen]
            logits = (rows @ keys.T * scale).masked_fill_(chosen > columns[first:last, None], float("-inf"))
            out[b, h, first:last] = torch.softmax(logits, -1) @ value[b, h // groups, chosen]
        return out

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
        self.told: list[dict[str, float]] = []

    def means(self) -> dict[str, float]:
        """``kept``, and true recall of sampled rows: mean, worst head, 5th percentile of the heads."""
        heads = torch.cat(self.recalls)
        low = {"recall_worst_head": heads.min().item(), "recall_5th": heads.quantile(0.05).item()}
        told = {name: sum(x[name] for x in self.told) / len(self.told) for name in self.told[0]}
        return {"kept": sum(self.kept) / len(self.kept), "recall": heads.mean().item(), **low, **told}


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
        out = kept.attend(query, key, value, scaling)
        self.books.kept.append(kept.share())
        self.books.told.append(kept.told if isinstance(kept, Blocks) else {})
        self.books.recalls.append(sampled_recall(kept, query, key, scaling).cpu())
        return out.transpose(1, 2).contiguous(), None


def sampled_recall(kept: Kept, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """True recall of each head on ``SAMPLED_ROWS`` rows, as ``collect_stats`` samples them: (Hq,)."""
    rows = sampled_rows(query)
    pairs = [kept.pairs(row, row + 1) for row in rows.tolist()]
    wide = torch.cat([F.pad(x, (0, key.shape[2] - x.shape[3])) for x in pairs], 2)
    mask = causal_index_mask(0, query.device)
    return true_recall(wide.expand(query.shape[0], query.shape[1], -1, -1), rows, query, key, mask, scale, None)[0]


def attend_by_pairs(kept: Kept, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``Kept.attend`` for any pairs: all logits, some queries at a time."""
    out, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
    places = torch.arange(query.shape[2], device=query.device)
    for start in range(0, query.shape[2], STRETCH):
        stop = min(start + STRETCH, query.shape[2])
        rows = query[:, :, start:stop].unflatten(1, (-1, groups)).flatten(2, 3)
        logits = (rows @ key[:, :, :stop].mT * scale).unflatten(2, (groups, -1)).flatten(1, 2)
        allowed = kept.pairs(start, stop) & (places[:stop] <= places[start:stop, None])
        mass = torch.softmax(logits.masked_fill_(~allowed, float("-inf")), -1)
        mass = mass.unflatten(1, (-1, groups)).flatten(2, 3) @ value[:, :, :stop]
        out[:, :, start:stop] = mass.unflatten(2, (groups, -1)).flatten(1, 2)
    return out


def install(model: nn.Module) -> MaskAttention:
    """Give the model the attention of masks."""
    attention = MaskAttention()
    AttentionInterface.register(NAME, attention.attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.config._attn_implementation = NAME
    return attention
