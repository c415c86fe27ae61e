"""A decode step of the whole decoder at Qwen2.5-VL-7B's shape: slim cache, replayed, against dense ones.

    python3 -m benchmarks.decode.bench_decode_model
    python3 -m benchmarks.decode.bench_decode_model --layers 4
    python3 -m benchmarks.decode.bench_decode_model --device cpu --quick

28 layers, hidden 3584, 28/4 heads, D=128, MLP 18944, bfloat16, random weights; embeddings in, hidden states out
(no vocabulary). The caches are filled with random keys and values as in ``bench_decode.py``, lazy heads and k* too.
Ours is what a caller gets: ``model(...)`` with an ``OmniSparseCache``, recorded after three steps. Dense, the same
weights, the fastest of:

- a ``DynamicCache`` and plain SDPA, uncompiled;
- the decoder compiled by Inductor over a full cache that never moves, one CUDA graph, with flash or with cuDNN SDPA:
  what a hand-made decode loop would run. Its replay is timed bare, without a call around it. One layer is compiled
  and serves all (``--whole`` compiles the decoder as one, which fuses a norm more in each layer, and takes minutes).

128K visual tokens come first, 8K and 4K last: those are there for one question, whether a step is ever slower than
dense. Nothing compiled depends on the length. The JSON is written, and figures are recorded, after each case.

A step is timed by CUDA events from an idle device, so what Python does before the first kernel counts; ``stream_ms``
is the same back to back, where it hides behind the step before.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode.bench_decode import (
    KV_HEADS,
    RESULTS,
    SCALE,
    SINKS,
    WINDOW,
    Sizes,
    fill_store,
    lazy_heads,
    settle,
    synchronize,
    visual_tokens,
)
from benchmarks.model import bench_compile
from omnisparse_flex import OmniSparseCache, OmniSparseConfig, apply_omnisparse, rewrite_report
from omnisparse_flex.model.cache_argument import as_cache_argument
from omnisparse_flex.model.compiled_module import compiled_decoder_of

RUNS, WARM = 40, 5
#: Tokens that a tail has room for: none of the timed steps has to grow it.
ROOM = 512
#: Visual tokens and the memory ratios measured there.
CASES = {131072: (4.0, 2.4), 32768: (4.0, 2.4), 8192: (4.0,), 4096: (4.0,)}
#: The attention implementation over ``FULL``.
NAME = "bench_full_cache"
FULL: list[tuple[Tensor, Tensor]] = []
#: The layer whose turn it is: no layer's number stands in the compiled code, so that one serves all.
TURN = [0]


@torch.library.custom_op("omnisparse_bench::full_attend", mutates_args=())
def full_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One token over the next layer's full cache, which never moves: written into its last place, then plain SDPA."""
    keys, values = FULL[TURN[0]]
    TURN[0] = (TURN[0] + 1) % len(FULL)
    keys[:, :, -1:] = key
    values[:, :, -1:] = value
    return F.scaled_dot_product_attention(query.contiguous(), keys, values, scale=SCALE, enable_gqa=True)


@full_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def full_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """``full_attend`` as transformers calls it."""
    out = torch.ops.omnisparse_bench.full_attend(query, key, value)
    return out.transpose(1, 2).contiguous(), None


def inputs_of(model: Any, sizes: Sizes) -> dict[str, Tensor]:
    """One token: an embedding (1, 1, hidden) and its M-RoPE positions (3, 1, 1)."""
    embeddings = torch.randn(1, 1, model.config.hidden_size, device=sizes.device, dtype=sizes.dtype)
    positions = torch.full((3, 1, 1), sizes.length, device=sizes.device)
    return {"inputs_embeds": embeddings, "position_ids": positions}


def spread(step: Callable[[], Any], device: str, runs: int = RUNS) -> dict[str, float]:
    """Milliseconds of a step from an idle device (median, 10th and 90th percentile), and back to back."""
    runs = runs if device == "cuda" else 3
    for _ in range(WARM):
        step()
    found = sorted(once(step, device) for _ in range(runs))
    synchronize(device)
    together = once(lambda: [step() for _ in range(runs)], device) / runs
    ninth = statistics.quantiles(found, n=10)
    return {"ms": statistics.median(found), "low_ms": ninth[0], "high_ms": ninth[-1], "stream_ms": together}


def once(step: Callable[[], Any], device: str) -> float:
    """Milliseconds on the device; on the CPU, of the clock."""
    synchronize(device)
    if device != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def dense_dynamic(model: Any, sizes: Sizes) -> dict[str, float]:
    """Plain SDPA over a ``DynamicCache``, as transformers decodes."""
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    for layer in range(sizes.layers):
        cache.update(sizes.random(KV_HEADS, sizes.length - 1), sizes.random(KV_HEADS, sizes.length - 1), layer)
    token = inputs_of(model, sizes)
    return spread(lambda: model(**token, **as_cache_argument(model.forward, cache)), sizes.device, runs=10)


