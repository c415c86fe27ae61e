"""The helpers accept what is right and, each of them, refuse what is wrong."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from omnisparse_flex import testing
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks.causal import causal
from omnisparse_flex.testing import (
    assert_block_mask_equals,
    assert_mask_mod_equals,
    attention_shapes,
    configs,
    expand_block_mask,
    expand_transposed,
    mask_mods,
)
from omnisparse_flex.testing.oracle import dense_attention, materialize_mask

# --- strategies -------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(attention_shapes())
def test_attention_shapes_make_legal_inputs(shape):
    assert 1 <= shape.batch <= 3 and shape.kv_heads <= 3 and shape.group in (1, 2, 7)
    assert 1 <= shape.q_len <= 400 and 1 <= shape.kv_len <= 400 and 16 <= shape.head_dim <= 64
    query, key, value = shape.inputs(torch.bfloat16, seed=1)
    assert query.shape == (shape.batch, shape.heads, shape.q_len, shape.head_dim)
    assert key.shape == value.shape == (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    assert query.dtype == torch.bfloat16 and torch.equal(query, shape.inputs(torch.bfloat16, seed=1)[0])


@settings(max_examples=50, deadline=None)
@given(configs())
def test_configs_are_valid_and_survive_json(config):
    assert isinstance(config, OmniSparseConfig)
    assert OmniSparseConfig.from_dict(config.to_dict()) == config
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize("draw", [attention_shapes, configs, lambda: mask_mods(1, 2, 3)])
def test_strategies_say_that_they_need_hypothesis(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"^the strategies .* need hypothesis: pip install hypothesis$"):
        draw()


def test_module_imports_without_hypothesis():
    block = "import sys; sys.modules['hypothesis'] = None; import omnisparse_flex.testing as t; t.dense_oracle"
    subprocess.run([sys.executable, "-c", block], check=True)


def test_everything_listed_is_there():
    assert all(hasattr(testing, name) for name in testing.__all__)
    assert testing.dense_oracle is dense_attention


# --- mask mods --------------------------------------------------------------


def test_assert_mask_mod_equals_names_the_first_pair():
    dense = materialize_mask(causal(), 2, 3, 5, 7)
    assert_mask_mod_equals(causal(), dense)
    dense[1, 2, 3, 4] = True
    dense[1, 2, 4, 4] = False
    message = "causal on broadcast indices is False at (b=1, h=2, q=3, kv=4), expected True; 2 of 210 pairs differ"
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}$"):
        assert_mask_mod_equals(causal(), dense)


def test_assert_mask_mod_equals_also_looks_under_vmap():
    def not_pointwise(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx.dim() == 0)

    with pytest.raises(AssertionError, match=r"^not_pointwise under vmap is True at \(b=0, h=0, q=0, kv=1\)"):
        assert_mask_mod_equals(not_pointwise, materialize_mask(causal(), 1, 1, 4, 4))


@pytest.mark.parametrize("dense", [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, 1, 2, 2)])
def test_dense_masks_must_be_4d_bool(dense):
    with pytest.raises(ConfigError, match=r"^dense must be a bool tensor of shape \(B, H, L, S\), got "):
        assert_mask_mod_equals(causal(), dense)


# --- block masks ------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_block_masks_denote_their_mask_mod_in_both_directions(data):
    batch, q_len, kv_len = (data.draw(st.integers(1, top)) for top in (2, 200, 200))
    case = data.draw(mask_mods(batch, q_len, kv_len))
    block_size = data.draw(st.sampled_from([16, 128, (32, 64)]))
    block_mask = create_block_mask(case.mask_mod, batch, None, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size)
    assert_block_mask_equals(block_mask, case.dense)
    assert torch.equal(expand_transposed(block_mask, heads=3), case.dense.expand(-1, 3, -1, -1))


def lists(*rows):
    """(1, 1, NQ) counts and (1, 1, NQ, 4) indices; what stands behind the count is garbage on purpose."""
    indices = torch.full((1, 1, len(rows), 4), 77, dtype=torch.int32)
    for row, blocks in enumerate(rows):
        indices[0, 0, row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return torch.tensor([[[len(row) for row in rows]]], dtype=torch.int32), indices


def block_mask_of(partial, full=None, mask_mod=None, length=16, **options):
    full_lists = lists(*full) if full else ()
    return BlockMask.from_kv_blocks(
        *lists(*partial), *full_lists, BLOCK_SIZE=4, mask_mod=mask_mod, seq_lengths=(length, length), **options
    )


PARTIAL, FULL = ([0], [1], [2], [3]), ([], [0], [1, 0], [2])


def test_full_blocks_ignore_the_mask_mod():
    block_mask = block_mask_of(PARTIAL, FULL, causal())
    dense = materialize_mask(causal(), 1, 1, 16, 16)
    dense[..., 12:, :8] = False
    assert_block_mask_equals(block_mask, dense)
    never = lambda b, h, q, kv: kv < 0  # noqa: E731
    assert expand_block_mask(block_mask_of(PARTIAL, FULL, never)).sum() == 4 * 16


def test_last_block_is_cut_at_the_sequence():
    dense = torch.zeros(1, 1, 14, 14, dtype=torch.bool)
    for start in (0, 4, 8, 12):
        dense[..., start : start + 4, start : start + 4] = True
    assert_block_mask_equals(block_mask_of(PARTIAL, length=14), dense)


def test_lists_without_transposes_are_checked_one_way():
    block_mask = block_mask_of(PARTIAL, FULL, causal(), compute_q_blocks=False)
    assert_block_mask_equals(block_mask, expand_block_mask(block_mask))
    with pytest.raises(ConfigError, match=r"^block_mask must carry transposed lists, got None$"):
        expand_transposed(block_mask)


@pytest.mark.parametrize(
    ("partial", "full", "message"),
    [
        (([0, 0], [1], [2], [3]), None, "lists a block twice in one row"),
        (PARTIAL, ([0], [], [], []), "lists a block as partial and as full"),
        (([0], [1], [2], [4]), None, "lists a block outside the 4 blocks of the sequence"),
        (([0], [1], [2], [-1]), None, "lists a block outside the 4 blocks of the sequence"),
    ],
)
def test_malformed_lists_are_refused(partial, full, message):
    with pytest.raises(AssertionError, match=message):
        expand_block_mask(block_mask_of(partial, full, compute_q_blocks=False))


def test_assert_block_mask_equals_names_the_first_pair():
    block_mask = block_mask_of(PARTIAL, FULL, causal())
    with pytest.raises(AssertionError, match=r"^block_mask \(kv-lists\) is False at \(b=0, h=0, q=12, kv=0\)"):
        assert_block_mask_equals(block_mask, materialize_mask(causal(), 1, 1, 16, 16))
    with pytest.raises(AssertionError, match=r"^block_mask is over \(16, 16\) tokens, expected \(16, 17\)$"):
        assert_block_mask_equals(block_mask, torch.ones(1, 1, 16, 17, dtype=torch.bool))


def test_transposed_lists_that_disagree_are_found():
    block_mask = block_mask_of(PARTIAL, FULL, causal())
    block_mask.q_num_blocks, block_mask.q_indices = lists([0], [1], [2], [])  # the backward would miss the last block
    with pytest.raises(AssertionError, match=r"^block_mask \(transposed lists\) is False at \(b=0, h=0, q=12, kv=12\)"):
        assert_block_mask_equals(block_mask, expand_block_mask(block_mask))
