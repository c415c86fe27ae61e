"""Calls that leave the peak rule little to work with: each answers as dense attention under its own selection does."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention.functional import sparse_attention
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks.blocks.promise import one_call
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import KV, Apply, Const, H, causal, conjunction
from omnisparse_flex.masks.expr.index_mask import IndexMask

CONFIG = OmniSparseConfig(sink_size=16, window_size=16)


def inputs(batch=1, length=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, 16, generator=generator) for heads in (4, 2, 2)]


def dense(query, key, value, allowed):
    """Float32 reference; rows without a key give 0."""
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    logits = (query @ key.mT * 0.25).masked_fill(~allowed, float("-inf"))
    return torch.softmax(logits, -1).nan_to_num(0.0) @ value


def check(allowed_of, batch=1, length=400, rows=None):
    """Compare with dense attention at a floor that keeps nearly everything; and let the default give finite numbers."""
    query, key, value = inputs(batch, length)
    b, h, q, kv = torch.meshgrid(*(torch.arange(n) for n in (batch, 4, length, length)), indexing="ij")
    allowed = allowed_of(b, h, q, kv) & (kv <= q)

    def call(config):
        return sparse_attention(query, key, value, config=config, mask_mod=allowed_of, enable_gqa=True)

    everything = call(OmniSparseConfig(target_recall=0.9999999))
    torch.testing.assert_close(everything, dense(query, key, value, allowed), atol=1e-5, rtol=1e-4)
    few = call(CONFIG)
    sees = allowed.any(-1)
    assert few.isfinite().all() and torch.equal(few.abs().sum(-1) > 0, sees)
    return few, allowed, (query, key, value)


def test_rows_that_may_see_one_key():
    few, _, (_, _, value) = check(lambda b, h, q, kv: kv == q)
    torch.testing.assert_close(few, value.repeat_interleave(2, 1))


def test_rows_that_may_see_the_first_key_alone():
    few, _, (_, _, value) = check(lambda b, h, q, kv: kv == 0)
    torch.testing.assert_close(few, value.repeat_interleave(2, 1)[:, :, :1].expand_as(few))


def test_a_batch_of_very_different_lengths():
    lengths = torch.tensor([1, 130, 400])
    few, allowed, tensors = check(lambda b, h, q, kv: kv >= 400 - lengths[b], batch=3)
    short = dense(*tensors, allowed)[0]
    torch.testing.assert_close(few[0], short, atol=1e-5, rtol=1e-4)


def test_rows_and_batch_rows_that_may_see_nothing():
    check(lambda b, h, q, kv: (b == 1) & (q >= 200), batch=2)


def test_heads_that_see_nothing():
    few, *_ = check(lambda b, h, q, kv: h != 2)
    assert (few[:, 2] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 127])
def test_sequences_shorter_than_a_block(length):
    few, allowed, tensors = check(lambda b, h, q, kv: kv >= 0, length=length)
    torch.testing.assert_close(few, dense(*tensors, allowed), atol=1e-5, rtol=1e-4)


def test_heads_that_see_nothing_break_no_promise():
    query, key, _ = inputs()
    mask = IndexMask(conjunction(causal(), Apply("ge", (KV, Apply("mul", (H, Const(400)))))))  # head 0 alone sees keys
    found = select_blocks(query, key, mask, CONFIG, target=0.6, min_peak=0.1, scale=0.25)
    assert found.recall.isfinite().all() and found.keep[:, 1:].sum() == 0
    assert one_call(found.recall, found.layout.some, 0.6)[3] == 0


def test_a_floor_that_no_threshold_reaches_keeps_everything_and_is_counted():
    """Rows so flat that every block has less than the lowest threshold: what was multiplied stays."""
    query, key, _ = inputs(length=1024)
    rule = {"target": 0.9999999, "min_peak": 0.9, "scale": 0.25}
    found = select_blocks(query, key, IndexMask(causal()), CONFIG, **rule)
    assert torch.equal(found.keep, found.layout.some.expand_as(found.keep))
    told = one_call(found.recall * 0.9, found.layout.some, 0.9999999)
    assert told[3] == 1


@pytest.mark.parametrize("peaks", [(0.1,), (0.1, 0.1, 0.1)])
def test_a_min_peak_for_another_number_of_layers_is_refused(peaks):
    with pytest.raises(ConfigError, match="min_peak must hold one value for each of the 2 layers"):
        OmniSparseConfig(min_peak=peaks).check_layers(2)
