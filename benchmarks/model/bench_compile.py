"""Compile time of a 28-layer decoder of Qwen2.5-VL-7B's shape: cold, and warm in a new process.

    python3 -m benchmarks.model.bench_compile
    python3 -m benchmarks.model.bench_compile --device cpu --layers 2 --tokens 512 --hidden small

Two processes share one empty cache folder: the first finds nothing there (cold), the second
everything (warm). Compile time = first call − a later call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compile.json"
#: hidden size, intermediate size, query heads, KV heads, M-RoPE sections.
SHAPES = {
    "7b": (3584, 18944, 28, 4, (16, 24, 24)),
    "7b_thin": (3584, 64, 28, 4, (16, 24, 24)),  # the attention of the one above, for a quick look
    "small": (64, 128, 4, 2, (2, 3, 3)),
}
AIMS = {"cold": 90.0, "warm": 15.0}
HEARTBEAT_S = 15.0


def say(text: str) -> None:
    """Print at once: somebody waits."""
    print(text, flush=True)


def build(options: argparse.Namespace) -> Any:
    """A text decoder with random weights, made where it will run."""
    import torch
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    hidden, intermediate, heads, kv_heads, sections = SHAPES[options.hidden]
    config = Qwen2_5_VLTextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128,  # embeddings are fed in
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)},
    )
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(options.device):
            return Qwen2_5_VLTextModel(config).eval()
    finally:
        torch.set_default_dtype(default)


def child(options: argparse.Namespace) -> None:
    """One process: build, compile, time, and write what happened to ``options.child``."""
    import torch

    import omnisparse_flex.backend as backend_module
    from omnisparse_flex import apply_omnisparse, rewrite_report

    passes: list[float] = []
    backend_module.run_pipeline = timed(backend_module.run_pipeline, passes)
    start = time.perf_counter()
    model = apply_omnisparse(build(options), min_seq_len=0)
    config = model.config
    embeddings = torch.randn(1, options.tokens, config.hidden_size, device=options.device, dtype=model.dtype)
    say(f"  built in {time.perf_counter() - start:.1f} s; compiling {options.layers} layers, {options.tokens} tokens")

    calls: list[float] = []
    run = timed(lambda: call(model, embeddings), calls)
    with torch.no_grad():
        first = run()
        later = [run() for _ in range(2)]
    report = rewrite_report(model)
    result = {
        "compile_s": calls[0] - min(calls[1:]),
        "steady_s": min(calls[1:]),
        "parts_s": parts(sum(passes)),
        "graphs": report.graphs,
        "rewritten": len(report.rewritten),
        "fell_back": any("eagerly" in note for note in report.notes) or report.graphs == 0,
        "counters": counters(),
        "finite": all(bool(torch.isfinite(x).all()) for x in (first, *later)),
        "checksum": first.double().abs().mean().item(),
        "versions": versions(),
    }
    Path(options.child).write_text(json.dumps(result))


def call(model: Any, embeddings: Any) -> Any:
    """One prefill, until the device has finished it."""
    import torch

    out = model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    if embeddings.is_cuda:
        torch.cuda.synchronize()
    return out


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """``function``, with the seconds of each call appended to ``seconds``."""

    def timed_function(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return timed_function


def parts(passes: float) -> dict[str, float]:
    """Where the compile time went, in seconds; the parts do not overlap."""
    from torch._dynamo.utils import compilation_time_metrics

    seconds = {name: sum(times) for name, times in compilation_time_metrics.items()}

    def of(name: str) -> float:
        return seconds.get(name, 0.0)

    whole, backend = of("_compile.compile_inner"), of("OutputGraph.call_user_compiler")
    inductor = of("compile_fx.<locals>.fw_compiler_base")
    load = of("AOTAutogradCache.inductor_load")
    codegen = of("GraphLowering.run") + of("GraphLowering.codegen")
    return {
        "whole": whole,
        "dynamo": whole - backend,
        "our passes": passes,
        "AOTAutograd": backend - passes - inductor - load,
        "Inductor: lowering and code": codegen,
        "Inductor: rest (passes, kernels)": inductor - codegen,
        "load from AOTAutograd's cache": load,
    }


def counters() -> dict[str, int]:
    """Dynamo's and the caches' own counts."""
    from torch._dynamo.utils import counters as counted

    wanted = {"stats": ("unique_graphs",), "frames": ("total", "ok")}
    found = {f"{group} {name}": counted[group][name] for group, names in wanted.items() for name in names}
    found["graph breaks"] = sum(counted["graph_break"].values())
    for group in ("aot_autograd", "inductor"):
        found.update({name: n for name, n in counted[group].items() if "cache" in name})
    return found


def versions() -> dict[str, str]:
    """Of what decides the compile time."""
    import torch
    import transformers

    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}


def measure(name: str, options: argparse.Namespace, folder: Path, deadline: float) -> dict[str, Any] | None:
    """Run one child process over the caches in ``folder``; None if it failed or took too long."""
    say(f"{name}: starting")
    output, start = folder / f"{name}.json", time.perf_counter()
    flags = [f"--{key}={getattr(options, key)}" for key in ("layers", "tokens", "device", "hidden")]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.model.bench_compile", *flags, f"--child={output}"], env=environment
    )
    while process.poll() is None:
        try:
            process.wait(HEARTBEAT_S)
        except subprocess.TimeoutExpired:
            say(f"  … {time.perf_counter() - start:.0f} s")
        if time.perf_counter() > deadline:
            process.kill()
            process.wait()
            say(f"{name}: stopped after {time.perf_counter() - start:.0f} s")
            return None
    if process.returncode != 0:
        say(f"{name}: failed with exit status {process.returncode}")
        return None
    return json.loads(output.read_text())


def show(name: str, result: dict[str, Any]) -> None:
    """Print one process's numbers."""
    say(f"{name}: compile {result['compile_s']:.1f} s (aim {AIMS[name]:.0f} s), later calls {result['steady_s']:.3f} s")
    for part, seconds in result["parts_s"].items():
        say(f"    {part:34s} {seconds:7.2f} s")
    fallback = "A FRAME FELL BACK TO EAGER" if result["fell_back"] else "no frame fell back"
    say(f"    {result['graphs']} graphs, {result['rewritten']} sites rewritten, {fallback}; {result['counters']}")


