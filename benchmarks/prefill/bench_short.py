"""Is it ever slower? A decoder at every length, with the path that the cost model chooses, against the same dense.

    python3 -m benchmarks.prefill.bench_short
    python3 -m benchmarks.prefill.bench_short --quick --device cpu

Layers of Qwen2.5-VL-7B's shape, random weights, batch 1 and 4, prefill and one decoded token; both
decoders go through the same compiler. The budget is fixed, because only then does anybody know before
the run what is kept. Then 20 more lengths, to count the graphs.
"""

from __future__ import annotations

import argparse
import statistics
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
from omnisparse_flex.attention import select_op
from omnisparse_flex.calibration.timing import milliseconds
from omnisparse_flex.model.cache_argument import as_cache_argument

RESULTS = Path(__file__).resolve().parents[1] / "results" / "short.json"
K = 1024
RULES = OmniSparseConfig(budget=2 * K)
DENSE = OmniSparseConfig(target_recall=1.0)
BATCHES = (1, 4)
#: In K tokens; 4 rows of the longest do not fit beside the dense decoder's own intermediate results.
LENGTHS = {1: (1, 2, 4, 8, 12, 16, 32, 64, 128, 256), 4: (1, 2, 4, 8, 16, 32, 64, 128)}
#: Turns of a prefill of few and of many tokens in all, and of a decoded token, whose time is the host's, and noisy.
TURNS, LONG_TURNS, MANY, TOKEN_TURNS = 11, 3, 32 * K, 15
KINDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class Decoder:
    """A decoder under our compiler with one set of rules."""

    def __init__(self, model: Any, config: OmniSparseConfig) -> None:
        """Change the model; ``close`` undoes it."""
        self.model = apply_omnisparse(model, config, dynamic=True)

    def close(self) -> None:
        """Restore the model."""
        remove_omnisparse(self.model)

    def prefill(self, embeddings: Tensor) -> Tensor:
        """The last hidden state of a prompt (B, N, hidden)."""
        return self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]

    def decode(self, token: Tensor, past: Any) -> Tensor:
        """One more token (B, 1, hidden) behind a full cache, which is cut back afterwards."""
        out = self.model(
            inputs_embeds=token, **as_cache_argument(self.model.forward, past), use_cache=True
        ).last_hidden_state
        past.crop(-1)
        return out

    @property
    def sparse(self) -> int:
        """Attention sites that run sparsely in any graph so far."""
        return len(rewrite_report(self.model).rewritten)