def by_layer(model: Any, device: str) -> Callable[..., Tensor]:
    """The decoder as a function of one token, over ``FULL``: one compiled layer called 28 times."""

    def one(layer: Any, hidden: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        return layer(hidden, position_embeddings=places, attention_mask=None, use_cache=False)

    compiled = torch.compile(one, dynamic=False, fullgraph=True, backend="inductor" if device == "cuda" else "eager")

    def run(inputs_embeds: Tensor, position_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, places = inputs_embeds, model.rotary_emb(inputs_embeds, position_ids)
        for layer in model.layers:
            hidden = compiled(layer, hidden, places)
        return model.norm(hidden)

    return run


def dense_graphs(model: Any, compiled: Callable[..., Any], sizes: Sizes) -> dict[str, dict[str, float]]:
    """The compiled decoder over a full cache, as one CUDA graph for each SDPA kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model.set_attn_implementation(NAME)
    FULL[:] = [
        (sizes.random(KV_HEADS, sizes.length), sizes.random(KV_HEADS, sizes.length)) for _ in range(sizes.layers)
    ]
    token, result, TURN[0] = inputs_of(model, sizes), {}, 0
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, kernel in kernels.items() if sizes.device == "cuda" else [("cpu", None)]:
        with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
            try:
                result[name] = spread(captured(lambda: compiled(**token, use_cache=False), sizes.device), sizes.device)
            except RuntimeError as error:  # a kernel that refuses the shape
                print(f"    {name}: {str(error).splitlines()[0]}", flush=True)
                TURN[0] = 0
    FULL.clear()
    return result


def captured(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A step as the replay of a CUDA graph; on the CPU, itself."""
    for _ in range(3):
        step()
    if device != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def slim(model: Any, sizes: Sizes) -> dict[str, Any]:
    """Our decode step: run from Python, recorded, replayed."""
    before = settle(sizes.device)
    cache = OmniSparseCache(model, offload=False)
    cache.store.chooser = sizes.chooser
    cache._omnisparse_visual = visual_tokens(sizes)
    memory = fill_store(cache.store, sizes)
    cache.set_length()
    for layer in cache.layers:
        # Filled without the host's part, which takes long, and told otherwise: so the steps keep their
        # queries for the next refresh, as they do when offloading.
        layer.lossy, layer.room = False, ROOM
    token = inputs_of(model, sizes)

    def step() -> Any:
        return model(**token, **as_cache_argument(model.forward, cache))

    start = time.perf_counter()
    step()
    synchronize(sizes.device)
    result: dict[str, Any] = {"first_s": time.perf_counter() - start, "resident": memory["resident"]}
    replay, cache.replay = cache.replay, None
    result["python"] = spread(step, sizes.device, runs=15)
    cache.replay = replay
    result["until_replay_ms"] = [once(step, sizes.device) for _ in range(3)]  # the third records, and replays
    result["replayed"] = spread(step, sizes.device)
    report = cache.memory_report()
    if sizes.device == "cuda":
        resident = torch.cuda.memory_allocated() - before
        result.update(recorded_bytes=report.recorded, resident_with_graph=resident, recordings=replay.count)
        counted = {int(layer.counter) for layer in cache.layers} | {layer.tail for layer in cache.layers}
        if replay.count != 1 or replay.recorded is None or len(counted) != 1:
            raise RuntimeError(f"the step was not replayed: {replay.count} recordings, {rewrite_report(model).notes}")
    result["memory_ratio"] = report.full / report.device
    return result


def measure(
    layers: int, cases: dict[int, tuple[float, ...]], device: str, shape: str, *,
    whole: bool = False, done: Callable[[dict[str, Any], int, float], None] = lambda results, visual, ratio: None,
) -> dict[str, Any]:  # fmt: skip
    """All lengths and ratios: dense first, then the same model changed.

    Args:
        layers: Decoder layers.
        cases: Visual tokens, and the memory ratios measured there.
        device: ``cuda`` or ``cpu``.
        shape: Of ``bench_compile.SHAPES``.
        whole: Compile the dense decoder as one.
        done: Called after each case of ours with the results so far.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, full_attention)
    started = time.perf_counter()
    model = bench_compile.build(argparse.Namespace(hidden=shape, layers=layers, device=device))
    say(started, f"built {layers} layers")
    results: dict[str, Any] = {"layers": layers, "dense_compiled": "whole" if whole else "by layer"}
    backend = "inductor" if device == "cuda" else "eager"
    compiled = torch.compile(model, dynamic=False, backend=backend) if whole else by_layer(model, device)
    for visual in cases:
        sizes = Sizes(layers, visual, 1.0, [0] * layers, device)
        dense = {**dense_graphs(model, compiled, sizes), "dynamic": dense_dynamic(model, sizes)}
        settle(device)
        results[str(visual)] = {"dense": dense}
        say(started, f"{visual} visual tokens, dense: " + ", ".join(f"{k} {text(v)}" for k, v in dense.items()))
    model.set_attn_implementation("sdpa")
    rules = OmniSparseConfig(sink_size=SINKS, window_size=WINDOW)
    inner = "auto" if device == "cuda" else "eager"
    apply_omnisparse(model, rules, visual_mask=lambda args, kwargs: None, inner=inner)
    entry = compiled_decoder_of(model)
    assert entry is not None
    entry.checked = True  # no prefill runs here, and a decode graph has nothing to rewrite: no warning
    for visual, ratios in cases.items():
        for ratio in ratios:
            row = ours(model, layers, visual, ratio, device, results[str(visual)]["dense"])
            results[str(visual)][str(ratio)] = row
            results["seconds"], results["graphs"] = time.perf_counter() - started, entry.backend.log.graphs
            say(started, line(visual, ratio, row))
            done(results, visual, ratio)
    return results


def ours(model: Any, layers: int, visual: int, ratio: float, device: str, dense: dict[str, Any]) -> dict[str, Any]:
    """One case, beside its dense times."""
    lazy, source = lazy_heads(layers, "slim4x" if ratio == 4.0 else "slim2_4x")
    row = slim(model, Sizes(layers, visual, ratio, lazy, device))
    for unit in ("ms", "stream_ms"):
        row[f"speedup_{unit}"] = min(x[unit] for x in dense.values()) / row["replayed"][unit]
    row["speedup_dynamic"] = dense["dynamic"]["ms"] / row["replayed"]["ms"]
    return {**row, "lazy_heads_from": source}


def line(visual: int, ratio: float, row: dict[str, Any]) -> str:
    """One case as text."""
    slower = "" if row["speedup_ms"] >= 1 else " SLOWER THAN DENSE"
    return (
        f"{visual} visual tokens, {ratio}x: {text(row['replayed'])}, from Python {text(row['python'])}, "
        f"first step {row['first_s']:.0f} s, recording {row['until_replay_ms'][-1]:.0f} ms, "
        f"{row['memory_ratio']:.2f}x less memory; {row['speedup_ms']:.2f}x of the fastest dense{slower} "
        f"({row['speedup_stream_ms']:.2f}x back to back), {row['speedup_dynamic']:.2f}x of a DynamicCache"
    )


def text(row: dict[str, float]) -> str:
    """A time with its spread."""
    return f"{row['ms']:.2f} ms [{row['low_ms']:.2f}-{row['high_ms']:.2f}; {row['stream_ms']:.2f}]"


def say(started: float, line: str) -> None:
    """Print at once, with the seconds so far."""
    print(f"[{time.perf_counter() - started:5.1f} s] {line}", flush=True)


def keep(results: dict[str, Any], visual: int, ratio: float) -> None:
    """Write the JSON, and the figure of the case that was just measured."""
    from benchmarks.common import summary

    facts = {"device": summary.device_name(), "torch": torch.__version__}
    summary.write_json({**results, **facts}, RESULTS / "decode_model.json")
    if ratio != 4.0:
        return
    name = f"{visual // 1024}k"
    baseline = (
        f"a whole decoder step, fastest of: compiled {results['dense_compiled']} over a full cache, as one CUDA graph "
        "with flash or cuDNN SDPA; DynamicCache and SDPA; k* for 4x less memory, 28 layers, 7B shape, bfloat16, "
        f"{name.upper()} visual tokens, B=1"
    )
    value = round(results[str(visual)][str(ratio)]["speedup_ms"], 3)
    summary.record(f"decode.model_step_speedup.{name}", value, unit="x", baseline=baseline, script=__file__)


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=28, help="fewer: a quick look; records nothing")
    parser.add_argument("--whole", action="store_true", help="compile the dense decoder as one, not layer by layer")
    parser.add_argument("--quick", action="store_true", help="a short cache of few thin layers; records nothing")
    options = parser.parse_args()
    layers, cases, shape = (2, {2048: (4.0, 2.4)}, "7b_thin") if options.quick else (options.layers, CASES, "7b")
    full = layers == 28 and shape == "7b" and options.device == "cuda"
    with torch.no_grad():
        measure(layers, cases, options.device, shape, whole=options.whole, **({"done": keep} if full else {}))
    if not full:
        print("not the full shape on a GPU: no figure recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
