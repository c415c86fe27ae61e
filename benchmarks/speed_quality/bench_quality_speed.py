"""Quality and speed at one operating point: attention's time with the rules whose accuracy was measured.

    python3 -m benchmarks.speed_quality.bench_quality_speed
    python3 -m benchmarks.speed_quality.bench_quality_speed --quick --device cpu

The rules and their accuracy are a row of ``results/video/compare.json``: the shipped video model, asked about 32K
visual tokens. Times are of whole calls of a module that ``apply_omnisparse`` changed, selection included, against the
fastest dense kernel of the same run on the same tensors, all replayed as CUDA graphs (``launched_ms``: the same calls
one by one from Python). Sparse calls make their layout anew, which a model's layers share. Two kinds of cases:

``real``: query, key and value of each of the model's layers while it reads a generated test video (dense inference,
rotary positions applied), at its own heads; sums over the layers. For 128K the video's tokens are repeated four times
in a row between the same first token and questions. Positions then repeat too, so that near keys are met once in each
tile, which makes more blocks look needed than in a video of that length.

``production``: 28 query and 4 KV heads, D = 128. ``real pattern`` are the same tensors with heads repeated and rotated
into 128 dimensions: logits, kept blocks and active rows stay those of the model. ``random`` is random data whose
target is set so that it keeps at least the share of blocks that the model's layers keep on average; there every row is
active. At 128K that share is the one measured at 32K, the conservative case. ``extrapolated`` goes on along the
trend from 8K to 32K. No quality was measured at 128K. ``flattest head`` is the ``real pattern`` under the paper's
budget rule, at the same target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.gpu_timing import attention_share, captured, dense_attention, flex_dense, kernel_milliseconds
from benchmarks.speed_quality.quality_speed_cases import (
    BASE,
    FACTOR,
    Case,
    blank_layer,
    operating_point,
    production_layers,
    random_layers,
    shares,
    sparse,
    target_for,
)
from benchmarks.video_needle.attention_inputs import Layer, capture, tiled
from omnisparse_flex import OmniSparseConfig, rewrite_report
from omnisparse_flex.attention.flex_options import has_flash
from omnisparse_flex.calibration.timing import Function, milliseconds
from omnisparse_flex.model.compiled_module import compiled_decoder_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS, WEIGHTS = ROOT / "results" / "quality_speed.json", ROOT.parent / "models" / "video_needle"
#: A dense kernel this much slower than the fastest is not timed at a greater length.
SLOW = 1.3
#: The paper's budget rule.
FLATTEST = "flattest_head"
#: Visual tokens of a run that only shows that it runs.
QUICK = 512
Sets = list[tuple[Tensor, ...]]


def timed(function: Function, sets: Sets, calls: int, *, graphs: bool = True) -> dict[str, Any]:
    """Milliseconds of ``calls`` calls over rotated inputs, as CUDA graphs or not; a CPU only shows that it runs."""
    called, given = function, sets
    if not sets[0][0].is_cuda:
        took, graphs = milliseconds(called, given, runs=1, warm_up=1), False
    else:
        try:
            called, given = (captured(function, sets), [()]) if graphs else (function, sets)
        except RuntimeError as error:  # then with what launching it takes
            print(f"  no CUDA graph: {error}", file=sys.stderr)
            graphs = False
        took = milliseconds(called, given, runs=5, warm_up=len(sets), queued=max(4, len(sets)))
    return {name: ms * calls for name, ms in dataclasses.asdict(took).items()} | {"graphs": graphs}


class Bench:
    """One run.

    Attributes:
        rows: What was measured.
        errors: Of parts that failed, by name.
        kept: Mean share of blocks that the model's layers keep, by visual tokens.
    """

    def __init__(
        self, device: str, base: int, seconds: float, keep: Callable[[dict[str, Any]], None], kernel: str = "auto"
    ) -> None:
        """``keep`` is called with the content after each case; none starts after ``seconds``."""
        self.device, self.base, self.keep, self.kernel = device, base, keep, kernel
        self.deadline = time.perf_counter() + seconds
        self.config, self.quality = operating_point()
        self.modules: dict[OmniSparseConfig, nn.Module] = {}
        self.rows: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}
        self.kept: dict[int, float] = {}
        self.kept_source = "measured on the model's tensors, mean of its layers"
        self._dense: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}

    @property
    def extrapolated(self) -> float:
        """The kept share at ``FACTOR`` times the base length if it falls as it does up to there."""
        return self.kept[self.base] ** 2 / self.kept[self.base // FACTOR]

    def run(self) -> None:
        """All cases, those that figures are about first."""
        layers = self._tried("capture", self._capture) or []
        if not layers:  # the selection's cost is in a density, so it is a little more
            self.kept_source = "density in the quality test: the tensors could not be had"
            self.kept = {self.base // f: self.quality[BASE // f]["density"] for f in (1, FACTOR)}
        for case in self._cases(layers):
            if time.perf_counter() > self.deadline:
                self.errors[case.name] = "no time left"
            else:
                row = self._tried(case.name, lambda case=case: self._measure(case))
                self.rows += [row] if row else []
                if self.device == "cuda":
                    torch.cuda.empty_cache()
            self.keep(self.content())

    def _cases(self, layers: list[Layer]) -> list[Case]:
        """What is timed, in order; without the model's layers random data alone."""
        base, longer, here = self.base, self.base * FACTOR, self.kept[self.base]
        first = layers[0] if layers else blank_layer(base, self.device)
        noise, long_noise = (lambda times=times: random_layers(tiled(first, times)) for times in (1, FACTOR))
        random = [
            Case("production", "random", base, noise, here),
            Case("production", "random", longer, long_noise, here),
            Case("production", "random, extrapolated", longer, long_noise, self.extrapolated),
        ]
        if not layers:
            return random
        return [
            Case("production", "real pattern", base, lambda: production_layers(layers)),
            *random,
            Case("real", "real", base, lambda: layers),
            Case("real", "real", longer, lambda: [tiled(layer, FACTOR) for layer in layers]),
            Case("production", "real pattern, flattest head", base, lambda: production_layers(layers), budget=FLATTEST),
        ]

    def _capture(self) -> list[Layer]:
        from benchmarks.video_needle import release

        model, layers = release.load(WEIGHTS).to(self.device), []
        for length in (self.base // FACTOR, self.base):
            layers = capture(model, length)
            found = [shares(layer, self.config, self.config.recall_of(0))[0] for layer in layers]
            self.kept[length] = statistics.mean(found)
            print(f"  {length} visual tokens: {self.kept[length]:.4f} of the blocks kept", flush=True)
        return layers

    def _tried(self, name: str, do: Callable[[], Any]) -> Any:
        """What ``do`` returns; None if it failed, which is noted."""
        try:
            return do()
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"[:1000]
            traceback.print_exc()
            return None

    def _measure(self, case: Case) -> dict[str, Any]:
        layers, config = case.make(), self.config
        if case.budget is not None:
            config = dataclasses.replace(config, budget=case.budget)
        if config not in self.modules:
            self.modules[config] = sparse(config, self.kernel)
        module = self.modules[config]
        sets: Sets = [tuple(layer) for layer in layers]
        calls, (_, heads, tokens, dim) = len(layers) if case.share is None else 1, layers[0].query.shape
        target = config.recall_of(0) if case.share is None else target_for(case.share, layers[0], config)
        kept, active = zip(*(shares(layer, config, target) for layer in layers), strict=True)
        row: dict[str, Any] = {"kind": case.kind, "data": case.data, "visual_tokens": case.tokens, "tokens": tokens}
        row |= {"heads": (heads, layers[0].key.shape[1], dim), "dtype": str(layers[0].query.dtype), "calls": calls}
        row |= {"target_recall": target, "asked_share": case.share, "dense_layers": config.recalls.count(1.0)}
        row |= {"kept": statistics.mean(kept), "active": statistics.mean(active)}
        row |= {"kept_by_layer": kept, "active_by_layer": active}
        entry = compiled_decoder_of(module)
        assert entry is not None
        # An input of the graph: no case is compiled for its target.
        entry.state.recall = torch.full_like(entry.state.recall, target, device=self.device)
        row["total_ms"] = timed(module, sets, calls)
        report = rewrite_report(module)
        if not report.rewritten or report.skipped:
            raise RuntimeError(f"attention stayed dense: {report}")
        row["notes"] = report.notes
        row["dense_ms"] = self._dense_times(case, [chosen[:3] for chosen in sets], calls)
        fastest = min(row["dense_ms"], key=lambda kernel: row["dense_ms"][kernel]["median"])
        row["fastest_dense"], dense, total = fastest, row["dense_ms"][fastest], row["total_ms"]
        row["speedup"] = dense["median"] / total["median"]
        row["speedup_range"] = dense["low"] / total["high"], dense["high"] / total["low"]
        if self.device == "cuda":
            self._tried(f"{case.name}: parts", lambda: self._parts(row, module, sets, calls))
        parts = ", ".join(f"{k} {row[k]:.4g}" for k in ("kept", "active", "speedup", "selection_ms") if k in row)
        print(f"  {case.name}: {parts}; {total['median']:.3f} ms, {fastest} {dense['median']:.3f}", flush=True)
        return row

    def _parts(self, row: dict[str, Any], module: nn.Module, sets: Sets, calls: int) -> None:
        """Where the time goes, and what launching from Python costs."""
        kernels = kernel_milliseconds(lambda: [module(*chosen) for chosen in sets], ())
        kernels = {name: ms * calls / len(sets) for name, ms in kernels.items()}
        row["attention_ms"] = attention_share(kernels)
        row["selection_ms"] = sum(kernels.values()) - row["attention_ms"]
        row["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])
        row["launched_ms"] = timed(module, sets, calls, graphs=False)

    def _dense_times(self, case: Case, sets: Sets, calls: int) -> dict[str, dict[str, Any]]:
        """Times of every dense kernel; those that are slow at the base length are left out above it."""
        data = case.data.partition(",")[0]  # the same tensors, whatever is kept of them
        found = self._dense.setdefault((case.kind, data, case.tokens), {})
        if found:
            return found
        tokens, dim = sets[0][0].shape[2:]
        kernels = dense_attention(dim**-0.5)
        if self.device == "cuda":
            kernels["flex"] = flex_dense(tokens, dim**-0.5)
        before = {} if case.tokens == self.base else self._dense.get((case.kind, data, self.base), {})
        limit = SLOW * min((took["median"] for took in before.values()), default=0.0)
        for name, attend in kernels.items():
            if not before or (name in before and before[name]["median"] <= limit):
                took = self._tried(f"{case.name}: dense {name}", lambda attend=attend: timed(attend, sets, calls))
                found |= {name: took} if took else {}
        return found

    def content(self) -> dict[str, Any]:
        """What is known so far, for the JSON."""
        from benchmarks.common import summary

        before, here, after = (f"kept({n})" for n in (self.base // FACTOR, self.base, self.base * FACTOR))
        rule = f"{after} = {here}^2 / {before}, the trend in visual tokens; no quality was measured there"
        return {
            **{"torch": torch.__version__, "device": summary.device_name(), "commit": summary.commit()},
            **{"flash4": has_flash(), "kernel": self.kernel, "config": self.config.to_dict(), "quality": self.quality},
            **{"base_tokens": self.base, "kept": self.kept, "kept_source": self.kept_source},
            "extrapolation": {"rule": rule, "kept": self.extrapolated},
            **{"rows": self.rows, "errors": self.errors, "method": __doc__},
        }


def keep(content: dict[str, Any], path: Path = RESULTS) -> None:
    """Write the JSON and the figures, as far as they were measured."""
    from benchmarks.common import summary
    from benchmarks.speed_quality import quality_speed_figures

    summary.write_json(content, path)
    quality_speed_figures.record(json.loads(path.read_text()))


def main() -> int:
    """Measure, print, record; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernel", default="auto", help="as in apply_omnisparse")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no case after so long")
    parser.add_argument("--quick", action="store_true", help="a short video; records nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    write = (lambda content: None) if options.quick or options.device == "cpu" else keep
    bench = Bench(options.device, QUICK if options.quick else BASE, options.seconds, write, options.kernel)
    with torch.no_grad():
        bench.run()
    for name, error in bench.errors.items():
        print(f"  not measured: {name}: {error.splitlines()[0]}")
    return int(bool(bench.errors))


if __name__ == "__main__":
    sys.exit(main())
