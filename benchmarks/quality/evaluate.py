"""What a rule costs the model: perplexity on long text, and answers to look-up items, both after sparse prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.lab import Books, Lab
from benchmarks.quality.retrieval import Items
from benchmarks.quality.rules import Rule

#: Positions whose vocabulary-wide logits are in memory at once.
VOCABULARY_ROWS = 1024


@torch.inference_mode()
def perplexity(
    model: nn.Module, lab: Lab, rule: Rule, texts: dict[str, Tensor], tokens: int, windows: int
) -> dict[str, Any]:
    """Mean negative log-likelihood of consecutive windows of each text.

    Args:
        model: A causal LM with the lab installed.
        lab: Its lab.
        rule: The rule.
        texts: Token ids by source.
        tokens: N, the length of a window, prefilled at once.
        windows: Windows per text.

    Returns:
        ``nll`` and ``late`` (second half of the window) by source in nats per token, and the books' summary.
    """
    began = time.perf_counter()
    with lab.using(rule) as books:
        found = text_losses(model, texts, tokens, windows)
    return {**found, **summary(books.items()), "seconds": round(time.perf_counter() - began, 2)}


@torch.inference_mode()
def text_losses(
    model: nn.Module, texts: dict[str, Tensor], tokens: int, windows: int, done: Callable[[], None] = lambda: None
) -> dict[str, dict[str, float]]:
    """``nll`` and ``late`` of ``perplexity``, whatever attention the model has; ``done`` is called after a window."""
    found: dict[str, dict[str, float]] = {"nll": {}, "late": {}}
    for name, ids in texts.items():
        losses = []
        for i in range(windows):
            losses.append(_losses(model, ids[i * tokens : (i + 1) * tokens]))
            done()
        found["nll"][name] = torch.cat(losses).mean().item()
        found["late"][name] = torch.cat([x[tokens // 2 :] for x in losses]).mean().item()
    return found


@torch.inference_mode()
def retrieval(model: nn.Module, lab: Lab, rule: Rule, items: dict[str, Items], contexts: int) -> dict[str, Any]:
    """Share of look-up items that are answered right.

    Args:
        model: A causal LM with the lab installed.
        lab: Its lab.
        rule: The rule: question and all are prefilled under it.
        items: By format, of one length.
        contexts: At most so many per format.

    Returns:
        By format: ``rank``, the right word is the likeliest of the words in the context; ``greedy``, it is the
        likeliest token of all; ``items``, how many; ``right``, 0/1 per item, for paired tests. And the books' summary.
    """
    began = time.perf_counter()
    with lab.using(rule) as books:
        found = answered(model, items, contexts)
    return {**found, **summary(books.items()), "seconds": round(time.perf_counter() - began, 2)}


@torch.inference_mode()
def answered(model: nn.Module, items: dict[str, Items], contexts: int) -> dict[str, dict[str, Any]]:
    """What ``retrieval`` tells of each format, whatever attention the model has."""
    found, device = {}, next(model.parameters()).device
    for kind, batch in items.items():
        rank, greedy = [], []
        for c in range(min(contexts, len(batch.ids))):
            ids = batch.ids[c : c + 1].long().to(device)
            scores = model.lm_head(model.model(ids, use_cache=False).last_hidden_state[0, batch.positions[c]])
            listed = scores.float()[:, batch.candidates[c]].argmax(-1).cpu()
            rank.append(batch.candidates[c][listed] == batch.answers[c])
            greedy.append(scores.argmax(-1).cpu() == batch.answers[c])
        right = torch.cat(rank)
        found[kind] = {
            "rank": right.float().mean().item(),
            "greedy": torch.cat(greedy).float().mean().item(),
            "items": len(right),
            "right": "".join("01"[int(x)] for x in right),
        }
    return found


def summary(books: Iterable[tuple[int, Books]]) -> dict[str, Any]:
    """Whole-model figures of the books; densities are shares of the dense causal FLOPs of all layers.

    ``attention`` counts kept pairs, ``rectangle`` the pairs that gathered tiles would compute, ``selection`` the
    estimates; ``density`` is attention + selection. ``recall`` lists true recall by sparse layer and head.
    """
    layers = dict(sorted(books))
    allowed = sum(book.allowed for book in layers.values())
    sparse = {layer: book for layer, book in layers.items() if book.queries}
    recall = {layer: (book.recall / book.queries) for layer, book in sparse.items()}
    values = torch.stack(list(recall.values())) if recall else torch.ones(1, 1)
    queries = sum(book.queries for book in sparse.values()) * values.shape[1] or 1.0
    lazy = sum(book.lazy for book in sparse.values())
    shares = {
        key: sum(getattr(b, key) for b in layers.values()) / allowed for key in ("kept", "rectangle", "selection")
    }
    return {
        "density": shares["kept"] + shares["selection"],
        "attention": shares["kept"],
        "rectangle": shares["rectangle"],
        "selection": shares["selection"],
        "recall_mean": values.mean().item(),
        "recall_min": values.min().item(),
        "recall": {layer: [round(x, 4) for x in row.tolist()] for layer, row in recall.items()},
        "active": sum(book.active for book in sparse.values()) / queries if sparse else 1.0,
        "lazy": lazy / queries,
        "discarded_of_lazy": sum(book.discarded for book in sparse.values()) / lazy if lazy else 0.0,
        "budget": {layer: round(b.budget / max(b.segments, 1.0), 1) for layer, b in sparse.items()},
    }


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 (N - 1,), nats per predicted token."""
    ids = ids.long().to(next(model.parameters()).device)
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, :-1]
    parts = []
    for rows, targets in zip(hidden.split(VOCABULARY_ROWS), ids[1:].split(VOCABULARY_ROWS), strict=True):
        parts.append(F.cross_entropy(model.lm_head(rows).float(), targets, reduction="none"))
    return torch.cat(parts).cpu()
