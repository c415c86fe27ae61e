"""A smaller cache: two questions about one clip, and the bytes that each head takes.

The model is the tiny one of ``apply_to_a_model.py``, with random weights.

    python examples/slim_cache.py
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from apply_to_a_model import build, video_inputs

from omnisparse_flex import OmniSparseCache, apply_omnisparse


def cache_argument(model: Any) -> str:
    """The name of the cache in this transformers: ``cache`` from 5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def run(inner: str = "auto", visual_recall: float = 0.7) -> tuple[OmniSparseCache, torch.Tensor]:
    """Ask twice.

    Args:
        inner: What compiles the rewritten graphs.
        visual_recall: Share of its attention mass that each head keeps. Heads of random weights look everywhere, so
            this is low.

    Returns:
        The cache after both questions, and all tokens, int64 (1, N).
    """
    model, inputs = build(), video_inputs()
    apply_omnisparse(model, inner=inner)  # prefill of a clip this short stays dense
    cache = OmniSparseCache(model, visual_recall=visual_recall)
    named = {cache_argument(model): cache}
    tokens = model.generate(**inputs, **named, max_new_tokens=6, do_sample=False)
    print(cache.memory_report())

    # A second turn: new text after everything so far. The keys that were not kept come back from the host.
    question = torch.randint(10, 900, (1, 12), generator=torch.Generator().manual_seed(2))
    turn = torch.cat([tokens, question], 1)
    tokens = model.generate(
        input_ids=turn, attention_mask=torch.ones_like(turn), **named, max_new_tokens=6, do_sample=False
    )
    print(cache.memory_report())
    return cache, tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Compiling for a CPU would take longer than all the rest: "eager" runs the rewritten graph as it is.
    default = "auto" if torch.cuda.is_available() else "eager"
    parser.add_argument("--inner", default=default, help="compiler of the rewritten graphs (auto, eager, ...)")
    run(parser.parse_args().inner)
