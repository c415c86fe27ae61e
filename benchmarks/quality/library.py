"""The library itself on the text and the look-up items that the lab judges masks by: SmolLM2-135M, 8K tokens.

    PYTHONPATH=. python -m benchmarks.quality.library --data DIR [--out FILE] [--only NAME ...]
    PYTHONPATH=. python -m benchmarks.quality.library --data DIR --quick

The lab computes exact attention under a mask of tokens; here the changed model runs, with whole blocks always kept and
with its kernels' rounding. A CUDA device takes the token kernels. Densities are the library's own count, in which
a product of a score weighs the same whatever its precision: the lab counts one of 8 bits as half of one.
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

from benchmarks.quality.evaluate import answered, text_losses
from benchmarks.quality.prepare import load
from benchmarks.quality.retrieval import Items
from benchmarks.quality.table import change, retrieved
from benchmarks.quality.weights import load_model
from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, remove_omnisparse
from omnisparse_flex.masks.statistics import STATS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality_smollm2_library.json"
TOKENS = 8192
#: Fields of the lab's best rule.
HEADS = {"gqa_choice": "head", "scoring_dims": 32}
#: Row -> target of the layers after the first, which is dense, and further fields. The lab's row of the same rules as
#: the fourth is "token256 one-pass fp8 dims32 pool32 per_head d0 t0.96 lazy0.1", which judges queries by exact rows.
ROWS: dict[str, tuple[float, dict[str, Any]]] = {
    "tokens": (0.96, {}),
    "tokens, each head, 32 dims": (0.96, HEADS),
    "tokens, each head, 32 dims, target 0.9": (0.9, HEADS),
    "tokens, each head, 32 dims, lazy under 0.1": (0.96, {**HEADS, "lazy_threshold": 0.1}),
    "tokens, each head, 32 dims, lazy under 0.01": (0.96, {**HEADS, "lazy_threshold": 0.01}),
    "tokens, each head, 32 dims, lazy under 0.001": (0.96, {**HEADS, "lazy_threshold": 0.001}),
}


def config_of(name: str, layers: int) -> OmniSparseConfig:
    """The rules of a row for a model of so many layers."""
    target, fields = ROWS[name]
    return OmniSparseConfig(target_recall=[1.0] + [target] * (layers - 1), granularity="token", **fields)


class Shares:
    """Mean shares of dense attention over windows, the whole model's: kept pairs, and scores."""

    def __init__(self, raw: Tensor) -> None:
        """``raw`` is the live record of ``collect_stats``, one row a layer."""
        self.raw = raw
        self.found: list[list[float]] = []

    def note(self) -> None:
        """Add what was recorded last; a layer without a record is dense."""
        kept, allowed, scores = (self.raw[:, STATS.index(f"{x}_blocks")] for x in ("kept", "allowed", "selection"))
        sparse = allowed > 0
        total = allowed.clamp(min=1e-9)
        self.found.append(
            [torch.where(sparse, kept / total, 1.0).mean(), torch.where(sparse, scores / total, 0.0).mean()]
        )

    def means(self) -> dict[str, float]:
        """``attention``, ``selection`` and their sum, ``density``."""
        attention, selection = torch.tensor(self.found, dtype=torch.float64).mean(0).tolist()
        return {"attention": attention, "selection": selection, "density": attention + selection}


def measure(
    model: nn.Module, config: OmniSparseConfig | None, texts: dict[str, Tensor], items: dict[str, Items],
    tokens: int, windows: int, contexts: int,
) -> dict[str, Any]:  # fmt: skip
    """One row: losses and shares of the texts, look-ups; None as ``config``: the model as it is.

    Returns:
        ``ppl:TOKENS`` and ``items:TOKENS`` as in the lab's results.
    """
    began = time.perf_counter()
    if config is None:
        ppl, shares = text_losses(model, texts, tokens, windows), {"attention": 1.0, "selection": 0.0, "density": 1.0}
        found = answered(model, items, contexts)
    else:
        apply_omnisparse(model, config, min_seq_len=0)
        try:
            with collect_stats(model) as stats:
                books = Shares(stats.raw)
                ppl, shares = text_losses(model, texts, tokens, windows, books.note), books.means()
            found = answered(model, items, contexts)
        finally:
            remove_omnisparse(model)
    row = {f"ppl:{tokens}": {**ppl, **shares}, f"items:{tokens}": found}
    return row | {"config": config and config.to_dict(), "seconds": round(time.perf_counter() - began, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file does not hold yet; print and write after each row."""
    from benchmarks.common import summary  # beside this folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.quality.prepare")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--contexts", type=int, default=99, help="of look-up items, at most, of each format; 0: none")
    parser.add_argument("--tokens", type=int, choices=(2048, 4096, TOKENS), default=TOKENS)
    parser.add_argument("--windows", type=int, help="of each text; default: as many as hold 16K tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two layers, 1K tokens, one window: figures mean nothing")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(options.data, device=device, dtype=torch.float32)
    if options.quick:
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
    tokens = 1024 if options.quick else options.tokens
    texts, listed = load(options.data)
    items = {kind: found for (kind, size), found in listed.items() if size == tokens}
    items = items if options.contexts else {}
    windows = options.windows or 16384 // tokens
    sizes = (texts, items, tokens, *((1, 1) if options.quick else (windows, options.contexts)))
    content = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    content |= {"torch": torch.__version__, "device": summary.device_name(), "commit": summary.commit()}
    for name in ("dense", *options.only):
        if name in content["rows"]:
            continue
        config = None if name == "dense" else config_of(name, len(model.model.layers))
        row = content["rows"][name] = measure(model, config, *sizes)
        ppl, dense = row[f"ppl:{tokens}"], content["rows"]["dense"]
        told = f"density {ppl['density']:.3f} (attention {ppl['attention']:.3f}), perplexity "
        told += f"{change(ppl, dense[f'ppl:{tokens}']):+.2f} %"
        if items:
            right, known = (100 * retrieved(x[f"items:{tokens}"]) for x in (row, dense))
            told += f", look-ups {right:.1f} of {known:.1f} %"
        print(f"{name}: {told}, {row['seconds']} s", flush=True)
        summary.write_json(content, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
