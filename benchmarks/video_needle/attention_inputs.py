"""What the attention of every layer of a trained model receives while it reads a video, and how it is made larger."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import batch_of, inputs, position_ids
from benchmarks.video_needle.scene import CELLS

#: Name under which transformers finds the attention that looks on.
NAME = "needle_attention_inputs"


class Layer(NamedTuple):
    """One layer's tensors, rotary positions applied.

    Attributes:
        query: (1, Hq, N, D).
        key: (1, Hkv, N, D).
        value: (1, Hkv, N, D).
        visual: bool (1, N), tokens that come from the video; shared by all layers.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visual: Tensor


@torch.no_grad()
def capture(model: Any, visual_tokens: int, video: int = 0) -> list[Layer]:
    """Let a model read a test video and its questions densely, and keep what its attention is given.

    Args:
        model: A Qwen2.5-VL model of ``model.make_config``, not changed by ``apply_omnisparse``.
        visual_tokens: Length of the video.
        video: Which of the test split.

    Returns:
        The layers in order, in the dtype that autocast gives attention: bfloat16 on a GPU.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    device = next(model.parameters()).device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    steps = visual_tokens // CELLS
    batch = batch_of("test", video, 1, steps, 1)[0].to(device)
    visual = batch.input_ids == model.config.video_token_id
    found: list[Layer] = []

    def look_on(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (x.to(dtype).contiguous() for x in (query, key, value))
        found.append(Layer(query, key, value, visual))
        scale = kwargs["scaling"]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, look_on)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # causal, no padding
    config = model.model.language_model.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            given = inputs(batch, position_ids(steps, 1, device), load().to(device), dtype)
            model(**given, use_cache=False)
    finally:
        config._attn_implementation_internal = before
    return found


def tiled(layer: Layer, times: int) -> Layer:
    """The same layer with its video ``times`` times in a row, between the same first token and questions.

    Positions repeat with the video: a query sees the keys beside it once in every tile.
    """
    first, count = int(layer.visual[0].int().argmax()), int(layer.visual.sum())

    def tile(x: Tensor, dim: int) -> Tensor:
        start, video, end = x.split((first, count, x.shape[dim] - first - count), dim)
        return torch.cat([start, *(video,) * times, end], dim)

    return Layer(*(tile(x, 2) for x in layer[:3]), tile(layer.visual, 1))


def widened(layer: Layer, heads: int, kv_heads: int, dim: int) -> Layer:
    """The same attention with more and larger heads: logits scaled by 1 / sqrt(D), and so what a head sees, are kept.

    Heads are repeated, each group holding the query heads of its key head in turn. Vectors are rotated
    into the larger space by one random rotation, so that no part of a product is with zeros.

    Args:
        layer: The tensors.
        heads: Query heads, a multiple of ``kv_heads``.
        kv_heads: Key heads, a multiple of the layer's.
        dim: Size of a head, at least the layer's.
    """
    (_, old_heads, _, old_dim), old_kv, device = layer.query.shape, layer.key.shape[1], layer.query.device
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0][:old_dim].to(device)
    group, old_group = heads // kv_heads, old_heads // old_kv
    keys = [head * old_kv // kv_heads for head in range(kv_heads)]
    queries = [key * old_group + turn % old_group for key in keys for turn in range(group)]

    def turned(x: Tensor, chosen: list[int], factor: float = 1.0) -> Tensor:
        return (x.float() @ (factor * rotation)).to(x.dtype)[:, chosen].contiguous()

    query = turned(layer.query, queries, (dim / old_dim) ** 0.5)
    return Layer(query, turned(layer.key, keys), turned(layer.value, keys), layer.visual)
