"""The oracle-derived tolerances let right implementations pass, at every shape, and wrong ones not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from omnisparse_flex.masks.document import document, document_ids
from omnisparse_flex.testing import AttentionShape, assert_close_to_oracle, attention_shapes, mask_mods, tolerance
from omnisparse_flex.testing.oracle import dense_attention, materialize_mask

SHAPE = AttentionShape(batch=2, kv_heads=2, group=2, q_len=40, kv_len=130, head_dim=32)
MASK = materialize_mask(document(document_ids([[25, 105], [70, 60]])), 2, 1, 40, 130)
MASK[1, :, 7] = False


def flash(query, key, value, mask=MASK):
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def leaves(dtype):
    return [tensor.requires_grad_() for tensor in SHAPE.inputs(dtype)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_right_implementation_is_close_to_the_oracle(dtype):
    query, key, value = leaves(dtype)
    output = flash(query, key, value)
    assert_close_to_oracle(output, query, key, value, MASK, grad_output=torch.randn_like(output))


@settings(max_examples=40, deadline=None)
@given(st.data(), attention_shapes(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_right_implementation_is_close_at_every_shape(data, shape, dtype):
    shape = shape._replace(q_len=min(shape.q_len, 130), kv_len=min(shape.kv_len, 130))
    mask = data.draw(mask_mods(shape.batch, shape.q_len, shape.kv_len)).dense
    query, key, value = (tensor.requires_grad_() for tensor in shape.inputs(dtype))
    full_key, full_value = (tensor.repeat_interleave(shape.group, dim=1) for tensor in (key, value))
    output = F.scaled_dot_product_attention(query, full_key, full_value, mask)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator).to(dtype)
    assert_close_to_oracle(output, query, key, value, mask, grad_output=grad_output)


def test_features_that_sdpa_lacks_are_checked_too():
    query, key, value = SHAPE.inputs()
    options = {"softcap": 5.0, "scale": 0.2, "sinks": torch.zeros(4)}
    output = dense_attention(query, key, value, mask=MASK, dtype=torch.float32, **options)
    assert_close_to_oracle(output, query, key, value, MASK, **options)
    with pytest.raises(AssertionError, match=r"^output differs from the oracle"):
        assert_close_to_oracle(output, query, key, value, MASK, softcap=5.0, scale=0.2)


def one_key_less(query, key, value):
    mask = MASK.clone()
    mask[0, 0, 3, 5] = False
    return flash(query, key, value, mask)


def not_a_number(query, key, value):
    return flash(query, key, value).index_fill(2, torch.tensor(4), torch.nan)


def dead_row_of_means(query, key, value):
    output = flash(query, key, value)
    dead = torch.zeros_like(output)
    dead[1, :, 7] = 1e-9  # far under any tolerance, and yet not 0
    return output + dead


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (one_key_less, r"^output differs from the oracle at \(0, [0-3], 3, \d+\): got "),
        (not_a_number, r"^output differs from the oracle at \(0, 0, 4, 0\): got nan"),
        (dead_row_of_means, r"^output must be exactly 0 in rows without an allowed key$"),
        (lambda q, k, v: flash(q, k, v) * 1.001, "^output differs from the oracle"),
        (lambda q, k, v: flash(q, k, v)[:, :1], r"^output has shape \(2, 1, 40, 32\), expected \(2, 4, 40, 32\)$"),
    ],
)
def test_a_wrong_output_is_found(attend, message):
    query, key, value = SHAPE.inputs()
    with pytest.raises(AssertionError, match=message):
        assert_close_to_oracle(attend(query, key, value), query, key, value, MASK)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_wrong_gradient_is_found(position):
    query, key, value = inputs = leaves(torch.float32)
    bent = list(inputs)
    bent[position] = inputs[position] * 1.01 - inputs[position].detach() * 0.01  # same value, gradient 1 % too large
    output = flash(*bent)
    name = ("query", "key", "value")[position]
    assert_close_to_oracle(output, query, key, value, MASK)
    with pytest.raises(AssertionError, match=f"^gradient of {name} differs from the oracle"):
        assert_close_to_oracle(output, query, key, value, MASK, grad_output=torch.ones_like(output))


def test_tolerance_follows_the_trusted_error_and_never_falls_to_zero():
    expected = torch.tensor([2.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert tolerance(expected, torch.float32, expected.float()) == pytest.approx(4 * eps * 4)
    assert tolerance(expected, torch.float32, expected.float() + 0.5) == pytest.approx(2.0, rel=1e-5)
    assert tolerance(expected, torch.float32, expected.float(), magnitude=1.0, factor=2.0) == pytest.approx(2 * eps)
