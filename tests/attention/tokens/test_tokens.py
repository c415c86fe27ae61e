"""Token granularity against the float64 oracle, under the very mask that the selection denotes."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.functional import sparse_attention
from omnisparse_flex.attention.lse_attention import merge
from omnisparse_flex.attention.tokens import dispatch as token_attention
from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.config_checks import GQA_CHOICES
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.expr.expr import TRUE, Const
from omnisparse_flex.masks.expr.expr import causal as causal_expr
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.tokens.column_mass import column_mass
from omnisparse_flex.masks.tokens.segments import segments_of, tokens_of_blocks
from omnisparse_flex.masks.tokens.select import kept_pairs, list_width
from omnisparse_flex.testing import AttentionShape, assert_close_to_oracle, mask_mods
from omnisparse_flex.testing.oracle import dense_logits, materialize_mask

TOKENS = OmniSparseConfig(
    granularity="token", target_recall=0.6, lazy_threshold=0.05, sink_size=8, window_size=16, segment_size=128
)
EVERYTHING = dataclasses.replace(TOKENS, target_recall=1.0, lazy_threshold=None)


def inputs(shape, device, dtype=torch.float32, grad=True):
    """Query, key and value with a few keys that many queries like."""
    query, key, value = shape.inputs(dtype)
    liked = torch.rand(shape.kv_len, generator=torch.Generator().manual_seed(3)) < 0.05
    key = torch.where(liked[:, None], key + 2, key)
    return [x.to(device).requires_grad_(grad) for x in (query + 1, key, value)]


def run(shape, tensors, config, mask, *, target=None, offset=None, **fields):
    """Output, the selection, and the dense mask (B, Hq, L, S) that it denotes."""
    site = SparseCall(
        config=config,
        target=config.recall_of(0) if target is None else target,
        mask=mask,
        q_offset=shape.kv_len - shape.q_len if offset is None else offset,
        **fields,
    )
    found, attending = [], token_attention.attend_and_select
    spy = lambda q, k, v, site, _: found.append(attending(q, k, v, site)) or found[-1]  # noqa: E731
    with mock.patch.object(token_attention, "attend_and_select", spy):
        out = attend(*tensors, site)
    ((_, selection),) = found
    places = torch.arange(shape.q_len, device=tensors[0].device)
    kept = kept_pairs(selection, places, shape.kv_len, config, BLOCK)
    own = materialize_mask(mask, shape.batch, shape.heads, shape.q_len, shape.kv_len, tensors[0].device)
    return out, selection, kept & own, own


def check(out, tensors, mask, **oracle):
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    assert_close_to_oracle(out, *tensors, mask, grad_output=grad if out.requires_grad else None, **oracle)


SHAPES = [AttentionShape(2, 2, 1, n, n, 16) for n in (1, 7, 127, 128, 129, 700)]
SHAPES += [AttentionShape(1, 2, 7, 129, 129, 16), AttentionShape(2, 1, 2, 1, 300, 16)]
SHAPES += [AttentionShape(2, 2, 2, 7, 300, 16), AttentionShape(1, 1, 1, 300, 200, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_a_budget_of_everything_is_dense_attention(shape, device):
    tensors = inputs(shape, device)
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    out, _, kept, own = run(shape, tensors, EVERYTHING, mask)
    assert torch.equal(kept, own)
    check(out, tensors, own)


@pytest.mark.parametrize("budget", ["flattest_head", "per_head", 40])
@pytest.mark.parametrize(
    "shape", [AttentionShape(2, 2, 2, 700, 700, 16), AttentionShape(1, 1, 7, 140, 520, 16)], ids=str
)
def test_output_is_dense_attention_under_the_selection(shape, budget, device):
    tensors = inputs(shape, device)
    config = dataclasses.replace(TOKENS, budget=budget)
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    visual = (torch.arange(shape.kv_len, device=device) < shape.kv_len - 9).expand(shape.batch, -1)
    out, selection, kept, own = run(shape, tensors, config, mask, visual=visual)
    assert selection.key_count.max() > 0 and kept.sum() < 0.8 * own.sum(), "a test of nothing"
    check(out, tensors, kept)


@st.composite
def small_shapes(draw):
    lengths = st.sampled_from((1, 7, 100, 128, 129, 200, 400))
    q_len = draw(lengths)
    kv_len = draw(st.just(q_len) | lengths)
    return AttentionShape(
        draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from((1, 2))), q_len, kv_len, 32
    )


@st.composite
def token_configs(draw):
    cap = draw(st.none() | st.integers(0, 200))
    fixed = st.integers(0, 200 if cap is None else cap)
    budget = draw(st.sampled_from(("flattest_head", "per_head")) | fixed)
    return OmniSparseConfig(
        target_recall=draw(st.floats(0.05, 1.0)),
        granularity="token",
        segment_size=draw(st.sampled_from((128, 256, 384))),
        scoring_dims=draw(st.sampled_from((None, 16, 32))),
        gqa_choice="group" if budget == "flattest_head" else draw(st.sampled_from(GQA_CHOICES)),
        budget=budget,
        max_kv_budget=cap,
        lazy_threshold=draw(st.none() | st.floats(0.0, 1.0)),
        sink_size=draw(st.sampled_from((0, 8, 150))),
        window_size=draw(st.sampled_from((1, 16, 200))),
    )


@given(st.data(), small_shapes(), token_configs(), st.booleans())
def test_any_mask_any_config(data, shape, config, is_causal):
    """The invariants: kept within the mask, no live row without a key, dead rows 0, output and gradients."""
    case = data.draw(mask_mods(shape.batch, shape.q_len, shape.kv_len))
    tensors = inputs(shape, "cpu")
    order = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)) if is_causal else TRUE)
    mask = order.intersect(trace_mask_mod(case.mask_mod, torch.device("cpu")))
    offset = shape.kv_len - shape.q_len if is_causal else 0
    out, _, kept, own = run(shape, tensors, config, mask, offset=offset)
    alive = own.any(-1)
    assert torch.equal(kept.any(-1), alive)
    assert not out[~alive].any()
    check(out, tensors, kept)
    if config.lazy_threshold is None and config.recall_of(0) >= 1.0 and config.max_kv_budget is None:
        assert torch.equal(kept, own)


@given(small_shapes(), token_configs(), st.integers(0, 2**16))
def test_the_target_is_met_and_the_budget_is_the_flattest_heads(shape, config, seed):
    config = dataclasses.replace(config, max_kv_budget=None, gqa_choice="group", budget="flattest_head")
    query, key, value = (x * 2 for x in shape.inputs(seed=seed))
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    _, selection, _, own = run(shape, (query, key, value), config, mask)
    asked = selection.row_count > 0
    live = segments_of(selection.active.unsqueeze(-1) & own.any(-1, keepdim=True), shape.kv_heads, config.segment_size)
    assert (selection.mass[live.any((-1, -2))] >= config.recall_of(0) - 1e-4).all()
    wanted = selection.needs.masked_fill(~asked, 0).amax(1, keepdim=True).masked_fill(~asked, 0)
    eligible = tokens_of_blocks(selection.segments.eligible, BLOCK, shape.kv_len).sum(-1)
    assert torch.equal(selection.key_count, torch.minimum(wanted, eligible))


@given(small_shapes(), token_configs())
def test_no_segment_fetches_more_than_the_bound(shape, config):
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    _, selection, *_ = run(shape, inputs(shape, "cpu", grad=False), config, mask)
    most = shape.kv_len if config.max_kv_budget is None else config.max_kv_budget
    assert (selection.key_count <= most).all()
    over = (selection.needs > most) & (selection.row_count > 0)
    assert torch.equal(selection.overflow, over)


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_small_bound_is_kept(most):
    shape = AttentionShape(1, 2, 1, 700, 700, 16)
    config = dataclasses.replace(TOKENS, target_recall=0.99, lazy_threshold=None, max_kv_budget=most)
    _, selection, *_ = run(shape, inputs(shape, "cpu", grad=False), config, IndexMask(causal_expr()))
    assert selection.key_count.max() == most and selection.overflow.any()


@pytest.mark.parametrize(("budget", "most", "width"), [(5, None, 5), (5, 7, 5), (0, None, 1), ("per_head", 7, 7)])
def test_lists_are_no_wider_than_a_budget_can_be(budget, most, width):
    shape = AttentionShape(1, 2, 1, 700, 700, 16)
    config = dataclasses.replace(TOKENS, target_recall=0.99, lazy_threshold=None, budget=budget, max_kv_budget=most)
    _, selection, *_ = run(shape, inputs(shape, "cpu", grad=False), config, IndexMask(causal_expr()))
    assert list_width(config, 700) == width and selection.overflow.any() == (most is not None)
    assert selection.key_count.max() <= width


@settings(max_examples=50)
@given(small_shapes(), st.integers(0, 2**16))
def test_the_estimate_is_the_true_mass(shape, seed):
    """``column_mass`` is exact: with it the recall that a selection states is the recall of its active rows."""

    def exact(*arguments, columns, **given):
        assert columns is None
        return column_mass(*arguments, **given)

    config = TOKENS
    query, key, value = shape.inputs(seed=seed)
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    with mock.patch("omnisparse_flex.masks.tokens.select.one_pass", exact):
        _, selection, kept, own = run(shape, (query, key, value), config, mask)
    weights = dense_logits(query, key).masked_fill(~own, -torch.inf).softmax(-1).nan_to_num(0.0)
    recall = (weights * kept).sum(-1)
    for m in range(selection.rows.shape[2]):
        part = slice(m * 128, (m + 1) * 128)
        active = selection.active[:, :, part] & own[:, :, part].any(-1)
        by_group = lambda x: x.unflatten(1, (shape.kv_heads, -1)).sum((2, 3))  # noqa: E731
        true = by_group(recall[:, :, part] * active) / by_group(active).clamp(min=1)
        torch.testing.assert_close(true.float(), selection.mass[:, :, m], atol=1e-4, rtol=1e-4)


@given(small_shapes(), token_configs())
def test_same_input_same_selection_with_and_without_gradients(shape, config):
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    _, learning, *_ = run(shape, inputs(shape, "cpu"), config, mask)
    with torch.no_grad():
        _, inferring, *_ = run(shape, inputs(shape, "cpu", grad=False), config, mask)
    assert all(torch.equal(a, b) for a, b in zip(learning[1:], inferring[1:], strict=True))


@pytest.mark.parametrize("fields", [{"softcap": 1.5}, {"score_mod": lambda s, b, h, q, kv: s * 0.5 + (q - kv) * 0.01}])
def test_changed_logits(fields, device):
    shape = AttentionShape(1, 2, 2, 700, 700, 16)
    tensors = inputs(shape, device)
    out, _, kept, own = run(shape, tensors, TOKENS, IndexMask(causal_expr()), **fields)
    assert kept.sum() < own.sum()
    check(out, tensors, kept, **fields)


def test_sparse_attention_takes_token_granularity(device):
    shape = AttentionShape(2, 2, 2, 400, 400, 16)
    tensors = inputs(shape, device)
    mask = IndexMask(causal_expr(Const(0)))
    expected, *_ = run(shape, tensors, TOKENS, mask)
    torch.testing.assert_close(sparse_attention(*tensors, config=TOKENS, enable_gqa=True), expected)


def test_a_nan_stays_in_its_own_row():
    """The model's own behaviour is kept: a query of NaN gives NaN, and no other query notices."""
    shape = AttentionShape(1, 1, 2, 400, 400, 16)
    query, key, value = inputs(shape, "cpu", grad=False)
    query[0, 0, 300] = torch.nan
    out, *_ = run(shape, (query, key, value), TOKENS, IndexMask(causal_expr()))
    broken = out.isnan().any(-1)
    assert broken[0, 0, 300] and broken.sum() == 1


def test_a_nan_key_is_kept_for_all_to_see():
    shape = AttentionShape(1, 1, 1, 700, 700, 16)
    query, key, value = inputs(shape, "cpu", grad=False)
    key[0, 0, 200] = torch.nan
    config = dataclasses.replace(TOKENS, lazy_threshold=None, budget=4)
    out, *_ = run(shape, (query, key, value), config, IndexMask(causal_expr()))
    assert out[0, 0, 200:].isnan().all() and not out[0, 0, :200].isnan().any()


def test_merge_equals_one_softmax_over_the_union():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.randn(12, 3, generator=generator, dtype=torch.float64).requires_grad_()
    parts = (slice(0, 4), slice(4, 12))
    merged = merge(*(x for p in parts for x in (logits[:, p].softmax(-1) @ values[p], logits[:, p].logsumexp(-1))))
    whole = logits.softmax(-1) @ values
    torch.testing.assert_close(merged, whole)
    for got, expected in zip(
        *(torch.autograd.grad(x.square().sum(), (logits, values)) for x in (merged, whole)), strict=True
    ):
        torch.testing.assert_close(got, expected)
