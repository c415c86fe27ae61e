"""The operator of token attention in a model's graph, around the attention that it calls."""

import dataclasses

import torch

from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.expr.expr import Const, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.testing import AttentionShape

CONFIG = OmniSparseConfig(
    granularity="token", target_recall=0.6, lazy_threshold=0.05, sink_size=8, window_size=16, segment_size=128
)


def test_autocast_changes_nothing_in_it(device):
    """Else the backward, which runs outside autocast and selects again, would be that of other keys."""
    tensors = [x.to(device).requires_grad_() for x in AttentionShape(1, 2, 1, 520, 520, 64).inputs(torch.bfloat16)]
    site = SparseCall(config=CONFIG, target=0.6, mask=IndexMask(causal(Const(0))))
    site = dataclasses.replace(site, rules=register(site))
    expected = call_token_op(*tensors, site)
    with torch.autocast(device.type, torch.bfloat16):
        out = call_token_op(*tensors, site)
    assert torch.equal(out, expected)
