"""A few segments at a time give what all at once give: in tensor code, and in the kernels."""

import dataclasses
from unittest import mock

import pytest
import torch

from omnisparse_flex.attention.tokens import dispatch as token_attention
from omnisparse_flex.attention.tokens.query_chunks import BITS
from omnisparse_flex.masks.expr.causal_padding import as_causal_padding
from omnisparse_flex.masks.tokens import chunks as room
from omnisparse_flex.masks.tokens.key_bits import words
from omnisparse_flex.testing import AttentionShape
from tests.attention.tokens.test_token_kernels import CONFIG, site_of, tensors
from tests.helpers.interpreter import needs_scalars, run_interpreted

CASES = [
    {},
    {"budget": "per_head", "lazy_threshold": 0.4},
    {"budget": 24},
    {"max_kv_budget": 20, "lazy_threshold": None},
    {"gqa_choice": "head", "lazy_threshold": 0.4},
]
SHAPE = AttentionShape(1, 4, 2, 700, 700, 16)


def site_with_sinks(shape, device, case):
    sinks = torch.linspace(-1, 1, shape.heads, device=device).requires_grad_()
    return dataclasses.replace(site_of(shape, device, dataclasses.replace(CONFIG, **case)), sinks=sinks)


def chunks_of(size):
    """Room for ``size`` bytes of keys and values: 0 gives one segment at a time."""
    return mock.patch.object(room, "layer_bytes", lambda key: size)


def same(one, other, exact):
    for a, b in zip(one, other, strict=True):
        if exact:
            assert torch.equal(a, b)
        else:  # keys' gradients are summed in another order
            bound = 16 * torch.finfo(a.dtype).eps * float(a.detach().abs().max().clamp(min=1e-30))
            torch.testing.assert_close(a, b, atol=bound, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_tensor_code(case):
    inputs, site = tensors(SHAPE, "cpu"), site_with_sinks(SHAPE, "cpu", case)
    found = []
    for size in (1 << 40, 0):
        with chunks_of(size):
            out, selection = token_attention.attend_and_select(*inputs, site)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append((out, torch.autograd.grad(out, [*inputs, site.sinks], grad), selection[1:]))
    (out, grads, selected), (small_out, small_grads, small_selected) = found
    assert selected[5].any(), "a test of nothing"
    for one, other in zip(selected, small_selected, strict=True):
        same([one], [other], exact=not one.is_floating_point())
    same([out, *grads], [small_out, *small_grads], exact=False)


def through_kernels(inputs, site, grad, size):
    """Output, gradients of both ways backward, and the selection."""
    from omnisparse_flex.attention.tokens.triton import attend_tokens_triton, token_backward_triton

    query, key = inputs[:2]
    plain = as_causal_padding(site.mask, query.shape[0], key.shape[2], query.device)
    segments = token_attention.segments_of_site(query, key, site)
    rest = (site, plain, segments, token_attention.text_queries(query, key, site))
    with chunks_of(size):
        out, selection = attend_tokens_triton(*inputs, *rest, True)
        kept = torch.autograd.grad(out, [*inputs, site.sinks], grad)
        again = token_backward_triton(grad, *(x.detach() for x in inputs), *rest)
    return out, kept, again, selection[1:]


def one_span_of_small_steps(shape):
    """Bytes of keys and values at which all bits fit and masses and lists do not."""
    segments = -(-shape.q_len // CONFIG.segment_size)
    return 4 * shape.batch * shape.kv_heads * words(shape.kv_len) * segments * BITS


def check_kernels(shape, case, device, size, dtype=torch.float32):
    inputs, site = tensors(shape, device, dtype), site_with_sinks(shape, device, case)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    # As models hand it over: heads inside of tokens.
    grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    out, kept, again, selected = through_kernels(inputs, site, grad, 1 << 40)
    small_out, small_kept, small_again, small_selected = through_kernels(inputs, site, grad, size)
    assert selected[5].any(), "a test of nothing"
    same([out], [small_out], exact=True)
    for one, other in zip(selected, small_selected, strict=True):
        same([one], [other], exact=not one.is_floating_point())  # sums of other shapes may round differently
    for gradients in (again, small_kept, small_again):
        same(kept, gradients, exact=False)


def check_what_is_kept(shape, device):
    """Autograd holds everything that the backward reads: checkpointing drops it, and a backward frees it."""
    from omnisparse_flex.attention.tokens.triton import attend_tokens_triton

    inputs, site = tensors(shape, device), site_with_sinks(shape, device, {})
    query, key = inputs[:2]
    plain = as_causal_padding(site.mask, query.shape[0], key.shape[2], query.device)
    segments = token_attention.segments_of_site(query, key, site)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        text = token_attention.text_queries(query, key, site)
        out, selection = attend_tokens_triton(*inputs, site, plain, segments, text, True)
    assert {x.data_ptr() for x in (selection.chosen, selection.rows, selection.key_count, out)} <= set(saved)


def check_interpreted():
    shape = AttentionShape(1, 2, 1, 140, 520, 16)
    check_what_is_kept(shape, "cpu")
    for case, size in zip(CASES, (0, one_span_of_small_steps(shape)), strict=False):
        check_kernels(shape, case, "cpu", size)


@needs_scalars
def test_in_kernels_in_the_interpreter():
    run_interpreted("tests.attention.tokens.test_token_streaming", "check_interpreted()")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_kernels_on_the_gpu(case, dtype):
    for shape in (AttentionShape(1, 4, 7, 3000, 3000, 64), AttentionShape(2, 2, 2, 700, 1111, 128)):
        for size in (0, one_span_of_small_steps(shape)):
            check_kernels(shape, case, "cuda", size, dtype)


@pytest.mark.gpu
def test_what_is_kept_on_the_gpu():
    check_what_is_kept(SHAPE, "cuda")


def test_steps_are_alike_and_fit():
    key = torch.empty(1, 2, 100, 16)  # 25600 bytes of keys and values
    assert room.layer_bytes(key) == 25600
    assert room.segments_per_chunk(10, 1000, key, 4) == 5  # 6 would fit, and leave 4
    assert room.segments_per_chunk(10, 10**9, key, 1) == 1 and room.segments_per_chunk(3, 1, key, 1) == 3


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 4), (1, 8), (2, 4), (3, 4), (5, 2), (8, 8)])
def test_quarters_cover_each_head_once(batch, heads):
    pytest.importorskip("triton")
    from omnisparse_flex.attention.tokens.triton_backward import head_chunks

    seen = torch.zeros(batch, heads, dtype=torch.int64)
    for part in head_chunks(batch, heads):
        assert seen[part].is_contiguous() and seen[part].numel() <= max(1, batch * heads // 4)
        seen[part] += 1
    assert (seen == 1).all()
