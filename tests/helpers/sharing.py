"""Small models and graphs whose layers share a choice of blocks, and what is seen of that choice."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention import select as choices
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.testing.oracle import expand_block_map
from tests.helpers.tiny import build

SHARED = OmniSparseConfig(target_recall=0.5, sink_size=16, window_size=64, lazy_threshold=None, share_layers=2)
LENGTH = 1100


class Spy:
    """What every layer attended with, and how often blocks were chosen, in graphs that run eagerly."""

    def __init__(self, monkeypatch):
        self.layers, self.chosen = [], 0
        attending, selecting = sys.modules["omnisparse_flex.passes.site_functions"].attend, choices.select_blocks

        def attend(query, key, value, site):
            out = attending(query, key, value, site)
            self.layers.append((query, key, value, site, out))
            return out

        def select(*args, **kwargs):
            self.chosen += 1
            return selecting(*args, **kwargs)

        monkeypatch.setattr("omnisparse_flex.passes.site_functions.attend", attend)
        monkeypatch.setattr(choices, "select_blocks", select)

    def keep(self, layer):
        """The map that a layer was given, or None."""
        choice = self.layers[layer][3].choice
        return None if choice is None else choice.keep


def sharpened(layers):
    """A model whose layers look at different blocks."""
    model = build("llama", "cpu", num_hidden_layers=layers)
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.weight.data.mul_(30)
    return model


def checkpointing(model, layers=None):
    """Every layer in a body of its own, or some of them."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = layers is None or i in layers
    return model


def chain(layers, is_causal=None):
    orders = [True] * layers if is_causal is None else is_causal

    def call(q, k, v):
        for order in orders:
            q = F.scaled_dot_product_attention(q, k, v, is_causal=order)
        return q

    return call


def allowed(keep, length):
    """The dense mask of a causal layer's block map."""
    kept = expand_block_map(keep, length, length, BLOCK)
    return kept & torch.ones(length, length, dtype=torch.bool).tril()
