"""Nothing is read across a write: the one rule by which every pass may read a tensor at another time."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from omnisparse_flex.backend import Backend
from omnisparse_flex.passes.writes import changes_between, mutations
from tests.helpers.rewriting import qkv, rewritten

N = 140


def repeat(x):
    return x.repeat_interleave(2, 1)


def expand(x):
    B, H, S, D = x.shape
    return x[:, :, None].expand(B, H, 2, S, D).reshape(B, 2 * H, S, D)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def repeated(how, write):
    def call(q, k, v):
        kk, vv = how(k), how(v)
        write(k, v)
        return sdpa(q, kk, vv)

    return call


def foreach(k, v):
    torch._foreach_add_([k, v], 1.0)


WRITES = {
    "a method": lambda k, v: k.mul_(2),
    "of the value": lambda k, v: v.zero_(),
    "an item": lambda k, v: k.__setitem__((slice(None), 0), 3.0),
    "a slice": lambda k, v: k[:, :, :5].fill_(2.0),
    "a view of a view": lambda k, v: k.mT[:, :, 0].view(2, 2, -1).add_(1.0),
    "flat": lambda k, v: k.view(-1)[:50].copy_(torch.ones(50)),
    "split": lambda k, v: k.split(70, 2)[1].zero_(),
    "chunk": lambda k, v: v.chunk(2, -1)[0].mul_(3),
    "diagonal": lambda k, v: k[0, 0].diagonal().fill_(9.0),
    "out": lambda k, v: torch.neg(k, out=k),
    "a list": foreach,
    "augmented": lambda k, v: k.__iadd__(1.0),
    "indices": lambda k, v: k.index_fill_(2, torch.tensor([3, 5]), 1.0),
    "in place of a function": lambda k, v: F.relu(k, inplace=True),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("how", [repeat, expand])
def test_keys_are_not_taken_from_before_the_repeat(name, how):
    assert rewritten(repeated(how, WRITES[name]), qkv(N, kv_heads=2)) == [""]


def eager(before_mask=None, before_value=None, before_query=None):
    def call(q, k, v, m):
        scaled = q * 0.25
        if before_query:
            before_query(q, k, v, m)
        logits = scaled @ k.mT
        if before_mask:
            before_mask(q, k, v, m)
        logits = logits + m[:, None, None]
        if before_value:
            before_value(q, k, v, m)
        return torch.softmax(logits, -1) @ v

    return call


HALVES = {
    "query after it was scaled": (eager(before_query=lambda q, k, v, m: q.zero_()), True),
    "query after it was multiplied": (eager(before_mask=lambda q, k, v, m: q.zero_()), True),
    "key after it was multiplied": (eager(before_mask=lambda q, k, v, m: k.zero_()), True),
    "a view of the key": (eager(before_value=lambda q, k, v, m: k.mT[:, :, 0].zero_()), True),
    "mask after it was added": (eager(before_value=lambda q, k, v, m: m.zero_()), None),
    "mask before it was added": (eager(before_mask=lambda q, k, v, m: m.add_(1.0)), None),
    "value before it is read": (eager(before_value=lambda q, k, v, m: v.mul_(2)), False),
    "key before it is read": (eager(before_query=lambda q, k, v, m: k.mul_(2)), False),
}


@pytest.mark.parametrize("name", HALVES)
def test_the_two_halves_of_an_eager_match(name):
    call, refused = HALVES[name]
    mask = torch.where(torch.arange(N) % 3 == 0, -2.0, 0.0).expand(2, N).contiguous()
    (reason,) = rewritten(call, (*qkv(N), mask))
    if refused is not None:
        assert ("is changed in place" in reason) == refused, reason


def masked(write, late=False):
    def call(q, k, v, pad, pos):
        mask = (torch.arange(k.shape[2]) <= pos[:, None]) & pad[:, None, None]
        if not late:
            write(mask, pad, pos)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if late:
            write(mask, pad, pos)
        return out

    return call


MASKS = {
    "the mask": lambda mask, pad, pos: mask[..., :3].fill_(True),
    "the mask by an item": lambda mask, pad, pos: mask.__setitem__((..., 0), True),
    "positions": lambda mask, pad, pos: pos.add_(7),
    "positions through a view": lambda mask, pad, pos: pos.view(2, -1)[0].fill_(3),
    "padding": lambda mask, pad, pos: pad.fill_(True),
    "padding through a view": lambda mask, pad, pos: pad[:, 5:9].logical_not_(),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_was_made_of(name, late):
    pad = torch.arange(N) >= torch.tensor([[0], [20]])
    rows = torch.arange(N) >= 20
    rewritten(masked(MASKS[name], late), (*qkv(N), pad, torch.arange(N)), rows=rows)


def test_a_body_that_writes_to_its_operand():
    def body(x, k):
        k.mul_(2.0)
        return x + 1

    def call(q, k, v):
        kk, vv = repeat(k), repeat(v)
        return sdpa(checkpoint(body, q, k, use_reentrant=False), kk, vv)

    rewritten(call, qkv(N, kv_heads=2))


def test_the_rule_itself():
    """Storage tells who shares memory; order tells what is between."""
    seen = {}

    def look(graph_module, inputs):
        nodes = {node.name: node for node in graph_module.graph.nodes}
        seen["names"] = list(nodes)
        base, view = (node for node in nodes.values() if node.op == "call_method" and node.target in ("clone", "view"))
        write = next(node for node in nodes.values() if node.target == "add_")
        last = next(reversed(graph_module.graph.nodes))
        assert mutations(base) == mutations(view) == [write]
        assert changes_between(base, base, last) and not changes_between(base, write, last)
        assert not mutations(next(iter(nodes.values())))
        return graph_module.forward

    def call(x):
        y = x.clone()
        z = y.view(-1)
        z.add_(1.0)
        return y * 2

    torch.compile(call, backend=look)(torch.randn(3))
    assert seen


def test_two_inputs_that_share_memory():
    """A write through one is a write to the other."""

    def call(q, k, v, flat):
        kk, vv = repeat(k), repeat(v)
        flat.mul_(3.0)
        return sdpa(q, kk, vv)

    from tests.helpers.rewriting import keep_all

    q, k, v = qkv(N, kv_heads=2)
    want = call(q, k.clone(), v, torch.zeros(1))
    backend = Backend(keep_all(), inner="eager", min_seq_len=0)
    torch.testing.assert_close(torch.compile(call, backend=backend)(q, k, v, k.view(-1)), want)
