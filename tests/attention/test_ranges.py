"""No estimator and no exact row leaves the range of a type where dense attention does not."""

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex import OmniSparseConfig, sparse_attention
from omnisparse_flex.config import SCORINGS
from omnisparse_flex.masks.blocks.block_lse import block_lse
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import KV, Apply, Const, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

#: Estimators of mass. ``sampled_rows`` chooses by peaks instead: ``tests/masks/test_peaks.py``.
COUNTING = tuple(name for name in SCORINGS["block"] if name != "sampled_rows")

N, D = 700, 32


def loud(dtype, size, seed=0):
    """Queries and keys whose products leave float16 before they are scaled, though scaled logits do not."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, N, D, generator=g) for _ in range(3))
    return (size * q).to(dtype), (size * k).to(dtype), v.to(dtype)


RULES = [{"scoring": x, "lazy_threshold": None} for x in COUNTING]
RULES += [{"granularity": "token", "scoring": x, "lazy_threshold": None} for x in SCORINGS["token"]]
RULES += [{"scoring": "sampled_rows"}]


@pytest.mark.parametrize("rules", RULES, ids=lambda x: x["scoring"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 100.0, 3000.0])
def test_loud_inputs(rules, dtype, size):
    """By size 100 products reach 1e5 to 1e6: past 65,504."""
    q, k, v = loud(dtype, size)
    config = OmniSparseConfig(target_recall=0.9999999, **rules)
    out = sparse_attention(q, k, v, config=config)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    near = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert out.isfinite().all()
    bound = 8 * ((near - want).abs().max() + 4 * torch.finfo(dtype).eps)
    exact = (
        100 if rules["scoring"] == "sampled_rows" else 3000
    )  # loud rows that are not sampled look where others do not
    if size < exact:  # beyond 3000, float32 itself cannot tell which key is the largest
        assert (out.double() - want).abs().max() <= bound


@pytest.mark.parametrize("scoring", COUNTING)
@pytest.mark.parametrize("last_rows", [0, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_the_choice_in_half_precision_is_that_in_float32(scoring, last_rows, padded):
    q, k, _ = loud(torch.float16, 60.0)
    expr = Apply("and", (causal(), Apply("ge", (KV, Const(200))))) if padded else causal()
    config = OmniSparseConfig(scoring=scoring, last_rows=last_rows, lazy_threshold=None)
    found = [
        select_blocks(x, y, IndexMask(expr), config, target=0.9, scale=D**-0.5)
        for x, y in ((q, k), (q.float(), k.float()))
    ]
    assert found[0].mass.isfinite().all()
    assert (found[0].mass - found[1].mass).abs().mean() < 0.02


@pytest.mark.parametrize("width", [64, 128])
def test_peaks_in_half_precision_are_those_in_float32(width):
    """Of the same numbers: exact rows are never rounded to a half type."""
    q, k, _ = loud(torch.float16, 60.0)
    config = OmniSparseConfig(key_block=width, window_size=1, sink_size=1)
    rule = {"target": 0.6, "min_peak": 0.1, "scale": D**-0.5}
    half, full = (select_blocks(x, y, IndexMask(causal()), config, **rule) for x, y in ((q, k), (q.float(), k.float())))
    assert half.recall.isfinite().all() and not half.keep.all()
    assert (half.keep != full.keep).float().mean() < 0.01
    torch.testing.assert_close(half.recall, full.recall, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_rows(dtype):
    q, k, _ = loud(dtype, 300.0)
    rows, last = q[:, :, :8], torch.full((8,), N - 1)
    found = block_lse(rows, k, last, None, D**-0.5, 128)
    want = F.pad(rows.double() @ k.double().mT * D**-0.5, (0, -N % 128), value=-torch.inf).unflatten(-1, (-1, 128))
    torch.testing.assert_close(found.double(), want.logsumexp(-1), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_keys_in_a_block_do_not_overflow_its_sum(dtype):
    """A block's sum of 128 keys leaves float16 where its mean does not."""
    q, k, v = (torch.full((1, 1, 512, D), x, dtype=dtype) for x in (0.01, 1000.0, 1.0))
    out = sparse_attention(q, k, v, config=OmniSparseConfig(window_size=1, sink_size=0, lazy_threshold=None))
    torch.testing.assert_close(out, v)
