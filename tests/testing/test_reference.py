"""The oracle against SDPA in float64, against its own definition, and on rows that may attend nothing."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.testing import AttentionShape
from omnisparse_flex.testing.oracle import dense_attention, expand_block_map, materialize_mask

L, S = 19, 33
INPUTS = {
    group: AttentionShape(batch=2, kv_heads=3, group=group, q_len=L, kv_len=S, head_dim=16).inputs(torch.float64)
    for group in (1, 2, 7)
}
SOME = torch.rand(2, 1, L, S, generator=torch.Generator().manual_seed(0)) < 0.5
SOME[..., 0] = True
BIAS = torch.randn(2, 1, L, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_gradients(attend, tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = attend(*leaves)
    generator = torch.Generator().manual_seed(2)
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"scale": 0.3}, {"scale": 0.3}),
        ({"mask": SOME}, {"attn_mask": SOME}),
        ({"mask": SOME[0, 0]}, {"attn_mask": SOME[0, 0]}),
        ({"mask": torch.ones(L, S, dtype=torch.bool).tril()}, {"is_causal": True}),
        ({"bias": BIAS}, {"attn_mask": BIAS}),
        ({"bias": BIAS.masked_fill(~SOME, -torch.inf)}, {"attn_mask": BIAS.masked_fill(~SOME, -torch.inf)}),
        ({"bias": BIAS, "mask": SOME}, {"attn_mask": BIAS.masked_fill(~SOME, -torch.inf)}),
    ],
    ids=[
        "dense",
        "scale",
        "mask",
        "shared_mask",
        "causal_upper_left",
        "bias",
        "bias_of_minus_infinity",
        "bias_and_mask",
    ],
)
def test_equals_sdpa_forward_and_backward(group, ours, theirs):
    actual = with_gradients(lambda q, k, v: dense_attention(q, k, v, **ours), INPUTS[group])
    expected = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs), INPUTS[group]
    )
    assert_same(actual, expected)


def test_softcap_sinks_and_bias_in_transformers_order():
    query, key, value = INPUTS[1]
    sinks = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)

    def by_definition(q, k, v, s):
        logits = 2.0 * torch.tanh(q @ k.mT * 0.25 / 2.0) + BIAS
        column = s.view(1, 3, 1, 1).expand(2, 3, L, 1)  # a key whose logit is learned and whose value is 0
        return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1] @ v

    def ours(q, k, v, s):
        return dense_attention(q, k, v, softcap=2.0, bias=BIAS, sinks=s)

    inputs = (query, key, value, sinks)
    assert_same(with_gradients(ours, inputs), with_gradients(by_definition, inputs))


@pytest.mark.parametrize(("logit", "share"), [(1e4, 0.0), (-1e4, 1.0)])
def test_sinks_of_any_size(logit, share):
    sinks = torch.full((3,), logit, dtype=torch.float64)
    actual = with_gradients(lambda q, k, v, s: dense_attention(q, k, v, sinks=s), (*INPUTS[1], sinks))
    without = with_gradients(dense_attention, INPUTS[1])
    assert_same(actual, [*(share * tensor for tensor in without), torch.zeros_like(sinks)])


def test_score_mod_is_flex_attentions():
    slopes = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def alibi_of_even_keys(score, b, h, q_idx, kv_idx):
        return torch.where(kv_idx % 2 == b, score + slopes[h] * (kv_idx - q_idx), -float("inf"))

    query, key, value = INPUTS[1]
    expected = flex_attention(query, key, value, score_mod=alibi_of_even_keys)
    assert_same([dense_attention(query, key, value, score_mod=alibi_of_even_keys)], [expected])


def test_score_mod_comes_after_bias_and_before_mask():
    query, key, value = INPUTS[1]
    actual = dense_attention(query, key, value, bias=BIAS, mask=SOME, score_mod=lambda score, b, h, q, kv: 2 * score)
    assert_same([actual], [dense_attention(query, key, value, bias=2 * BIAS, mask=SOME, scale=0.5)])


@pytest.mark.parametrize("sinks", [None, torch.zeros(6, dtype=torch.float64)])
@pytest.mark.parametrize("through", ["mask", "bias", "score_mod"])
def test_rows_without_a_key_are_zero_and_so_are_their_gradients(through, sinks):
    mask = SOME.clone()
    mask[0] = False
    mask[1, :, 5] = False
    forbid = {
        "mask": {"mask": mask},
        "bias": {"bias": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)},
        "score_mod": {"score_mod": lambda score, b, h, q, kv: torch.where(mask[b, 0, q, kv], score, -torch.inf)},
    }[through]
    attend = lambda q, k, v: dense_attention(q, k, v, sinks=sinks, **forbid)  # noqa: E731
    output, *gradients = with_gradients(attend, INPUTS[2])
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    assert output[0].count_nonzero() == 0 and output[1, :, 5].count_nonzero() == 0
    assert all(gradient[0].count_nonzero() == 0 for gradient in gradients)
    assert gradients[0][1, :, 5].count_nonzero() == 0
    assert (output[1, :, 6] != 0).all() and (gradients[0][1, :, 6] != 0).all()


def test_gradients_are_those_of_finite_differences():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 2, 2, 4), (1, 1, 3, 4), (1, 1, 3, 5), (2,))
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: dense_attention(q, k, v, mask=mask, sinks=s, softcap=3.0), inputs, fast_mode=True
    )


@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_logits_of_any_size(magnitude):
    query, key, value = INPUTS[1]
    output = dense_attention(query * magnitude, key, value)
    assert_same([output], [F.scaled_dot_product_attention(query * magnitude, key, value)])


def test_computes_in_the_dtype_asked_for():
    low = [tensor.bfloat16() for tensor in INPUTS[2]]
    exact = dense_attention(*low)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, dense_attention(*(tensor.double() for tensor in low)))
    single = dense_attention(*low, dtype=torch.float32)
    assert single.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense_attention(*low, dtype=torch.float32), single)


def test_values_may_have_their_own_width():
    query, key, value = INPUTS[2]
    assert_same([dense_attention(query, key, value[..., :5])], [dense_attention(query, key, value)[..., :5]])


@pytest.mark.parametrize(
    ("mask_mod", "expected"),
    [
        (lambda b, h, q, kv: q >= kv, torch.ones(2, 3, 4, 5, dtype=torch.bool).tril()),
        (
            lambda b, h, q, kv: kv < b + h,
            (torch.arange(2)[:, None] + torch.arange(3))[..., None, None] > torch.arange(5),
        ),
        (lambda b, h, q, kv: b.new_ones((), dtype=torch.bool), torch.ones(2, 3, 4, 5, dtype=torch.bool)),
    ],
    ids=["pairs", "heads", "constant"],
)
def test_materialize_mask(mask_mod, expected):
    mask = materialize_mask(mask_mod, 2, 3, 4, 5)
    assert mask.is_contiguous() and torch.equal(mask, expected.expand(2, 3, 4, 5))


@pytest.mark.parametrize("block_size", [4, (3, 5)])
def test_expand_block_map(block_size):
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    keep = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(4)) < 0.5  # more blocks than tokens
    tokens = expand_block_map(keep, 9, 13, block_size)
    assert tokens.shape == (2, 3, 9, 13)
    for i in range(9):
        for j in range(13):
            assert torch.equal(tokens[..., i, j], keep[..., i // block_q, j // block_k])


Q, K = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_attention(Q[0], K, K), "query must be of shape (B, H, N, D), got (4, 3, 8)"),
        (lambda: dense_attention(Q, K[..., :4], K), "key must have B=1 and D=8, got (1, 2, 5, 4)"),
        (lambda: dense_attention(Q, K, K[:, :1]), "value must have B, H, S = (1, 2, 5), got (1, 1, 5, 8)"),
        (
            lambda: dense_attention(Q[:, :3], K, K),
            "key must have a number of heads that divides 3, got 2",
        ),
        (
            lambda: dense_attention(Q, K, K, sinks=torch.zeros(1, 4)),
            "sinks must have shape (4,), got (1, 4)",
        ),
        (lambda: dense_attention(Q, K, K, mask=torch.zeros(3, 5)), "mask must be a bool tensor, got torch.float32"),
        (
            lambda: materialize_mask(lambda b, h, q, kv: q - kv, 1, 1, 2, 2),
            "mask_mod must return a bool tensor, got torch.int64",
        ),
        (
            lambda: materialize_mask(lambda b, h, q, kv: True, 1, 1, 2, 2),
            "mask_mod must return a bool tensor, got True",
        ),
        (
            lambda: expand_block_map(torch.ones(2, 2, dtype=torch.bool), 9, 8, 4),
            "keep must cover 9 x 8 tokens in blocks of 4 x 4, got (2, 2)",
        ),
        (lambda: expand_block_map(torch.ones(2, 2), 8, 8, 4), "keep must be a bool tensor, got torch.float32"),
    ],
)
def test_bad_input_is_refused_in_the_house_wording(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert str(raised.value) == message
