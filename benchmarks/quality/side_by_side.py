"""The library's rules through the library, and others' rules as masks, on the same windows of text: SmolLM2-135M.

    PYTHONPATH=. python -m benchmarks.quality.side_by_side --data DIR --device cpu --tokens 8192 --windows 1
        [--only NAME ...] [--out FILE] [--layers 30]

Every window is written as soon as it is measured; a second run goes on where the first stopped. Rows of the library
run its passes and kernels with ``min_seq_len=0``, compiled once for all layers. The rows of ``MASKS`` compute exact
attention under the pairs that a rule keeps, and count them; "as masks" are those that the library's own rule chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.common import summary
from benchmarks.quality.block_masks import Rule, install
from benchmarks.quality.own_rules import BLOCK_RULES
from benchmarks.quality.prepare import load
from benchmarks.quality.rivals import MASKS
from benchmarks.quality.weights import load_model
from benchmarks.quality.windows import Window, against_dense, dense_states, hidden_states, windows_of
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.calibration.device_speed import compiled_attention

RESULTS = Path(__file__).resolve().parents[1] / "results" / "side_by_side.json"
#: Row -> the library's rules.
CONFIGS = {**BLOCK_RULES, "paper": OmniSparseConfig.paper()}


class LibraryAttention:
    """A transformers attention function that runs the library's compiled call, one graph for all layers."""

    def __init__(self, config: OmniSparseConfig) -> None:
        self.run = compiled_attention(config, dynamic=False)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """(B, H, N, D) in, (B, N, H, D) out. Causal, no padding, no cache."""
        return self.run(query, key, value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def library(model: Any, config: OmniSparseConfig) -> Iterator[Callable[[Window], tuple[Tensor, dict[str, float]]]]:
    """Windows inside run under the library's rules; yields what measures one."""
    before, name = model.config._attn_implementation, "quality_library"
    AttentionInterface.register(name, LibraryAttention(config).attend)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.config._attn_implementation = name
    try:
        yield lambda window: (hidden_states(model, window), {})
    finally:
        model.config._attn_implementation = before


@contextlib.contextmanager
def masked(model: Any, rule: Rule) -> Iterator[Callable[[Window], tuple[Tensor, dict[str, float]]]]:
    """Windows inside run under the pairs of a rule; yields what measures one."""
    before = model.config._attn_implementation
    attention = install(model)
    try:
        with attention.using(rule):
            yield lambda window: (hidden_states(model, window), attention.books.means())
    finally:
        model.config._attn_implementation = before


def measure(
    model: Any, name: str, windows: Sequence[Window], states: Sequence[Tensor], row: dict[str, Any],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Fill ``row`` with the windows that it lacks; ``save`` is called after each."""
    missing = [(w, s) for w, s in zip(windows, states, strict=True) if w.name not in row]
    if not missing:
        return
    way = masked(model, MASKS[name]) if name in MASKS else library(model, CONFIGS[name])
    row["way"] = "mask" if name in MASKS else "library"
    with way as run:
        for window, dense in missing:
            began = time.perf_counter()
            own, found = run(window)
            ran = time.perf_counter() - began
            judged = against_dense(model.lm_head, own, dense, window.ids)
            row[window.name] = {**judged, **found, "seconds": round(ran, 1)}
            save()
            told = ", ".join(f"{key} {value:.4f}" for key, value in row[window.name].items())
            print(f"{name} | {window.name}: {told}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file does not hold yet; print and write after each window."""
    rows = ["dense", *CONFIGS, *MASKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.quality.prepare")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=rows, default=rows)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--layers", type=int, help="the first so many alone: figures mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    model: Any = load_model(options.data, device=options.device, dtype=torch.float32)
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    windows = list(windows_of(load(options.data)[0], options.tokens, options.windows))
    kept = options.data / f"dense-{options.device}-{len(model.model.layers)}"
    states = [dense_states(model, window, kept) for window in windows]
    for name in options.only:
        content = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
        content |= {"torch": torch.__version__, "device": summary.device_name(), "commit": summary.commit()}
        row = content["rows"].setdefault(name, {})
        if name == "dense":
            for window, dense in zip(windows, states, strict=True):
                row[window.name] = against_dense(model.lm_head, dense, dense, window.ids)
            summary.write_json(content, options.out)
        else:
            measure(model, name, windows, states, row, lambda x=content: summary.write_json(x, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
