"""The model: stock Qwen2.5-VL classes with a small config."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.video_needle.data import TOKENS_PER_SECOND
from benchmarks.video_needle.scene import CELLS, GRID
from benchmarks.video_needle.sprites import CELL
from benchmarks.video_needle.vocabulary import IDS, SIZE

#: Name of the vision attention that takes all frames at once. transformers hands the frame boundaries only to names
#: that hold "flash"; other attention functions are called once per frame, thousands of times a batch.
FRAMES_AT_ONCE = "flash_frames_at_once"


def make_config(layers: int = 12, hidden: int = 256, heads: int = 4, vision_depth: int = 2, init: float = 0.06) -> Any:
    """The config.

    M-RoPE in Qwen2.5-VL gives time the fastest rotations and the image axes the slowest. Half of the
    pairs for time reach from one position to the whole video; the other half hardly turn and are left
    to content. Where things are in a frame is the vision tower's business.

    Args:
        layers: Decoder layers.
        hidden: Width of the decoder; heads are ``hidden // heads`` wide.
        heads: Query heads; half as many key-value heads.
        vision_depth: Layers of the vision tower.
        init: Standard deviation of fresh weights: about the inverse root of the width. Look-ups form later from the
            usual 0.02, whose attention hardly tells tokens apart.
    """
    from transformers import Qwen2_5_VLConfig

    pairs = hidden // heads // 2
    rope = {"rope_type": "default", "type": "mrope", "rope_theta": 2e5}
    rope["mrope_section"] = [pairs // 2, pairs // 4, pairs // 4]
    text = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": SIZE,
        "max_position_embeddings": 65536,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": IDS["<end>"],
        "pad_token_id": IDS["<pad>"],
        "tie_word_embeddings": True,
        "use_cache": False,
        "initializer_range": init,
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": hidden // 2,
        "intermediate_size": hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": CELL,
        "spatial_merge_size": 1,
        "temporal_patch_size": 2,
        "window_size": 4 * CELL,
        "fullatt_block_indexes": list(range(vision_depth)),
        "tokens_per_second": TOKENS_PER_SECOND,
        "initializer_range": init,
    }
    tokens = {
        "image_token_id": IDS["<image>"],
        "video_token_id": IDS["<video>"],
        "vision_start_token_id": IDS["<vision_start>"],
        "vision_end_token_id": IDS["<vision_end>"],
        "tie_word_embeddings": True,
        "initializer_range": init,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)


def make_model(seed: int = 0, **sizes: int) -> Any:
    """A fresh model, the same for the same seed on every device."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    return speed_up_vision(Qwen2_5_VLForConditionalGeneration(make_config(**sizes)))


def speed_up_vision(model: Any) -> Any:
    """Same numbers, fewer calls: all frames in one attention, and patches embedded by one product.

    Args:
        model: A Qwen2.5-VL model; changed in place, its weights and their names are not.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(FRAMES_AT_ONCE, frames_at_once)
    tower = model.model.visual
    tower.config._attn_implementation_internal = FRAMES_AT_ONCE
    projection = tower.patch_embed.proj
    # A convolution whose kernel is the whole patch is a product, but not every library runs it as one.
    tower.patch_embed.forward = lambda pixels: F.linear(
        pixels.to(projection.weight.dtype), projection.weight.flatten(1)
    )
    return model


def frames_at_once(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention inside each frame, for frames of equal size.

    Args:
        module: The attention module.
        query: (1, H, frames * tokens, D).
        key: The same shape.
        value: The same shape.
        attention_mask: Always None here.
        **kwargs: ``scaling``, ``cu_seq_lens_q`` (frames + 1 boundaries) and others that do not matter.

    Returns:
        (1, frames * tokens, H, D) and no weights.
    """
    frames = len(kwargs["cu_seq_lens_q"]) - 1
    parts = [x[0].unflatten(1, (frames, -1)).transpose(0, 1) for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*parts, scale=kwargs["scaling"])
    return out.transpose(1, 2).flatten(0, 1)[None], None


def frame_layout(model: Any, frames: int, device: torch.device) -> dict[str, Any]:
    """What the vision tower would read off ``grid_thw`` again in every step, each time waiting for the device.

    Args:
        model: A model of ``make_config``.
        frames: Steps of all videos of a batch together.
        device: Where the tower is.

    Returns:
        Arguments of the tower beside pixels and ``grid_thw``.
    """
    from transformers import vision_utils

    vision = model.config.vision_config
    grid, merge = torch.tensor([[frames, GRID, GRID]]), vision.spatial_merge_size
    windows, bounds = vision_utils.get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
    tensors = {
        "position_ids": vision_utils.get_vision_position_ids(grid, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        "window_index": windows,
        "cu_window_seqlens": bounds,
    }
    return {name: x.to(device) for name, x in tensors.items()} | {"max_seqlen": CELLS, "max_window_seqlen": CELLS}


def embed(model: Any, ids: Tensor, pixels: Tensor, layout: dict[str, Any]) -> dict[str, Tensor]:
    """Words and frames as the decoder takes them, without a wait for the device.

    The stock class finds the places of visual tokens by value, forward and backward; here they are known.

    Args:
        model: A model of ``make_config``.
        ids: int64 (B, N), as in ``Batch``.
        pixels: As ``render`` returns them.
        layout: As ``frame_layout`` returns it.

    Returns:
        ``inputs_embeds`` and ``mm_token_type_ids``, as the stock class takes them.
    """
    tower = model.model.visual
    frames = tower(pixels.to(tower.dtype), grid_thw=None, **layout).pooler_output
    end = 1 + len(frames) // len(ids)
    words = model.get_input_embeddings()(ids)
    frames = frames.view(len(ids), end - 1, -1).to(words.dtype)
    return {
        "inputs_embeds": torch.cat([words[:, :1], frames, words[:, end:]], 1),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id).int(),
    }


def count_parameters(model: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
