"""``sparse_attention`` and ``attend`` against the float64 oracle, under the very mask that the selection denotes."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.functional import sparse_attention
from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks import causal, intersect, padding
from omnisparse_flex.masks.blocks.select import BLOCK, change_of_logits, select_blocks
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import KV, Apply, Const, H, Load, Q, causal_offset
from omnisparse_flex.masks.expr.expr import causal as causal_expr
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.testing import AttentionShape, assert_close_to_oracle, dense_oracle, mask_mods
from omnisparse_flex.testing.oracle import expand_block_map, materialize_mask

EVERYTHING = OmniSparseConfig(target_recall=1.0, lazy_threshold=None)
#: Little is forced, so that a few hundred tokens leave something to choose.
SPARSE = OmniSparseConfig(target_recall=0.6, sink_size=8, window_size=16)


def inputs(shape, device, dtype=torch.float32, grad=True):
    """Query, key and value whose attention has favourites among the key blocks."""
    query, key, value = shape.inputs(dtype)
    steps = torch.arange(shape.kv_len) // BLOCK
    key = key + 3 * torch.randn(64, shape.head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)[steps]
    return [x.to(device).requires_grad_(grad) for x in (query + 1, key, value)]


def causal_mask(shape, device):
    return materialize_mask(causal(shape.kv_len - shape.q_len), 1, 1, shape.q_len, shape.kv_len, device)


def selected(shape, query, key, mask, config, *, offset=None, visual=None, target=None, adjust=None, score=None):
    """The dense (B, Hq, L, S) mask that the selection denotes."""
    selection = select_blocks(
        query.detach(),
        key.detach(),
        mask,
        config,
        target=config.recall_of(0) if target is None else target,
        scale=shape.head_dim**-0.5,
        visual=visual,
        q_offset=shape.kv_len - shape.q_len if offset is None else offset,
        adjust=adjust,
        score=score,
    )
    kept = expand_block_map(selection.keep, shape.q_len, shape.kv_len, (BLOCK, config.key_block))
    own = materialize_mask(mask, shape.batch, shape.heads, shape.q_len, shape.kv_len, query.device)
    return kept & own


def check(out, tensors, mask, **oracle):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out) if out.requires_grad else None
    assert_close_to_oracle(out, *tensors, mask, grad_output=grad, **oracle)


# --- a budget of everything --------------------------------------------------

SHAPES = [AttentionShape(2, 2, 1, n, n, 16) for n in (1, 7, 127, 128, 129, 700)]
SHAPES += [AttentionShape(1, 1, 2, 129, 129, 64), AttentionShape(1, 2, 7, 129, 129, 16)]
SHAPES += [AttentionShape(1, 1, 1, 130, 130, 128), AttentionShape(2, 1, 2, 1, 300, 16)]
SHAPES += [AttentionShape(2, 2, 2, 7, 300, 16), AttentionShape(1, 1, 1, 300, 200, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_a_budget_of_everything_is_dense_attention(shape, device):
    tensors = inputs(shape, device)
    out = sparse_attention(*tensors, config=EVERYTHING, enable_gqa=True)
    check(out, tensors, causal_mask(shape, device))


@pytest.mark.parametrize("left", [True, False])
def test_padding(left, device):
    shape = AttentionShape(3, 1, 2, 150, 150, 16)
    position, lengths = torch.arange(150), torch.tensor([[150], [20], [0]])
    valid = (position >= 150 - lengths if left else position < lengths).to(device)
    tensors = inputs(shape, device)
    out = sparse_attention(*tensors, config=EVERYTHING, mask_mod=padding(valid), enable_gqa=True)
    check(out, tensors, causal_mask(shape, device) & valid[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, device):
    shape = AttentionShape(1, 2, 2, 200, 200, 16)
    tensors = inputs(shape, device, dtype)
    out = sparse_attention(*tensors, config=EVERYTHING, enable_gqa=True)
    assert out.dtype == dtype
    check(out, tensors, causal_mask(shape, device))


def test_autocast_follows_sdpa(device):
    shape = AttentionShape(1, 1, 1, 40, 40, 16)
    with torch.autocast(device.type, torch.bfloat16):
        out = sparse_attention(*inputs(shape, device), config=EVERYTHING)
    assert out.dtype == torch.bfloat16


def test_value_may_have_its_own_head_dim(device):
    shape = AttentionShape(1, 1, 2, 140, 140, 16)
    query, key, _ = inputs(shape, device)
    value = torch.randn(1, 1, 140, 24, device=device, requires_grad=True)
    out = sparse_attention(query, key, value, config=EVERYTHING, enable_gqa=True)
    check(out, (query, key, value), causal_mask(shape, device))


# --- the mask that the selection denotes -------------------------------------


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    "shape", [AttentionShape(2, 2, 2, 700, 700, 16), AttentionShape(1, 1, 7, 140, 520, 16)], ids=str
)
def test_output_is_dense_attention_under_the_selection(shape, target, device):
    config = dataclasses.replace(SPARSE, target_recall=target)
    tensors = inputs(shape, device)
    visual = (torch.arange(shape.kv_len, device=device) < shape.kv_len - 9).expand(shape.batch, -1)
    offset = Const(shape.kv_len - shape.q_len)
    mask = selected(shape, *tensors[:2], IndexMask(causal_expr(offset)), config, visual=visual)
    assert mask.sum() < causal_mask(shape, device).expand_as(mask).sum(), "nothing was left out: a test of nothing"
    out = sparse_attention(*tensors, config=config, visual_mask=visual, enable_gqa=True)
    check(out, tensors, mask)


@st.composite
def small_shapes(draw):
    lengths = st.sampled_from((1, 7, 100, 128, 129, 200))
    q_len = draw(lengths)
    kv_len = draw(st.just(q_len) | lengths)
    return AttentionShape(
        draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from((1, 2))), q_len, kv_len, 8
    )


@given(st.data(), small_shapes(), st.booleans(), st.floats(0.05, 1.0), st.integers(0, 300))
def test_any_mask_forward_backward_and_dead_rows(data, shape, is_causal, target, window):
    case = data.draw(mask_mods(shape.batch, shape.q_len, shape.kv_len))
    # The fewest blocks that counting may keep, or blocks by peaks.
    rule = data.draw(st.sampled_from(({"max_kv_budget": 0}, {"key_block": 64}, {"key_block": 128})))
    config = OmniSparseConfig(target_recall=target, sink_size=0, window_size=max(window, 1), **rule)
    tensors = inputs(shape, "cpu")
    order = causal_expr(Const(shape.kv_len - shape.q_len)) if is_causal else Const(True)
    program = IndexMask(order).intersect(trace_mask_mod(case.mask_mod, torch.device("cpu")))
    # Without is_causal, causality in the mask itself says where the queries sit.
    own = None if is_causal else causal_offset(program.expr)
    offset = shape.kv_len - shape.q_len if is_causal else int(own.value) if isinstance(own, Const) else 0
    mask = selected(shape, *tensors[:2], program, config, offset=offset)
    out = sparse_attention(*tensors, config=config, is_causal=is_causal, mask_mod=case.mask_mod, enable_gqa=True)
    check(out, tensors, mask)  # also: rows without a key are exactly 0, and nothing is NaN
    dead = ~program_rows(program, shape)
    (gradient,) = torch.autograd.grad(out.sum(), tensors[0])
    assert not out[dead].any() and not gradient[dead].any()


def test_causality_in_the_mask_mod_places_the_queries():
    """Query 127 sits at key 128, the first of the next block: its window must follow it there."""
    shape = AttentionShape(1, 1, 1, 129, 129, 8)
    config = OmniSparseConfig(target_recall=0.5, sink_size=0, window_size=1, max_kv_budget=0)
    tensors = inputs(shape, "cpu", grad=False)
    out = sparse_attention(*tensors, config=config, is_causal=False, mask_mod=causal(1))
    dense = dense_oracle(*tensors, mask=materialize_mask(causal(1), 1, 1, 129, 129))
    torch.testing.assert_close(out[0, 0, 127].double(), dense[0, 0, 127], atol=1e-5, rtol=1e-5)


def program_rows(program, shape):
    """Rows to which the model's own mask allows a key."""
    return materialize_mask(program, shape.batch, shape.heads, shape.q_len, shape.kv_len).any(-1)


