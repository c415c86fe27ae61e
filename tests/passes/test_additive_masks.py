"""What an additive mask forbids is a mask, wherever it comes from; a true bias is seen where attention sees it."""

import math

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex import OmniSparseConfig, sparse_attention
from omnisparse_flex.backend import Backend
from omnisparse_flex.config import SCORINGS
from omnisparse_flex.masks.expr.expr import KV, TRUE, Apply, Const, H, Index, Load, Q
from omnisparse_flex.masks.expr.forbidden import FORBIDDEN, SCORE, split_additive
from tests.helpers.rewriting import keep_all, qkv, rewritten

#: Estimators of mass. ``sampled_rows`` chooses by peaks instead: ``tests/masks/test_peaks.py``.
COUNTING = tuple(name for name in SCORINGS["block"] if name != "sampled_rows")

N = 300
FILLS = (-math.inf, torch.finfo(torch.float32).min, -1e9)
places = torch.arange(N)
PATTERNS = {
    "left padding": torch.stack([places >= 30, places >= 200]),
    "right padding": torch.stack([places < N, places < 190]),
    "the middle of each block": (places % 128 != 64).expand(2, N),
    "the first of each tile": (places % 32 != 0).expand(2, N),
    "one in three": torch.rand(2, N, generator=torch.Generator().manual_seed(0)) < 0.33,
    "between two turns": torch.stack([places < N, (places < 100) | (places >= 180)]),
    "a whole block": ((places < 128) | (places >= 256)).expand(2, N),
}


def order(q, k):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def low_order(q, k):
    return torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype).triu(1)


#: (call of q, k, v and a mask of keys, what it makes of the bool mask and a fill).
SOURCES = {
    "added to order": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, low_order(q, k) + m[:, None, None]),
        True,
    ),
    "keys alone": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[:, None, None]), True),
    "filled": (
        lambda q, k, v, m: F.scaled_dot_product_attention(
            q, k, v, m[:, None, None].masked_fill(~order(q, k), -math.inf)
        ),
        True,
    ),
    "of a product": (
        lambda q, k, v, m: torch.softmax(q @ k.mT / 4 + (low_order(q, k) + m[:, None, None]), -1) @ v,
        True,
    ),
    "1 - m": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, low_order(q, k) + (1 - m[:, None, None]) * -1e9),
        False,
    ),
    "a logarithm": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, low_order(q, k) + m.log()[:, None, None]),
        False,
    ),
    "minus a large one": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, low_order(q, k) - (m[:, None, None] - 1) ** 2 * 1e9),
        False,
    ),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_float_mask_that_is_an_input(pattern, source):
    (call, filled), keep = SOURCES[source], PATTERNS[pattern]
    q, k, v = qkv(N)
    live = keep[:, None, None] & (torch.ones(N, N, dtype=torch.bool) if source == "keys alone" else order(q, k))
    for fill in FILLS if filled else FILLS[:1]:
        mask = torch.zeros(2, N).masked_fill(~keep, fill) if filled else keep.float()
        for granularity in ("block", "token"):
            config = keep_all(granularity=granularity)
            reasons = rewritten(call, (q, k, v, mask), config=config, rows=live.any(-1))
            assert reasons == [""], reasons


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", ["inf", "min"])
def test_in_half_precision(dtype, fill):
    keep = PATTERNS["left padding"]
    mask = torch.zeros(2, N, dtype=dtype).masked_fill(~keep, -math.inf if fill == "inf" else torch.finfo(dtype).min)
    call, _ = SOURCES["added to order"]
    rows = (keep[:, None, None] & order(*qkv(N)[:2])).any(-1)
    assert rewritten(call, (*qkv(N, dtype=dtype), mask), rows=rows) == [""]


@pytest.mark.parametrize("scoring", COUNTING)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_estimator_keeps_the_needle(scoring, pattern):
    """A few keys take most of the mass; what a mask hides beside them must not hide them."""
    g, length, dim = torch.Generator().manual_seed(3), 1024, 32
    keep = PATTERNS[pattern].repeat(1, 4)[:1, :length]
    keep[:, 400:440] = True
    d = F.normalize(torch.randn(dim, generator=g), dim=0)
    q, k, v = (torch.randn(1, 2, length, dim, generator=g) for _ in range(3))
    k[:, :, 400:440] += 10 * d
    q += 6 * d
    k = torch.where(keep[:, None, :, None], k, 30 * k - 60 * d)  # masked keys are large, and point elsewhere
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])
    for fill in FILLS:
        mask = torch.zeros(1, length).masked_fill(~keep, fill)
        config = OmniSparseConfig(scoring=scoring, target_recall=0.98, window_size=1, sink_size=0, lazy_threshold=None)
        backend = Backend(config, inner="eager", min_seq_len=0)
        out = torch.compile(SOURCES["keys alone"][0], backend=backend)(q, k, v, mask)
        assert (out - want).abs().mean() < 0.02, (pattern, fill)
        torch._dynamo.reset()


