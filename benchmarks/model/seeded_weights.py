"""Seeded weights for the seeded demo's model: nothing is learnt, but attention is as uneven as a trained model's.

A freshly initialised transformer attends almost uniformly, and nothing can be left out of a
uniform attention. So the queries here resemble the keys: every token attends to tokens that
look like it (the same meadow in another frame), some heads sharply, some broadly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

#: Logit gain of the broadest and of the sharpest query head of each KV group.
GAINS = (1.0, 2.5)
#: How much of a query's projection is that of its key, 0-1; the rest is noise.
LIKENESS = 0.8
#: Bias on the rotary pairs that carry time, in queries and keys alike: its products are largest at the
#: same moment, so attention prefers near frames, as trained video models do.
NEARNESS = 3.0
#: Attention's share in the residual stream, as a gain on the values.
VALUE_GAIN = 1.0


@torch.no_grad()
def seed_weights(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter with seeded values that keep activations of order one.

    Args:
        model: Any model; attention modules with ``layer_idx``, ``q_proj``, ``k_proj``,
            ``v_proj`` and ``head_dim`` (the text decoder's) get uneven attention.
        seed: The same seed gives the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
            parameter.copy_(_normal(parameter.shape, generator) / math.sqrt(fan_in))
    for _, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
            _liken_queries_to_keys(module, generator)


def _liken_queries_to_keys(attention: Any, generator: torch.Generator) -> None:
    head_dim: int = attention.head_dim
    query, key = attention.q_proj.weight, attention.k_proj.weight
    keys = key.float().cpu().unflatten(0, (-1, head_dim))
    groups = query.shape[0] // key.shape[0]
    noise = _normal((len(keys), groups, *keys.shape[1:]), generator) / math.sqrt(keys.shape[-1])
    alike = LIKENESS * keys.unsqueeze(1) + math.sqrt(1 - LIKENESS**2) * noise
    gains = torch.linspace(*GAINS, groups).view(1, -1, 1, 1)
    query.copy_((alike * gains).flatten(0, 2))
    for projection in (p for p in (attention.q_proj, attention.k_proj) if p.bias is not None):
        # Channel i of a head turns with channel i + head_dim // 2; the first channels carry time.
        projection.bias.unflatten(0, (-1, head_dim))[:, : head_dim // 8] = NEARNESS
    attention.v_proj.weight.mul_(VALUE_GAIN)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # On the CPU and in float32 whatever the model is, so that all devices see the same numbers.
    return torch.randn(shape, generator=generator)