# --- the model's own change of the logits ------------------------------------

ALIBI = Apply("mul", (Apply("cast_float", (Apply("sub", (KV, Q)),)), Load(0, (H,))))


def score_sites(device):
    slopes = torch.tensor([0.1, 0.02], device=device, requires_grad=True)
    rows, keys = torch.arange(300, device=device)[:, None], torch.arange(300, device=device)
    bias = (keys - rows) * slopes[:, None, None]
    return {
        "score_mod": ({"score_mod": lambda s, b, h, q, kv: s * 0.5 + (q - kv) * 0.01},) * 2,
        "softcap": ({"softcap": 1.5},) * 2,
        "bias": ({"bias": ALIBI, "bias_buffers": (slopes,)}, {"bias": bias}),
        "softcap_then_bias": (
            {"softcap": 2.0, "bias": ALIBI, "bias_buffers": (slopes,)},
            {"softcap": 2.0, "bias": bias},
        ),
    }, slopes


@pytest.mark.parametrize("name", ["score_mod", "softcap", "bias", "softcap_then_bias"])
def test_changed_logits(name, device):
    shape = AttentionShape(1, 2, 1, 300, 300, 16)
    sites, slopes = score_sites(device)
    fields, oracle = sites[name]
    program = IndexMask(causal_expr())
    site = SparseCall(config=SPARSE, target=0.6, mask=program, **fields)
    tensors = inputs(shape, device)
    adjust = change_of_logits(Grid(1, 2, 300, 300, BLOCK, device), site.plain_score)
    mask = selected(shape, *tensors[:2], program, SPARSE, target=0.6, adjust=adjust, score=site.plain_score)
    out = attend(*tensors, site)
    check(out, tensors, mask, **{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in oracle.items()})
    if "bias" in oracle:
        (got,) = torch.autograd.grad(out.square().sum(), slopes)
        (expected,) = torch.autograd.grad(dense_oracle(*tensors, mask=mask, **oracle).square().sum(), slopes)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


