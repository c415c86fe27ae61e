"""Query heads that choose for themselves, and narrow scores, in the kernels: on the GPU or in Triton's interpreter."""

import dataclasses

import pytest
import torch

from omnisparse_flex.masks.tokens.head_dims import top_dims_of, top_head_dims
from omnisparse_flex.testing import AttentionShape
from tests.attention.tokens.test_token_kernels import (
    CONFIG,
    check_a_nan_key,
    check_attention,
    check_gradients_in_tensor_code,
    check_operator,
    check_selection,
    loud,
    run,
    site_of,
)
from tests.attention.tokens.test_token_streaming import check_kernels, one_span_of_small_steps
from tests.helpers.interpreter import needs_scalars, run_interpreted

HEADS = dataclasses.replace(CONFIG, gqa_choice="head", scoring_dims=16)
SMALL = AttentionShape(2, 1, 2, 140, 520, 32)
SHAPES = [AttentionShape(1, 2, 7, 1000, 1000, 64), AttentionShape(2, 2, 2, 300, 1111, 128)]
CONFIGS = {
    "heads": dataclasses.replace(CONFIG, gqa_choice="head"),
    "narrow": dataclasses.replace(HEADS, gqa_choice="group", scoring_dims=32),
    "both": dataclasses.replace(HEADS, scoring_dims=32, lazy_threshold=0.1),
    "both_short": HEADS,  # too short a product for float8
}


def check_heads_alone(shape, device, config, dtype=torch.float32):
    """A member's choice, output and gradients are those of a head whose keys and values are its own."""
    inputs, site = loud(shape, device, dtype), site_of(shape, device, config)
    out, selection = run(inputs, site)
    query, *repeated = (x.detach() for x in inputs)
    repeated = [x.repeat_interleave(shape.group, 1) for x in repeated]
    alone = [x.clone().requires_grad_() for x in (query, *repeated)]
    single = dataclasses.replace(config, gqa_choice="group")
    wanted, own = run(alone, site_of(shape, device, single))
    assert torch.equal(out, wanted)
    for one, other in zip(selection[1:], own[1:], strict=True):
        if one.is_floating_point():  # sums of other shapes may round differently
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)
    chosen = selection.chosen.unflatten(1, (shape.kv_heads, shape.group))
    assert (chosen[:, :, 0] != chosen[:, :, 1]).any(), "members chose alike: a test of nothing"
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got, (of_query, *others) = (torch.autograd.grad(x, y, grad) for x, y in ((out, inputs), (wanted, alone)))
    summed = [of_query, *(x.float().unflatten(1, (shape.kv_heads, shape.group)).sum(2).to(dtype) for x in others)]
    for one, other in zip(got, summed, strict=True):  # each member's share is rounded before it is added
        bound = 2 * shape.group * torch.finfo(dtype).eps * float(one.abs().max())
        torch.testing.assert_close(one, other, atol=max(bound, 1e-5 * float(one.abs().max())), rtol=0)


def check_loudest(shape, device, dtype=torch.float32):
    """Coordinates against tensor code's, of tensors that lie as a model hands them over, some tokens broken."""
    from omnisparse_flex.kernels.head_dims import sums_of_squares

    size = torch.rand(shape.head_dim, generator=torch.Generator().manual_seed(2)) * 3
    query, key = ((x * size).to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in shape.inputs()[:2])
    query[0, 0, 3], key[0, 0, 7, 1], key[-1, -1, 9, 2] = torch.nan, torch.inf, torch.nan
    for choices in (shape.kv_heads, shape.heads):
        got = top_dims_of(sums_of_squares(query), sums_of_squares(key), choices, 16)
        assert torch.equal(got, top_head_dims(query, key, choices, 16))


def check_choices(shape, device, config, dtype=torch.float32):
    check_attention(shape, device, dtype, make=loud, config=config)
    check_selection(shape, device, config, dtype, make=loud)
    if config.gqa_choice == "head":
        check_heads_alone(shape, device, config, dtype)


def check_interpreted():
    """What fits into an interpreter's patience."""
    check_loudest(SMALL, "cpu")
    check_choices(SMALL, "cpu", HEADS)
    check_attention(SMALL, "cpu", make=loud, config=HEADS, padded=True, sinks=True)
    check_selection(SMALL, "cpu", dataclasses.replace(HEADS, gqa_choice="group"), make=loud)


def check_interpreted_ways_back():
    from unittest import mock

    from omnisparse_flex.attention.tokens import dispatch as token_attention
    from omnisparse_flex.attention.tokens import tensor_code

    shape = AttentionShape(1, 1, 2, 140, 520, 32)
    check_gradients_in_tensor_code(shape, "cpu", make=loud, config=HEADS, sinks=True)
    check_a_nan_key(shape, "cpu", config=HEADS)
    check_kernels(shape, {"gqa_choice": "head", "scoring_dims": 16, "budget": 24}, "cpu", 0)
    takes = mock.patch.object(token_attention, "takes_kernels", lambda *_: True)
    with takes, mock.patch.object(tensor_code, "attend_gathered", None):
        check_operator(shape, "cpu", make=loud, config=HEADS)


@needs_scalars
@pytest.mark.parametrize("call", ["check_interpreted()", "check_interpreted_ways_back()"])
def test_in_the_interpreter(call):
    run_interpreted("tests.attention.tokens.test_head_kernels", call)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_choices_on_the_gpu(shape, name, dtype):
    check_choices(shape, "cuda", CONFIGS[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loudest_coordinates_on_the_gpu(dtype):
    for shape in SHAPES:
        check_loudest(shape, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["heads", "both"])
def test_ways_back_on_the_gpu(name, dtype):
    rules = {"make": loud, "config": CONFIGS[name]}
    check_attention(SHAPES[1], "cuda", dtype, padded=True, sinks=True, **rules)
    check_gradients_in_tensor_code(SHAPES[1], "cuda", dtype, sinks=True, **rules)
    check_operator(SHAPES[1], "cuda", dtype, **rules)
    check_a_nan_key(SHAPES[1], "cuda", config=CONFIGS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_few_segments_at_a_time_on_the_gpu(dtype):
    for shape in (AttentionShape(1, 4, 7, 3000, 3000, 64), AttentionShape(2, 2, 2, 700, 1111, 128)):
        for size in (0, one_span_of_small_steps(shape)):
            check_kernels(shape, {"gqa_choice": "head", "scoring_dims": 32, "budget": 24}, "cuda", size, dtype)


@pytest.mark.gpu
def test_a_captured_call_replays():
    """No wait for the device, no shape that depends on data."""
    from omnisparse_flex.attention.tokens.dispatch import attend_tokens
    from omnisparse_flex.masks.blocks.layout import block_layout
    from omnisparse_flex.masks.blocks.select import grid_of

    inputs = [x.detach() for x in loud(SHAPES[1], "cuda", torch.bfloat16)]
    site = site_of(SHAPES[1], "cuda", CONFIGS["both"])
    layout = block_layout(site.mask, grid_of(*inputs[:2]), site.config)
    site = dataclasses.replace(site, layout=layout)
    attend_tokens(*inputs, site)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_tokens(*inputs, site)
    for x in inputs:
        x.copy_(torch.randn_like(x) + 0.5)
    graph.replay()
    assert torch.equal(captured, attend_tokens(*inputs, site))
