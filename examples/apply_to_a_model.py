"""Sparse attention in a Hugging Face video model: apply, look at the report, generate, look at what was kept.

The model is a tiny Qwen2.5-VL with random weights, so that nothing has to be downloaded. With a real one only ``build``
and ``video_inputs`` change: use ``from_pretrained`` and the model's own processor, as the README does.

    python examples/apply_to_a_model.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, remove_omnisparse, rewrite_report

VIDEO_TOKEN, VISION_START, VISION_END = 1001, 1002, 1003
#: Steps of two frames, and patches of 14 x 14 pixels along both sides; four patches are one token.
GRID = (64, 8, 8)


def build(layers: int = 2) -> Any:
    """A tiny Qwen2.5-VL with random weights, in eval mode."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "rope_parameters": {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=1000,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def video_inputs() -> dict[str, torch.Tensor]:
    """What a processor makes of a clip and a question: 1,024 visual tokens between pieces of text."""
    generator = torch.Generator().manual_seed(1)
    steps, rows, columns = GRID
    visual = torch.full((steps * rows * columns // 4,), VIDEO_TOKEN)
    before, question = (torch.randint(10, 900, (n,), generator=generator) for n in (20, 12))
    edges = (torch.tensor([VISION_START]), torch.tensor([VISION_END]))
    ids = torch.cat([before, edges[0], visual, edges[1], question])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO_TOKEN).int() * 2,
        "pixel_values_videos": torch.randn(steps * rows * columns, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([GRID]),
    }


@torch.no_grad()
def run(inner: str = "auto") -> dict[str, Any]:
    """Apply, report, generate, measure, take back.

    Args:
        inner: What compiles the rewritten graphs, as in ``apply_omnisparse``.

    Returns:
        What was printed: the report, the statistics, and the largest difference of logits.
    """
    model, inputs = build(), video_inputs()
    dense = model(**inputs).logits

    # Random weights look everywhere, hence a low target; a clip this short would stay dense without min_seq_len=0.
    rules = OmniSparseConfig(min_peak=0.5, target_recall=0.3, sink_size=16, window_size=64)
    apply_omnisparse(model, rules, min_seq_len=0, inner=inner)
    with collect_stats(model, exact=True) as stats:
        sparse = model(**inputs).logits
    report = rewrite_report(model)
    print(report, stats, sep="\n\n")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print("\nnew tokens:", tokens[0, inputs["input_ids"].shape[1] :].tolist())

    remove_omnisparse(model)
    assert torch.equal(model(**inputs).logits, dense), "the model is what it was"
    return {"report": report, "stats": stats, "difference": (sparse - dense).abs().max().item()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Compiling for a CPU would take longer than all the rest: "eager" runs the rewritten graph as it is.
    default = "auto" if torch.cuda.is_available() else "eager"
    parser.add_argument("--inner", default=default, help="compiler of the rewritten graphs (auto, eager, ...)")
    run(parser.parse_args().inner)
