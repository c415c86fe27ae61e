"""Dense against sparse on one input: times, distances of the outputs, and the random control."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnisparse_flex.masks.blocks import budget as budgets
from omnisparse_flex.masks.blocks import select

Inputs = Mapping[str, Any]

#: Added to a layer's target recall, it asks for the random control; see ``random_switch``.
RANDOM = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One way of running a prefill.

    Attributes:
        logits: float32 (positions, vocabulary), the last positions of the first batch row.
        model_s: Median time to the first token of the whole model, in seconds.
        decoder_s: Median share of the text decoder, in seconds.
        peak_bytes: Most memory in use, or None where it is not measured (CPU).
    """

    logits: Tensor
    model_s: float
    decoder_s: float
    peak_bytes: int | None


class _Stopwatch:
    """Stands in front of a module's call and sums up its time."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.call = module._compiled_call_impl
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = _now()
        result = (self.call or self.module._call_impl)(*args, **kwargs)
        self.seconds += _now() - begun
        return result


@contextlib.contextmanager
def _timed(module: nn.Module) -> Iterator[_Stopwatch]:
    watch = _Stopwatch(module)
    module._compiled_call_impl = watch
    try:
        yield watch
    finally:
        module._compiled_call_impl = watch.call


@torch.no_grad()
def last_logits(model: nn.Module, inputs: Inputs, positions: int) -> Tensor:
    """One prefill with a cache, as ``generate`` starts.

    Args:
        model: A causal language model of transformers.
        inputs: Its keyword arguments.
        positions: How many of the last positions to return.

    Returns:
        float32 (positions, vocabulary) of the first batch row.
    """
    logits: Tensor = _prefill(model, inputs, positions).logits[0, -positions:].float()
    return logits


def _prefill(model: nn.Module, inputs: Inputs, positions: int) -> Any:
    # Old or unusual models compute the logits of every position.
    fewer = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(**inputs, use_cache=True, **fewer)


def measure(model: nn.Module, decoder: nn.Module, inputs: Inputs, positions: int, repeats: int = 3) -> Run:
    """Prefill once to warm up (and compile), then ``repeats`` times against the clock.

    Args:
        model: A causal language model of transformers.
        decoder: Its text decoder.
        inputs: The model's keyword arguments.
        positions: How many of the last positions' logits to keep.
        repeats: Timed runs.

    Returns:
        The medians, and the last run's logits.
    """
    logits = last_logits(model, inputs, positions)
    cuda = logits.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    whole, part = [], []
    for _ in range(repeats):
        with _timed(decoder) as watch:
            begun = _now()
            logits = last_logits(model, inputs, positions)
            whole.append(_now() - begun)
        part.append(watch.seconds)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Run(logits, statistics.median(whole), statistics.median(part), peak)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor."""
    return float((approximate - exact).norm() / exact.norm())


def top1_agreement(approximate: Tensor, exact: Tensor) -> float:
    """Share of positions whose most likely token is the same; logits (positions, vocabulary)."""
    return float((approximate.argmax(-1) == exact.argmax(-1)).float().mean())


def mean_kl(approximate: Tensor, exact: Tensor) -> float:
    """KL(exact || approximate) of the next-token distributions in nats, mean over positions."""
    p, q = F.log_softmax(exact.double(), -1), F.log_softmax(approximate.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def greedy(model: nn.Module, inputs: Inputs, tokens: int, positions: int) -> list[int]:
    """Greedily generated token ids of the first batch row; the end token does not stop it.

    The steps of ``generate``, but from the prefill that ``measure`` runs: ``generate`` hands the
    decoder other position tensors, and that would be one more graph to compile.

    Args:
        model: A causal language model of transformers.
        inputs: Its keyword arguments: one row without padding.
        tokens: How many.
        positions: As in ``measure``, so that the graph is the same.
    """
    output = _prefill(model, inputs, positions)
    found: list[int] = []
    for _ in range(tokens):
        found.append(int(output.logits[0, -1].argmax()))
        step = torch.tensor([found[-1:]], device=output.logits.device)
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
    return found


@contextlib.contextmanager
def random_switch(seed: int = 0) -> Iterator[None]:
    """Control: graphs that compile in this context choose random blocks where the target says so.

    A target raised by ``RANDOM`` leaves the estimator, the budgets, the always-kept blocks and
    the active rows what they are; only which eligible blocks a row spends its budget on is
    drawn at random. One graph serves both, so that the control costs no compile of its own.

    Args:
        seed: Of the draw, which is a fixed function of (head, row, column).
    """
    switches: list[Tensor] = []

    def need(sorted_mass: Tensor, kept_mass: Tensor, eligible_count: Tensor, target: Tensor | float) -> Tensor:
        asked = torch.as_tensor(target, dtype=torch.float32, device=sorted_mass.device)
        switches.append(asked > RANDOM - 0.5)
        real = torch.where(switches[-1], asked - RANDOM, asked)
        return budgets.need(sorted_mass, kept_mass, eligible_count, real)

    def keep_top(order: Tensor, eligible: Tensor, budget: Tensor) -> Tensor:
        drawn = budgets.rank(_noise(order, seed), eligible)[1]
        return budgets.keep_top(torch.where(switches.pop(), drawn, order), eligible, budget)

    select.need, select.keep_top = need, keep_top  # type: ignore[attr-defined]
    try:
        yield
    finally:
        select.need, select.keep_top = budgets.need, budgets.keep_top  # type: ignore[attr-defined]


def _noise(like: Tensor, seed: int) -> Tensor:
    """Values in (0, 1) by position; (B, H, NQ, NK). A hash: random operators do not trace into every graph."""
    _, heads, rows, columns = like.shape
    h = torch.arange(heads, device=like.device).view(-1, 1, 1)
    q = torch.arange(rows, device=like.device).view(-1, 1)
    kv = torch.arange(columns, device=like.device)
    state = (h * 7919 + q * 104729 + kv * 1299709 + seed * 15485863 + 12345) % 2147483647
    for _ in range(3):  # a Lehmer generator's step; int64 holds its product
        state = (state * 48271 + 11) % 2147483647
        state = state ^ (state >> 15)
    return ((state % 2147483647).to(torch.float32) + 1).div(2147483649.0).expand_as(like)
