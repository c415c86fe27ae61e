"""Key blocks of 64: the same choice in training and inference, forward and backward against the oracle."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import ConfigError, OmniSparseConfig
from omnisparse_flex.attention import block_sparse as attending
from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.flex_options import NARROW, kernel_options
from omnisparse_flex.attention.functional import sparse_attention
from omnisparse_flex.masks.blocks.block_lists import wider
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import KV, Apply, B, Const, Load, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import measure_selection
from omnisparse_flex.testing import AttentionShape
from tests.attention.test_attention import SPARSE, check, inputs, selected

RULES = dataclasses.replace(SPARSE, key_block=64)
SHAPES = [
    AttentionShape(2, 2, 2, 700, 700, 16),
    AttentionShape(1, 1, 7, 140, 520, 16),
    AttentionShape(1, 2, 1, 1, 330, 16),
]


def causal_mask(shape):
    return IndexMask(causal(Const(shape.kv_len - shape.q_len)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_output_and_gradients_are_those_of_the_narrow_map(shape, sinks):
    tensors, mask = inputs(shape, "cpu"), causal_mask(shape)
    logits = torch.linspace(-1, 2, shape.heads) if sinks else None
    site = SparseCall(config=RULES, target=0.6, mask=mask, q_offset=shape.kv_len - shape.q_len, sinks=logits)
    check(attend(*tensors, site), tensors, selected(shape, *tensors[:2], mask, RULES, target=0.6), sinks=logits)


def test_padding_and_windows():
    shape = AttentionShape(2, 1, 2, 500, 500, 16)
    real = torch.arange(500) >= torch.tensor([[0], [170]])
    near = Apply("lt", (Apply("sub", (Load(1, ()), KV)), Const(1000)))
    keys = Apply("and", (Load(0, (B, KV)), near))
    mask = IndexMask(Apply("and", (causal(Const(0)), keys)), (real, torch.tensor(499)))
    tensors = inputs(shape, "cpu")
    out = attend(*tensors, SparseCall(config=RULES, target=0.6, mask=mask))
    check(out, tensors, selected(shape, *tensors[:2], mask, RULES, target=0.6))


def test_half_a_wide_block_may_be_kept():
    """What the narrow width is for; and a wide map of the same keeps all of both halves."""
    query, key, _ = inputs(SHAPES[0], "cpu", grad=False)
    how = {"target": 0.6, "scale": 0.25}
    narrow = select_blocks(query, key, causal_mask(SHAPES[0]), RULES, **how)
    keep, full = wider(narrow.keep, narrow.layout.full, 2)
    assert narrow.keep.shape[-1] == 11 and keep.shape[-1] == 6 and full.shape == keep.shape
    halves = torch.nn.functional.pad(narrow.keep, (0, 1)).unflatten(-1, (-1, 2))
    assert (halves.any(-1) & ~halves.all(-1)).any()
    share = narrow.keep.sum() / narrow.layout.some.expand_as(narrow.keep).sum()
    wide = select_blocks(query, key, causal_mask(SHAPES[0]), dataclasses.replace(RULES, key_block=128), **how)
    assert share < wide.keep.sum() / wide.layout.some.expand_as(wide.keep).sum()


@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 3), st.integers(0, 2**16))
def test_wider_maps(rows, columns, split, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 1, rows, columns, generator=generator) < 0.6
    full = torch.rand(1, 1, rows, columns, generator=generator) < 0.6
    kept, whole = wider(keep, full, split)
    for at in range(kept.shape[-1]):
        part = slice(at * split, (at + 1) * split)
        assert torch.equal(kept[..., at], keep[..., part].any(-1))
        short = columns < (at + 1) * split
        assert torch.equal(whole[..., at], (keep & full)[..., part].all(-1) & (not short))


@pytest.mark.parametrize("grad", [False, True])
def test_the_kernels_get_wide_lists_where_gradients_follow(grad, monkeypatch):
    """The choice is the same, the lists are not."""
    seen = []
    call = attending.call_flex
    monkeypatch.setattr(attending, "call_flex", lambda *a, **k: seen.append(k) or call(*a, **k))
    tensors = inputs(SHAPES[0], "cpu", grad=grad)
    site = SparseCall(config=RULES, target=0.6, mask=causal_mask(SHAPES[0]), lists=True)
    attend(*tensors, site)
    (made,) = seen
    chosen = select_blocks(*(x.detach() for x in tensors[:2]), site.mask, RULES, target=0.6, scale=0.25)
    if grad:
        assert made["key_block"] == 128 and len(made["mask_buffers"]) > 0
        assert torch.equal(made["keep"], wider(chosen.keep, chosen.layout.full, 2)[0])
    else:
        assert made["key_block"] == 64 and torch.equal(made["keep"], chosen.keep) and not made["mask_buffers"]


def test_statistics_and_pictures():
    query, key, _ = inputs(SHAPES[0], "cpu", grad=False)
    mask = causal_mask(SHAPES[0])
    chosen = select_blocks(query, key, mask, RULES, target=0.6, scale=0.25)
    found = measure_selection(chosen, query, key, mask, RULES, scale=0.25, score=None, exact=True)
    assert torch.equal(found.block_map > 0, wider(chosen.keep, chosen.layout.full, 2)[0][0])
    everything = select_blocks(query, key, mask, RULES, target=1.0, scale=0.25)
    best = measure_selection(everything, query, key, mask, RULES, scale=0.25, score=None, exact=True)
    assert (best.recalls > 0.9999).all() and (found.recalls[0] < 0.9999).all()


def test_budgets_are_tokens():
    query, key, _ = inputs(SHAPES[0], "cpu", grad=False)
    rules = dataclasses.replace(RULES, budget=130, lazy_threshold=None, last_rows=0)
    chosen = select_blocks(query, key, causal_mask(SHAPES[0]), rules, target=0.6, scale=0.25)
    assert chosen.budget.unique().tolist() == [3]
    found = measure_selection(chosen, query, key, causal_mask(SHAPES[0]), rules, scale=0.25, score=None, exact=False)
    assert found.stats[2] * 128 == 192


def test_options_of_the_kernels(monkeypatch):
    from omnisparse_flex.attention import flex_options as kernel_choice

    tensor = torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16)
    wide = torch.empty(1, 2, 512, 128, device="meta", dtype=torch.bfloat16)
    for x in (tensor, wide):
        assert kernel_options("auto", x, x, x, x.dtype, plain_scores=True, captures=False, narrow=True) == ((), "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda")))
    facts = {"plain_scores": True, "captures": False}
    options = lambda kernel, x: kernel_options(kernel, x, x, x, x.dtype, **facts, narrow=True)  # noqa: E731
    assert options("triton", tensor) == (NARROW, "")
    assert options("flash", wide) == (kernel_choice.FLASH, "")
    assert options("flash", tensor) == (NARROW, "key blocks of 64 at head_dim 64")


@pytest.mark.parametrize("wrong", [0, 32, 96, 256, True, 64.0, "64"])
def test_other_widths_are_refused(wrong):
    with pytest.raises(ConfigError, match=re.escape(f"key_block must be one of 64, 128, got {wrong!r}")):
        OmniSparseConfig(key_block=wrong)


def test_tokens_have_no_key_blocks():
    with pytest.raises(ConfigError, match="key_block must be 128 at token granularity, got 64"):
        OmniSparseConfig(granularity="token", key_block=64)


@pytest.mark.slow
@torch.no_grad()
def test_under_inductor():
    shape = SHAPES[0]
    tensors = inputs(shape, "cpu", grad=False)
    out = torch.compile(sparse_attention, fullgraph=True)(*tensors, config=RULES, enable_gqa=True)
    check(out, tensors, selected(shape, *tensors[:2], causal_mask(shape), RULES))
