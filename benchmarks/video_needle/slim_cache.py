"""Answers through a slim cache: the last tokens of a question are decoded from what the heads still hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.decode.needle_decode import Variant, budgeted  # benchmarks/needle_decode.py
from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import batch_of, inputs, make_batch, position_ids
from benchmarks.video_needle.scene import CELLS, STEPS
from benchmarks.video_needle.vocabulary import KINDS
from omnisparse_flex import OmniSparseCache, OmniSparseConfig, apply_omnisparse, remove_omnisparse
from omnisparse_flex.model.cache_argument import as_cache_argument
from omnisparse_flex.model.switches import DISABLE_VARIABLE

#: What of a question is known when keys are dropped: its first word, or all but the ``?`` (how a prompt arrives). The
#: rest is decoded.
KNOWN = ("kind", "question")


@contextlib.contextmanager
def dense_prefill(model: Any, config: OmniSparseConfig) -> Iterator[None]:
    """Only the cache is under test: attention of the prompt is dense, nothing is compiled."""
    before = os.environ.get(DISABLE_VARIABLE)
    os.environ[DISABLE_VARIABLE] = "1"
    apply_omnisparse(model, config)
    try:
        yield
    finally:
        remove_omnisparse(model)
        os.environ.pop(DISABLE_VARIABLE)
        if before is not None:
            os.environ[DISABLE_VARIABLE] = before


@contextlib.contextmanager
def sparse_prefill(model: Any, config: OmniSparseConfig) -> Iterator[None]:
    """All three mechanisms: the prompt is read sparsely, too."""
    apply_omnisparse(model, config, min_seq_len=0)
    try:
        yield
    finally:
        remove_omnisparse(model)


@torch.no_grad()
def ask_slim(
    model: Any, split: str, length: int, videos: int, batch: int, ratio: float | None, known: str = "question"
) -> dict[str, Any]:
    """Ask one question of each kind about each video, every question in a conversation of its own.

    Args:
        model: A model that ``apply_omnisparse`` changed.
        split: Which seeds.
        length: Visual tokens of a video.
        videos: How many.
        batch: Videos at once.
        ratio: Full cache over device memory; None: all keys are kept.
        known: One of ``KNOWN``: what of the question has been read when keys are dropped.

    Returns:
        ``correct``, ``kind``, ``video`` as ``evaluate`` returns them, in the same order; ``kv_ratio``, as measured.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct, kind, ratios = [], [], []
    for first in range(0, videos, batch):
        size = min(batch, videos - first)
        _, scenes, asked = batch_of(split, first, size, STEPS.get(length, length // CELLS), 1)
        right = np.zeros((size, len(KINDS)), dtype=bool)
        for name in KINDS:
            places = [[question.kind for question in row].index(name) for row in asked]
            chosen = [[row[place]] for row, place in zip(asked, places, strict=True)]
            answers, measured = _decode(model, make_batch(scenes, chosen).to(device), ratio, known)
            right[np.arange(size), places] = answers
            ratios.append(measured)
        correct.append(right.flatten())
        kind.append(np.array([[KINDS.index(question.kind) for question in row] for row in asked]).flatten())
    model.train(was_training)
    video = np.repeat(np.arange(videos), len(KINDS))
    found = {"correct": np.concatenate(correct), "kind": np.concatenate(kind), "video": video}
    return found | {"kv_ratio": float(np.mean(ratios))}


def _decode(model: Any, batch: Any, ratio: float | None, known: str) -> tuple[np.ndarray, float]:
    """Whether each row's answer is right, and the full cache's bytes over those held."""
    ids, dtype = batch.input_ids, next(model.parameters()).dtype
    positions = position_ids(batch.steps, 1, ids.device)[..., : ids.shape[1]]
    given = inputs(batch, positions, load().to(ids.device), dtype)
    start = 2 + batch.steps * CELLS + 1 if known == "kind" else ids.shape[1] - 1
    cache = OmniSparseCache(model, visual_recall=1.0 if ratio is None else 0.95, offload=False)
    if ratio is not None:
        text = model.config.text_config
        width = 2 * text.hidden_size // text.num_attention_heads * dtype.itemsize
        cache.store.chooser = budgeted(Variant("slim", ratio), start, width, [])
    prompt = given | {"input_ids": ids[:, :start], "position_ids": given["position_ids"][..., :start]}
    model(**prompt, **as_cache_argument(model.forward, cache), use_cache=True, logits_to_keep=1)
    for at in range(start, ids.shape[1]):
        step = {"input_ids": ids[:, at : at + 1], "position_ids": given["position_ids"][..., at : at + 1]}
        logits = model(**step, **as_cache_argument(model.forward, cache), use_cache=True).logits
    right = logits[:, -1].argmax(-1) == batch.answers[:, -1]
    return right.cpu().numpy(), cache.memory_report().ratio
