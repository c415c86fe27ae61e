"""Tiny models of the Gemma kind: their images attend to themselves in both directions, by masks made outside."""

from __future__ import annotations

import torch

from tests.helpers.tiny import IMAGE, VIDEO, text_config

#: Tokens of an image.
SPAN = 256
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
LAYERS = ["sliding_attention", "full_attention"]


def gemma3(**changes):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**text_config(head_dim=16, sliding_window=100, layer_types=LAYERS) | changes)
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**TOWER),
        image_token_index=IMAGE,
        mm_tokens_per_image=SPAN,
        boi_token_index=192,
        eoi_token_index=193,
    )
    return Gemma3ForConditionalGeneration(config)


def gemma4(**changes):
    """Without a tower: its heads differ from layer to layer."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig

    own = {
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 200,
        "sliding_window": 100,
        "layer_types": LAYERS,
    }
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**text_config(**own) | changes),
        vision_config=None,
        audio_config=None,
        image_token_id=198,
        video_token_id=VIDEO,
        audio_token_id=194,
        boi_token_id=192,
        eoi_token_id=193,
    )
    return Gemma4ForConditionalGeneration(config)


def paligemma(**changes):
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text_config(head_dim=16) | changes),
        vision_config=SiglipVisionConfig(**TOWER | {"projection_dim": 64}),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    return PaliGemmaForConditionalGeneration(config)


def build(make, device="cpu", **changes):
    torch.manual_seed(0)
    return make(**changes).eval().to(device)


def prompt(device="cpu", rows=2, head=20, tail=200):
    """Text, an image with its pixels, text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 180, (rows, head + SPAN + tail), generator=generator)
    ids[:, head : head + SPAN] = IMAGE
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "token_type_ids": (ids == IMAGE).int().to(device),
        "pixel_values": torch.randn(rows, 3, 224, 224, generator=generator).to(device),
    }
