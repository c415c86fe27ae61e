"""No live row without a key: whatever the mask, the budget and the bounds are."""

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, sparse_attention
from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.testing.oracle import materialize_mask

N, P, HEADS = 700, 50, 4
CPU = torch.device("cpu")
frames = torch.zeros(2, N // P, dtype=torch.bool)
frames[0, 5], frames[1, 9:11] = True, True
tokens = frames.repeat_interleave(P, 1)
of_heads = torch.stack([torch.arange(N) // 90 == h + 2 for h in range(HEADS)])
level = torch.where(tokens, 1.0, -1.0)
level[0, 3] = float("nan")
start = torch.tensor([333, 401])
pairs = torch.rand(14, 14, generator=torch.Generator().manual_seed(0)) < 0.2

MASKS = {
    "a table by frame": lambda b, h, i, j: frames[b, j // P],
    "a table by frame, causal": lambda b, h, i, j: frames[b, j // P] & (j <= i),
    "by trunc": lambda b, h, i, j: frames[b, torch.div(j, P, rounding_mode="floor")],
    "by a shift": lambda b, h, i, j: frames[b, (j >> 6).clamp(max=13)],
    "by token": lambda b, h, i, j: tokens[b, j],
    "two of which neither is enough": lambda b, h, i, j: (j % 100 < 50) & (j % 200 >= 49),
    "of each head": lambda b, h, i, j: of_heads[h, j],
    "of each pair of heads": lambda b, h, i, j: of_heads[h // 2, j],
    "of the head's half": lambda b, h, i, j: of_heads[(h / 2).long(), j],
    "of the head before": lambda b, h, i, j: of_heads[h - 1, j],
    "numbers with a NaN": lambda b, h, i, j: level[b, j] > 0,
    "not numbers": lambda b, h, i, j: ~(level[b, j] <= 0) & (j <= i),
    "a start": lambda b, h, i, j: j >= start[b],
    "one key": lambda b, h, i, j: j == start[b],
    "one key, causal": lambda b, h, i, j: (j == start[b] - h) & (j <= i),
    "pairs of frames": lambda b, h, i, j: pairs[i // P, j // P],
    "pairs of frames, transposed": lambda b, h, i, j: pairs[j // P, i // P] & (j <= i),
    "far away": lambda b, h, i, j: i - j > 300,
    "remainders": lambda b, h, i, j: (j % 7 == i % 7) & (j < 40),
    "bits": lambda b, h, i, j: ((j >> 3) & 1) == (i & 1),
}
RULES = {
    "defaults": {},
    "lone peaks": {"min_peak": 0.9, "target_recall": 0.05, "sink_size": 0, "window_size": 1},
    "budget 0": {"budget": 0, "sink_size": 0, "window_size": 1},
    "budget of a block": {"budget": 128, "sink_size": 0, "window_size": 1},
    "bound 0": {"max_kv_budget": 0, "sink_size": 0, "window_size": 1},
    "low recall": {"target_recall": 0.1, "sink_size": 0, "window_size": 1, "lazy_threshold": 0.5},
}


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_no_live_row_loses_every_key(name, rules, granularity, is_causal):
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, HEADS, N, 8, generator=g)
    k, v = (torch.randn(2, 2, N, 8, generator=g) for _ in range(2))
    if granularity == "token" and "min_peak" in RULES[rules]:
        pytest.skip("tokens have no peaks")
    config = OmniSparseConfig(granularity=granularity, **RULES[rules])
    out = sparse_attention(q, k, v, config=config, mask_mod=MASKS[name], is_causal=is_causal, enable_gqa=True)
    allowed = materialize_mask(MASKS[name], 2, HEADS, N, N)
    live = (allowed.tril() if is_causal else allowed).any(-1)
    assert out.isfinite().all()
    assert (out.abs().sum(-1) > 0).equal(live)


@pytest.mark.parametrize("name", [x for x in MASKS if x != "bits" and "shift" not in x])
def test_bounds_hold_the_mask_and_are_exact_in_keys(name):
    program = trace_mask_mod(MASKS[name], CPU)
    full, some = (x.expand(2, HEADS, 6, 6) for x in program.bounds(Grid(2, HEADS, N, N, 128, CPU)))
    allowed = materialize_mask(MASKS[name], 2, HEADS, N, N)
    padded = torch.zeros(2, HEADS, 768, 768, dtype=torch.bool)
    padded[..., :N, :N] = allowed
    blocks = padded.unflatten(3, (6, 128)).unflatten(2, (6, 128))
    any_pair = blocks.any(5).any(3)
    assert (some | ~any_pair).all(), "a block with an allowed pair is some"
    ends = torch.nn.functional.pad(~allowed, (0, 68, 0, 68)).unflatten(3, (6, 128)).unflatten(2, (6, 128)).any(5).any(3)
    assert not (full & ends).any(), "a full block has no forbidden pair"
    if not {"q"} & {x.axis for x in _indices(program)}:
        assert torch.equal(some, any_pair), "exact where only keys matter"


def _indices(program: IndexMask):
    from omnisparse_flex.masks.expr.expr import Index, walk

    return [x for x in walk(program.expr) if isinstance(x, Index)]
