"""The token kernels: on the GPU if there is one, else in Triton's interpreter, else not at all."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.tokens import dispatch as token_attention
from omnisparse_flex.attention.tokens import tensor_code
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.kernels.fallback import guarded
from omnisparse_flex.masks.blocks.budget import need, rank
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.mean_pool import block_mean
from omnisparse_flex.masks.blocks.select import BLOCK, grid_of
from omnisparse_flex.masks.expr.causal_padding import as_causal_padding
from omnisparse_flex.masks.expr.expr import KV, TRUE, Apply, B, Const, Load, Q, causal, conjunction
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.masks.tokens.head_dims import top_head_dims
from omnisparse_flex.masks.tokens.key_bits import unpack_bits, words
from omnisparse_flex.masks.tokens.one_pass import one_pass
from omnisparse_flex.masks.tokens.segments import per_member, segments_of, tokens_of_blocks
from omnisparse_flex.masks.tokens.select import kept_pairs
from omnisparse_flex.testing import AttentionShape, assert_close_to_oracle, dense_oracle
from omnisparse_flex.testing.oracle import materialize_mask
from tests.helpers.interpreter import needs_scalars, run_interpreted

CONFIG = OmniSparseConfig(
    granularity="token", target_recall=0.6, lazy_threshold=0.05, sink_size=8, window_size=16, segment_size=128
)
SMALL = [AttentionShape(1, 1, 2, 520, 520, 16), AttentionShape(2, 2, 1, 140, 520, 16)]
SHAPES = [AttentionShape(1, 2, group, 1000, 1000, dim) for group, dim in ((1, 64), (2, 128), (7, 64))]
SHAPES += [
    AttentionShape(2, 2, 7, 300, 1111, 128),
    AttentionShape(1, 1, 1, 300, 200, 16),
    AttentionShape(3, 1, 2, 7, 900, 32),
]


def tensors(shape, device, dtype=torch.float32):
    """Query, key and value with a few keys that many queries like."""
    query, key, value = shape.inputs()
    liked = torch.rand(shape.kv_len, generator=torch.Generator().manual_seed(3)) < 0.05
    key = torch.where(liked[:, None], key + 2, key)
    return [x.to(device, dtype).requires_grad_() for x in (query + 1, key, value)]


def loud(shape, device, dtype=torch.float32):
    """The same, their first 16 coordinates louder than the rest: enough for scores that read no more."""
    size = torch.where(torch.arange(shape.head_dim, device=device) < 16, 1.0, 0.1)
    query, key, value = (x.detach() for x in tensors(shape, device))
    return [x.to(dtype).requires_grad_() for x in (query * size, key * size, value)]


def site_of(shape, device, config=CONFIG, padded=False, order=True):
    offset = shape.kv_len - shape.q_len if order else 0
    mask = IndexMask(causal(Const(offset)) if order else TRUE)
    if padded:
        real = torch.arange(shape.kv_len, device=device) >= 37 * torch.arange(shape.batch, device=device)[:, None]
        mask = mask.intersect(IndexMask(Load(0, (B, KV)), (real,)))
    return SparseCall(config=config, target=config.recall_of(0), mask=mask, q_offset=offset)


def run(inputs, site):
    """Output and selection of the kernels."""
    from omnisparse_flex.attention.tokens.triton import attend_tokens_triton

    query, key, value = inputs
    plain = as_causal_padding(site.mask, query.shape[0], key.shape[2], query.device)
    segments = token_attention.segments_of_site(query, key, site)
    text = torch.zeros((1, query.shape[2]), dtype=torch.bool, device=query.device)
    return attend_tokens_triton(query, key, value, site, plain, segments, text, True)


def attended_lse(inputs):
    """Log-sum-exps (B, Hq, L) of dense attention, by and large."""
    query, key = (x.detach().double() for x in inputs[:2])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return torch.logsumexp(query @ key.transpose(-1, -2) * query.shape[3] ** -0.5, -1).float()


def check_attention(shape, device, dtype=torch.float32, sinks=False, make=tensors, **fields):
    """Output and gradients are those of dense attention under what the selection denotes."""
    site, inputs = site_of(shape, device, **fields), make(shape, device, dtype)
    logits = None
    if sinks:  # a sink takes a good part of a row's mass
        level = attended_lse(inputs).mean((0, 2)) + torch.linspace(-1, 1, shape.heads, device=device)
        logits = level.requires_grad_()
    site = dataclasses.replace(site, sinks=logits)
    out, selection = run(inputs, site)
    places = torch.arange(shape.q_len, device=device)
    own = materialize_mask(site.mask, shape.batch, shape.heads, shape.q_len, shape.kv_len, torch.device(device))
    kept = kept_pairs(selection, places, shape.kv_len, site.config, BLOCK) & own
    assert shape.kv_len < 500 or kept.sum() < own.sum(), "a test of nothing"
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    oracle = {} if logits is None else {"sinks": logits.detach()}
    assert_close_to_oracle(out, *inputs, kept, grad_output=grad, **oracle)
    if logits is not None:
        (got,) = torch.autograd.grad(out, logits, grad)
        exact = dense_oracle(*(x.detach() for x in inputs), mask=kept, sinks=logits)
        (wanted,) = torch.autograd.grad(exact, logits, grad.double())
        # A sum over all rows, of outputs rounded to their type and made in float32: signs differ, so do most errors.
        rounded = 2 * torch.finfo(dtype).eps * (grad.double() * out.detach().double()).norm()
        bound = float(rounded + 8 * torch.finfo(torch.float32).eps * grad.double().norm() * shape.head_dim**0.5)
        assert wanted.abs().max() > 4 * bound and (got.double() - wanted).abs().max() <= bound, (got, wanted, bound)
    return selection


def check_selection(shape, device, config, dtype=torch.float32, make=tensors):
    """The kernels' choice against the tensor code's, on the same inputs."""
    inputs = [x.detach() for x in make(shape, device, dtype)]
    site = site_of(shape, device, config)
    _, quick = run(inputs, site)
    choices = config.choices(shape.heads, shape.kv_heads)
    inputs[1:] = [per_member(x, choices // shape.kv_heads) for x in inputs[1:]]
    segments = token_attention.segments_of_site(*inputs[:2], site)
    near_lse = tensor_code.attend_near(*inputs, segments, site)[1]
    text = torch.zeros((1, shape.q_len), dtype=torch.bool, device=device)
    plain = tensor_code.choose(*inputs[:2], near_lse, segments, text, site)
    assert (quick.active == plain.active).float().mean() > 0.98
    packed = segments_of(quick.active.unsqueeze(-1), choices, config.segment_size)
    assert torch.equal(quick.row_count, packed.sum((3, 4)))
    taken = unpack_bits(quick.chosen, shape.kv_len)
    eligible = tokens_of_blocks(segments.eligible, BLOCK, shape.kv_len)
    assert torch.equal(taken.sum(-1), quick.key_count) and not (taken & ~eligible).any()
    if config.budget == "per_head" and config.max_kv_budget is None:
        target = config.recall_of(0)
        assert (quick.mass[quick.row_count > 0] >= target - 2e-3).all()
    # As good as the tensor code's: by the unrounded estimate, its keys hold as much mass as the best of that number.
    given = {"block": BLOCK, "scale": shape.head_dim**-0.5, "pairs": None, "score": None}
    if config.scoring_dims is not None:
        given["columns"] = top_head_dims(*inputs[:2], choices, config.scoring_dims)
    mass, _ = one_pass(*inputs[:2], near_lse, segments.eligible, quick.rows.long(), quick.row_count, config, **given)
    as_many = torch.arange(shape.kv_len, device=device) < quick.key_count.unsqueeze(-1)
    got = (mass * taken).sum()
    best = (mass.sort(-1, descending=True).values * as_many).sum()
    assert got >= (0.97 if device == "cuda" else 0.9999) * best > 0
    if device != "cuda":  # float32 throughout: the same choice
        assert torch.equal(quick.key_count, plain.key_count) and torch.equal(quick.overflow, plain.overflow)


def check_pick(device, size=3000):
    """Need and choice against a sort: masses a factor of 1.004 apart, some places no keys, some segments empty.

    20000 such masses are normal numbers still; steps of 1.01 would end in zeros, which tie, and in subnormal
    numbers, which the kernel does not tell apart.
    """
    from omnisparse_flex.kernels.key_lists import list_keys
    from omnisparse_flex.kernels.top_keys import masses_needed, pick

    generator = torch.Generator().manual_seed(0)
    mass = torch.stack([1.004 ** -torch.randperm(size, generator=generator).float() for _ in range(6)]).view(
        1, 2, 3, -1
    )
    absent = torch.rand(mass.shape, generator=generator) < 0.3
    absent[0, 1, 2] = True
    mass = mass.masked_fill(absent, -1.0)
    kept, target = torch.rand(1, 2, 3, generator=generator) * 20, torch.full((1,), 0.9)
    ranked, order = rank(mass, mass >= 0)
    wanted = need(ranked, kept, (mass >= 0).sum(-1), target)
    mass, kept, target = (x.to(device) for x in (mass, kept, target))
    stops = torch.full((1, 2, 3), size, dtype=torch.int32, device=device)
    needs, there, totals = masses_needed(mass, stops, kept, target)
    assert torch.equal(there.cpu(), (~absent).sum(-1)) and (needs.cpu() - wanted).abs().max() <= 1 and wanted.max() > 20
    torch.testing.assert_close(totals, mass.clamp(min=0).sum(-1))
    assert torch.equal(masses_needed(mass, stops, kept, torch.ones_like(target))[0], there)
    bits = torch.zeros((1, 2, 5, words(size)), dtype=torch.int32, device=device)
    budget = torch.tensor([[[0, 1, 57], [size // 4, size // 2, 0]]], device=device)
    chosen = pick(mass, stops, budget, bits, 2)
    assert not bits[:, :, :2].any() and not unpack_bits(bits, 32 * words(size))[..., size:].any()
    keys = torch.full((1, 2, 4, size), -7, dtype=torch.int32, device=device)
    list_keys(bits, slice(2, 5), keys)
    assert (keys[:, :, 3] == -7).all()
    for h in range(2):
        for m in range(3):
            count = int(budget[0, h, m])
            expected = order[0, h, m, :count].sort().values
            assert torch.equal(keys[0, h, m, :count].cpu().long(), expected)
            assert (keys[0, h, m, count:] == -7).all()
            torch.testing.assert_close(chosen[0, h, m].cpu(), ranked[0, h, m, :count].sum())


def check_ready_keys(device, dtype, kv_len=300, dim=32):
    """Means, float8 keys and states against tensor code, of keys that lie as a cache may hold them."""
    from omnisparse_flex.kernels.pack_keys import BROKEN, WHOLE, ready_keys

    key = torch.randn(2, kv_len, 3, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype).transpose(1, 2)
    key[0, 1, 7, 3], key[1, 2, 290, 0], key[1, 0] = torch.nan, -torch.inf, 0.0
    real = (torch.arange(kv_len, device=device) > 4).to(torch.uint8).expand(2, -1).contiguous()
    broken = ~key.isfinite().all(-1)
    whole = torch.where(broken.unsqueeze(-1), 0.0, key)
    means, (packed, gain, state, _) = ready_keys(key, real, 16, torch.float8_e4m3fn)
    torch.testing.assert_close(means, block_mean(whole, 16))
    assert torch.equal(state, torch.where(broken, BROKEN, WHOLE).to(torch.uint8) * real[:, None])
    error = (packed.float() * gain[..., None, None] - whole.float()).abs()
    peak = whole.float().abs().amax((2, 3), keepdim=True)
    # Three bits of mantissa, and numbers below 2^-6 of 448 have fewer; the interpreter's rounding forgets to carry.
    assert (
        error <= whole.float().abs() / (16 if device == "cuda" else 1.9) + peak * 2**-18
    ).all() and packed.is_contiguous()
    same_means, (same_keys, ones, _, _) = ready_keys(key, None, 16, dtype)
    torch.testing.assert_close(same_means, means)
    assert same_keys is key and (ones == 1).all()
    columns = torch.randperm(dim, generator=torch.Generator().manual_seed(1))[:16].to(device, torch.int32)
    columns = torch.stack([columns + h % 2 for h in range(6)]).clamp(max=dim - 1).view(2, 3, 16)
    narrow_means, (narrow, ones, *_) = ready_keys(key, None, 16, dtype, columns)
    at = columns.long().unsqueeze(2).expand(-1, -1, kv_len, -1)
    assert torch.equal(narrow_means, same_means) and torch.equal(narrow, whole.gather(3, at)) and (ones == 1).all()


def check_gradients_in_tensor_code(shape, device, dtype=torch.float32, **fields):
    """Where only the kernels of the gradients fail, they are those of the selection that the others made."""
    from omnisparse_flex.attention.tokens import triton as quick_tokens

    with mock.patch.object(quick_tokens, "_backward_guarded", lambda *_: None):
        check_attention(shape, device, dtype, **fields)


def check_a_nan_key(shape, device, at=300, **fields):
    """Whoever may see a key of NaN gives NaN, and nobody else: near it nobody is lazy, and it is always chosen."""
    inputs, site = [x.detach() for x in tensors(shape, device)], site_of(shape, device, **fields)
    inputs[1][0, 0, at, 0] = torch.nan
    sees = materialize_mask(site.mask, shape.batch, shape.heads, shape.q_len, shape.kv_len, device)[..., at]
    sees[1:] = sees[:, shape.group :] = False
    assert torch.equal(run(inputs, site)[0].isnan().any(-1), sees)


def check_interpreted():
    """What fits into an interpreter's patience."""
    check_pick("cpu", 500)
    check_pick("cpu", 20000)
    check_ready_keys("cpu", torch.float32)
    for shape in SMALL:
        check_attention(shape, "cpu", padded=shape.batch > 1)
    check_attention(SMALL[1], "cpu", padded=True, sinks=True)
    check_gradients_in_tensor_code(SMALL[1], "cpu", sinks=True)
    check_a_nan_key(SMALL[1], "cpu")
    check_selection(SMALL[0], "cpu", CONFIG)
    check_selection(SMALL[1], "cpu", dataclasses.replace(CONFIG, budget="per_head", lazy_threshold=None))
    check_selection(SMALL[0], "cpu", dataclasses.replace(CONFIG, max_kv_budget=20))
    takes = mock.patch.object(token_attention, "takes_kernels", lambda *_: True)
    with takes, mock.patch.object(tensor_code, "attend_gathered", None):
        check_operator(SMALL[1], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_attention_on_the_gpu(shape, dtype, padded):
    check_attention(shape, "cuda", dtype, padded=padded)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_with_logit_sinks_on_the_gpu(dtype):
    check_attention(SHAPES[1], "cuda", dtype, sinks=True)
    check_gradients_in_tensor_code(SHAPES[1], "cuda", dtype, sinks=True)


@pytest.mark.gpu
def test_attention_without_an_order_on_the_gpu():
    check_attention(SHAPES[1], "cuda", torch.bfloat16, order=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"budget": "per_head", "lazy_threshold": None}, {"budget": 40}, {"max_kv_budget": 20}], ids=str
)
def test_selection_on_the_gpu(fields, dtype):
    check_selection(SHAPES[2], "cuda", dataclasses.replace(CONFIG, **fields), dtype)


