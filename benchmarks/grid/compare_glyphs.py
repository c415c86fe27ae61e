"""Raster order, ZipAR and NAR on glyphs of 16 x 16 bits: forwards, counted, and exact bits per pixel, held out.

    python -m benchmarks.grid.compare_glyphs /usr/share/unifont/unifont.hex [--seeds 3] [--record]

Every decoder has the same size and sees the same batches. The bits of a ZipAR window are those of its parallel
decoding, from one masked forward; those of NAR likewise. Wall time is not measured here.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import summary
from benchmarks.grid import glyphs, models
from omnisparse_flex.grid import nar_generate, zipar_generate

RESULTS = summary.ROOT / "benchmarks" / "results" / "grid_glyphs.json"
WINDOWS = (16, 12, 8, 6, 4, 2, 1)
#: Held-out glyphs whose likelihood is taken, and images that are generated to count forwards.
TAKEN, DRAWN = 512, 4


@torch.no_grad()
def bits(loss: Any, held_out: Tensor) -> float:
    """Bits per pixel: ``loss(batch)`` gives nats per pixel."""
    chunks = held_out[:TAKEN].split(64)
    nats = sum(float(loss(chunk)) * len(chunk) for chunk in chunks) / sum(map(len, chunks))
    return nats / math.log(2)


def counted(module: nn.Module) -> list[int]:
    """A list that grows by one at each call of ``module``."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def zipar_forwards(model: Any, window: int | str, rows: int, min_window: int = 2) -> int:
    calls, start = counted(model), torch.full((rows, 1), glyphs.START, device=model.device)
    output = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        custom_generate=zipar_generate,
        grid=models.GRID,
        window=window,
        min_window=min_window,
        do_sample=True,
        suppress_tokens=[glyphs.START, glyphs.OTHER],
        max_new_tokens=glyphs.SIDE**2,
        return_dict_in_generate=True,
    )
    assert output.forwards == len(calls)
    return len(calls)


def measure(training: Tensor, held_out: Tensor, size: models.Size, seed: int) -> dict[str, Any]:
    """Train the three decoders of one seed; rows of forwards and bits per pixel."""
    rows: dict[str, Any] = {}
    for name, window in (("raster", glyphs.SIDE), ("random_windows", None)):
        model = models.raster_model(training, size, seed, window)
        for decoded in WINDOWS:
            held = bits(lambda batch, w=decoded, m=model: models.zipar_nats(m, batch, w), held_out)
            rows[f"{name}.window_{decoded}"] = {"forwards": zipar_forwards(model, decoded, 1), "bits": held}
        adaptive = [zipar_forwards(model, "adaptive", 1) for _ in range(DRAWN)]
        rows[f"{name}.adaptive"] = {"forwards": sum(adaptive) / len(adaptive)}
    model, heads = models.nar_model(training, size, seed)
    calls = counted(model.model)
    nar_generate(model.model, heads, torch.full((1, 1), glyphs.START, device=model.device))
    forwards = len(calls)
    held = bits(lambda batch: models.nar_nats(model, heads, batch), held_out)
    rows["nar"] = {"forwards": forwards, "bits": held}
    return rows


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    lines = ["decoder                      forwards  bits per pixel"]
    for name in runs[0]:
        forwards, held = ([run[name][field] for run in runs if field in run[name]] for field in ("forwards", "bits"))
        shown = f"{sum(held) / len(held):.4f}" if held else "-"
        lines.append(f"{name:28} {sum(forwards) / len(forwards):8.1f}  {shown}")
    return "\n".join(lines)


def figures(runs: list[dict[str, Any]], size: models.Size) -> dict[str, tuple[float, str, str]]:
    """name -> (value, unit, baseline), of the seeds' means."""

    def mean(name: str, field: str) -> float:
        return sum(run[name][field] for run in runs) / len(runs)

    def bits_against_raster(name: str) -> float:
        return round(mean(name, "bits") / mean("raster.window_16", "bits"), 4)

    def saved(window: int) -> float:
        return round(100 * (1 - mean(f"raster.window_{window}", "forwards") / 256), 1)

    training = f"{size.layers} layers of {size.width}, {size.steps} steps of {size.batch}, mean of {len(runs)} seeds"
    against = f"held-out bits of a raster model, 16x16 glyphs; {training}"
    found = {"zipar.forwards_saved_pct": (saved(8), "%", "256 forwards of raster order; 16x16, window 8")}
    for window in (8, 2):
        for name, how in (("raster", "as trained"), ("random_windows", "trained under random windows")):
            figure = f"zipar.bits_ratio.w{window}{'.trained' if name != 'raster' else ''}"
            found[figure] = (bits_against_raster(f"{name}.window_{window}"), "x", f"{against}; {how}")
    forwards = int(mean("nar", "forwards"))
    found["nar.forwards.image"] = (forwards, "forwards", "256 of raster order; 16x16")
    found["nar.bits_ratio"] = (bits_against_raster("nar"), "x", against)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("font", type=Path, help="a .hex file with glyphs of 16 x 16 bits")
    for name, value in (("seeds", 1), ("layers", 3), ("width", 64), ("batch", 16), ("steps", 400)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="write the figures into the summary")
    options = parser.parse_args()
    training, held_out = (part.to(options.device) for part in glyphs.split(glyphs.read(options.font)))
    size = models.Size(options.layers, options.width, options.batch, options.steps)
    runs = [measure(training, held_out, size, seed) for seed in range(options.seeds)]
    print(table(runs))
    content = {
        "runs": runs,
        "size": vars(size),
        "glyphs": [len(training), len(held_out)],
        "device": summary.device_name(),
        "torch": torch.__version__,
        "commit": summary.commit(),
    }
    summary.write_json(content, RESULTS)
    if options.record:
        summary.record_results(figures(runs, size), content, __file__)


if __name__ == "__main__":
    main()
