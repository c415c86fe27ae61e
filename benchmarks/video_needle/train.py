"""Train the small video-MLLM from scratch, in pieces of a few minutes that continue one another exactly.

python3 -m benchmarks.video_needle.train --minutes 3.5 --out runs/dense                      # dense
python3 -m benchmarks.video_needle.train --minutes 3.5 --out runs/dense --resume runs/dense  # go on
python3 -m benchmarks.video_needle.train --out runs/sparse --omnisparse '{}'                 # sparse from the start
python3 -m benchmarks.video_needle.train --out runs/tuned --init runs/dense --omnisparse '{}' --stages 8192:200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.video_needle import checkpoint
from benchmarks.video_needle.model import count_parameters
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.trainer import Trainer
from omnisparse_flex.errors import ConfigError, require


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint that is written")
    parser.add_argument("--minutes", type=float, default=3.5, help="wall clock of the whole call")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on with, exactly; takes its plan from there")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights a new run begins with")
    parser.add_argument("--omnisparse", type=json.loads, help="OmniSparseConfig fields as JSON; left out: dense")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers (dense only)")
    parser.add_argument("--last-step", type=int, default=1 << 40, help="stop here at the latest")
    parser.add_argument("--no-validate", action="store_true", help="skip the questions at the end")
    parser.add_argument("--final", action="store_true", help="keep the weights alone, in bfloat16; no resuming")
    parser.add_argument("--workers", type=int, default=max(0, min(10, (os.cpu_count() or 1) - 3)))
    for field in dataclasses.fields(Schedule):
        parser.add_argument(f"--{field.name}", type=type(field.default), help=f"default {field.default}")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> tuple[Schedule, dict[str, Any] | None, dict[str, int]]:
    """The schedule, sparsity and sizes: the checkpoint's when resuming, else the command line's.

    Raises:
        ConfigError: If a resumed run is asked to change its plan.
    """
    require(options.minutes > 0, "minutes", "be above 0", options.minutes)
    require(options.resume is None or options.init is None, "init", "be left out with --resume", str(options.init))
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Schedule)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.resume is None:
        sizes = checkpoint.read_record(options.init)["sizes"] if options.init else {}
        return Schedule(**given), options.omnisparse, sizes
    record = checkpoint.read_record(options.resume)
    require(not given, "resume", "come without changes of the plan", sorted(given))
    require(options.omnisparse in (None, record["omnisparse"]), "omnisparse", "be the checkpoint's", options.omnisparse)
    return Schedule(**record["schedule"]), record["omnisparse"], record["sizes"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for a while."""
    started = time.monotonic()
    options = parse(arguments)
    try:
        schedule, omnisparse, sizes = plan(options)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trainer = Trainer(schedule, device, omnisparse, sizes, options.compile)
        if options.resume:
            trainer.resume(options.resume)
        if options.init:
            trainer.begin_with(options.init)
    except ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    megabytes = 2 * count_parameters(trainer.model) / 2**20
    print(
        f"{count_parameters(trainer.model) / 1e6:.2f}M parameters ({megabytes:.1f} MiB in bf16), {device}", flush=True
    )
    deadline = started + 60 * options.minutes - (0 if options.no_validate else 6)
    trainer.run(deadline, options.last_step, options.workers)
    trainer.save(options.out, options.final)
    print(f"step {trainer.step} of {schedule.total} after {time.monotonic() - started:.0f} s", flush=True)
    if not options.no_validate:
        record = trainer.record() | {"validation": trainer.validate()}
        kept = checkpoint.read_record(options.out)
        (options.out / checkpoint.STATE).write_text(json.dumps(kept | record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
