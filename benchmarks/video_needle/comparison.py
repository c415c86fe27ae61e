"""Every way of inference asked of every checkpoint, at every length; rows that exist are not measured again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.intervals import interval
from benchmarks.video_needle import report
from benchmarks.video_needle.controls import match_density, scoring
from benchmarks.video_needle.evaluate import by_kind, describe, evaluate
from benchmarks.video_needle.families import FAMILIES, Family
from benchmarks.video_needle.slim_cache import KNOWN, ask_slim, dense_prefill, sparse_prefill
from omnisparse_flex import apply_omnisparse, collect_stats, remove_omnisparse
from omnisparse_flex.errors import require
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.stats import Stats

#: What a model may see, by the name of the row.
BASELINES = {"dense": "all", "last frame only": "last", "text only": "none"}
Weights = dict[str, dict[str, Tensor]]


@dataclasses.dataclass
class Comparison:
    """What is asked, and the answers so far.

    Attributes:
        out: Folder of the JSON, the table and the plot; rows in it are kept.
        videos: Test videos a length; six questions each.
        tokens: Visual tokens of a batch.
        recalls: Target recalls of the sparse runs.
        dense_layers: First layers that stay dense.
        base: Fields of every sparse config.
        ratios: Full cache over slim cache.
        tag: Tells rows of these rules from rows of others in one folder: ``"OmniSparse, 64 rows"``; "": none.
        deadline: Time (``time.monotonic``) after which no further run is begun.
    """

    out: Path
    videos: int
    tokens: int
    recalls: tuple[float, ...]
    dense_layers: int
    base: dict[str, Any]
    ratios: tuple[float, ...] = (2.4, 4.0, 8.0)
    tag: str = ""
    deadline: float = float("inf")
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Check every field and read the rows that exist."""
        require(self.videos > 0, "videos", "be above 0", self.videos)
        require(self.tokens > 0, "tokens", "be above 0", self.tokens)
        require(self.dense_layers >= 0, "dense-layers", "be at least 0", self.dense_layers)
        for recall in self.recalls:
            require(0 < recall < 1, "recalls", "be in (0, 1)", recall)
        for ratio in self.ratios:
            require(ratio > 1, "ratios", "be above 1", ratio)
        Family("").config(self.base, 1, 0)
        self.rows = report.read(self.out)
        for row in self.rows:
            asked = row["videos"] >= self.videos
            require(asked, "out", f"hold rows of at least {self.videos} videos", row["videos"])

    def run_dense(self, weights: Weights, model: Any, lengths: list[int]) -> None:
        """Dense inference; up to the trained length also what can be known without seeing the events."""
        for name, state in weights.items():
            model.load_state_dict(state)
            for length in lengths:
                for label, visible in BASELINES.items():
                    if visible != "all" and length > report.TRAINED:
                        continue
                    self._once(name, length, label, lambda n=length, v=visible: self._ask(model, n, v), density=1.0)

    def run_family(self, family: Family, weights: Weights, model: Any, lengths: list[int]) -> None:
        """Sparse inference of one family: a compiled graph a length, for all weights and targets."""
        config = family.config(self.base, model.config.text_config.num_hidden_layers, self.dense_layers)
        apply_omnisparse(model, config, min_seq_len=0, dynamic=False)
        try:
            with scoring(family.control), collect_stats(model) as stats:
                for name, state in weights.items():
                    model.load_state_dict(state)
                    for length in lengths:
                        for recall in family.recalls or self.recalls:
                            self._sparse(family, name, model, length, stats, recall)
        finally:
            remove_omnisparse(model)

    def _sparse(self, family: Family, name: str, model: Any, length: int, stats: Stats, recall: float) -> None:
        own, plain = (f"{x}, {self.tag}" if self.tag else x for x in (family.name, "OmniSparse"))
        label, target = f"{own} at recall {recall:g}", recall
        if family.recalls is not None:
            label = own
        if time.monotonic() > self.deadline or self.find(name, length, label):
            return
        if family.control is not None:
            model_row = self.find(name, length, f"{plain} at recall {recall:g}")
            if model_row is None:
                return
            target = match_density(lambda x: self._density(model, length, stats, x), model_row["density"])
        self._set_target(model, target)
        ask = lambda: self._ask(model, length) | {"density": stats.density}  # noqa: E731
        config = {**self.base, **family.fields}
        self._once(name, length, label, ask, family=own, target=target, config=config)

    def run_slim(
        self,
        weights: Weights,
        model: Any,
        lengths: list[int],
        how: tuple[str, ...] = KNOWN,
        recall: float | None = None,
    ) -> None:
        """The cache after dense prefill, or, with ``recall``, after sparse prefill at a density that has a row.

        In the weights' dtype on a CPU and in bfloat16 on a GPU.
        """
        first = next(iter(weights.values()))
        model.load_state_dict(first)
        device = next(model.parameters()).device
        small = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        config = Family("slim").config(self.base, model.config.text_config.num_hidden_layers, self.dense_layers)
        with dense_prefill(small, config) if recall is None else sparse_prefill(small, config):
            for name, state in weights.items():
                small.load_state_dict(state)
                for length in lengths:
                    for ratio in (None, *self.ratios):
                        for known in how:
                            self._slim(name, small, length, ratio, known, recall)
        model.to(torch.float32)

    def _slim(self, name: str, model: Any, length: int, ratio: float | None, known: str, recall: float | None) -> None:
        label, family, density = f"{'full' if ratio is None else f'slim {ratio:g}x'} cache, {known} known", "cache", 1.0
        if recall is not None:
            plain = self.find(name, length, f"OmniSparse at recall {recall:g}")
            if plain is None:
                return
            label, family, density = (
                f"{label}, after OmniSparse at recall {recall:g}",
                "three together",
                plain["density"],
            )
            self._set_target(model, recall)
        batch = max(1, self.tokens // length)
        ask = lambda: ask_slim(model, "test", length, self.videos, batch, ratio, known)  # noqa: E731
        self._once(name, length, label, ask, family=f"{family}, {known} known", density=density, wanted_ratio=ratio)

    def find(self, name: str, length: int, label: str) -> dict[str, Any] | None:
        """The row of some weights, length and label, if it was measured."""
        rows = (r for r in self.rows if (r["checkpoint"], r["length"], r["inference"]) == (name, length, label))
        return next(rows, None)

    def _density(self, model: Any, length: int, stats: Stats, target: float) -> float:
        self._set_target(model, target)
        batch = max(1, self.tokens // length)
        evaluate(model, "test", length, batch, batch)  # the shape that the graph is of
        return stats.density

    def _set_target(self, model: Any, target: float) -> None:
        """The targets are an input of the compiled graph, so it need not be compiled again."""
        entry = compiled_decoder_of(model)
        assert entry is not None
        entry.state.recall[self.dense_layers :] = target

    def _ask(self, model: Any, length: int, visible: str = "all") -> dict[str, Any]:
        batch = max(1, self.tokens // length)
        # Whole batches only: a ragged last one would compile once more.
        return dict(evaluate(model, "test", length, -(-self.videos // batch) * batch, batch, visible=visible))

    def _once(self, name: str, length: int, label: str, ask: Callable[[], dict[str, Any]], **more: Any) -> None:
        """Measure one row unless it is there or the time is up, and write all of them."""
        if time.monotonic() > self.deadline or self.find(name, length, label):
            return
        started = time.perf_counter()
        found = ask()
        seconds = time.perf_counter() - started
        mean, low, high = interval(found["correct"], found["video"])
        extra = {key: value for key, value in found.items() if not isinstance(value, np.ndarray)}
        row = {
            "checkpoint": name,
            "length": length,
            "inference": label,
            "family": label,
            "videos": int(found["video"].max()) + 1,
            "questions": len(found["correct"]),
            "accuracy": mean,
            "interval": [low, high],
            "by_kind": by_kind(found),
            "right": "".join("01"[int(x)] for x in found["correct"]),
            "seconds": seconds,
            **more,
            **extra,
        }
        self.rows.append(row)
        report.write(self.rows, self.out)
        print(f"{name} {length} {label}: density {row['density']:.3f}  {describe(row['by_kind'])}  ({seconds:.0f} s)")


def family_of(name: str) -> Family:
    """A family by its name.

    Raises:
        ConfigError: If there is none.
    """
    require(name in FAMILIES, "parts", f"hold only dense, slim, together and {', '.join(FAMILIES)}", name)
    return FAMILIES[name]
