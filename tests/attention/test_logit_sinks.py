"""Logit sinks in one attention call: every path against the float64 oracle, gradients of the sinks included."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, sparse_attention
from omnisparse_flex.attention import block_sparse as attention
from omnisparse_flex.attention.block_sparse import attend
from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.backend import Backend
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks import causal, padding, sliding_window
from omnisparse_flex.masks.expr.expr import Const
from omnisparse_flex.masks.expr.expr import causal as causal_expr
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.testing import AttentionShape, assert_close_to_oracle, dense_oracle, tolerance
from omnisparse_flex.testing.oracle import materialize_mask
from tests.attention import test_attention
from tests.attention.tokens import test_tokens
from tests.cache.test_cache_kernel import layer_of, token_of

TOKENS = test_tokens.TOKENS
BLOCKS = test_attention.SPARSE
EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None)


def sinks_of(heads, device, dtype=torch.float32):
    """From hardly any mass to most of it."""
    return torch.linspace(-1, 7, heads).to(device, dtype).requires_grad_()


def check(out, tensors, sinks, mask, **oracle):
    """Output and gradients of query, key, value and sinks."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    assert_close_to_oracle(out, *tensors, mask, grad_output=grad, sinks=sinks.detach(), **oracle)
    (got,) = torch.autograd.grad(out, sinks, grad)
    wanted, rival = (gradient_of(sinks, tensors, mask, grad, dtype, oracle) for dtype in (torch.float64, out.dtype))
    assert wanted.abs().max() > 0.02, "a test of nothing"
    terms = out.shape[0] * out.shape[2]  # of order one, rounded one by one
    assert (got.double() - wanted).abs().max() <= tolerance(wanted, out.dtype, rival, magnitude=terms, factor=1)


def gradient_of(sinks, tensors, mask, grad, dtype, oracle):
    twin = sinks.detach().to(dtype).requires_grad_()
    out = dense_oracle(*(x.detach() for x in tensors), mask=mask, sinks=twin, dtype=dtype, **oracle)
    return torch.autograd.grad(out, twin, grad.to(dtype))[0]


# --- dense: the marker's own meaning -----------------------------------------

