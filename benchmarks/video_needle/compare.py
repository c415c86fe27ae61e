"""Dense against sparse inference of trained checkpoints, with controls at equal density, at several lengths.

python3 -m benchmarks.video_needle.compare --checkpoint dense=runs/dense --checkpoint sparse=runs/sparse \
    --lengths 2048,8192,32768 --videos 200 --out results --minutes 4
Call it again to go on: what the JSON in --out holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.video_needle import checkpoint
from benchmarks.video_needle.comparison import Comparison, family_of
from benchmarks.video_needle.families import FAMILIES
from benchmarks.video_needle.model import make_model
from benchmarks.video_needle.report import keep_figures, table
from benchmarks.video_needle.scene import STEPS
from benchmarks.video_needle.slim_cache import KNOWN
from omnisparse_flex.errors import ConfigError, require

#: Parts about the slim cache: after dense prefill, and after sparse prefill at the first target recall.
CACHE = ("slim", "together")


def load_model(directory: Path, device: torch.device) -> Any:
    """A checkpoint's model, ready to be asked.

    Raises:
        ConfigError: If it is missing, incomplete or of another config.
    """
    model = make_model(0, **checkpoint.read_record(directory)["sizes"])
    checkpoint.load(directory, model)
    return model.to(device).eval()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, help="name=directory; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSON, the table and the plot")
    parser.add_argument("--parts", default=",".join(("dense", *FAMILIES, *CACHE)), help="what to measure, in order")
    parser.add_argument("--lengths", default="2048,8192,32768", help="visual tokens")
    parser.add_argument("--videos", type=int, default=200, help="test videos a length; six questions each")
    parser.add_argument("--tokens", type=int, default=65536, help="visual tokens of a batch")
    parser.add_argument("--recalls", default="0.98,0.95,0.9,0.8,0.6", help="target recalls; empty: none")
    parser.add_argument("--ratios", default="2.4,4,8", help="full cache over slim cache; empty: none")
    parser.add_argument("--known", default=",".join(KNOWN), help="what of a question is known to the slim cache")
    parser.add_argument("--dense-layers", type=int, default=0, help="first layers that stay dense")
    parser.add_argument("--omnisparse", type=json.loads, default={}, help="further config fields as JSON")
    parser.add_argument("--tag", default="", help="told behind a family's name: tells rows of other rules apart")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing new after this time")
    parser.add_argument("--figures", action="store_true", help="record the summary's figures from what there is")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    options = parse(arguments)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        recalls, ratios = (tuple(float(x) for x in text.split(",") if x) for text in (options.recalls, options.ratios))
        lengths = [int(n) for n in options.lengths.split(",")]
        known = tuple(options.known.split(","))
        require(set(known) <= set(KNOWN), "known", f"hold only {', '.join(KNOWN)}", options.known)
        require(all(n in STEPS for n in lengths), "lengths", f"hold lengths of {sorted(STEPS)}", options.lengths)
        parts = [part for part in options.parts.split(",") if part]
        families = {part: family_of(part) for part in parts if part not in ("dense", *CACHE)}
        pairs = [pair.partition("=")[::2] for pair in options.checkpoint]
        todo = Comparison(
            options.out, options.videos, options.tokens, recalls, options.dense_layers, options.omnisparse, ratios,
            options.tag,
        )  # fmt: skip
        models = {name: load_model(Path(directory), device) for name, directory in pairs}
        sizes = {str(checkpoint.read_record(Path(directory))["sizes"]) for _, directory in pairs}
        require(len(sizes) == 1, "checkpoint", "be of one model config", sorted(sizes))
    except (ConfigError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    todo.deadline = started + 60 * options.minutes
    weights = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    model = next(iter(models.values()))
    for part in parts:
        if time.monotonic() > todo.deadline:
            break
        if part == "dense":
            todo.run_dense(weights, model, lengths)
        elif part in CACHE:
            todo.run_slim(weights, model, lengths, known, recalls[0] if part == "together" and recalls else None)
        else:
            todo.run_family(families[part], weights, model, lengths)
    print(table(todo.rows))
    if options.figures:
        print("\n".join(keep_figures(todo.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
