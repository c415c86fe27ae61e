"""Accuracy on questions, by kind, and what a guess would reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import IGNORE, batch_of, inputs, position_ids
from benchmarks.video_needle.scene import CELLS, STEPS
from benchmarks.video_needle.vocabulary import ANSWERS, KINDS

#: Accuracy of a guess among the possible answers, by kind and over all (every kind is asked equally often).
CHANCE = {kind: 1 / len(words) for kind, words in ANSWERS.items()}
MEAN_CHANCE = sum(CHANCE.values()) / len(CHANCE)


@torch.no_grad()
def evaluate(
    model: Any, split: str, length: int, videos: int, batch: int, *, rounds: int = 1, visible: str = "all"
) -> dict[str, np.ndarray]:
    """Ask a model about videos.

    Args:
        model: A Qwen2.5-VL model of ``model.make_config``, sparse or dense.
        split: Which seeds.
        length: Visual tokens of a video.
        videos: How many.
        batch: Videos at once.
        rounds: Questions of each kind about a video.
        visible: What the model may see; see ``data.VISIBLE``.

    Returns:
        Arrays with one entry a question, in the order of videos: ``correct`` (bool), ``kind``
        (index into ``KINDS``) and ``video``.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: dict[str, list[Tensor]] = {"correct": [], "kind": [], "video": []}
    for first, size, given, answers, kinds in _batches(split, length, videos, batch, rounds, visible, device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**given, use_cache=False).logits
        asked = answers != IGNORE
        found["correct"].append((logits.argmax(-1)[asked] == answers[asked]).cpu())
        found["kind"].append(kinds[asked].cpu())
        found["video"].append(torch.arange(first, first + size).repeat_interleave(int(asked.sum()) // size))
    model.train(was_training)
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def _batches(
    split: str, length: int, videos: int, batch: int, rounds: int, visible: str, device: torch.device
) -> Iterator[tuple[int, int, dict[str, Tensor], Tensor, Tensor]]:
    steps = STEPS.get(length, length // CELLS)
    positions, clips = position_ids(steps, rounds, device), load().to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for first in range(0, videos, batch):
        size = min(batch, videos - first)
        made = batch_of(split, first, size, steps, rounds, visible)[0].to(device)
        yield first, size, inputs(made, positions, clips, dtype), made.answers, made.kinds


def by_kind(result: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy over all questions (``all``) and of each kind."""
    rows = {kind: result["correct"][result["kind"] == i] for i, kind in enumerate(KINDS)}
    return {"all": float(result["correct"].mean())} | {
        kind: float(hit.mean()) for kind, hit in rows.items() if hit.size
    }


def describe(accuracy: dict[str, float]) -> str:
    """``all 0.91  what 0.95 …``."""
    return "  ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
