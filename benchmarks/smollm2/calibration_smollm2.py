"""Does calibrated recall hold on text not used for calibration? SmolLM2-135M, both directions between two texts.

``python -m benchmarks.smollm2.calibration_smollm2 --data DIR`` (DIR as ``benchmarks.quality.prepare`` makes it).
Quality only: graphs run eagerly, where the mask carries the selection; it is the same selection, nothing is timed.
On a CPU: ``--tokens 4096 --layers 8 --inner inductor --windows 1 --out FILE`` (eager needs N x N memory and patience).
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
from torch import Tensor, nn

from benchmarks.common import summary
from benchmarks.quality.prepare import load
from benchmarks.quality.weights import load_model
from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, remove_omnisparse
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.calibration.search import run_calibration
from omnisparse_flex.config import SCORINGS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "calibration_smollm2.json"
#: The figures are of this length and of the whole model.
TOKENS, LAYERS = 8192, 30


def windows_of(text: Tensor, tokens: int, count: int) -> list[dict[str, Tensor]]:
    """``count`` stretches of ``tokens`` ids, evenly spread over a text of int32 (N,)."""
    last = len(text) - tokens
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    return [{"input_ids": text[start : start + tokens].long()[None]} for start in starts]


@torch.no_grad()
def held_out(
    model: nn.Module, config: OmniSparseConfig, inputs: list[dict[str, Tensor]], target: float, inner: str = "eager"
) -> dict[str, Any]:
    """What a config truly keeps on ``inputs``; every recall is a mean over sampled rows and inputs.

    Returns:
        ``met_share`` of all (layer, head) pairs, dense layers counting as met; ``met_share_sparse`` of
        those in sparse layers; the least ``recall``; ``density`` of the whole model; ``recalls`` by layer.
    """
    apply_omnisparse(model, config, min_seq_len=0, inner=inner)
    device = next(model.parameters()).device
    recalls: dict[int, Tensor] = {}
    density = 0.0
    for batch in inputs:
        with collect_stats(model, exact=True) as stats:
            model(input_ids=batch["input_ids"].to(device), logits_to_keep=1, use_cache=False)
        density += stats.density / len(inputs)
        for layer in stats.per_layer():
            part = torch.tensor(layer.true_recall, dtype=torch.float64) / len(inputs)
            recalls[layer.layer] = recalls.get(layer.layer, 0) + part
    remove_omnisparse(model)
    heads = model.config.num_attention_heads
    pairs, sparse = model.config.num_hidden_layers * heads, len(recalls) * heads
    missed = sum(int((x < target).sum()) for x in recalls.values())
    return {
        "met_share": 1 - missed / pairs,
        "met_share_sparse": 1 - missed / sparse if sparse else None,
        "sparse_layers": len(recalls),
        "recall_min": min((float(x.min()) for x in recalls.values()), default=1.0),
        "recall_mean": (sum(float(x.sum()) for x in recalls.values()) + pairs - sparse) / pairs,
        "density": density,
        "recalls": {str(layer): [round(v, 5) for v in x.tolist()] for layer, x in sorted(recalls.items())},
    }


def measure(
    model: nn.Module,
    rules: OmniSparseConfig,
    texts: dict[str, list[dict[str, Tensor]]],
    target: float,
    say: Progress,
    inner: str = "eager",
) -> dict[str, Any]:
    """Calibrate on each text and look at the others; ``{"manual > narrative": {...}, ...}``."""
    apply_omnisparse(model, rules, min_seq_len=0, inner=inner)  # one graph for all calibrations
    results = {name: run_calibration(model, batches, target, progress=say) for name, batches in texts.items()}
    remove_omnisparse(model)
    found = {}
    for name, calibration in results.items():
        say(f"{name}: {calibration.named_dense()}; density {calibration.density:.3f}")
        for other in sorted(texts.keys() - {name}):
            result = held_out(model, calibration.config, texts[other], target, inner)
            say(_brief(f"{name} > {other}", result))
            found[f"{name} > {other}"] = {**result, "calibration": calibration.to_dict()}
    return found


def _brief(name: str, result: dict[str, Any]) -> str:
    return (
        f"{name}: {result['met_share']:.3f} of the (layer, head) pairs meet the target, "
        f"least recall {result['recall_min']:.3f}, density {result['density']:.3f}"
    )


def keep_figures(rows: dict[str, Any], scoring: str, target: float) -> None:
    """The worse direction's share, and the denser one's density."""
    for name, value, unit, baseline in (
        (
            "recall_met_share",
            min(x["met_share"] for x in rows.values()),
            "share, 0-1",
            f"(layer, head) pairs with true mean recall >= {target} on the text not calibrated on; worse direction",
        ),
        (
            "calibrated_density",
            max(x["density"] for x in rows.values()),
            "share, 0-1",
            f"dense causal attention FLOPs of the whole model, calibrated at {target}; denser direction",
        ),
    ):
        summary.record(f"smollm2.{name}.8k", value, unit=unit, baseline=f"{baseline}; {scoring}", script=__file__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.quality.prepare")
    parser.add_argument("--target", type=float, default=0.9, help="true recall wanted")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of a window")
    parser.add_argument("--windows", type=int, default=2, help="windows per text")
    parser.add_argument("--layers", type=int, default=LAYERS, help="first layers of the model")
    parser.add_argument(
        "--scoring", nargs="+", choices=SCORINGS["block"], default=["mean_pool"], help="the first gives figures"
    )
    parser.add_argument("--sinks", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager", help="what compiles the graphs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no scorer after so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say = Progress()
    with say.step("loading"):
        model: Any = load_model(options.data, device=device, dtype=torch.float32)
        texts = load(options.data)[0]
    model.model.layers = model.model.layers[: options.layers]
    model.config.num_hidden_layers = len(model.model.layers)
    batches = {name: windows_of(text, options.tokens, options.windows) for name, text in texts.items()}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    whole = options.tokens == TOKENS and len(model.model.layers) == LAYERS
    for index, scoring in enumerate(options.scoring):
        if say.seconds > options.seconds:
            break
        say(f"scoring {scoring}")
        rules = OmniSparseConfig(scoring=scoring, sink_size=options.sinks, window_size=options.window)
        began = time.perf_counter()
        rows = measure(model, rules, batches, options.target, say, options.inner)
        kept[f"{scoring} {options.tokens} x {options.windows}, {len(model.model.layers)} layers, {options.target}"] = {
            "rows": rows,
            "seconds": round(time.perf_counter() - began, 1),
            "device": summary.device_name(),
            "torch": torch.__version__,
            "commit": summary.commit(),
        }
        summary.write_json(kept, options.out)
        if whole and index == 0:
            keep_figures(rows, scoring, options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