SCORE_MODS = {
    "where": lambda keep, bias: lambda s, b, h, i, j: torch.where(keep[b, j], s, -math.inf),
    "where, turned": lambda keep, bias: lambda s, b, h, i, j: torch.where(~keep[b, j], -1e9, s),
    "in two steps": lambda keep, bias: (
        lambda s, b, h, i, j: torch.where(j <= i, torch.where(keep[b, j], s, -math.inf), -math.inf)
    ),
    "scaled first": lambda keep, bias: lambda s, b, h, i, j: torch.where(keep[b, j], s * 0.5 + 1, -math.inf),
    "added": lambda keep, bias: lambda s, b, h, i, j: s + bias[b, j],
    "subtracted": lambda keep, bias: lambda s, b, h, i, j: torch.where(keep[b, j], s, s - 1e9),
    "a window": lambda keep, bias: lambda s, b, h, i, j: torch.where((i - j < 70) & keep[b, j], s, -math.inf),
    "by the logit": lambda keep, bias: lambda s, b, h, i, j: torch.where(s > -1, s, -5.0) + bias[b, j],
}


@pytest.mark.parametrize("name", SCORE_MODS)
@pytest.mark.parametrize("granularity", ["block", "token"])
def test_what_a_score_mod_forbids(name, granularity):
    keep = PATTERNS["left padding"]
    bias = torch.zeros(2, N).masked_fill(~keep, -math.inf)
    mod, (q, k, v) = SCORE_MODS[name](keep, bias), qkv(N)
    b, i, j = torch.arange(2)[:, None, None, None], torch.arange(N)[:, None], torch.arange(N)
    logits = mod(q.double() @ k.double().mT / 4, b, 0, i, j).masked_fill(j > i, -math.inf)
    live = logits.amax(-1, keepdim=True) > -1e6
    want = torch.where(live, torch.softmax(logits, -1).nan_to_num(0.0) @ v.double(), 0.0)
    for config in (
        keep_all(granularity=granularity),
        OmniSparseConfig(granularity=granularity, sink_size=0, budget=0, window_size=1),
    ):
        out = sparse_attention(q, k, v, config=config, score_mod=mod)
        assert out.isfinite().all()
        assert ((out != 0).any(-1, keepdim=True) | ~live).all(), "a live row lost every key"
        if config.budget != 0:
            assert (torch.where(live, out.double(), 0.0) - want).abs().max() < 1e-5


def test_a_bias_that_falls_with_the_distance_is_no_mask():
    """Where it is all that a row sees, softmax takes it for what it is."""
    slope = torch.tensor([400.0, 1.0, 0.5, 200.0])  # as 0.5 over 131,072 tokens

    def call(q, k, v, slope):
        far = torch.arange(k.shape[2]) - (k.shape[2] - 1)
        return F.scaled_dot_product_attention(q, k, v, low_order(q, k) + slope[:, None, None] * far)

    assert rewritten(call, (*qkv(N), slope)) == [""]


# --- the split itself ---------------------------------------------------------

LOAD = Load(0, (Index("b"), KV))
FLOATS = [torch.float32]
SPLITS = {
    "a constant": (Const(-1e4), Const(False), None),
    "nothing": (Const(0.0), TRUE, None),
    "a small number": (Const(-3.0), TRUE, Const(-3.0)),
    "a tensor": (LOAD, Apply("gt", (LOAD, Const(FORBIDDEN))), LOAD),
    "of queries": (Load(0, (Q,)), TRUE, Load(0, (Q,))),
    "a slope": (Apply("mul", (Load(0, (H,)), Apply("sub", (KV, Q)))), TRUE, "itself"),
    "the logit": (SCORE, TRUE, "itself"),
    "a condition on the logit": (Apply("where", (Apply("gt", (SCORE, Const(0))), SCORE, Const(-1e9))), TRUE, "itself"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_split(name):
    expr, allowed, bias = SPLITS[name]
    assert split_additive(expr, FLOATS) == (allowed, expr if bias == "itself" else bias)


def test_split_of_half_precision_takes_its_lowest_number():
    allowed, _ = split_additive(LOAD, [torch.float16])
    assert allowed == Apply("gt", (LOAD, Const(torch.finfo(torch.float16).min)))
