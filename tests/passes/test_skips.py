"""What would crash is a named skip or works: broadcast tensors, positions from tensors, masks that do not fit."""

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex.backend import Backend
from tests.helpers.rewriting import keep_all, qkv, rewritten

N = 140


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def product(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v


BROADCAST = {
    "keys and values of one row": (
        sdpa,
        lambda q, k, v: (q, k[:1], v[:1]),
        "batch is broadcast: 2 against 1 against 1",
    ),
    "values of one row": (sdpa, lambda q, k, v: (q, k, v[:1]), "batch is broadcast: 2 against 2 against 1"),
    "queries of one row": (sdpa, lambda q, k, v: (q[:1], k, v), "batch is broadcast: 1 against 2 against 2"),
    "one value head": (sdpa, lambda q, k, v: (q, k, v[:, :1]), "key heads is broadcast: 4 against 1"),
    "one key head": (sdpa, lambda q, k, v: (q, k[:, :1], v), "key heads is broadcast: 1 against 4"),
    "one query head": (sdpa, lambda q, k, v: (q[:, :1], k, v), "query heads of the output is broadcast: 1 against 4"),
    "one head of both": (sdpa, lambda q, k, v: (q, k[:, :1], v[:, :1]), ""),
    "expanded by the caller": (sdpa, lambda q, k, v: (q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)), ""),
    "product, keys of one row": (product, lambda q, k, v: (q, k[:1], v), "batch is broadcast: 2 against 1 against 2"),
    "product, one value head": (product, lambda q, k, v: (q, k, v[:, :1]), "key heads is broadcast: 4 against 1"),
    "product, queries of one row": (
        product,
        lambda q, k, v: (q[:1], k, v),
        "batch is broadcast: 1 against 2 against 2",
    ),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_broadcast_tensors(name):
    call, narrow, reason = BROADCAST[name]
    assert rewritten(call, narrow(*qkv(N))) == [reason]


def test_broadcast_lengths_are_told_apart_where_sizes_are_symbols():
    reasons = rewritten(sdpa, qkv(N), qkv(150), (qkv(170)[0], *(x[:1] for x in qkv(170)[1:])), dynamic=True)
    assert reasons[0] == "" and "broadcast" in reasons[-1]


def test_lengths_that_nobody_said_are_equal_are_equal():
    """Keys and values are inputs with sizes of their own."""
    call = lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))  # noqa: E731
    reasons = rewritten(call, *(qkv(n, kv_heads=2, kv_len=n + 30) for n in (60, 90, 130)), dynamic=True)
    assert reasons == [""], "one graph, rewritten"


def test_a_mask_that_widens_the_logits_is_refused():
    q, k, v = qkv(N, batch=1)
    mask = torch.where(torch.rand(3, 1, 1, N) < 0.3, -5.0, 0.0)
    (reason,) = rewritten(lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v, (q, k, v, mask))
    assert "does not broadcast to the logits" in reason


def test_types_that_differ():
    def call(q, k, v):
        return torch.softmax(q.double() @ k.double().mT / 4, -1).to(v.dtype) @ v

    backend = Backend(keep_all(), inner="eager", min_seq_len=0)
    tensors = qkv(N)
    torch.testing.assert_close(torch.compile(call, backend=backend)(*tensors), call(*tensors))
    reason = "query, key and value differ in dtype: torch.float32, torch.float64"
    assert [x.reason for x in backend.log.sites] == [reason]


#: Rows of queries at a position that a tensor holds.
POSITIONS = {
    "scalar": (lambda L, p: torch.arange(L)[:, None] + p, torch.tensor(60)),
    "first of a vector": (lambda L, p: torch.arange(L)[:, None] + p[0], torch.arange(60, 140)),
    "first as a slice": (lambda L, p: torch.arange(L)[:, None] + p[:1], torch.arange(60, 140)),
    "last of a vector": (lambda L, p: torch.arange(L)[:, None] + p[-1] - L + 1, torch.arange(60, 140)),
    "from the end": (lambda L, p: torch.arange(L)[:, None] + (p - L), torch.tensor(140)),
    "as another type": (lambda L, p: torch.arange(L)[:, None] + p.long(), torch.tensor(60, dtype=torch.int32)),
    "as a fraction": (lambda L, p: torch.arange(L)[:, None] + p, torch.tensor(60.5)),
    "of a matrix": (lambda L, p: torch.arange(L)[:, None] + p[0, 1], torch.tensor([[3, 60]])),
    "a maximum": (lambda L, p: torch.arange(L)[:, None] + p.max(), torch.tensor([3, 60])),
    "a product": (lambda L, p: torch.arange(L)[:, None] + p * 2, torch.tensor(30)),
    "a clamp": (lambda L, p: torch.arange(L)[:, None] + p.clamp(max=60), torch.tensor(90)),
    "two of them": (lambda L, p: torch.arange(L)[:, None] + p[0] + p[1], torch.tensor([20, 40])),
    "all of them": (lambda L, p: p[:, None], torch.arange(60, 140)),
    "of each batch row": (lambda L, p: torch.arange(L)[:, None] + p[:, None, None, None], torch.tensor([60, 33])),
    "before the first key": (lambda L, p: torch.arange(L)[:, None] + p, torch.tensor(-20)),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("granularity", ["block", "token"])
def test_positions_from_tensors(name, dynamic, granularity):
    rows, position = POSITIONS[name]

    def call(q, k, v, p):
        mask = torch.arange(k.shape[2]) <= rows(q.shape[2], p)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    alive = torch.arange(80) >= 20 if name == "before the first key" else None
    tensors = qkv(80, kv_len=140)
    how = {"dynamic": dynamic, "config": keep_all(granularity=granularity), "rows": alive}
    assert rewritten(call, (*tensors, position), **how) == [""]
