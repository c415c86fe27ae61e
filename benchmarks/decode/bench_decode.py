"""Memory and time of decoding on a slim cache, at the shape of Qwen2.5-VL-7B: 28 layers, 28/4 heads, D=128, bfloat16.

    python3 -m benchmarks.decode.bench_decode
    python3 -m benchmarks.decode.bench_decode --device cpu --quick

Lazy heads are those of ``results/needle_decode.json`` (its layers stretched over ours), k* what the
same memory ratio leaves. A step is the attention of all layers for one token, the new key and value
written included. Dense: the faster of flash and cuDNN SDPA over a full cache that never moves. Both are
timed from Python ("eager") and replayed as a CUDA graph ("device"): the first has the launches in it,
the second has none.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.cache.choose_keys import HeadChoice, ranked
from omnisparse_flex.cache.layer import MIN_TAIL_STEP, SlimLayer
from omnisparse_flex.cache.store import SlimStore

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEADS, KV_HEADS, DIM = 28, 4, 128
SCALE = DIM**-0.5
#: Text before and after the video, in tokens; sinks and recent tokens as in the look-up benchmark.
TEXT, SINKS, WINDOW = 64, 16, 64
POSITION_BYTES = 4
RUNS = 20


class Sizes:
    """What one run measures.

    Attributes:
        layers: Decoder layers.
        visual: Visual tokens.
        ratio: Memory ratio that k* is set for.
        lazy: Lazy heads of each layer.
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, layers: int, visual: int, ratio: float, lazy: list[int], device: str) -> None:
        self.layers, self.visual, self.ratio, self.lazy, self.device = layers, visual, ratio, lazy, device
        self.length = visual + 2 * TEXT
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def chooser(self, mass: Tensor, layer: int) -> HeadChoice:
        """The split that the look-up benchmark found, with k* for the ratio."""
        count, width = mass.shape[2], 2 * DIM * self.dtype.itemsize
        room = self.length / self.ratio * width / (width + POSITION_BYTES) - MIN_TAIL_STEP
        lazy = tuple(range(self.lazy[layer]))
        fetching = tuple(range(len(lazy), KV_HEADS))
        k = min(count, int(KV_HEADS * (room - (self.length - count)) / max(1, len(fetching))))
        return HeadChoice(lazy, fetching, ranked(mass[:, list(fetching)])[:, :, :k])

    def random(self, heads: int, tokens: int) -> Tensor:
        """(1, heads, tokens, D)."""
        return torch.randn(1, heads, tokens, DIM, device=self.device, dtype=self.dtype)


def fill(sizes: Sizes, offload: bool) -> tuple[SlimStore, dict[str, float]]:
    """A slim cache after a prompt, and what that took."""
    store = SlimStore([SlimLayer(i) for i in range(sizes.layers)], sizes.chooser, offload, SINKS, WINDOW)
    return store, fill_store(store, sizes)


def fill_store(store: SlimStore, sizes: Sizes) -> dict[str, float]:
    """A prompt, layer by layer as a prefill hands them over."""
    visual = visual_tokens(sizes)
    before = settle(sizes.device)
    store.begin(torch.zeros(1, sizes.length, device=sizes.device), None, visual)
    seconds = 0.0
    for layer in range(sizes.layers):
        key, value = sizes.random(KV_HEADS, sizes.length), sizes.random(KV_HEADS, sizes.length)
        query = sizes.random(HEADS, 256)
        synchronize(sizes.device)
        start = time.perf_counter()
        store.mode = "prefill"
        slim(store, sizes, query, key, value, layer)
        synchronize(sizes.device)
        seconds += time.perf_counter() - start
        del key, value, query
    if store.copies is not None:
        store.copies.drain()
    store.end(sizes.length)
    peak, resident = used(sizes.device)
    return {"peak": peak - before, "resident": resident - before, "slim_ms": seconds * 1e3}


def visual_tokens(sizes: Sizes) -> Tensor:
    """bool (1, length)."""
    visual = torch.zeros(1, sizes.length, dtype=torch.bool, device=sizes.device)
    visual[:, TEXT : TEXT + sizes.visual] = True
    return visual