@pytest.mark.gpu
def test_pick_on_the_gpu():
    check_pick("cuda")
    check_pick("cuda", 20000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ready_keys_on_the_gpu(dtype):
    check_ready_keys("cuda", dtype)


@needs_scalars
def test_in_the_interpreter():
    run_interpreted("tests.attention.tokens.test_token_kernels", "check_interpreted()")


@pytest.mark.gpu
def test_a_site_runs_in_the_kernels_and_its_gradients_too(monkeypatch):
    """Through ``attend_tokens``: nobody calls the tensor code."""
    monkeypatch.setattr(tensor_code, "attend_gathered", None)
    inputs = tensors(SHAPES[1], "cuda", torch.bfloat16)
    token_attention.attend_tokens(*inputs, site_of(SHAPES[1], "cuda")).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in inputs)


def check_operator(shape, device, dtype=torch.float32, make=tensors, **fields):
    """The operator of a model's graph, whose backward selects again: the gradients are those of the direct call."""
    inputs, site = make(shape, device, dtype), site_of(shape, device, **fields)
    site = dataclasses.replace(site, rules=register(site))
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    direct, through = token_attention.attend_tokens(*inputs, site), call_token_op(*inputs, site)
    assert torch.equal(direct, through)
    wanted, got = (torch.autograd.grad(x, inputs, grad) for x in (direct, through))
    for one, other in zip(wanted, got, strict=True):  # keys' gradients are summed in no fixed order
        torch.testing.assert_close(one, other, atol=8 * torch.finfo(dtype).eps * float(one.abs().max()), rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_on_the_gpu(dtype):
    check_operator(SHAPES[1], "cuda", dtype)


@pytest.mark.gpu
def test_kernels_that_fail_leave_tensor_code(monkeypatch):
    from omnisparse_flex.attention.tokens import triton as quick_tokens
    from omnisparse_flex.kernels import attend_lists as rectangle_kernel

    inputs, site = tensors(SHAPES[0], "cuda"), site_of(SHAPES[0], "cuda")
    monkeypatch.setattr(rectangle_kernel, "_attend", None)
    failed = "the token kernels failed, token attention runs in tensor code"
    monkeypatch.setattr(quick_tokens, "_attend_guarded", guarded(quick_tokens._attend_chunk, failed))
    with pytest.warns(UserWarning, match=failed):
        out = token_attention.attend_tokens(*inputs, site)
    assert out.isfinite().all() and out.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_tensor_code_on_the_gpu(dtype):
    check_gradients_in_tensor_code(SHAPES[1], "cuda", dtype)


@pytest.mark.gpu
def test_a_nan_key_on_the_gpu():
    check_a_nan_key(SHAPES[1], "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_the_current_one():
    inputs = tensors(SHAPES[1], "cuda:1", torch.bfloat16)
    token_attention.attend_tokens(*inputs, site_of(SHAPES[1], "cuda:1")).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in inputs)


@pytest.mark.gpu
def test_a_captured_call_replays():
    """No wait for the device, no shape that depends on data: one graph serves other numbers."""
    inputs = [x.detach() for x in tensors(SHAPES[1], "cuda", torch.bfloat16)]
    site = site_of(SHAPES[1], "cuda")
    layout = block_layout(site.mask, grid_of(*inputs[:2]), site.config)
    site = dataclasses.replace(site, layout=layout)
    token_attention.attend_tokens(*inputs, site)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_attention.attend_tokens(*inputs, site)
    for x in inputs:
        x.copy_(torch.randn_like(x) + 0.5)
    graph.replay()
    assert torch.equal(captured, token_attention.attend_tokens(*inputs, site))


@pytest.mark.parametrize("device_type", ["cpu", "meta"])
def test_only_what_they_can_do_goes_to_the_kernels(device_type):
    query, value = (torch.empty(1, 2, 300, 64, device=device_type) for _ in range(2))
    assert not token_attention.takes_kernels(query, value, site_of(SMALL[0], "cpu"))


PADDED = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("expr", "buffers", "offset", "real"),
    [
        (TRUE, (), None, None),
        (causal(), (), 0, None),
        (causal(Const(5)), (), 5, None),
        (causal(Load(0, ())), (torch.tensor(3),), 3, None),
        (conjunction(causal(), Load(0, (B, KV))), (PADDED,), 0, PADDED),
        (Apply("lt", (KV, Const(2))), (), None, torch.tensor([[True, True, False]] * 2)),
    ],
)
def test_a_plain_mask_is_read(expr, buffers, offset, real):
    found = as_causal_padding(IndexMask(expr, buffers), 2, 3, torch.device("cpu"))
    assert found is not None
    assert (found.offset is None) == (offset is None) and (found.real is None) == (real is None)
    assert offset is None or found.offset.item() == offset
    assert real is None or torch.equal(found.real, real)


@pytest.mark.parametrize(
    "mask",
    [
        IndexMask(conjunction(causal(), Apply("gt", (KV, Apply("sub", (Q, Const(4))))))),  # a window
        IndexMask(conjunction(causal(), causal(Const(2)))),
        IndexMask(Apply("lt", (KV, Q))),
        OpaqueMask(IndexMask(causal()), lambda b, h, q, kv: q >= 0),
    ],
)
def test_any_other_mask_is_not(mask):
    assert as_causal_padding(mask, 2, 3, torch.device("cpu")) is None