def keep(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the JSON, and the figures if this was the decoder they are about."""
    from benchmarks.common import summary

    shape = {key: getattr(options, key) for key in ("layers", "tokens", "device", "hidden")}
    if (options.layers, options.hidden, options.device) != (28, "7b", "cuda"):
        say("not the 28-layer 7B shape on a GPU: no figure recorded")
        return
    summary.write_json({"device": summary.device_name(), "cores": os.cpu_count(), **shape, **results}, RESULTS)
    baseline = f"first − later call; 28 layers, 7B shape, {options.tokens} tokens, {os.cpu_count()} cores"
    for name, result in results.items():
        seconds = round(result["compile_s"], 2)
        summary.record(f"compile.{name}_s.7b", seconds, unit="s", baseline=baseline, script=__file__)


def main() -> int:
    """Measure cold, then warm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--hidden", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--limit", type=float, default=230.0, help="seconds for both processes together")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return 0
    results: dict[str, dict[str, Any]] = {}
    deadline = time.perf_counter() + options.limit
    with tempfile.TemporaryDirectory(prefix="omnisparse_compile_") as folder:
        for name in ("cold", "warm"):
            result = measure(name, options, Path(folder), deadline)
            if result is None:
                break
            results[name] = result
            show(name, result)
    if results:
        keep(results, options)
    good = len(results) == 2 and not any(r["fell_back"] or not r["finite"] for r in results.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
