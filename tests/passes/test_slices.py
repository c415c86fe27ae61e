"""Slices that count from the end, start at a computed place or have steps, at lengths known only in the run."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.rewriting import qkv, rewritten

#: Rows of the last L positions of S, and keys, in many spellings.
ROWS = {
    "from the end": lambda L, S, t: torch.arange(S)[-L:],
    "from a computed place": lambda L, S, t: torch.arange(S)[S - L :],
    "from a computed place before the end": lambda L, S, t: torch.arange(S + 3)[S - L : S],
    "from the end to the end": lambda L, S, t: torch.arange(S + 3)[-L - 3 : -3],
    "of a captured tensor": lambda L, S, t: t[-L:],
    "of a captured tensor, from a computed place": lambda L, S, t: t[S - L :],
    "of what was computed of it": lambda L, S, t: (t * 2 - t)[-L:],
    "every second": lambda L, S, t: torch.arange(2 * S)[::2][S - L :] // 2,
    "every second from the end": lambda L, S, t: (torch.arange(2 * S)[-2 * L :: 2]) // 2,
    "every second of a captured tensor": lambda L, S, t: t.repeat_interleave(2)[::2][-L:],
    "narrowed": lambda L, S, t: torch.arange(S).narrow(0, S - L, L),
    "twice": lambda L, S, t: torch.arange(2 * S)[S // 2 :][S - S // 2 - L : S - S // 2],
    "a slice of a slice": lambda L, S, t: t[1:][-L:] if L < S else t,
    "with an offset": lambda L, S, t: torch.arange(-5, S - 5)[-L:] + 5,
}
KEYS = {
    "plain": lambda S, t: torch.arange(S),
    "shifted": lambda S, t: torch.arange(S + 7)[7:] - 7,
    "without the last": lambda S, t: torch.arange(S + 7)[:-7],
    "captured": lambda S, t: t[:S],
    "captured, from the end": lambda S, t: t[-S:],
}


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, dynamic):
    def call(q, k, v, t):
        L, S = q.shape[2], k.shape[2]
        mask = torch.arange(S) <= ROWS[rows](L, S, t)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    sizes = ((60, 140), (45, 200), (70, 150))
    rewritten(call, *((*qkv(L, kv_len=S), torch.arange(S)) for L, S in sizes), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("keys", KEYS)
def test_keys(keys, dynamic):
    def call(q, k, v, t):
        L, S = q.shape[2], k.shape[2]
        mask = KEYS[keys](S, t) <= (torch.arange(L) + S - L)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    sizes = ((60, 140), (45, 200))
    assert rewritten(call, *((*qkv(L, kv_len=S), torch.arange(S)) for L, S in sizes), dynamic=dynamic)[0] == ""


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "cut", [lambda m, L, S: m[-L:], lambda m, L, S: m[S - L :, :], lambda m, L, S: m[..., -L:, :S]]
)
def test_a_longer_masks_last_rows(cut, dynamic):
    def call(q, k, v):
        L, S = q.shape[2], k.shape[2]
        mask = cut(torch.ones(S, S, dtype=torch.bool).tril(), L, S)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    rewritten(call, qkv(60, kv_len=140), qkv(45, kv_len=200), dynamic=dynamic)


@pytest.mark.parametrize("item", [0, 1, -1, -2])
@pytest.mark.parametrize("dynamic", [None, True])
def test_single_items(item, dynamic):
    def call(q, k, v, table):
        start = table[:, item]
        mask = torch.arange(k.shape[2]) >= start[:, None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    table = torch.tensor([[3, 40], [9, 77]])
    assert rewritten(call, (*qkv(100), table), (*qkv(130), table), dynamic=dynamic)[0] == ""