def slim(store: SlimStore, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, layer: int) -> None:
    """``store_layer`` with the last queries only: the benchmark has no use for the others."""
    plan, own = store.plan, store.layers[layer]
    assert plan is not None
    places = (plan.queries - (sizes.length - query.shape[2]))[:, None, :, None].clamp(min=0)
    pattern = query.gather(2, places.expand(-1, HEADS, -1, DIM))
    own.store(pattern, key, value, plan, SCALE, first=0, chooser=store.chooser, copies=store.copies)
    own.limit = 1 << 30


def slim_step(store: SlimStore, inputs: list[Tensor]) -> None:
    """One token through all layers."""
    for layer in range(len(store.layers)):
        store.attend_layer(*inputs, None, layer, SCALE)


def dense_step(caches: list[tuple[Tensor, Tensor]], inputs: list[Tensor], at: int) -> None:
    """One token through all layers of a full cache."""
    query, key, value = inputs
    for keys, values in caches:
        keys[:, :, at : at + 1] = key
        values[:, :, at : at + 1] = value
        F.scaled_dot_product_attention(query, keys, values, scale=SCALE, enable_gqa=True)


def dense_times(sizes: Sizes) -> dict[str, Any]:
    """Memory and step times of a full cache, by kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = settle(sizes.device)
    caches = [(sizes.random(KV_HEADS, sizes.length), sizes.random(KV_HEADS, sizes.length)) for _ in range(sizes.layers)]
    inputs = token(sizes)
    result: dict[str, Any] = {"resident": used(sizes.device)[1] - before, "eager_ms": {}, "device_ms": {}}
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, kernel in kernels.items() if sizes.device == "cuda" else [("cpu", None)]:
        with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
            try:
                step = lambda: dense_step(caches, inputs, sizes.length - 1)  # noqa: E731
                result["eager_ms"][name], result["device_ms"][name] = times(step, sizes.device)
            except RuntimeError as error:  # a kernel that refuses the shape
                print(f"    {name}: {str(error).splitlines()[0]}", flush=True)
    return result


def token(sizes: Sizes) -> list[Tensor]:
    """Query, key and value of one token."""
    return [sizes.random(heads, 1) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def times(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Median milliseconds of a step from Python, and replayed as a CUDA graph."""
    for _ in range(3):
        step()
    eager = median(step, device)
    if device != "cuda":
        return eager, eager
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return eager, median(graph.replay, device)


def median(step: Callable[[], None], device: str) -> float:
    """Median milliseconds of ``RUNS`` runs."""
    seconds = []
    for _ in range(RUNS):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def turn(store: SlimStore, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a second turn beside its own attention: fetch every layer, slim it again."""
    count = TEXT
    visual = torch.zeros(1, sizes.length + count, dtype=torch.bool, device=sizes.device)
    visual[:, TEXT : TEXT + sizes.visual] = True
    key, value, query = (sizes.random(heads, count) for heads in (KV_HEADS, KV_HEADS, HEADS))
    before = settle(sizes.device)
    start = time.perf_counter()
    store.begin(torch.zeros(1, count, device=sizes.device), None, visual)
    fetch = 0.0
    for layer in range(sizes.layers):
        at = time.perf_counter()
        full = store.restore_layer(key, value, layer)
        synchronize(sizes.device)
        fetch += time.perf_counter() - at
        store.store_layer(query, *full, layer, SCALE)
        del full
    synchronize(sizes.device)
    total = time.perf_counter() - start
    store.end(count)
    return {"total_ms": total * 1e3, "fetch_ms": fetch * 1e3, "peak": used(sizes.device)[0] - before}


def measure(sizes: Sizes, dense: dict[str, Any]) -> dict[str, Any]:
    """One ratio at one length."""
    store, memory = fill(sizes, offload=True)
    report = SlimReport(store)
    result: dict[str, Any] = {**memory, "report_device": report.device, "report_host": report.host, "full": report.full}
    result["full_layer"] = report.full // sizes.layers
    result["turn"] = turn(store, sizes)
    inputs = token(sizes)
    store.begin(inputs[0][:, 0], None, None)
    for layer in store.layers:
        layer.limit = 1 << 30
    # The tail grows with every run, and has room for all of them (``MIN_TAIL_STEP``): a graph may write to it.
    result["eager_ms"], result["device_ms"] = times(lambda: slim_step(store, inputs), sizes.device)
    result["memory_ratio"] = (dense["resident"] or report.full) / (result["resident"] or report.device)
    for kind in ("eager_ms", "device_ms"):
        best = min(dense[kind].values())
        result[kind.replace("_ms", "_speedup")] = best / result[kind]
    return result


class SlimReport:
    """Bytes of a store, by its own report."""

    def __init__(self, store: SlimStore) -> None:
        from omnisparse_flex.cache.memory_report import memory_report

        report = memory_report(store.layers, store.batch, store.length)
        self.device, self.host, self.full = report.device, report.host, report.full


def settle(device: str) -> int:
    """Free what is free, restart the peak, and return what is allocated."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def used(device: str) -> tuple[int, int]:
    """Peak and present bytes allocated; 0 where nobody counts them."""
    return (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if device == "cuda" else (0, 0)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def lazy_heads(layers: int, variant: str) -> tuple[list[int], str]:
    """Lazy heads of each layer, from the run whose accuracy is reported; and where they are from."""
    file = RESULTS / "needle_decode.json"
    if not file.exists():
        return [1] * layers, "assumed: one of four heads (no needle_decode.json)"
    found = json.loads(file.read_text())["variants"][variant]["lazy_heads"]
    shares = [found[i * len(found) // layers] / 3 for i in range(layers)]  # SmolLM2 has 3 KV heads
    return [min(KV_HEADS, round(share * KV_HEADS)) for share in shares], "benchmarks/results/needle_decode.json"


def show(name: str, row: dict[str, Any], dense: dict[str, Any]) -> None:
    """Print one row."""
    peak = row["peak"] / max(1, row["resident"] + row["full_layer"])
    print(
        f"  {name}: {row['memory_ratio']:.2f}x less memory, prefill peak {peak:.2f} of slim + one layer; step "
        f"{row['device_ms']:.3f} ms on the device ({row['device_speedup']:.2f}x), {row['eager_ms']:.3f} ms from Python "
        f"({row['eager_speedup']:.2f}x); dense {dense['device_ms']} / {dense['eager_ms']}; "
        f"turn {row['turn']['total_ms']:.0f} ms ({row['turn']['fetch_ms']:.0f} fetching), "
        f"slimming {row['slim_ms']:.0f} ms",
        flush=True,
    )


def keep(results: dict[str, Any]) -> None:
    """Write the JSON so far and the figures, all of the first length."""
    from benchmarks.common import summary

    summary.write_json(
        {**results, "device": summary.device_name(), "torch": torch.__version__}, RESULTS / "decode.json"
    )
    row = results["131072"]["4.0"]
    shape = "28 layers, 28/4 heads, D=128, bfloat16, 128K visual tokens, B=1"
    figures = {
        "decode.memory_ratio.128k": (row["memory_ratio"], "x", f"bytes allocated for a full cache; {shape}"),
        "decode.step_speedup.128k": (
            row["device_speedup"], "x",
            f"attention of a step, fastest of flash and cuDNN SDPA, both as CUDA graphs; 4x less memory, {shape}",
        ),
        "decode.step_speedup_eager.128k": (row["eager_speedup"], "x", f"the same, launched from Python; {shape}"),
        "decode.offload_turn_ms.128k": (row["turn"]["total_ms"], "ms", f"fetch and slim every layer again; {shape}"),
    }  # fmt: skip
    for name, (value, unit, baseline) in figures.items():
        summary.record(name, round(value, 3), unit=unit, baseline=baseline, script=__file__)


def main() -> int:
    """Measure every length and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a short cache of few layers; records nothing")
    options = parser.parse_args()
    layers, lengths = (3, (2048,)) if options.quick else (28, (131072, 32768))
    results: dict[str, Any] = {}
    with torch.no_grad():
        for visual in lengths:
            dense = dense_times(Sizes(layers, visual, 1.0, [0] * layers, options.device))
            results[str(visual)] = {"dense": dense}
            for ratio, variant in ((2.4, "slim2_4x"), (4.0, "slim4x")):
                lazy, source = lazy_heads(layers, variant)
                row = measure(Sizes(layers, visual, ratio, lazy, options.device), dense)
                results[str(visual)][str(ratio)] = {**row, "lazy_heads": lazy, "lazy_heads_from": source}
                show(f"{visual} visual tokens, {ratio}x", row, dense)
            if not options.quick and options.device == "cuda":
                keep(results)
    if options.quick or options.device != "cuda":
        print("not the full shape on a GPU: no figure recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
