"""How true recall at one estimator target carries over from one text to another: the reserve that ``calibrate`` keeps.

``python -m benchmarks.smollm2.calibration_transfer --data DIR`` takes queries and keys of some layers of SmolLM2-135M,
runs the block selection on them at a ladder of targets, and asks for several reserves: of the (layer, head) pairs
of layers that become sparse on one text, how many keep the wanted recall on the other?
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import summary
from benchmarks.quality.prepare import load
from benchmarks.quality.weights import load_model
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.calibration.search import MAX_DENSITY
from omnisparse_flex.config import BUDGETS, LAZY_THRESHOLD, SCORINGS
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import measure_selection
from omnisparse_flex.report import table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "calibration_transfer.json"
#: Targets are 1 - 2**-u; between two steps recall and density are interpolated.
LADDER = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0)
RESERVES = (0.0, 0.05, 0.1, 0.15, 0.25)


@torch.no_grad()
def capture(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries (1, Hq, N, D) and keys (1, Hkv, N, D) of some layers of a dense forward over int64 ids (1, N)."""
    from transformers import AttentionInterface

    found = {}

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any):
        if module.layer_idx in layers:
            found[module.layer_idx] = query, key
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("capture", attention)
    model.config._attn_implementation_internal = "capture"
    model.model(input_ids=ids, use_cache=False)
    return found


@torch.no_grad()
def ladder(query: Tensor, key: Tensor, config: OmniSparseConfig) -> tuple[Tensor, Tensor]:
    """True mean recall (steps, Hq) and density (steps,) of one layer at every target of ``LADDER``."""
    mask, scale = IndexMask(causal()), query.shape[-1] ** -0.5
    recalls, densities = [], []
    for u in LADDER:
        chosen = select_blocks(query, key, mask, config, target=1 - 2**-u, scale=scale)
        found = measure_selection(chosen, query, key, mask, config, scale=scale, score=None, exact=True)
        recalls.append(found.recalls[0].cpu())
        densities.append((chosen.keep.sum() / chosen.layout.some.expand_as(chosen.keep).sum()).cpu())
    return torch.stack(recalls), torch.stack(densities)


def carried(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], needed: float) -> tuple[Tensor, float] | None:
    """The other text's recall (Hq,) and density where the own text's worst head first reaches ``needed``.

    Returns:
        None where the layer stays dense: out of reach, or not worth it.
    """
    worst = own[0].min(1).values
    reached = (worst >= needed).nonzero()
    if not len(reached):
        return None
    step = int(reached[0])
    before = max(step - 1, 0)
    part = 1.0 if step == before else float((needed - worst[before]) / (worst[step] - worst[before]))
    if float(torch.lerp(own[1][before], own[1][step], part)) > MAX_DENSITY:
        return None
    return torch.lerp(other[0][before], other[0][step], part), float(torch.lerp(other[1][before], other[1][step], part))


def transfer(found: dict[str, list[tuple[Tensor, Tensor]]], wanted: float, reserve: float) -> dict[str, Any]:
    """Over all pairs of texts: what share of the sparse pairs keeps ``wanted``, and at which density."""
    needed = 1 - (1 - wanted) * (1 - reserve)
    met, worst, densities = [], 1.0, []
    for own, other in itertools.permutations(found, 2):
        for a, b in zip(found[own], found[other], strict=True):
            result = carried(a, b, needed)
            densities.append(1.0 if result is None else result[1])
            if result is not None:
                met += (result[0] >= wanted).tolist()
                worst = min(worst, float(result[0].min()))
    share = sum(met) / len(met) if met else math.nan
    return {
        "reserve": reserve,
        "met_share_sparse": None if math.isnan(share) else share,
        "sparse_pairs": len(met),
        "recall_min": worst,
        "density": sum(densities) / len(densities),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.quality.prepare")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 7, 11, 15, 20, 25, 29])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.data, device=device, dtype=torch.float32)
    texts = load(options.data)[0]
    captured = {
        name: capture(model, text[: options.tokens].long()[None].to(device), options.layers)
        for name, text in texts.items()
    }
    rows = []
    counting = (x for x in SCORINGS["block"] if x != "sampled_rows"), (x for x in BUDGETS if x != "peak")
    for scoring, budget, lazy in itertools.product(*counting, (LAZY_THRESHOLD, None)):
        rules = OmniSparseConfig(scoring=scoring, budget=budget, lazy_threshold=lazy)
        found = {name: [ladder(*layers[i], rules) for i in options.layers] for name, layers in captured.items()}
        names = {"scoring": scoring, "budget": budget, "lazy_threshold": lazy}
        rows += [names | transfer(found, options.target, reserve) for reserve in RESERVES]
        print(f"{scoring}, {budget}, lazy_threshold {lazy}: done", flush=True)
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    print("\n".join(table([list(rows[0]), *cells])))
    kept = {name: getattr(options, name) for name in ("tokens", "target", "layers")}
    kept |= {"device": summary.device_name(), "torch": torch.__version__, "commit": summary.commit(), "rows": rows}
    summary.write_json(kept, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
