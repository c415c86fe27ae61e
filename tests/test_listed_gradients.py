"""Gradients in tensor code of a selection that was made elsewhere."""

import dataclasses

import pytest
import torch

from omnisparse_flex import token_attention
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.listed_gradients import listed_gradients
from omnisparse_flex.masks.expr import Const, causal
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.site import Site
from omnisparse_flex.testing import AttentionShape

CONFIG = OmniSparseConfig(granularity="token", target_recall=0.6, sink_size=8, window_size=16, segment_size=128)


@pytest.mark.parametrize("shape", [AttentionShape(1, 1, 2, 520, 520, 16), AttentionShape(2, 2, 1, 140, 520, 16)])
def test_they_are_those_of_the_attention_that_made_it(shape):
    query, key, value = (x.requires_grad_() for x in shape.inputs())
    offset = shape.kv_len - shape.q_len
    site = Site(config=CONFIG, target=0.6, mask=MaskProgram(causal(Const(offset))), q_offset=offset)
    out, selection = token_attention.attend_and_select(query, key, value, site)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(out, (query, key, value), grad)
    taken = torch.arange(selection.keys.shape[-1]) < selection.key_count.unsqueeze(-1)
    assert taken.any() and not taken.all()
    # The kernels leave whatever was there behind a list's end, in int32.
    keys = torch.where(taken, selection.keys, -(1 << 30)).int()
    chosen = (selection.rows, selection.row_count, keys, selection.key_count)
    got = listed_gradients(grad, query, key, value, selection.segments, chosen, dataclasses.replace(site, target=1.0))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad
