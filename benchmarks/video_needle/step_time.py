"""Time of a training step at 32K visual tokens, dense against sparse: the whole step, and attention alone.

python3 -m benchmarks.video_needle.step_time --init models/video_needle --out DIR
Attention alone is timed on the queries, keys and values of a middle layer, forward and backward; the figure is of its
replay as a CUDA graph.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import summary
from benchmarks.common.gpu_timing import captured as captured_call
from benchmarks.speed_quality.quality_speed_cases import operating_point
from benchmarks.video_needle import checkpoint, release
from benchmarks.video_needle.data import Batch
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.trainer import StepData, Trainer
from benchmarks.video_needle.vocabulary import IDS
from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats
from omnisparse_flex.errors import ConfigError

#: Steps or calls before anything is measured.
WARM = 3


def median_ms(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median milliseconds of a call, the device waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    found = []
    for _ in range(WARM + repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found[WARM:])


def captured(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value that SDPA gets in the middle layer; (1, H, N, D) each, detached."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = F.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        if query.shape[-2] == batch.input_ids.shape[1]:  # the decoder's, not the vision tower's
            calls.append((query.detach(), key.detach(), value.detach()))
        return attend(query, key, value, *more, **options)

    F.scaled_dot_product_attention = note
    try:
        with torch.no_grad():
            trainer.forward(batch)
    finally:
        F.scaled_dot_product_attention = attend
    dtype = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
    middle = calls[len(calls) // 2]
    return tuple(x.to(dtype) for x in middle)  # type: ignore[return-value]


class Attention(nn.Module):
    """One call of SDPA; the parameter only says on which device it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, Hq, N, D) and (B, Hkv, N, D) in, (B, Hq, N, D) out."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def attention_ms(parts: tuple[Tensor, ...], attend: Callable[..., Tensor], repeats: int) -> dict[str, float]:
    """Median milliseconds of forward and backward: replayed as a CUDA graph, and launched from Python.

    A layer by itself waits for the host, which in a step runs ahead: its launches say little of the device.
    """
    leaves = [x.clone().requires_grad_() for x in parts]
    gradient = torch.randn_like(leaves[0])

    def step() -> None:
        torch.autograd.grad(attend(*leaves), leaves, gradient)

    device = parts[0].device
    found = {"launched": median_ms(step, repeats, device)}
    if device.type == "cuda":
        found["replayed"] = median_ms(captured_call(step, [()]), repeats, device)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, help="checkpoint or released model to begin with; none: fresh weights")
    parser.add_argument(
        "--omnisparse", type=json.loads, help="OmniSparseConfig fields as JSON; default: the released model's"
    )
    parser.add_argument("--length", type=int, default=32768, help="visual tokens of the one video of a step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="folder of step_time.json")
    parser.add_argument("--figures", action="store_true", help="record the summary's figure (32K tokens only)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Schedule(stages=f"{options.length}:100", tokens=options.length, rounds=1)
    try:
        given = options.omnisparse
        config = operating_point()[0] if given is None else OmniSparseConfig.from_dict(given)
        sizes = _sizes(options.init) if options.init else {}
        for result in measure(plan, config, sizes, options, device):
            print(json.dumps(result, indent=1), flush=True)
            keep(result, options)
    except ConfigError as error:
        print(f"step_time.py: {error}", file=sys.stderr)
        return 2
    return 0


def keep(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what there is so far, and record the figure."""
    summary.write_json(result, options.out / "step_time.json")
    if options.figures and options.length == 32768:
        attention = result["attention_ms"]
        dense, sparse = (attention[name] for name in ("dense", "sparse"))
        told = f"attention, forward and backward, SDPA; density {result['density']:.3f}, CUDA graphs; launched from "
        told += f"Python {dense['launched'] / sparse['launched']:.2f}x"
        if "sparse" in result["step_ms"]:
            told += f"; the whole step {result['step_ms']['dense'] / result['step_ms']['sparse']:.2f}x"
        value = dense["replayed"] / sparse["replayed"]
        summary.record("video.train_step_speedup.32k", value, unit="x", baseline=told, script=__file__)


def measure(
    plan: Schedule, config: OmniSparseConfig, sizes: dict[str, int], options: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Milliseconds of attention, dense and sparse, and its density; then, as a second result, of the whole step too."""
    batch = StepData(plan)[0].to(device)
    parts = captured(_trainer(plan, device, None, sizes, options.init), batch)
    visual = batch.input_ids == IDS["<video>"]
    dense = Attention().to(device)
    sparse = apply_omnisparse(Attention().to(device), config, min_seq_len=0, visual_mask=visual)
    attention = {
        "dense": attention_ms(parts, dense, options.repeats),
        "sparse": attention_ms(parts, sparse, options.repeats),
    }
    with collect_stats(sparse) as stats, torch.no_grad():
        sparse(*parts)
    shape = {"length": options.length, "query": list(parts[0].shape), "key": list(parts[1].shape)}
    told = {"config": config.to_dict(), "torch": torch.__version__, "device": summary.device_name()}
    result: dict[str, Any] = {"attention_ms": attention, "density": stats.density, "step_ms": {}, **shape, **told}
    yield result
    for name, fields in (("dense", None), ("sparse", config.to_dict())):
        compiled = fields is None and device.type == "cuda"
        trainer = _trainer(plan, device, fields, sizes, options.init, compile_layers=compiled)
        result["step_ms"][name] = median_ms(functools.partial(trainer.train_step, batch), options.repeats, device)
    with collect_stats(trainer.model) as stats, torch.no_grad():
        trainer.forward(batch)
    result["step_density"] = stats.density
    yield result


def _trainer(
    plan: Schedule,
    device: torch.device,
    fields: dict[str, Any] | None,
    sizes: dict[str, int],
    init: Path | None,
    compile_layers: bool = False,
) -> Trainer:
    trainer = Trainer(plan, device, fields, sizes, compile_layers=compile_layers)
    if init and _released(init):
        trainer.model.load_state_dict(release.load(init).state_dict())
    elif init:
        checkpoint.load(init, trainer.model)
    return trainer


def _released(init: Path) -> bool:
    return (init / release.FACTS).is_file()


def _sizes(init: Path) -> dict[str, int]:
    """The model's sizes; raises ConfigError if ``init`` is neither a released model nor a checkpoint."""
    told = release.facts(init) if _released(init) else checkpoint.read_record(init)
    sizes: dict[str, int] = told["sizes"]
    return sizes


if __name__ == "__main__":
    sys.exit(main())
