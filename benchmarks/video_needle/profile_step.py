"""Where the time of a training step goes: phases by wall clock, operators by device and host time.

python3 -m benchmarks.video_needle.profile_step --compile --length 512 --tokens 16384 > profile.txt
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.video_needle.data import Batch
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.trainer import StepData, Trainer

#: Steps before anything is measured, and measured ones.
WARM, MEASURED = 10, 10


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    parser.add_argument("--length", type=int, default=512, help="visual tokens of a video")
    parser.add_argument("--tokens", type=int, default=32768, help="visual tokens of a batch")
    parser.add_argument("--rounds", type=int, default=8, help="questions of each kind about a video")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Schedule(stages=f"{options.length}:1000", tokens=options.tokens, rounds=options.rounds)
    trainer = Trainer(plan, device, compile_layers=options.compile)
    batch = StepData(plan)[0]
    for _ in range(WARM):
        trainer.train_step(batch)
    for name, milliseconds in phases(trainer, plan, batch).items():
        print(f"{name:12s} {milliseconds:8.2f} ms")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            trainer.train_step(batch)
    for order in (f"self_{device.type}_time_total", "self_cpu_time_total"):
        print(profile.key_averages().table(sort_by=order, row_limit=18, max_name_column_width=60))
    return 0


def phases(trainer: Trainer, plan: Schedule, batch: Batch) -> dict[str, float]:
    """Milliseconds of each phase, the device waited for after every one; ``step`` is a whole one without waiting.

    On a GPU the update is the replay of a CUDA graph.
    """
    found = dict.fromkeys(("data", "pixels", "update", "step"), 0.0)
    wait = torch.cuda.synchronize if trainer.device.type == "cuda" else (lambda: None)

    def note(name: str, since: float) -> float:
        wait()
        now = time.perf_counter()
        found[name] += 1000 * (now - since) / MEASURED
        return now

    for step in range(MEASURED):
        wait()
        now = time.perf_counter()
        made = StepData(plan)[step]
        now = note("data", now)
        tensors = trainer.tensors(made)
        now = note("pixels", now)
        trainer.update(*tensors)
        note("update", now)
    now = time.perf_counter()
    for _ in range(MEASURED):
        trainer.train_step(batch)
    note("step", now)
    return found


if __name__ == "__main__":
    sys.exit(main())