def times(decoders: dict[str, Decoder], batch: int, tokens: int, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of ``"prefill B x N"`` and ``"decode B x N"`` of each decoder.

    Decoders take turns, so that a machine that is busy for a while is so for all of them; the median of the turns.
    """
    from transformers import DynamicCache

    model = next(iter(decoders.values())).model
    inputs = torch.randn(batch, tokens, model.config.hidden_size, device=device, dtype=model.dtype)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}

    def note(name: str, what: str, took: float) -> None:
        found[name].setdefault(f"{what} {batch} x {tokens}", []).append(took)

    for _ in range(TURNS if batch * tokens <= MANY else LONG_TURNS):
        for name, decoder in decoders.items():
            note(name, "prefill", milliseconds(decoder.prefill, [(inputs,)], runs=2, warm_up=1, queued=1).median)
    pasts = {name: DynamicCache(config=model.config) for name in decoders}
    for name, decoder in decoders.items():
        decoder.model(inputs_embeds=inputs, **as_cache_argument(decoder.model.forward, pasts[name]), use_cache=True)
    for _ in range(TOKEN_TURNS):
        for name, decoder in decoders.items():
            note(name, "decode", milliseconds(decoder.decode, [(inputs[:, :1], pasts[name])], runs=7, queued=1).median)
    return {name: {what: statistics.median(took) for what, took in own.items()} for name, own in found.items()}


def graphs_over_lengths(model: Any, device: str, longest: int) -> tuple[int, int]:
    """Graphs that 20 lengths compile, short and long ones: of the decoder, and of the choice of blocks."""
    decoder, before = Decoder(model, RULES), select_op.graphs
    for i in range(20):
        tokens = longest // 20 * (i + 1) + i
        decoder.prefill(torch.randn(1, tokens, model.config.hidden_size, device=device, dtype=model.dtype))
    graphs = rewrite_report(decoder.model).graphs
    decoder.close()
    return graphs, select_op.graphs - before


def measure(options: argparse.Namespace, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All shapes, dense and as chosen; after each one ``done`` is told of the result so far."""
    start = time.perf_counter()
    models: list[Any] = [build(options), build(options)]
    lengths = {1: (0.25, 0.5)} if options.quick else LENGTHS
    shapes = [(batch, int(n * K)) for batch, of_batch in lengths.items() for n in of_batch]
    shapes.sort(key=lambda shape: shape[0] * shape[1])  # what takes longest last
    result: dict[str, Any] = {"layers": options.layers, "budget": RULES.budget, "dense": {}, "chosen": {}}
    with torch.no_grad(), sdpa_kernel(KINDS, set_priority=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "omnisparse: rewrote no attention site")
        decoders = {"dense": Decoder(models[0], DENSE), "chosen": Decoder(models[1], RULES)}
        for batch, tokens in shapes:
            if time.perf_counter() - start > options.seconds:
                break
            for name, took in times(decoders, batch, tokens, options.device).items():
                result[name] |= took
                result[f"{name}_report"] = rewrite_report(decoders[name].model).to_dict()["notes"]
            dense = result["dense"]
            result["slowdown_pct"] = {name: 100 * (took / dense[name] - 1) for name, took in result["chosen"].items()}
            show(result, f"{batch} x {tokens}")
            done(result)
        for decoder in decoders.values():
            decoder.close()
        longest = 2 * K if options.quick else 20 * K
        found = graphs_over_lengths(models[1], options.device, longest)
        result["graphs_over_20_lengths"], result["choice_graphs_over_20_lengths"] = found
    done(result)
    return result


def show(result: dict[str, Any], shape: str) -> None:
    """Print the rows of a shape."""
    for name, change in result["slowdown_pct"].items():
        if name.endswith(f" {shape}"):
            dense, chosen = result["dense"][name], result["chosen"][name]
            print(f"  {name:18s} dense {dense:9.3f} ms, chosen {chosen:9.3f} ms, {change:+.1f} %", flush=True)


def conclude(result: dict[str, Any]) -> None:
    """Print what holds for all shapes."""
    print(f"  {result.get('graphs_over_20_lengths', '?')} graphs over 20 lengths; {'; '.join(result['chosen_report'])}")


def keep(result: dict[str, Any]) -> None:
    """Write the JSON and the figures."""
    from benchmarks.common import summary

    versions = {"torch": torch.__version__, "device": summary.device_name()}
    summary.write_json({**versions, **result}, RESULTS)
    worst = max(result["slowdown_pct"], key=lambda name: result["slowdown_pct"][name])
    baseline = (
        f"same compiled decoder, dense; {result['layers']} layers of the 7B shape, budget {RULES.budget}; at {worst}"
    )
    value = round(result["slowdown_pct"][worst], 2)
    summary.record("short.worst_slowdown_pct", value, unit="%", baseline=baseline, script=__file__)
    if "graphs_over_20_lengths" in result:
        graphs, own = result["graphs_over_20_lengths"], result["choice_graphs_over_20_lengths"]
        what = f"1K to 20K tokens, one model; {own} more of the choice of blocks"
        summary.record("compile.graphs_over_20_lengths", graphs, unit="graphs", baseline=what, script=__file__)


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240.0, help="start no shape after so long")
    parser.add_argument("--quick", action="store_true", help="2 small layers, short; records nothing")
    options = parser.parse_args()
    options.hidden = "small" if options.quick else "7b"
    options.layers = 2 if options.quick else options.layers
    conclude(measure(options, (lambda result: None) if options.quick else keep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