SHAPE = AttentionShape(2, 2, 3, 70, 70, 16)
REAL = torch.arange(70) >= torch.tensor([[0], [30]])
WINDOW = materialize_mask(sliding_window(9), 1, 1, 70, 70)
DENSE = {
    "causal": (SHAPE, {}, None),
    "no order": (SHAPE, {"is_causal": False}, torch.ones(70, 70, dtype=torch.bool)),
    "after a cache": (SHAPE._replace(q_len=7), {}, None),
    "one query": (SHAPE._replace(q_len=1), {}, None),
    "padding": (SHAPE, {"padding": REAL}, REAL[:, None, None]),
    "one query and padding": (SHAPE._replace(q_len=1), {"padding": REAL}, REAL[:, None, None]),
    "window": (SHAPE, {"mask": WINDOW}, WINDOW),
    "additive": (SHAPE, {"mask": torch.zeros(WINDOW.shape).masked_fill(~WINDOW, -torch.inf)}, WINDOW),
    "soft cap": (SHAPE, {"softcap": 2.0}, None),
    "empty rows": (SHAPE, {"mask": WINDOW & (torch.arange(70) > 20)}, WINDOW & (torch.arange(70) > 20)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", DENSE)
def test_the_marker_is_dense_attention_with_sinks(case, dtype, device):
    shape, fields, mask = DENSE[case]
    tensors, sinks = test_attention.inputs(shape, device, dtype), sinks_of(shape.heads, device, dtype)
    given = {"padding": None, "mask": None, "is_causal": True, "scale": 0.3, "layer": 0, "softcap": 0.0} | fields
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    if given["mask"] is not None and given["mask"].is_floating_point():
        given["mask"] = given["mask"].to(dtype)
    out = torch.ops.omnisparse.attn(*tensors, *given.values(), sinks)
    order = test_attention.causal_mask(shape, device) if given["is_causal"] else True
    allowed = order if mask is None else mask.to(device) & order
    check(out, tensors, sinks, allowed, scale=0.3, **({"softcap": 2.0} if given["softcap"] else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_keeps_a_large_sink(dtype, device):
    """s / scale is 335, which bfloat16 alone would round by 1, and so the logit by 0.2."""
    query = key = torch.full((1, 2, 70, 16), 4.5, dtype=torch.bfloat16, device=device)  # logits of 64.8
    value = torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).to(query)
    out = torch.ops.omnisparse.attn(
        query, key, value, None, None, True, 0.2, 0, 0.0, torch.full((2,), 67.0).to(device, dtype)
    )
    order = test_attention.causal_mask(AttentionShape(1, 2, 1, 70, 70, 16), device)
    exact, rounded = (
        dense_oracle(query, key, value, mask=order, scale=0.2, sinks=torch.full((2,), logit, device=device))
        for logit in (67.0, 66.8)
    )
    assert (rounded - exact).abs().max() > 4 * (out.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(70, 70), (1, 70)], ids=str)
def test_a_sink_out_of_reach_is_none(lengths, dtype, device):
    """Minus infinity, and what half precision cannot hold once it is divided by the scale."""
    tensors = [x.to(dtype) for x in test_attention.inputs(SHAPE._replace(q_len=lengths[0]), device, torch.float32)]
    given = (None, None, True, 0.1, 0, 0.0)
    with torch.no_grad():
        want = torch.ops.omnisparse.attn(*tensors, *given)
        for logit in (-torch.inf, -1e4):
            out = torch.ops.omnisparse.attn(*tensors, *given, torch.full((SHAPE.heads,), logit, device=device))
            torch.testing.assert_close(out, want, atol=2e-3 if dtype == torch.float16 else 2e-2, rtol=2e-2)


def test_one_query_is_as_exact_as_many(device):
    """Logits are products in float32, whatever the inputs' type."""
    shape = AttentionShape(1, 2, 4, 1, 2000, 64)
    tensors = [(3 * x.detach()).bfloat16() for x in test_attention.inputs(shape, device, torch.float32)]
    sinks = torch.full((shape.heads,), 40.0, device=device)
    with torch.no_grad():
        out = torch.ops.omnisparse.attn(*tensors, None, None, True, 0.125, 0, 0.0, sinks)
    exact = dense_oracle(*tensors, mask=None, scale=0.125, sinks=sinks)
    assert (out.double() - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_sinks_by_keyword_reach_the_site(device):
    tensors = [x.detach() for x in test_attention.inputs(AttentionShape(1, 2, 1, 300, 300, 16), device, torch.float32)]
    sinks, own = torch.ones(2, device=device), Backend(OmniSparseConfig(), min_seq_len=0, inner="eager")
    run = torch.compile(
        lambda q, k, v, s: torch.ops.omnisparse.attn(q, k, v, None, None, True, 0.25, 0, 0.0, sinks=s), backend=own
    )
    run(*tensors, sinks)
    assert own.last.sites[0].rewritten and own.last.sites[0].sinks is not None


# --- sparse: both granularities ----------------------------------------------

MASKS = {
    "causal": (AttentionShape(2, 2, 2, 520, 520, 16), lambda device: None),
    "after a cache": (AttentionShape(1, 1, 3, 140, 520, 16), lambda device: None),
    "window": (AttentionShape(1, 2, 2, 520, 520, 16), lambda device: sliding_window(300)),
    "padding": (
        AttentionShape(2, 1, 2, 900, 900, 16),
        lambda device: padding(torch.arange(900, device=device) >= torch.tensor([[0], [170]], device=device)),
    ),
}


def masked(case, device):
    shape, make = MASKS[case]
    mask = IndexMask(causal_expr(Const(shape.kv_len - shape.q_len)))
    own = make(device)
    return shape, mask if own is None else mask.intersect(trace_mask_mod(own, torch.device(device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MASKS)
def test_block_granularity(case, dtype, device):
    shape, mask = masked(case, device)
    tensors, sinks = test_attention.inputs(shape, device, dtype), sinks_of(shape.heads, device, dtype)
    kept = test_attention.selected(shape, *tensors[:2], mask, BLOCKS)
    own = materialize_mask(mask, shape.batch, shape.heads, shape.q_len, shape.kv_len, torch.device(device))
    assert kept.sum() < own.sum(), "nothing was left out: a test of nothing"
    offset = shape.kv_len - shape.q_len
    out = attend(
        *tensors, SparseCall(config=BLOCKS, target=BLOCKS.recall_of(0), mask=mask, q_offset=offset, sinks=sinks)
    )
    assert out.dtype == dtype
    check(out, tensors, sinks, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MASKS)
def test_token_granularity(case, dtype, device):
    shape, mask = masked(case, device)
    tensors, sinks = test_tokens.inputs(shape, device, dtype), sinks_of(shape.heads, device, dtype)
    out, selection, kept, own = test_tokens.run(shape, tensors, TOKENS, mask, sinks=sinks)
    assert selection.key_count.max() > 0 and kept.sum() < own.sum(), "a test of nothing"
    check(out, tensors, sinks, kept)


@pytest.mark.parametrize("config", [BLOCKS, TOKENS], ids=["block", "token"])
def test_a_sink_without_mass_changes_nothing_and_one_with_all_of_it_leaves_nothing(config, device):
    tensors = [x.detach() for x in test_attention.inputs(AttentionShape(1, 2, 2, 520, 520, 16), device)]
    plain = sparse_attention(*tensors, config=config, enable_gqa=True)
    call = lambda logit: sparse_attention(  # noqa: E731
        *tensors, config=config, enable_gqa=True, sinks=torch.full((4,), logit, device=device)
    )
    assert torch.equal(call(-1e4), plain), "the selection ignores sinks"
    assert call(1e4).count_nonzero() == 0


@pytest.mark.parametrize("config", [BLOCKS, TOKENS], ids=["block", "token"])
def test_rows_without_a_key_stay_zero_with_finite_gradients(config, device):
    shape = AttentionShape(2, 1, 2, 150, 150, 16)
    valid = torch.arange(150, device=device) >= torch.tensor([[150], [40]], device=device)
    tensors, sinks = test_attention.inputs(shape, device), sinks_of(2, device)
    out = sparse_attention(*tensors, config=config, mask_mod=padding(valid), enable_gqa=True, sinks=sinks)
    check(out, tensors, sinks, test_attention.causal_mask(shape, device) & valid[:, None, None])


def test_the_operator_of_a_graph_has_the_same_gradients(device):
    shape, mask = masked("causal", device)
    tensors, sinks = test_tokens.inputs(shape, device), sinks_of(shape.heads, device)
    site = SparseCall(config=TOKENS, target=0.6, mask=mask, sinks=sinks)
    site = dataclasses.replace(site, rules=register(site))
    direct, through = attend(*tensors, dataclasses.replace(site, rules="")), call_token_op(*tensors, site)
    assert torch.equal(direct, through)
    grad = torch.randn(direct.shape, generator=torch.Generator().manual_seed(1)).to(direct)
    wanted, got = (torch.autograd.grad(x, (*tensors, sinks), grad) for x in (direct, through))
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, other)
    # A sink alone may be what trains.
    frozen = [x.detach() for x in tensors]
    (alone,) = torch.autograd.grad(call_token_op(*frozen, site), sinks, grad)
    torch.testing.assert_close(alone, wanted[3])


def test_kernels_without_a_log_sum_exp_take_the_sink_as_a_key(device):
    """Inductor's on the CPU; here its operands run eagerly, where gradients may be had too."""
    if device.type == "cuda":
        pytest.skip("CUDA kernels return it")
    shape, mask = masked("padding", device)
    tensors, sinks = test_attention.inputs(shape, device), sinks_of(shape.heads, device)
    site = SparseCall(config=EVERYTHING, target=0.999, mask=mask, sinks=sinks, lists=True)
    assert not attention._has_lse(tensors[0], site)
    own = materialize_mask(mask, shape.batch, shape.heads, shape.q_len, shape.kv_len)
    check(attend(*tensors, site), tensors, sinks, own)


# --- through graphs ----------------------------------------------------------


def marked(q, k, v, sinks):
    return torch.ops.omnisparse.attn(q, k, v, None, None, True, 0.25, 0, 0.0, sinks)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("granularity", ["block", "token"])
def test_a_rewritten_site_keeps_its_sinks(granularity, checkpointing, device):
    shape = AttentionShape(1, 2, 2, 300, 300, 16)
    config = dataclasses.replace(EVERYTHING, granularity=granularity, sink_size=8, window_size=16)

    def call(q, k, v, sinks):
        if not checkpointing:
            return marked(q, k, v, sinks) * 1
        return torch.utils.checkpoint.checkpoint(marked, q, k, v, sinks * 1, use_reentrant=False)

    backend = Backend(config, min_seq_len=0, inner="aot_eager")
    tensors, sinks = test_attention.inputs(shape, device), sinks_of(shape.heads, device)
    out = torch.compile(call, backend=backend, fullgraph=True)(*tensors, sinks)
    (site,) = backend.last.sites
    assert site.rewritten, site.skip
    check(out, tensors, sinks, test_attention.causal_mask(shape, device), scale=0.25)


@pytest.mark.parametrize("fields", [{"min_seq_len": 1000}, {"config": OmniSparseConfig(target_recall=1.0)}], ids=str)
def test_a_dense_site_keeps_its_sinks(fields, device):
    shape = AttentionShape(1, 2, 2, 300, 300, 16)
    backend = Backend(**{"config": EVERYTHING, "min_seq_len": 0, "inner": "aot_eager"} | fields)
    tensors, sinks = test_attention.inputs(shape, device), sinks_of(shape.heads, device)
    out = torch.compile(lambda *a: marked(*a) * 1, backend=backend, fullgraph=True)(*tensors, sinks)
    (site,) = backend.last.sites
    assert not site.rewritten and site.skip.reason
    check(out, tensors, sinks, test_attention.causal_mask(shape, device), scale=0.25)


def test_flash_is_told_of_the_sinks(device, monkeypatch):
    """Its log-sum-exp has no gradient: ``kernel_choice`` must know."""
    told, module = [], sys.modules["omnisparse_flex.passes.lower"]
    monkeypatch.setattr(module, "kernel_options", lambda *a, sinks, **k: told.append(sinks) or ((), ""))
    backend = Backend(EVERYTHING, min_seq_len=0, inner="inductor")
    monkeypatch.setattr("omnisparse_flex.backend._compile", lambda *_: lambda *inputs: (inputs[0],))
    tensors = [x.detach() for x in test_attention.inputs(AttentionShape(1, 1, 2, 130, 130, 16), device)]
    for sinks in (sinks_of(2, device).detach(), None):
        torch.compile(lambda *a: marked(*a) * 1, backend=backend)(*tensors, sinks)
    assert told == [True, False]


def test_under_dynamo(device):
    shape = AttentionShape(1, 2, 2, 520, 520, 16)
    tensors, sinks = [x.detach() for x in test_attention.inputs(shape, device)], sinks_of(4, device).detach()
    call = lambda q, k, v, s: sparse_attention(q, k, v, config=BLOCKS, enable_gqa=True, sinks=s)  # noqa: E731
    torch.testing.assert_close(
        torch.compile(call, backend="eager", fullgraph=True)(*tensors, sinks), call(*tensors, sinks)
    )


@pytest.mark.slow
def test_through_inductor(device):
    backend = Backend(BLOCKS, min_seq_len=0, inner="inductor")
    compiled = torch.compile(lambda *a: marked(*a) * 1, backend=backend, fullgraph=True)
    shape = AttentionShape(2, 2, 2, 520, 520, 16)
    tensors = [x.detach() for x in test_attention.inputs(shape, device)]
    sinks = sinks_of(shape.heads, device).detach()
    expected, plain = (
        sparse_attention(*tensors, config=BLOCKS, enable_gqa=True, sinks=own, scale=0.25) for own in (sinks, None)
    )
    assert (plain - expected).abs().max() > 0.1, "a test of nothing"
    torch.testing.assert_close(compiled(*tensors, sinks), expected, atol=1e-5, rtol=1e-5)
    assert len(backend.log.report().rewritten) == 1


# --- a slim cache ------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_a_layer_of_the_cache(count):
    """Two rectangles and a tail are one softmax with one sink."""
    torch.manual_seed(0)
    case = (1, 4, 3, 16, (90, 40), 5, False)
    layer, _ = layer_of(case, torch.float64, "cpu", True)
    query, key, value = (torch.cat([x] * count, 2) for x in token_of(case, torch.float64, "cpu"))
    sinks = sinks_of(12, "cpu", torch.float64).detach()
    out = layer.attend(query, key, value, None, 0.2, sinks)
    for head in range(12):
        part = next(part for part in layer.kept if head // 3 in part.heads)
        column = part.heads.index(head // 3)
        tail = (x[:, head // 3, None, : layer.tail] for x in (layer.tail_keys, layer.tail_values))
        full = [torch.cat([x[:, column, None], y], 2) for x, y in zip((part.keys, part.values), tail, strict=True)]
        order = materialize_mask(causal(full[0].shape[2] - count), 1, 1, count, full[0].shape[2])
        own = slice(head, head + 1)
        exact = dense_oracle(query[:, own], *full, mask=order, scale=0.2, sinks=sinks[own])
        torch.testing.assert_close(out[:, own], exact)


# --- mistakes ----------------------------------------------------------------

Q = torch.zeros(1, 4, 8, 16)
BAD = {
    "list": ([0.0] * 4, "sinks must be a tensor, got 'list'"),
    "heads": (torch.zeros(2), r"sinks must have shape \(4,\), got \(2,\)"),
    "rank": (torch.zeros(1, 4), r"sinks must have shape \(4,\), got \(1, 4\)"),
    "dtype": (torch.zeros(4, dtype=torch.int64), "sinks must be floating point, got torch.int64"),
    "device": (torch.zeros(4, device="meta"), "sinks must be on query's device cpu, got device.*meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sinks_are_refused(name):
    sinks, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        sparse_attention(Q, Q, Q, config=BLOCKS, sinks=sinks)
