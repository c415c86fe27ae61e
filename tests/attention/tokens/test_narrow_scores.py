"""Scores over some coordinates of a head: which ones, what they give, and that nothing but the scores is narrow."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import apply_omnisparse, sparse_attention
from omnisparse_flex.attention.tokens.dispatch import attend_tokens
from omnisparse_flex.backend import Backend
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import STATS
from omnisparse_flex.masks.tokens.head_dims import gather_dims, top_head_dims
from omnisparse_flex.masks.tokens.one_pass import one_pass
from omnisparse_flex.testing import AttentionShape
from omnisparse_flex.testing.oracle import dense_logits
from tests.attention.tokens.test_token_kernels import CONFIG, loud, site_of
from tests.attention.tokens.test_token_streaming import chunks_of
from tests.attention.tokens.test_tokens import run
from tests.masks.test_one_pass import by_loops, situation

SHAPE = AttentionShape(2, 2, 3, 520, 700, 32)
WIDE = dataclasses.replace(CONFIG, lazy_threshold=None)
NARROW = dataclasses.replace(WIDE, scoring_dims=16)


def some_louder(shape=SHAPE, seed=0):
    """Queries and keys some of whose coordinates are larger than others."""
    query, key, _ = shape.inputs(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return (x * torch.rand((1, x.shape[1], 1, shape.head_dim), generator=generator) * 3 for x in (query, key))


@given(st.integers(0, 2**16), st.sampled_from((1, 2, 3)), st.booleans(), st.sampled_from((16, 32)))
def test_the_loudest_coordinates_by_loops(seed, group, each_head, dims):
    shape = AttentionShape(2, 2, group, 9, 13, 32)
    query, key = some_louder(shape, seed)
    query[0, 0, 3, 5], key[1, 1, 2, 0] = torch.nan, torch.inf  # neither token has a say
    columns = top_head_dims(query, key, shape.heads if each_head else shape.kv_heads, dims)
    for b in range(shape.batch):
        for choice, chosen in enumerate(columns[b]):
            mine = [choice] if each_head else range(choice * group, (choice + 1) * group)
            energy = []
            for d in range(shape.head_dim):
                rows = [x for h in mine for x in query[b, h] if x.isfinite().all()]
                kept = [x for x in key[b, mine[0] // group] if x.isfinite().all()]
                of_query, of_key = (sum(float(x[d]) ** 2 for x in tokens) / len(tokens) for tokens in (rows, kept))
                energy.append(of_query * of_key)
            order = sorted(range(shape.head_dim), key=lambda d: -energy[d])
            assert chosen.tolist() == sorted(order[:dims])


def test_the_first_of_equal_coordinates():
    ones = torch.ones(1, 1, 4, 32)
    assert top_head_dims(ones, ones, 1, 16).flatten().tolist() == list(range(16))


def test_what_is_not_finite_stays_so():
    x = torch.ones(1, 2, 3, 32)
    x[0, 1, 2, 31] = torch.inf
    narrow = gather_dims(x, torch.arange(16).view(1, 1, 16))
    assert narrow.shape == (1, 2, 3, 16) and narrow[0, 1, 2].isnan().all() and narrow.isnan().sum() == 16


def test_mass_by_loops():
    """Logits over the chosen coordinates, normalisers over all of them."""
    query, key = some_louder(AttentionShape(1, 2, 2, 520, 520, 32))
    arguments, rules, active, logits = situation(query * 2, key)
    columns = top_head_dims(query * 2, key, 2, 16)
    zeros = torch.zeros(2, 32).scatter(1, columns[0], 1.0).repeat_interleave(2, 0)
    narrow = dense_logits(query * 2 * zeros[None, :, None], key, 32**-0.5)
    assert (narrow - logits).abs().max() > 0.1, "a test of nothing"
    got = one_pass(*arguments, columns=columns, **rules)
    for actual, expected in zip(got, by_loops(arguments, active, narrow), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-4)


def test_all_coordinates_give_the_same_choice():
    given = loud(SHAPE, "cpu")
    found = []
    for config in (WIDE, dataclasses.replace(WIDE, scoring_dims=32), NARROW):
        _, selection, *_ = run(SHAPE, given, config, IndexMask(causal()))
        found.append(selection)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    assert not torch.equal(found[0].chosen, found[2].chosen), "a test of nothing"


def test_a_few_segments_at_a_time_read_the_same_coordinates():
    given = loud(SHAPE, "cpu")
    # The last segment's queries alone would choose other coordinates.
    given[0] = given[0].detach().index_fill(3, torch.arange(16), 0.0).where(torch.arange(520)[:, None] >= 384, given[0])
    found = []
    for size in (1 << 40, 0):
        with chunks_of(size):
            _, selection, *_ = run(SHAPE, given, NARROW, IndexMask(causal()))
        found.append(selection)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    assert found[0].key_count.any(), "a test of nothing"


def test_a_broken_key_is_kept_though_its_break_is_not_read():
    shape = AttentionShape(1, 1, 1, 700, 700, 32)
    query, key, value = (x.detach() for x in loud(shape, "cpu"))
    key[..., 0] *= 1e-3  # never among the top_head_dims
    key[0, 0, 200, 0] = torch.nan
    out, *_ = run(shape, (query, key, value), dataclasses.replace(NARROW, budget=4), IndexMask(causal()))
    assert out[0, 0, 200:].isnan().all() and not out[0, 0, :200].isnan().any()


def test_narrow_scores_cost_less():
    """Every row is active, so that the same pairs are scored."""
    given, found = [x.detach() for x in loud(SHAPE, "cpu")], []
    for config in (WIDE, NARROW):
        attend_tokens(*given, dataclasses.replace(site_of(SHAPE, "cpu", config), write=found.append))
    wide, narrow = (x.stats[STATS.index("selection_blocks")] for x in found)
    assert narrow == wide / 2 > 0


def test_more_coordinates_than_a_head_has_are_refused():
    from tests.helpers.tiny import build

    config, rule = dataclasses.replace(WIDE, scoring_dims=64), "scoring_dims must be at most the head_dim"
    with pytest.raises(ConfigError, match=f"^{rule} 32, got 64$"):
        sparse_attention(*loud(SHAPE, "cpu"), config=config, enable_gqa=True)
    with pytest.raises(ConfigError, match=f"^{rule} 16, got 64$"):
        apply_omnisparse(build("llama"), config)


def test_a_graph_keeps_such_a_site_dense_by_name():
    backend = Backend(dataclasses.replace(WIDE, scoring_dims=64), min_seq_len=0, inner="eager")
    attention = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    given = [torch.randn(1, 2, 300, 32) for _ in range(3)]
    torch.testing.assert_close(torch.compile(attention, backend=backend)(*given), attention(*given))
    assert backend.log.sites[0].reason == "scoring_dims = 64 is more than head_dim 32"
