"""Does training give back what sparsity costs? SmolLM2-135M fine-tuned densely and with the selection on.

python -m benchmarks.smollm2.finetune_smollm2 --data DIR --minutes 3      # DIR as benchmarks.quality.prepare makes it
Call it again to go on: rows of the JSON are not measured twice, weights wait under --work. On a CPU, as a smoke test:
python -m benchmarks.smollm2.finetune_smollm2 --data DIR --quick --device cpu --out quick.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.prepare import load, training_only
from benchmarks.quality.weights import load_model
from benchmarks.smollm2 import finetune_report as report
from benchmarks.smollm2.finetune_parts import FineTuning, perplexity_parts, set_targets, split, target_for, weights
from benchmarks.smollm2.finetune_plan import Plan
from omnisparse_flex import apply_omnisparse, collect_stats, remove_omnisparse
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.stats import Stats
from omnisparse_flex.warmup import RecallWarmup

RESULTS = Path(__file__).resolve().parents[1] / "results" / "finetune_smollm2.json"
#: The first is the one that figures are about.
SCORINGS = ["tile_pool", "mean_pool"]
QUICK = {"tokens": 1024, "steps": 2, "rows": 1, "windows": 1, "densities": [0.9], "train_density": 0.9}
WORK = Path(__file__).resolve().parents[1] / "scratch" / "finetune_smollm2"


class Experiment:
    """One pretrained model, its fine-tuned weights, and the rows measured so far."""

    def __init__(
        self,
        model: Any,
        texts: dict[str, Tensor],
        plan: Plan,
        out: Path,
        work: Path,
        deadline: float,
        further: dict[str, Tensor] | None = None,
    ) -> None:
        """Split the texts and read what is there already.

        Args:
            model: A float32 Llama model of transformers.
            texts: int32 token ids by source.
            plan: The plan.
            out: JSON of the rows.
            work: Folder of the fine-tuned weights.
            deadline: Time (``time.monotonic``) after which nothing new begins.
            further: Token ids by source, for training alone.

        Raises:
            ConfigError: If ``out`` or ``work`` is of another plan, or a text is too short.
        """
        self.model, self.plan, self.out, self.work, self.deadline = model, plan, out, work, deadline
        self.layers = len(model.model.layers)
        require(plan.dense_layers < self.layers, "dense_layers", f"be under {self.layers}", plan.dense_layers)
        self.training, self.windows, repeated = split(texts, plan.tokens, plan.windows, further or {})
        head = {"plan": json.loads(json.dumps(dataclasses.asdict(plan))), "layers": self.layers}
        head |= {"held_out_windows": len(self.windows), "held_out_runs_in_training": repeated}
        self.content: dict[str, Any] = {**head, **report.versions(), "rows": [], "training": {}, "targets": {}}
        if out.exists():
            self.content = json.loads(out.read_text())
            require(self.content["plan"] == head["plan"], "out", "hold rows of the same plan", str(out))
        self.pretrained = weights(model)

    def late(self) -> bool:
        """Whether nothing new should begin."""
        return time.monotonic() > self.deadline

    def dense(self) -> None:
        """Dense inference of the pretrained weights; dense fine-tuning; dense inference of its weights."""
        self.look("pretrained", self.pretrained, "dense")
        tuned = self.tune("dense")
        if tuned is not None:
            self.look("tuned dense", tuned, "dense")

    def sparse(self, scoring: str) -> None:
        """Fine-tuning with a scorer's selection on; sparse inference of all three sets of weights."""
        self.model.load_state_dict(self.pretrained)
        apply_omnisparse(self.model, self.plan.config(scoring, self.layers), min_seq_len=0)
        try:
            target = self._train_target(scoring)
            print(f"{scoring}: trains at target recall {target:.3f}", flush=True)
            tuned = self.tune(scoring)
            dense = self.tuned("dense")
            with collect_stats(self.model) as stats:
                # What the claim is about first: time may end.
                for name, state in (("tuned sparse", tuned), ("tuned dense", dense), ("pretrained", self.pretrained)):
                    if state is not None:
                        self._sparse_rows(name, state, scoring, stats, target)
        finally:
            remove_omnisparse(self.model)
        if tuned is not None:
            self.look("tuned sparse", tuned, "dense", trained_with=scoring)

    def _train_target(self, scoring: str) -> float:
        """Target recall of training: found once on the pretrained model, then kept with the rows."""
        targets = self.content["targets"]
        if scoring not in targets:
            first = self.training[min(self.training)][: self.plan.tokens]
            with collect_stats(self.model) as stats:
                targets[scoring] = target_for(self.model, stats, first, self.plan.train_density, self.plan.dense_layers)
            report.write(self.content, self.out)
        set_targets(self.model, targets[scoring], self.plan.dense_layers)
        return targets[scoring]

    def _sparse_rows(self, name: str, state: dict[str, Tensor], scoring: str, stats: Stats, trained: float) -> None:
        for density in self.plan.densities:
            self.look(name, state, scoring, density, stats)
        # The trained target itself: its density may have drifted.
        self.look(name, state, scoring, None, stats, trained)

    def tune(self, how: str) -> dict[str, Tensor] | None:
        """Weights fine-tuned with the attention that the model has now; None if the time is up before the end."""
        found = self.tuned(how)
        if found is not None or self.late():
            return found
        path = self.work / f"{how}.pt"
        self.model.load_state_dict(self.pretrained)
        run = FineTuning(self.model, self.plan.steps, self.plan.lr, self.plan.rows)
        if path.exists():
            run.load(path)
        print(f"fine-tuning: {how}, from step {run.done}", flush=True)
        complete = run.run(self.training, self.plan.tokens, self.deadline, self._warmup(run.done))
        run.save(path)
        self.model.requires_grad_(False)
        if not complete:
            return None
        self.content["training"][how] = run.history
        report.write(self.content, self.out)
        return weights(self.model)

    def _warmup(self, done: int) -> Callable[[], None]:
        """What follows a step, ``done`` of which are over: the target falls, where there is one."""
        if self.plan.warmup == 0 or compiled_decoder_of(self.model) is None:
            return lambda: None
        warmup = RecallWarmup(self.model, self.plan.warmup)
        for _ in range(done):
            warmup.step()
        return warmup.step

    def tuned(self, how: str) -> dict[str, Tensor] | None:
        """Fine-tuned weights of a complete run, if there are any."""
        path = self.work / f"{how}.pt"
        if how not in self.content["training"] or not path.exists():
            return None
        return torch.load(path, map_location="cpu", weights_only=True)["model"]

    def look(
        self,
        name: str,
        state: dict[str, Tensor],
        inference: str,
        density: float | None = None,
        stats: Stats | None = None,
        target: float | None = None,
        trained_with: str | None = None,
    ) -> None:
        """Measure one row unless it is there or the time is up.

        Args:
            name: Of the weights.
            state: The weights.
            inference: ``"dense"`` or a scorer.
            density: Wanted of the whole model; None with ``stats``: ``target`` is given.
            stats: Of the model, for sparse inference.
            target: Target recall of the sparse layers.
            trained_with: Scorer of the weights where ``inference`` does not say it.
        """
        key = {"weights": name, "inference": inference, "wanted": density, "trained_with": trained_with}
        if self.late() or any(all(row[k] == v for k, v in key.items()) for row in self.content["rows"]):
            return
        self.model.load_state_dict(state)
        if stats is not None and density is not None:
            try:
                target = target_for(self.model, stats, self.windows[0], density, self.plan.dense_layers)
            except ConfigError as error:  # this scorer's own cost leaves no room; the others may go on
                print(f"{name}, {inference}: {error}", flush=True)
                return
        elif stats is not None and target is not None:
            set_targets(self.model, target, self.plan.dense_layers)
        losses, kept = [], []
        for window in self.windows:
            losses += perplexity_parts(self.model, [window])
            kept.append(1.0 if stats is None else stats.density)
        row = {**key, "density": sum(kept) / len(kept), "target": target, "losses": losses}
        self.content["rows"].append(row)
        report.write(self.content, self.out)
        print(f"{name}, {inference}: density {row['density']:.3f}, loss {sum(losses) / len(losses):.4f}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.quality.prepare")
    parser.add_argument("--minutes", type=float, default=3.0, help="begin nothing new after so long")
    parser.add_argument("--scoring", nargs="+", default=SCORINGS, help="estimators")
    parser.add_argument("--plan", type=json.loads, default={}, help="fields of the plan as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two layers, two steps, 1K tokens: figures mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the fine-tuned weights")
    return parser.parse_args(arguments)


def load_small(data: Path, device: str, layers: int | None) -> nn.Module:
    """SmolLM2 in float32, or its first layers."""
    model: Any = load_model(data, device=device, dtype=torch.float32)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until everything is measured or the time is up."""
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    quick = QUICK if options.quick else {}
    try:
        fields = {**quick, **options.plan}
        unknown = sorted(fields.keys() - {f.name for f in dataclasses.fields(Plan)})
        require(not unknown, "plan", "hold only fields of the plan", unknown)
        plan = Plan(**{**fields, "densities": tuple(fields.get("densities", Plan.densities))})
        for scoring in options.scoring:
            plan.config(scoring, plan.dense_layers + 1)
        model = load_small(options.data, options.device, 2 if options.quick else None)
        texts, further = load(options.data)[0], training_only(options.data) if plan.more_text else {}
        experiment = Experiment(model, texts, plan, options.out, options.work, deadline, further)
    except ConfigError as error:
        print(f"finetune_smollm2.py: {error}", file=sys.stderr)
        return 2
    experiment.dense()
    for scoring in options.scoring:
        if not experiment.late():
            experiment.sparse(scoring)
    print(report.table(experiment.content))
    report.keep_figures(experiment.content, SCORINGS[0], __file__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
