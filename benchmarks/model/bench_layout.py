"""What is kept before any query or key is looked at, where a model writes text before every frame.

    python3 -m benchmarks.model.bench_layout [--record]

A prompt of 32K tokens as Qwen3-VL lays it out: 20 tokens of a system prompt, frames of 64 to 256 tokens with a
timestamp of 10 before each, a question of 40. Shares are of the causal block pairs, under the default sinks and window.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import summary
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.expr.block_bounds import Grid, any_in_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

SCRIPT = "benchmarks/model/bench_layout.py"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "layout.json"
TOKENS, HEAD, TAIL, STAMP = 32768, 20, 40, 10
FRAMES = (64, 128, 196, 256)
#: Tokens of other texts before each frame: captions, and what just is not a long run.
STAMPS = (2, 10, 60, 127, 128)


def interleaved(frame: int, stamp: int, tokens: int = TOKENS) -> Tensor:
    """bool (1, N): the visual tokens of a prompt with ``stamp`` tokens of text before each frame of ``frame``."""
    places = torch.arange(tokens)
    visual = (places - HEAD) % (frame + stamp) >= stamp
    visual[:HEAD] = visual[-TAIL:] = False
    return visual[None]


def shares(visual: Tensor) -> dict[str, float]:
    """Kept shares of the causal block pairs: by rule, by sinks and window, and if every block with text stayed."""
    count, config = visual.shape[1], OmniSparseConfig()
    grid = Grid(1, 1, count, count, BLOCK, visual.device, config.split)
    found = block_layout(IndexMask(causal()), grid, config, visual=visual)
    text = found.some & any_in_blocks(~visual, 1, grid.kv_blocks, grid.kv_block)[:, None, None]
    maps = {"always_kept": found.forced, "near": found.near, "every_text_block": found.near | text}
    return {name: (kept.sum() / found.some.sum()).item() for name, kept in maps.items()}


def main(arguments: list[str] | None = None) -> int:
    """Count, print and write; ``--record`` writes the figures too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the figures into the summary")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for stamp in STAMPS:
        for frame in FRAMES:
            rows.append({"frame": frame, "stamp": stamp, **shares(interleaved(frame, stamp))})
            print(*(f"{name} {value:.3g}" for name, value in rows[-1].items()), sep=", ")
    summary.write_json({"tokens": TOKENS, "head": HEAD, "tail": TAIL, "rows": rows}, RESULTS)
    if options.record:
        for row in (row for row in rows if row["stamp"] == STAMP):
            other = f"{row['every_text_block']:.3f} with every block that holds text"
            baseline = f"causal block pairs, 32K tokens, {STAMP} of text before each frame; {other}"
            name, value = f"layout.always_kept.{row['frame']}", round(row["always_kept"], 4)
            summary.record(name, value, unit="share, 0-1", baseline=baseline, script=SCRIPT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
