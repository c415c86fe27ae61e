"""Time to first token of a decoder of Qwen2.5-VL-7B's shape, sparse against the same compiled decoder on dense SDPA.

    python3 -m benchmarks.model.bench_ttft --layers 28
    python3 -m benchmarks.model.bench_ttft --quick --device cpu

Random weights, embeddings fed in, batch 1, no cache, the last hidden state is the end (the head adds the
same to both). Both decoders go through the same compiler: the dense one has ``target_recall=1.0`` in
every layer and runs cuDNN SDPA. The sparse one keeps a fixed budget of keys, whose share of
the block pairs is stated, and ``--dense-layers`` first layers stay dense. ``--hf`` also times the decoder as
``torch.compile(model)`` runs it without us.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.model.bench_compile import build
from omnisparse_flex import OmniSparseConfig, apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.calibration.timing import Timing, milliseconds
from omnisparse_flex.cost_model import expected_share

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ttft.json"
K = 1024


def budget_for(share: float, tokens: int) -> int:
    """The fixed budget that keeps at most ``share`` of the causal block pairs, in tokens."""
    low, high = 0, tokens // 128
    while low < high:
        middle = (low + high + 1) // 2
        fits = expected_share(tokens, OmniSparseConfig(budget=middle * 128)) <= share
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * 128


def rules(share: float, tokens: int, layers: int, dense_layers: int) -> OmniSparseConfig:
    """First layers dense, the others on a fixed budget."""
    recalls = (1.0,) * dense_layers + (0.95,) * (layers - dense_layers)
    return OmniSparseConfig(target_recall=recalls, budget=budget_for(share, tokens))


class Bench:
    """One model, several lengths.

    Attributes:
        rows: What was measured.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Build the decoder."""
        self.options = options
        self.model: Any = build(options)
        self.rows: list[dict[str, Any]] = []

    def embeddings(self, tokens: int) -> Tensor:
        """(1, N, hidden)."""
        hidden = self.model.config.hidden_size
        return torch.randn(1, tokens, hidden, device=self.options.device, dtype=self.model.dtype)

    def time(self, call: Callable[[Tensor], Any], embeddings: Tensor) -> tuple[Timing, float]:
        """Milliseconds of a prefill, and its peak memory in GiB."""
        call(embeddings)
        on_gpu = embeddings.is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        # Beyond 64K a call takes seconds.
        took = milliseconds(call, [(embeddings,)], runs=3 if embeddings.shape[1] <= 64 * K else 2, warm_up=0, queued=1)
        return took, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0

    def call(self, embeddings: Tensor) -> Tensor:
        """One prefill without a cache."""
        return self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]

    def ours(self, config: OmniSparseConfig, embeddings: Tensor) -> dict[str, Any]:
        """The decoder under our compiler."""
        apply_omnisparse(self.model, config, min_seq_len=0, dynamic=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "omnisparse: rewrote no attention site")  # the dense decoder's point
            took, memory = self.time(self.call, embeddings)
        report = rewrite_report(self.model)
        remove_omnisparse(self.model)
        return {
            "ms": took.median,
            "low": took.low,
            "high": took.high,
            "peak_gib": memory,
            "rewritten": len(report.rewritten),
        }

    def length(self, tokens: int) -> dict[str, Any]:
        """Dense and sparse at one length."""
        options, layers = self.options, self.options.layers
        embeddings = self.embeddings(tokens)
        row: dict[str, Any] = {"tokens": tokens, "layers": layers, "dense_layers": options.dense_layers}
        kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.no_grad(), sdpa_kernel(kinds, set_priority=True):
            row["dense"] = self.ours(OmniSparseConfig(target_recall=1.0), embeddings)
            print(f"  {tokens}: dense {row['dense']['ms']:.1f} ms", flush=True)
            for share in options.shares:
                config = rules(share, tokens, layers, options.dense_layers)
                found = self.ours(config, embeddings)
                found["share"] = expected_share(tokens, config)
                found["whole_model"] = (
                    options.dense_layers + (layers - options.dense_layers) * found["share"]
                ) / layers
                found["speedup"] = row["dense"]["ms"] / found["ms"]
                row[f"d{share}"] = found
                print(f"  {tokens}: d{share} {found['ms']:.1f} ms, {found['speedup']:.2f}x", flush=True)
            if options.hf:
                torch._dynamo.reset()
                compiled = torch.compile(self.model, dynamic=False)
                took, memory = self.time(lambda x: compiled(inputs_embeds=x, use_cache=False), embeddings)
                row["hf"] = {"ms": took.median, "peak_gib": memory}
                print(f"  {tokens}: torch.compile(model) {took.median:.1f} ms, {memory:.1f} GiB", flush=True)
        self.rows.append(row)
        return row


def figures(content: dict[str, Any], kind: str) -> dict[str, tuple[float, str, str]]:
    """Name -> (value, unit, baseline) of the long rows.

    Args:
        content: A results file.
        kind: Which sparse result of a row, e.g. ``"d0.04"``.
    """
    found: dict[str, tuple[float, str, str]] = {}
    for row in content["rows"]:
        name, own, dense = f"{row['tokens'] // K}k", row[kind], row["dense"]
        if name not in ("128k", "256k"):
            continue
        kept = f"{own['whole_model']:.3f} of the block pairs of the whole model"
        what = f"same compiled decoder, dense cuDNN SDPA; {row['layers']} layers of the 7B shape, {kept}"
        shape = f"{row['layers']} layers of the 7B shape, random weights, batch 1, no cache"
        found[f"ttft.speedup.{name}"] = (round(own["speedup"], 3), "x", what)
        found[f"ttft.density.{name}"] = (round(own["whole_model"], 4), "share", "causal block pairs")
        for prefix, side, text in (("", own, f"sparse, {kept}"), ("dense_", dense, "dense cuDNN SDPA, same compiler")):
            found[f"ttft.{prefix}s.{name}"] = (round(side["ms"] / 1000, 3), "s", f"{text}; {shape}")
            found[f"ttft.{prefix}gib.{name}"] = (round(side["peak_gib"], 2), "GiB", f"peak; {text}; {shape}")
        if "hf" in row and name == "128k":
            against = f"torch.compile(model) as it is; {row['layers']} layers, {kept}"
            found["ttft.speedup_vs_hf_compile.128k"] = (round(row["hf"]["ms"] / own["ms"], 3), "x", against)
    return found


def keep(bench: Bench) -> None:
    """Write the JSON and the figures."""
    from benchmarks.common import summary

    versions = {"torch": torch.__version__, "device": summary.device_name(), "commit": summary.commit()}
    content = {**versions, "rows": bench.rows}
    summary.write_json(content, RESULTS)
    summary.record_results(figures(content, f"d{bench.options.shares[0]}"), content, __file__)


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dense-layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256], help="in K tokens")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1], help="kept block pairs of a sparse layer")
    parser.add_argument("--hf", action="store_true", help="also torch.compile(model) without us")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no length after so long")
    parser.add_argument("--quick", action="store_true", help="2 small layers, 1K tokens; records nothing")
    options = parser.parse_args()
    options.hidden = "small" if options.quick else "7b"
    if options.quick:
        options.layers, options.dense_layers, options.lengths = 2, 1, [1]
    bench, start = Bench(options), time.perf_counter()
    for length in options.lengths:
        if time.perf_counter() - start < options.seconds:
            bench.length(length * K)
            if not options.quick:
                keep(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