# --- under torch.compile -----------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_dynamo(backend, device):
    shape = AttentionShape(2, 2, 1, 300, 300, 16)
    valid = (torch.arange(300) >= torch.tensor([[0], [100]])).to(device)
    visual = torch.ones(2, 300, dtype=torch.bool, device=device)
    visual[:, 280:] = False
    mask_mod = intersect(padding(valid), causal())

    def call(query, key, value):
        return sparse_attention(query, key, value, config=SPARSE, visual_mask=visual, mask_mod=mask_mod)

    tensors = inputs(shape, device, grad=backend == "aot_eager" and device.type == "cuda")
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


@pytest.mark.slow
@torch.no_grad()
def test_under_inductor(device):
    shape = AttentionShape(1, 2, 2, 300, 300, 32)
    tensors = inputs(shape, device, grad=False)
    compiled = torch.compile(sparse_attention, fullgraph=True)
    mask = selected(shape, *tensors[:2], IndexMask(causal_expr()), SPARSE)
    check(compiled(*tensors, config=SPARSE, enable_gqa=True), tensors, mask)


# --- bad input ---------------------------------------------------------------


def sized(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


GOOD = sized(2, 4, 8, 16)
BAD = [
    ((sized(4, 8, 16), GOOD, GOOD), {}, "query must have shape (B, H, N, D), got (4, 8, 16)"),
    ((GOOD, GOOD.long(), GOOD), {}, "key must be floating point, got torch.int64"),
    ((GOOD, GOOD, GOOD.half()), {}, "value must have query's dtype torch.float32, got torch.float16"),
    ((GOOD[:, :, :0], GOOD, GOOD), {}, "query must hold at least one token, got (2, 4, 0, 16)"),
    ((GOOD, GOOD[:, :, :0], GOOD[:, :, :0]), {}, "key must hold at least one token, got (2, 4, 0, 16)"),
    ((GOOD, GOOD, GOOD[:, :, :7]), {}, "value must match key's (2, 4, 8), got (2, 4, 7)"),
    ((GOOD, GOOD[:1], GOOD[:1]), {}, "key must have query's batch size 2, got 1"),
    ((GOOD, GOOD[..., :8], GOOD), {}, "key must have query's head_dim 16, got 8"),
    ((GOOD, GOOD[:, :2], GOOD[:, :2]), {}, "key must have query's 4 heads, got 2"),
    ((GOOD, GOOD[:, :3], GOOD[:, :3]), {"enable_gqa": True}, "key must have heads that divide query's 4, got 3"),
    ((GOOD,) * 3, {"visual_mask": torch.ones(2, 8)}, "visual_mask must be bool, got torch.float32"),
    ((GOOD,) * 3, {"visual_mask": torch.ones(2, 9) > 0}, "visual_mask must have shape (2, 8), got (2, 9)"),
    ((GOOD.to("meta"), GOOD, GOOD), {}, "key must be on query's device meta, got device(type='cpu')"),
]


@pytest.mark.parametrize(("tensors", "options", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(tensors, options, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        sparse_attention(*tensors, config=EVERYTHING, **options)
