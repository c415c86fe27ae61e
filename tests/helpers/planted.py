"""A selection that is known beforehand, so that whatever a site is told wrongly shows.

With a budget of 0 a query keeps, of the blocks of 128 keys, its own and those with text that must be kept. So the
outcome depends on which tokens are visual, on where a query sits, and on which row of the batch it is in.
"""

from __future__ import annotations

import torch

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.testing import dense_oracle
from tests.helpers.tiny import IMAGE, VIDEO

RULES = OmniSparseConfig(target_recall=0.5, budget=0, last_rows=0, sink_size=0, window_size=1)
BLOCK = 128


def visual_of(ids):
    return (ids == IMAGE) | (ids == VIDEO)


def mask_of(visual, shift=0, causal=True):
    """bool (B, 1, N, N): what the rules keep.

    Args:
        visual: bool (B, N).
        shift: By how many blocks the queries' own block is taken from elsewhere.
        causal: Within causality; or else whatever the model's own mask allows.
    """
    places = torch.arange(visual.shape[1], device=visual.device)
    blocks = places // BLOCK
    own = (blocks[:, None] - shift).clamp(min=0) == blocks
    allowed = (places <= places[:, None]) | (not causal)
    text = torch.stack([(~visual[:, blocks == j]).any(1) for j in range(int(blocks[-1]) + 1)], 1)
    return (allowed & (own | text[:, None, blocks]))[:, None]


def wrongs(visual, past):
    """What the mask would be if a site were told something wrong, by name.

    Args:
        visual: bool (B, N) of the whole conversation.
        past: Tokens of the first turn.
    """
    everything = torch.ones_like(visual)
    forgotten = torch.cat([everything[:, :past], visual[:, past:]], 1)
    kept = torch.cat([torch.zeros_like(visual[:, :past]), visual[:, past:]], 1)
    return {
        "nothing is known to be text": mask_of(everything),
        "the first turn's text is dropped": mask_of(forgotten),
        "the first turn's visual tokens are all kept": mask_of(kept),
        "the visual tokens are a block off": mask_of(visual.roll(BLOCK, 1)),
        "the queries are a block off": mask_of(visual, shift=1),
        "another batch row's": mask_of(visual.flip(0)),
        "everything is kept": torch.ones_like(mask_of(visual)).tril(),
    }


def oracle(model, mask):
    """A transformers model in float64 whose decoder attends densely.

    Args:
        model: Changed in place.
        mask: bool (B, 1, N, N), or a function that gives it for an attention module.
    """
    from transformers import AttentionInterface

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        own = mask(module) if callable(mask) else mask
        out = dense_oracle(query, key, value, mask=own[:, :, -query.shape[2] :, : key.shape[2]], scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("planted", attention)
    model = model.double()
    model.get_decoder().config._attn_implementation_internal = "planted"
    getattr(model.get_decoder(), "language_model", model.get_decoder()).config._attn_implementation_internal = "planted"
    return model


def distance(actual, expected):
    """Relative, of the norms; of several tensors the largest."""
    if isinstance(expected, dict):
        return max(distance(actual[name], expected[name]) for name in expected)
    return float((actual.double() - expected).norm() / expected.norm())
