"""Attention of a transformers model under a rule's exact token mask, with the books kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.quality.choose import Chosen, choose, estimate, local_pairs
from benchmarks.quality.costs import selection_cost
from benchmarks.quality.estimators import ESTIMATORS, exact
from benchmarks.quality.one_pass import OnePass
from benchmarks.quality.rows import causal
from benchmarks.quality.rules import Rule

NAME = "quality_lab"
#: Queries handled at once; a longer segment takes its own length.
STRETCH = 1024


@dataclasses.dataclass
class Books:
    """Sums over forward passes; one row per layer.

    Attributes:
        kept: Kept pairs, over batch and heads.
        rectangle: Pairs computed if active queries meet all chosen keys, local part included.
        allowed: Causal pairs.
        selection: Cost of the estimates, in units of ``allowed``.
        recall: float64 (Hq,) sums of the true recall of queries that have far keys.
        queries: How many those were.
        active: Active ones among them, over heads; likewise ``lazy`` and ``discarded``.
        budget: Mean budget of a segment, in tokens.
    """

    kept: float = 0.0
    rectangle: float = 0.0
    allowed: float = 0.0
    selection: float = 0.0
    recall: Tensor | float = 0.0
    queries: float = 0.0
    active: float = 0.0
    lazy: float = 0.0
    discarded: float = 0.0
    budget: float = 0.0
    segments: float = 0.0


class Lab:
    """The attention function; a rule and its books for each use."""

    def __init__(self) -> None:
        self.rule = Rule("dense", estimator="dense")
        self.books: dict[int, Books] = {}
        #: By first query: what the layer that leads has chosen for those that share.
        self.choices: dict[int, Chosen] = {}

    @contextlib.contextmanager
    def using(self, rule: Rule) -> Iterator[dict[int, Books]]:
        """Forward passes inside run under ``rule``; yields its books by layer."""
        self.rule, self.books = rule, {}
        try:
            yield self.books
        finally:
            self.rule = Rule("dense", estimator="dense")

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """Transformers' attention call: (B, H, N, D) in, (B, N, H, D) out. Causal, no padding, no cache."""
        layer, rule = int(module.layer_idx), self.rule
        groups = query.shape[1] // key.shape[1]
        if rule.dense or layer in rule.dense_layers:
            pairs = query.shape[0] * query.shape[1] * _causal_pairs(query.shape[2])
            book = self.books.setdefault(layer, Books())
            book.kept, book.rectangle, book.allowed = book.kept + pairs, book.rectangle + pairs, book.allowed + pairs
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        else:
            out = self._sparse(layer, query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None

    def _sparse(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rule, tokens = self.rule, query.shape[2]
        book, active = self.books.setdefault(layer, Books()), 0.0
        rows = ESTIMATORS[rule.estimator](query, key, scale, **rule.options)
        truth = exact(query, key, scale)
        leads = (layer - len(rule.dense_layers)) % rule.share == 0
        generator = torch.Generator(query.device).manual_seed(layer)
        stretch, out = max(rule.segment or tokens, STRETCH), torch.empty_like(query)
        for start in range(0, tokens, stretch):
            stop = min(start + stretch, tokens)
            local = local_pairs(rule, start, stop, query.device)
            true = truth(start, stop)
            if leads:
                plain = rule.estimator == "exact" and rule.refine is None
                part = query[:, :, start:stop]
                mass = true if plain else estimate(rows, rule, local, part, key[:, :, :stop], scale, start)
                guessed = rows.breadth(start, stop) if isinstance(rows, OnePass) and rows.early else None
                self.choices[start] = choose(mass, local, rule, start, generator, guessed)
            chosen = self.choices[start]
            if leads and stop > tokens - rule.dense_tail:
                tail = max(0, tokens - rule.dense_tail - start)
                chosen.keep[:, :, tail:] = causal(start, stop, query.device)[tail:]
            out[:, :, start:stop] = _output(true, chosen, value[:, :, :stop], book, rule, start)
            _count(book, chosen, local, rule)
            active += chosen.active.sum().item()
        pairs = query.shape[0] * query.shape[1] * _causal_pairs(tokens)
        share = active / query[..., 0].numel()
        book.allowed += pairs
        if leads:
            groups = query.shape[1] // key.shape[1]
            book.selection += pairs * selection_cost(rule, tokens, query.shape[3], groups, share)
        return out


def _output(true: Tensor, chosen: Chosen, value: Tensor, book: Books, rule: Rule, start: int) -> Tensor:
    """Exact attention under the kept pairs; notes the true recall and who was active."""
    kept = true * chosen.keep
    recall = kept.sum(-1)
    groups = true.shape[1] // value.shape[1]
    out = (kept.to(value.dtype).unflatten(1, (-1, groups)) @ value.unsqueeze(2)).flatten(1, 2)
    out = out / recall.clamp(min=1e-20).unsqueeze(-1).to(value.dtype)
    far = max(0, rule.sinks + rule.window - start)  # earlier queries have no key beyond the local ones
    seen, active, lazy = recall[..., far:], chosen.active[..., far:], chosen.lazy[..., far:]
    book.recall = book.recall + seen.double().sum((0, 2)).cpu()
    book.queries += seen.shape[0] * seen.shape[2]
    book.active += active.sum().item()
    book.lazy += lazy.sum().item()
    book.discarded += (lazy & ~active).sum().item()
    return out


def _count(book: Books, chosen: Chosen, local: Tensor, rule: Rule) -> None:
    heads = chosen.active.shape[0] * chosen.active.shape[1]
    book.kept += chosen.keep.sum().item()
    skipped = (~chosen.active).unsqueeze(-1) if rule.lazy_mode == "skip" else None
    near = local.sum().item() * heads if skipped is None else (local & ~skipped).sum().item()
    book.rectangle += near + chosen.rectangle
    book.budget += chosen.budget.sum().item() * rule.unit
    book.segments += chosen.budget.numel()


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def install(model: nn.Module) -> Lab:
    """Give the model the lab's attention (dense until a rule is used)."""
    lab = Lab()
    AttentionInterface.register(NAME, lab.attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.config._attn_implementation = NAME
    return lab
