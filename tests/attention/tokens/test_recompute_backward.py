"""Gradients in tensor code of a selection that was made elsewhere."""

import dataclasses

import pytest
import torch

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.tokens import dispatch as token_attention
from omnisparse_flex.attention.tokens.tensor_code import recompute_backward
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.expr.expr import Const, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.testing import AttentionShape

CONFIG = OmniSparseConfig(
    granularity="token", target_recall=0.6, lazy_threshold=0.05, sink_size=8, window_size=16, segment_size=128
)


@pytest.mark.parametrize("shape", [AttentionShape(1, 1, 2, 520, 520, 16), AttentionShape(2, 2, 1, 140, 520, 16)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_they_are_those_of_the_attention_that_made_it(shape, with_sinks):
    tensors = [x.requires_grad_() for x in shape.inputs()]
    query, key, value = tensors
    sinks = torch.linspace(-1, 1, shape.heads).requires_grad_() if with_sinks else None
    offset = shape.kv_len - shape.q_len
    config = dataclasses.replace(CONFIG, lazy_threshold=0.5)
    site = SparseCall(config=config, target=0.6, mask=IndexMask(causal(Const(offset))), q_offset=offset, sinks=sinks)
    out, selection = token_attention.attend_and_select(query, key, value, site)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(out, tensors if sinks is None else [*tensors, sinks], grad)
    assert selection.key_count.any() and (selection.key_count < shape.kv_len).any()
    as_in_kernels = selection._replace(rows=selection.rows.int())
    got = recompute_backward(grad, query, key, value, as_in_kernels, dataclasses.replace(site, target=1.0))
    for one, other in zip(got, (*wanted, None) if sinks is None else wanted, strict=True):
        assert one is other is None or not one.requires_grad
        torch.testing.assert_close(one, other)
