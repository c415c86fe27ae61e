"""Dense against sparse inference of trained checkpoints, with controls at equal density, at several lengths.

python3 benchmarks/video_needle/compare.py --checkpoint dense=runs/dense --checkpoint sparse=runs/sparse \
    --lengths 2048,8192,32768 --videos 200 --out results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, remove_omnisparse
from omnisparse_flex.entry import entry_of
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.stats import Stats
from video_needle import checkpoint
from video_needle.controls import SCORERS, match_density, scoring
from video_needle.evaluate import by_kind, describe, evaluate
from video_needle.intervals import interval
from video_needle.model import make_model
from video_needle.report import table, write
from video_needle.scene import STEPS

#: What ``evaluate`` returns, and the seconds it took.
Answers = dict[str, np.ndarray]
#: Text tokens around the video: two markers and one round of questions.
TEXT = 26


@dataclasses.dataclass
class Comparison:
    """Everything that is asked of every checkpoint.

    Attributes:
        videos: Test videos a length; six questions each.
        tokens: Visual tokens of a batch.
        recalls: Target recalls of the sparse runs.
        dense_layers: First layers that stay dense.
        controls: Controls that also run, at the density of every sparse run.
        base: Further fields of the config.
        deadline: Time (``time.monotonic``) after which no further run is begun.
    """

    videos: int
    tokens: int
    recalls: tuple[float, ...]
    dense_layers: int
    controls: tuple[str, ...]
    base: dict[str, Any]
    deadline: float = float("inf")
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    dense: dict[tuple[str, int], Answers] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.videos > 0, "videos", "be above 0", self.videos)
        require(self.tokens > 0, "tokens", "be above 0", self.tokens)
        require(self.dense_layers >= 0, "dense-layers", "be at least 0", self.dense_layers)
        for recall in self.recalls:
            OmniSparseConfig.from_dict({**self.base, "target_recall": recall})
        for control in self.controls:
            require(control in SCORERS, "controls", f"hold only {', '.join(SCORERS)}", control)

    def run_dense(self, name: str, model: Any, length: int) -> None:
        """Dense inference, and what can be known without seeing the events."""
        for visible, label in (("all", "dense"), ("last", "last frame only"), ("none", "text only")):
            if time.monotonic() < self.deadline:
                found = self._ask(model, length, visible)
                self.dense.setdefault((name, length), found)
                self._note(name, length, label, found, density=1.0)

    def run_sparse(self, models: dict[str, dict[str, Tensor]], model: Any, lengths: list[int]) -> None:
        """Sparse inference, then each control; every one is a single compiled graph for all weights and lengths."""
        layers = model.config.text_config.num_hidden_layers
        flat = [1.0] * self.dense_layers + [0.5] * (layers - self.dense_layers)
        densities: dict[tuple[str, int, float], float] = {}
        for control in (None, *self.controls):
            config = OmniSparseConfig.from_dict({**self.base, "target_recall": tuple(flat)})
            if control is not None:
                config = dataclasses.replace(config, lazy_threshold=None, max_kv_budget=None, budget="per_head")
            apply_omnisparse(model, config, min_seq_len=0, dynamic=True)
            try:
                with scoring(control), collect_stats(model) as stats:
                    for name, weights in models.items():
                        model.load_state_dict(weights)
                        for length in lengths:
                            self._sparse(name, model, length, stats, control, densities)
            finally:
                remove_omnisparse(model)

    def _sparse(
        self,
        name: str,
        model: Any,
        length: int,
        stats: Stats,
        control: str | None,
        densities: dict[tuple[str, int, float], float],
    ) -> None:
        """All recalls of one checkpoint at one length."""
        for recall in self.recalls:
            if time.monotonic() > self.deadline or (control and (name, length, recall) not in densities):
                continue
            label, target = f"recall {recall:g}", recall
            if control is not None:
                label = f"{control} at recall {recall:g}'s density"
                wanted = densities[name, length, recall]
                target = match_density(lambda x: self._density(model, length, stats, x), wanted)
            self._set_target(model, target)
            found = self._ask(model, length)
            if control is None:
                densities[name, length, recall] = stats.density
            self._note(name, length, label, found, density=stats.density, target=target)

    def _density(self, model: Any, length: int, stats: Stats, target: float) -> float:
        self._set_target(model, target)
        evaluate(model, "test", length, 1, 1)
        return stats.density

    def _set_target(self, model: Any, target: float) -> None:
        """The targets are an input of the compiled graph, so it need not be compiled again."""
        entry = entry_of(model)
        assert entry is not None
        entry.state.recall[self.dense_layers :] = target

    def _ask(self, model: Any, length: int, visible: str = "all") -> Answers:
        batch = max(1, self.tokens // length)
        started = time.perf_counter()
        # Whole batches only: a ragged last one would compile once more.
        found = evaluate(model, "test", length, -(-self.videos // batch) * batch, batch, visible=visible)
        return found | {"seconds": np.asarray(time.perf_counter() - started)}

    def _note(self, name: str, length: int, label: str, found: Answers, **more: Any) -> None:
        dense = self.dense[name, length]
        mean, low, high = interval(found["correct"], found["video"])
        behind = dense["correct"].astype(float) - found["correct"].astype(float)
        row = {
            "checkpoint": name,
            "length": length,
            "inference": label,
            "questions": len(found["correct"]),
            "accuracy": mean,
            "interval": [low, high],
            "points_behind_dense": [100 * x for x in interval(behind, found["video"])],
            "by_kind": by_kind(found),
            "seconds": float(found["seconds"]),
            **more,
        }
        self.rows.append(row)
        loss, least, most = row["points_behind_dense"]
        print(
            f"{name} {length} {label}: density {row['density']:.3f} behind dense {loss:.1f} [{least:.1f}, {most:.1f}]"
        )
        print(f"    {describe(row['by_kind'])}  ({row['seconds']:.0f} s)", flush=True)


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
    parser.add_argument("--lengths", default="2048,8192,32768", help="visual tokens")
    parser.add_argument("--videos", type=int, default=200, help="test videos a length; six questions each")
    parser.add_argument("--tokens", type=int, default=65536, help="visual tokens of a batch")
    parser.add_argument("--recalls", default="0.98,0.95,0.9,0.8,0.6", help="target recalls; empty: none")
    parser.add_argument("--dense-layers", type=int, default=0, help="first layers that stay dense")
    parser.add_argument("--omnisparse", type=json.loads, default={}, help="further config fields as JSON")
    parser.add_argument("--controls", default="window only,random", help="at the same densities; empty: none")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing new after this time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    options = parse(arguments)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        recalls = tuple(float(r) for r in options.recalls.split(",") if r)
        lengths = [int(n) for n in options.lengths.split(",")]
        require(all(n in STEPS for n in lengths), "lengths", f"hold lengths of {sorted(STEPS)}", options.lengths)
        pairs = [pair.partition("=")[::2] for pair in options.checkpoint]
        controls = tuple(c for c in options.controls.split(",") if c)
        todo = Comparison(options.videos, options.tokens, recalls, options.dense_layers, controls, options.omnisparse)
        models = {name: load_model(Path(directory), device) for name, directory in pairs}
        sizes = {str(checkpoint.read_record(Path(directory))["sizes"]) for _, directory in pairs}
        require(len(sizes) == 1, "checkpoint", "be of one model config", sorted(sizes))
    except (ConfigError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    todo.deadline = started + 60 * options.minutes
    for name, model in models.items():
        for length in lengths:
            todo.run_dense(name, model, length)
    write(todo.rows, options.out)
    weights = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    todo.run_sparse(weights, next(iter(models.values())), lengths)
    write(todo.rows, options.out)
    print(table(todo.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
