"""A full cache masked as a slim one is: what a slim cache must equal."""

from __future__ import annotations

import contextlib

import torch

from omnisparse_flex.attention.marker import dense_attention
from omnisparse_flex.model.hf import attention_configs, find_decoder, mask_forward

NAME = "slim_oracle"


def kept(layer, heads: int) -> torch.Tensor:
    """bool (B, heads, prefix): which prompt tokens each KV head of a slim layer holds."""
    batch = layer.kept[0].keys.shape[0]
    mask = torch.zeros(batch, heads, layer.prefix + 1, dtype=torch.bool, device=layer.kept[0].keys.device)
    for part in layer.kept:
        for column, head in enumerate(part.heads):
            mask[:, head].scatter_(1, part.positions[:, column].long(), True)
    return mask[:, :, :-1]


def oracle_attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **kwargs):
    """Dense attention; decoded tokens, one or a draft of several, see of the prompt only what the slim layer kept."""
    keep = module.slim_keep
    mask = None
    count, length = query.shape[2], key.shape[2]
    if length - count >= keep.shape[2]:
        groups = query.shape[1] // key.shape[1]
        mask = torch.nn.functional.pad(keep, (0, length - keep.shape[2]), value=True).repeat_interleave(groups, 1)
        mask = mask[:, :, None] & torch.ones(count, length, dtype=torch.bool, device=key.device).tril(length - count)
    out = dense_attention(query, key, value, attention_mask, mask, mask is None, scaling, 0, 0.0, s_aux)
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def masked_like(cache, model):
    """Let ``model`` decode with the keys that ``cache`` holds now, and no others of the prompt."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, oracle_attention)
    AttentionMaskInterface.register(NAME, mask_forward)
    decoder = find_decoder(model)
    configs = attention_configs(decoder)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    for module in decoder.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            layer = cache.layers[module.layer_idx]
            module.slim_keep = kept(layer, sum(len(part.heads) for part in layer.kept))
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
