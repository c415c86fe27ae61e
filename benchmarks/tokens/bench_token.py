"""Attention at token granularity against the fastest dense one of the same run: 28/4 heads, D=128, bfloat16, causal.

    python3 -m benchmarks.tokens.bench_token
    python3 -m benchmarks.tokens.bench_token --device cpu --quick

The shares are forced, the work is real. Queries resemble their neighbours and look near by an amount that
varies from run to run of 16, so a lazy threshold exists at which a wanted share of them is active; it is
searched for beforehand. The budget is a fixed number of keys, k*. Everything then runs as in a model: always-kept keys,
breadth, guess, column mass, choice, gathered keys. ``select`` is all of that but the two attention
parts, ``near`` and ``far``; ``total`` is one call that holds the three. A training step is timed through the operator
that a model's graph calls: its backward selects again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.gpu_timing import dense_attention, kernel_milliseconds
from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.tokens.dispatch import (
    attend_and_select,
    attend_tokens,
    segments_of_site,
    takes_kernels,
)
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.attention.tokens.tensor_code import attend_near, choose
from omnisparse_flex.calibration.timing import milliseconds
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEADS, KV_HEADS, DIM = 28, 4, 128
#: Queries that resemble one another, tokens over which positions resemble one another, and the pull of near keys.
RUN, REACH, PULL = 16, 300.0, 12.0
SHARES, KEYS = (0.10, 0.25, 0.50), (0.02, 0.05, 0.10, 0.20)
RUNS = 5


def inputs(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (1, heads, tokens, D)."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def noise(heads: int, count: int, dim: int = DIM) -> Tensor:
        return torch.randn(1, heads, count, dim, generator=generator, device=device)

    waves = torch.randn(16, generator=generator, device=device) / REACH
    phases = torch.arange(tokens, device=device)[:, None] * waves
    place = F.pad(torch.cat([phases.cos(), phases.sin()], -1) / 4, (0, DIM - 32))
    runs = -(-tokens // RUN)
    near = torch.rand(1, HEADS, runs, 1, generator=generator, device=device) * PULL * DIM**0.5
    query = noise(HEADS, runs).mul_(1.2).repeat_interleave(RUN, 2)[:, :, :tokens]
    query = (query + 0.5 * noise(HEADS, tokens) + near.repeat_interleave(RUN, 2)[:, :, :tokens] * place).to(dtype)
    return query, (noise(KV_HEADS, tokens) + place).to(dtype), noise(KV_HEADS, tokens).to(dtype)


def site_of(budget: int, threshold: float) -> SparseCall:
    """A causal site with a fixed budget."""
    config = OmniSparseConfig(
        granularity="token", target_recall=0.95, budget=budget, max_kv_budget=budget, lazy_threshold=threshold
    )
    return SparseCall(config=config, target=0.95, mask=IndexMask(causal()))


def threshold_for(share: float, query: Tensor, key: Tensor, value: Tensor) -> float:
    """The lazy threshold at which ``share`` of the queries are active."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        active = attend_and_select(query, key, value, site_of(1, middle))[1].active.float().mean().item()
        low, high = (middle, high) if active > share else (low, middle)
    return (low + high) / 2


def parts(query: Tensor, key: Tensor, value: Tensor, site: SparseCall) -> dict[str, Callable[[], Any]]:
    """The steps of one call, each on its own."""
    segments = segments_of_site(query, key, site)
    text = torch.zeros((1, query.shape[2]), dtype=torch.bool, device=query.device)
    if not takes_kernels(query, value, site):
        near_lse = attend_near(query, key, value, segments, site)[1]
        return {
            "near": lambda: attend_near(query, key, value, segments, site),
            "select": lambda: choose(query, key, near_lse, segments, text, site),
        }
    from omnisparse_flex.attention.tokens.key_lists import far_lists, near_lists
    from omnisparse_flex.attention.tokens.triton import LISTS
    from omnisparse_flex.kernels.attend_lists import attend_lists
    from omnisparse_flex.masks.expr.causal_padding import as_causal_padding
    from omnisparse_flex.masks.tokens.select_triton import select_tokens_triton

    plain, segment = as_causal_padding(site.mask, 1, key.shape[2], query.device), site.config.segment_size
    assert plain is not None
    near, scale = near_lists(segments, key.shape, segment, plain), site.scale_for(query)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
    attend_lists(query, key, value, out, lse, near, scale)
    rules = {"block": BLOCK, "target": 0.95, "scale": scale, "real": None}
    selection = select_tokens_triton(query, key, lse, segments, text, site.config, **rules)
    spare_out, spare_lse = out.clone(), lse.clone()

    def attend_far() -> None:
        for far in far_lists(selection, near, site.config, key, LISTS):
            attend_lists(query, key, value, spare_out, spare_lse, far, scale, goes_on=True)

    return {
        "near": lambda: attend_lists(query, key, value, out, lse, near, scale),
        "select": lambda: select_tokens_triton(query, key, lse, segments, text, site.config, **rules),
        "far": attend_far,
    }


def dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention over these tensors, by kernel."""
    kernels = dense_attention(query.shape[3] ** -0.5)
    return {name: functools.partial(attend, query, key, value) for name, attend in kernels.items()}


def median_ms(run: Callable[[], Any], device: str, runs: int = RUNS) -> float:
    """Milliseconds of one call; a CPU only shows that it runs."""
    runs = runs if device == "cuda" else 1
    return milliseconds(run, [()], runs=runs, warm_up=1, queued=2).median


def extra_bytes(run: Callable[[], Any], device: str) -> int:
    """Device memory that a call holds at most beyond what is there before it."""
    if device != "cuda":
        return 0
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forward(tokens: int, shares: tuple[float, ...], keys: tuple[float, ...], device: str) -> dict[str, Any]:
    """Every share at one length."""
    query, key, value = inputs(tokens, device)
    result: dict[str, Any] = {name: median_ms(run, device, 3) for name, run in dense(query, key, value).items()}
    result = {"dense_ms": result, "cases": {}}
    fastest = min(result["dense_ms"].values())
    for share in shares:
        threshold = threshold_for(share, query, key, value)
        for part in keys:
            site = site_of(int(part * tokens), threshold)
            row = {name: median_ms(run, device) for name, run in parts(query, key, value, site).items()}
            call = lambda site=site: attend_tokens(query, key, value, site)  # noqa: E731
            row["total"] = median_ms(call, device)
            row["speedup"] = fastest / row["total"]
            if "far" in row:
                row["attention_speedup"] = fastest / (row["near"] + row["far"])
            # In units of the layer's keys and values; the output is not extra.
            held = extra_bytes(call, device) - query.nbytes
            row["extra_memory"] = max(0, held) / (key.nbytes + value.nbytes)
            selection = attend_and_select(query, key, value, site)[1]
            row["active"] = selection.active.float().mean().item()
            row["keys"] = selection.key_count.float().mean().item() / tokens
            name = f"a{round(share * 100)}.k{round(part * 100)}"
            if name == "a25.k5" and device == "cuda":  # where the time of the case that figures are about goes
                kernels = kernel_milliseconds(call, ())
                result["kernels_ms"] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:16])
            result["cases"][name] = row
            print(f"  {tokens} {name} " + " ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    print(f"  {tokens} dense {result['dense_ms']}", flush=True)
    return result


def training(tokens: int, share: float, part: float, device: str) -> dict[str, Any]:
    """Forward and backward at one length."""
    tensors = inputs(tokens, device)
    threshold = threshold_for(share, *tensors)
    query, key, value = (x.requires_grad_() for x in tensors)
    grad = torch.randn_like(query)
    site = site_of(int(part * tokens), threshold)
    compiled = dataclasses.replace(site, rules=register(site))

    def step(attend: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(), (query, key, value), grad)

    dense_ms = {name: median_ms(step(run), device) for name, run in dense(query, key, value).items()}
    result = {
        "dense_ms": dense_ms,
        "graph_ms": median_ms(step(lambda: call_token_op(query, key, value, compiled)), device),
        "eager_ms": median_ms(step(lambda: attend_tokens(query, key, value, site)), device),
    }
    result["speedup"] = min(dense_ms.values()) / result["graph_ms"]
    result["eager_speedup"] = min(dense_ms.values()) / result["eager_ms"]
    print(f"  {tokens} training {result}", flush=True)
    return result


def keep(results: dict[str, Any]) -> None:
    """Write the JSON and the figures."""
    from benchmarks.common import summary

    about = {"device": summary.device_name(), "torch": torch.__version__, "commit": summary.commit()}
    summary.write_json({**results, **about}, RESULTS / "token.json")
    dense_ms = results["131072"]["dense_ms"]
    fastest = min(dense_ms, key=lambda name: dense_ms[name])
    shares = "25 % of queries active, k* = 5 % of N"
    shape = f"{fastest}, fastest dense of the run; 28/4 heads, D=128, bfloat16, causal; {shares}"
    row = results["131072"]["cases"]["a25.k5"]
    figures = {
        "token.speedup.128k.a25.k5": (row["speedup"], f"{shape}; selection included"),
        "token.train_speedup.32k.a25.k5": (
            results["training"]["speedup"], f"{shape}; forward and backward, selection twice included",
        ),
    }  # fmt: skip
    for name, (value, baseline) in figures.items():
        summary.record(name, round(value, 3), unit="x", baseline=baseline, script=__file__)


def main() -> int:
    """Measure every length and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one short length and one share; records nothing")
    options = parser.parse_args()
    whole = not options.quick and options.device == "cuda"
    lengths, shares, keys = ((32768, 131072), SHARES, KEYS) if whole else ((1024,), (0.25,), (0.05,))
    results: dict[str, Any] = {"training": training(lengths[0], 0.25, 0.05, options.device)}
    with torch.no_grad():
        for tokens in lengths:
            results[str(tokens)] = forward(tokens, shares, keys, options.device)
    if not whole:
        print("not the full shape on a GPU: no figure recorded")
        return 0
    keep(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
