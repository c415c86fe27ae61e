"""Maps of blocks for each query head: no head looks at another, and every path that runs them reads the right one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import AttentionCall, SparseCall
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.block_lists import block_mask_from_maps
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import KV, Apply, Const, H, Q, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import measure_selection
from omnisparse_flex.masks.tokens.segments import segment_layout
from omnisparse_flex.testing import AttentionShape
from tests.attention.test_attention import SPARSE, check, inputs, selected

SHAPES = [AttentionShape(2, 2, 2, 700, 700, 16), AttentionShape(1, 1, 7, 140, 520, 16)]
SHAPES += [AttentionShape(1, 3, 1, 520, 520, 16), AttentionShape(1, 2, 3, 1, 700, 16)]
#: Rules that count: the peak rule samples other rows for other numbers of a head, see ``row_of``.
PER_HEAD = dataclasses.replace(SPARSE, budget="per_head", key_block=128, last_rows=8)


def by_head(shape):
    """Causality, and head h sees 150 * (h + 1) keys: heads of one group differ."""
    here = Apply("add", (Q, Const(shape.kv_len - shape.q_len)))
    reach = Apply("mul", (Apply("add", (H, Const(1))), Const(150)))
    near = Apply("lt", (Apply("sub", (here, KV)), reach))
    return IndexMask(Apply("and", (causal(Const(shape.kv_len - shape.q_len)), near)))


def choose(query, key, mask, config=PER_HEAD, **how):
    how = {"target": 0.6, "scale": query.shape[-1] ** -0.5, "q_offset": key.shape[2] - query.shape[2]} | how
    return select_blocks(query.detach(), key.detach(), mask, config, **how)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_query_head_chooses_as_if_it_were_alone(shape):
    query, key, _ = inputs(shape, "cpu", grad=False)
    mask = IndexMask(causal(Const(shape.kv_len - shape.q_len)))
    chosen = choose(query, key, mask)
    assert chosen.keep.shape[1] == chosen.needs.shape[1] == shape.heads
    for head in range(shape.heads):
        own = slice(head // shape.group, head // shape.group + 1)
        alone = choose(query[:, head : head + 1], key[:, own], mask)
        for name in ("keep", "needs", "budget", "active"):
            assert torch.equal(getattr(chosen, name)[:, head : head + 1], getattr(alone, name)), name


def test_heads_of_a_group_differ_where_they_look_elsewhere():
    query, key, _ = inputs(SHAPES[0], "cpu", grad=False)
    chosen = choose(query * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(-1, 1, 1), key, IndexMask(causal()))
    assert not torch.equal(chosen.keep[:, 0], chosen.keep[:, 1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_that_tells_heads_of_a_group_apart(shape):
    """Forward and backward against the oracle under what was selected; the map rides in the mask."""
    tensors, mask = inputs(shape, "cpu"), by_head(shape)
    site = SparseCall(config=PER_HEAD, target=0.6, mask=mask, q_offset=shape.kv_len - shape.q_len)
    check(attend(*tensors, site), tensors, selected(shape, *tensors[:2], mask, PER_HEAD, target=0.6))


@pytest.mark.parametrize("dense", [True, False])
def test_a_dense_site_under_such_a_mask(dense):
    """Without rules the maps are the mask's own: one for all heads, or one for each."""
    shape = SHAPES[0]
    tensors = inputs(shape, "cpu")
    mask = IndexMask(causal()) if dense else by_head(shape)
    everything = OmniSparseConfig(lazy_threshold=None)
    site = AttentionCall(mask=mask)
    check(attend(*tensors, site), tensors, selected(shape, *tensors[:2], mask, everything, target=1.0))


def test_the_lists_of_all_heads_lie_as_the_kernels_read_them():
    """They find a head's list at its number times the stride, also where a dimension has but one element."""
    for shape in ((1, 6, 5, 4), (2, 1, 5, 4), (1, 6, 1, 4), (3, 2, 5, 1), (1, 1, 1, 4)):
        keep = (torch.rand(shape[1], shape[0], *shape[2:]) < 0.6).transpose(0, 1)
        full = torch.rand(1, 1, *shape[2:]) < 0.5
        lengths = (shape[2] * 16, shape[3] * 16)
        found = block_mask_from_maps(keep, full, lambda b, h, q, kv: kv >= 0, lengths, 16, transposed=True)
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks",
                     "q_indices", "full_q_num_blocks", "full_q_indices"):  # fmt: skip
            made = getattr(found, name)
            assert made.stride() == torch.empty(made.shape).stride(), (name, shape)


def test_a_token_segment_keeps_what_any_head_of_its_group_does():
    shape = SHAPES[0]
    query, key, _ = inputs(shape, "cpu", grad=False)
    layout = choose(query, key, by_head(shape)).layout
    assert layout.some.shape[1] == shape.heads
    group, each = (segment_layout(layout, 2, heads) for heads in (shape.kv_heads, shape.heads))
    for name in ("some", "forced"):
        wide = getattr(each, name).unflatten(1, (shape.kv_heads, shape.group)).any(2)
        assert torch.equal(getattr(group, name), wide)
    assert torch.equal(each.some, layout.some)


def test_statistics_and_pictures_are_of_query_heads():
    shape = SHAPES[0]
    query, key, _ = inputs(shape, "cpu", grad=False)
    mask = IndexMask(causal())
    chosen = choose(query, key, mask)
    found = measure_selection(chosen, query, key, mask, PER_HEAD, scale=0.25, score=None, exact=True)
    assert torch.equal(found.block_map > 0, chosen.keep[0]) and found.recalls.shape == (2, shape.heads)
    assert found.stats[0] == chosen.keep.sum() / (shape.batch * shape.heads)


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [False, True])
@torch.no_grad()
def test_lists_for_each_head_under_inductor(sinks):
    """The lists alone carry the map there; logit sinks become a block of keys in front."""
    shape = AttentionShape(2, 2, 3, 520, 520, 32)
    tensors, mask = inputs(shape, "cpu", grad=False), by_head(shape)
    logits = torch.linspace(-1, 2, shape.heads) if sinks else None

    def call(*tensors):
        return attend(*tensors, SparseCall(config=PER_HEAD, target=0.6, mask=mask, lists=True, sinks=logits))

    out = torch.compile(call, fullgraph=True)(*tensors)
    check(out, tensors, selected(shape, *tensors[:2], mask, PER_HEAD, target=0.6), sinks=logits)
