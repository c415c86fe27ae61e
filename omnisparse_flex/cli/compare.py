"""Dense against sparse on one input: times, and distances of the outputs."""

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

Inputs = Mapping[str, Any]


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
        self.call = self.__wrapped__ = module._compiled_call_impl
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
    logits: Tensor = prefill(model, inputs, positions).logits[0, -positions:].float()
    return logits


def prefill(model: nn.Module, inputs: Inputs, positions: int) -> Any:
    """The model's own output of one prefill, with the logits of the last ``positions``; see ``last_logits``."""
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
