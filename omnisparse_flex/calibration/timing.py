"""Milliseconds of a function, by the device's own clock where there is one."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Calls of a timed run.
QUEUED = 4

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one function.

    Attributes:
        median: Of all runs.
        low: Fastest run.
        high: Slowest run.
    """

    median: float
    low: float
    high: float


def milliseconds(
    function: Function, inputs: Sequence[tuple[Any, ...]], *, runs: int = 7, warm_up: int = 2, queued: int = QUEUED
) -> Timing:
    """Time ``function`` over rotated inputs.

    Args:
        function: Called with one element of ``inputs`` at a time.
        inputs: Several sets, so that no run finds its inputs in the cache.
        runs: Timed runs.
        warm_up: Calls before them.
        queued: Calls of a run, launched one after the other as a model launches its layers: what the
            host does is then hidden where, and only where, it takes less time than the device.

    Returns:
        Of one call, by CUDA events; by the wall clock without a GPU.
    """
    on_gpu = torch.cuda.is_available()
    turns = itertools.cycle(inputs)
    for _ in range(warm_up):
        function(*next(turns))
    times = []
    for _ in range(runs):
        if on_gpu:
            torch.cuda.synchronize()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(queued):
                function(*next(turns))
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / queued)
        else:
            begin = time.perf_counter()
            function(*next(turns))
            times.append(1e3 * (time.perf_counter() - begin))
    return Timing(statistics.median(times), min(times), max(times))
