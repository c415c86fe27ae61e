"""Stock transformers classes with tiny configs, and inputs for them."""

from __future__ import annotations

import torch

from omnisparse_flex.model.cache_argument import as_cache_argument

VOCAB, IMAGE, VIDEO = 200, 190, 191
#: Of a clip: steps of two frames, and patches along both sides; four patches are one token.
GRID = (4, 4, 4)
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
}


def cached(cache):
    """The KV cache as a keyword argument, under the name that the installed transformers has for it."""
    from transformers import LlamaModel

    return as_cache_argument(LlamaModel.forward, cache)


def text_config(**changes):
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return fields | changes


def qwen2_5_vl(**changes):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = QWEN_VISION | {
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config(rope_parameters=rope, **changes),
        vision_config=vision,
        **QWEN_TOKENS,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(**changes):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "mrope_interleaved": True}
    vision = QWEN_VISION | {
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = Qwen3VLConfig(
        text_config=text_config(rope_parameters=rope, head_dim=16, **changes),
        vision_config=vision,
        **QWEN_TOKENS,
    )
    return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_moe(**changes):
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "mrope_interleaved": True}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    vision = QWEN_VISION | {
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = Qwen3VLMoeConfig(
        text_config=text_config(rope_parameters=rope, head_dim=16, **experts | changes),
        vision_config=vision,
        **QWEN_TOKENS,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("batched_mm")  # runs in float64 too
    return model


def llava_onevision(**changes):
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_config(**changes)),
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**text_config(**changes)))


def gpt_oss(**changes):
    """Logit sinks that matter, alternating windows, experts that Dynamo captures and that run in float64 too."""
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 40,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "experts_implementation": "batched_mm",
    }
    model = GptOssForCausalLM(GptOssConfig(**text_config(**fields | changes)))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


MODELS = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "llava_onevision": llava_onevision, "llama": llama}


def build(name: str, device: torch.device | str = "cpu", seed: int = 0, **changes):
    torch.manual_seed(seed)
    return {**MODELS, "gpt_oss": gpt_oss, "qwen3_vl_moe": qwen3_vl_moe}[name](**changes).eval().to(device)


def batch(lengths, device: torch.device | str = "cpu", *, left: bool = True, seed: int = 1):
    """Padded random text: ``input_ids`` and ``attention_mask`` (B, max(lengths))."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(10, 180, (len(lengths), longest), generator=generator)
    places = torch.arange(longest)
    real = torch.stack([(places >= longest - n) if left else (places < n) for n in lengths])
    ids = ids.masked_fill(~real, 3)
    return {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}


def with_images(texts, sides, rows: int = 1, device: torch.device | str = "cpu", seed: int = 0):
    """A Qwen3-VL prompt with pixels: text, image, text, ..., text.

    Args:
        texts: Tokens of each text, one more than there are images.
        sides: Side of each image in patches, even; an image is ``side ** 2 / 4`` tokens.
        rows: Batch rows, each with pixels of its own.
        device: Where to.
        seed: Of the tokens and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count, side in zip(texts, [*sides, 0], strict=True):
        parts.append(torch.randint(10, 180, (rows, count), generator=generator))
        if side:
            span = [192, *[IMAGE] * (side * side // 4), 193]
            parts.append(torch.tensor([span] * rows))
    ids = torch.cat(parts, 1)
    patches = rows * sum(side * side for side in sides)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([(1, side, side) for side in sides] * rows),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def video_inputs(device: torch.device | str = "cpu", rows: int = 2):
    """What a processor makes of a clip of 16 tokens between two pieces of text, for ``qwen2_5_vl``."""
    torch.manual_seed(0)
    text = lambda n: torch.randint(10, 180, (rows, n), device=device)  # noqa: E731
    span = torch.full((rows, GRID[0] * GRID[1] * GRID[2] // 4), VIDEO, device=device)
    edge = lambda token: torch.full((rows, 1), token, device=device)  # noqa: E731
    ids = torch.cat([text(30), edge(192), span, edge(193), text(20)], 1)
    patches = GRID[0] * GRID[1] * GRID[2]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": torch.randn(rows * patches, 3 * 2 * 14 * 14, device=device),
        "video_grid_thw": torch.tensor([GRID] * rows, device=device),
    }


class Spy:
    """An inner compiler that runs eagerly and keeps the forward graphs it was given."""

    def __init__(self) -> None:
        self.graphs = []

    def __call__(self, graph_module, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, example_inputs):
            self.graphs.append(graph)
            return make_boxed_func(graph.forward)

        backward = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_autograd(fw_compiler=keep, bw_compiler=backward)(graph_module, inputs)


class Paying:
    """Costs of a device where sparse attention pays from ``least`` queries on."""

    def __init__(self, least):
        self.least = least

    def break_even(self, shape, config, device):
        return self.least
