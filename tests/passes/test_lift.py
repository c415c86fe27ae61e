"""Mask lifting: each form a model writes its mask in as an index function; what is none stays dense, and says why."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex.backend import Backend
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.testing import assert_close_to_oracle, assert_no_square, count_hops

#: Sparse path with nothing dropped: just under 1, because 1.0 means a dense layer.
EVERYTHING = OmniSparseConfig(target_recall=0.9999999, lazy_threshold=None)
N = 140


class Capture(Backend):
    """A backend that keeps the graph it rewrote."""

    def __call__(self, graph_module, inputs, **kwargs):
        self.graph_module = graph_module
        return super().__call__(graph_module, inputs, **kwargs)


def qkv(device, length=N, grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 16, generator=generator).to(device).requires_grad_(grad) for _ in range(3)]


def attend_with(make_mask):
    """SDPA with a mask made from the length and small tensors."""

    def call(query, key, value, *small):
        mask = make_mask(query.shape[2], query.device, *small)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return call


def positions(n, device):
    return torch.arange(n, device=device)


def distance(n, device):
    i = positions(n, device)
    return i[:, None] - i[None, :]


def causal(n, device):
    return distance(n, device) >= 0


def float_causal(n, device):
    return torch.full((n, n), float("-inf"), device=device).triu(1)


def t5_bias(n, device, weight):
    n_far = distance(n, device).clamp(min=0)
    large = 8 + (torch.log(n_far.float() / 8 + 1e-6) / math.log(16) * 8).to(torch.long)
    bucket = torch.where(n_far < 8, n_far, torch.min(large, torch.full_like(large, 15)))
    return F.embedding(bucket, weight).permute(2, 0, 1).unsqueeze(0)


def alibi(n, device, slopes):
    far = -distance(n, device).abs().float()
    return (far * slopes[:, None, None]).masked_fill(~causal(n, device), float("-inf"))[None]


def shared(shape, seed=1):
    """A maker of one small tensor whose sizes may name the length ("N")."""

    def make(n, device):
        sizes = [n if size == "N" else size for size in shape]
        return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(device)

    return make


def left_padding(n, device):
    return (positions(n, device) >= torch.tensor([[0], [30]], device=device)).long()


def right_padding(n, device):
    return (positions(n, device) < torch.tensor([[n], [n - 30]], device=device)).long()


def packed(n, device):
    return torch.stack([positions(n, device) // 50, positions(n, device) // 37])


LIFTED = {
    "tril": (lambda n, d: torch.ones(n, n, dtype=torch.bool, device=d).tril(), []),
    "tril_of_a_longer_one": (lambda n, d: torch.ones(512, 512, dtype=torch.bool, device=d).tril()[:n, :n], []),
    "triu_of_minus_inf": (float_causal, []),
    "compared_positions": (causal, []),
    "left_padding": (lambda n, d, p: causal(n, d) & p.bool()[:, None, None, :], [left_padding]),
    "right_padding": (lambda n, d, p: causal(n, d) & p.bool()[:, None, None, :], [right_padding]),
    "padding_filled_in": (
        lambda n, d, p: float_causal(n, d).masked_fill(p[:, None, None] == 0, -math.inf),
        [right_padding],
    ),
    "padding_multiplied": (
        lambda n, d, p: (1.0 - p[:, None, None, :].float()) * torch.finfo(torch.float32).min,
        [right_padding],
    ),
    "window": (lambda n, d: causal(n, d) & (distance(n, d) < 50), []),
    "packed": (lambda n, d, ids: (ids[:, None, :, None] == ids[:, None, None, :]) & causal(n, d), [packed]),
    "logical_and_of_numbers": (lambda n, d: torch.logical_and(distance(n, d) >= 0, positions(n, d) + 1), []),
    "where_minus_inf": (lambda n, d: torch.where(causal(n, d), 0.0, -math.inf), []),
    "where_finfo_min": (lambda n, d: torch.where(causal(n, d), 0.0, torch.finfo(torch.float32).min), []),
    "negated": (lambda n, d: ~(distance(n, d) < 0), []),
    "table_of_distances": (lambda n, d, t: t[:, distance(n, d).clamp(-20, 20) + 20], [shared((4, 41))]),
    "table_heads_last": (lambda n, d, t: t[distance(n, d).clamp(-9, 9) + 9].permute(2, 0, 1), [shared((19, 4))]),
    "table_after_ellipsis": (lambda n, d, t: t[..., distance(n, d).abs().clip(max=30)], [shared((4, 31))]),
    "alibi": (alibi, [shared((4,))]),
    "t5_buckets": (t5_bias, [shared((16, 4))]),
    "row_plus_column": (lambda n, d, u, v: u[:, :, None] + v[:, None, :], [shared((4, "N")), shared((4, "N"), 2)]),
    "keys_only": (lambda n, d, b: b[:, None, None, :], [shared((2, "N"))]),
}


def run(make_mask, makers, device, *, length=N, inner="eager", dynamic=None):
    backend = Capture(EVERYTHING, inner=inner, min_seq_len=0)
    compiled = torch.compile(attend_with(make_mask), backend=backend, fullgraph=True, dynamic=dynamic)
    tensors, small = qkv(device, length), [make(length, device) for make in makers]
    return backend, compiled(*tensors, *small), tensors, make_mask(length, tensors[0].device, *small)


@pytest.mark.parametrize("name", LIFTED)
def test_lifted(name, device):
    make_mask, makers = LIFTED[name]
    backend, out, tensors, mask = run(make_mask, makers, device)
    (site,) = backend.last.sites
    assert site.rewritten, site.skip
    oracle = {"mask": mask} if mask.dtype == torch.bool else {"bias": mask}
    assert_close_to_oracle(out, *tensors, **oracle)


@pytest.mark.parametrize("name", LIFTED)
def test_no_square_is_left_at_either_length(name, device):
    make_mask, makers = LIFTED[name]
    for length in (N, 261):
        torch._dynamo.reset()
        backend, *_ = run(make_mask, makers, device, length=length)
        assert_no_square(backend.graph_module, length)


@pytest.mark.parametrize("name", ["tril", "left_padding", "packed", "alibi", "table_of_distances", "row_plus_column"])
def test_one_graph_serves_other_lengths(name, device):
    make_mask, makers = LIFTED[name]
    backend = Capture(EVERYTHING, inner="eager", min_seq_len=0)
    compiled = torch.compile(attend_with(make_mask), backend=backend, fullgraph=True, dynamic=True)
    for length in (N, 171, 300):
        tensors, small = qkv(device, length), [make(length, device) for make in makers]
        torch.testing.assert_close(compiled(*tensors, *small), attend_with(make_mask)(*tensors, *small))
    assert backend.log.graphs == 1 and len(backend.log.report().rewritten) == 1


@pytest.mark.parametrize("name", ["table_of_distances", "t5_buckets", "alibi", "row_plus_column"])
def test_gradients_reach_the_small_tensors(name, device):
    make_mask, makers = LIFTED[name]
    tensors, call = qkv(device, grad=True), attend_with(make_mask)
    inputs = [*tensors, *(make(N, device).requires_grad_() for make in makers)]
    backend = Capture(EVERYTHING, inner="aot_eager", min_seq_len=0)
    out = torch.compile(call, backend=backend, fullgraph=True)(*inputs)
    assert backend.last.sites[0].rewritten
    # float64 says what is right, the dense path in float32 how far rounding goes; rows of N terms add up.
    exact = torch.autograd.grad(call(*(x.double() for x in inputs)).square().sum(), inputs)
    dense = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    for got, wanted, rival in zip(torch.autograd.grad(out.square().sum(), inputs), exact, dense, strict=True):
        bound = 4 * ((rival - wanted).abs().max() + N * torch.finfo(torch.float32).eps * wanted.abs().max())
        assert (got - wanted).abs().max() <= bound


# --- decode offset -----------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_length_tensor_that_is_advanced_later_is_read_before(inner, device):
    def step(query, key, value, seen):
        rows = torch.arange(query.shape[2], device=query.device) + seen
        mask = torch.arange(key.shape[2], device=query.device)[None] <= rows[:, None]
        seen.add_(query.shape[2])  # as a static cache does, before attention runs
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None])

    query, key, value = qkv(device)
    backend = Capture(EVERYTHING, inner=inner, min_seq_len=0)
    seen = torch.tensor(7, device=device)
    out = torch.compile(step, backend=backend, fullgraph=True)(query[:, :, :30], key, value, seen)
    (site,) = backend.last.sites
    assert site.rewritten and seen == 37
    mask = torch.ones(30, N, dtype=torch.bool, device=device).tril(7)
    assert_close_to_oracle(out, query[:, :, :30], key, value, mask)


# --- what must not be lifted -------------------------------------------------

SQUARE = "is a query-by-key tensor, not a function of indices"


def written_to(n, device):
    mask = torch.zeros(n, n, device=device)
    mask[:, 30:60] = -math.inf
    return mask


def written_through_a_view(n, device):
    mask = torch.zeros(n, n, device=device)
    mask[:, 30:60].fill_(-math.inf)
    return mask


def small_written_to(n, device, bias):
    moved = bias * 1.0
    moved.add_(-5.0 * positions(n, device))
    return moved[:, None, None]


REFUSED = {
    "parameter": (lambda n, d, p: p, [shared(("N", "N"))], rf"mask \w+ \(140, 140\) {SQUARE}"),
    "per_head_parameter": (lambda n, d, p: p[None], [shared((4, "N", "N"))], rf"mask \w+ \(4, 140, 140\) {SQUARE}"),
    "product_of_vectors": (lambda n, d, u: u @ u.T, [shared(("N", 3))], rf"mask \w+ \(140, 140\) {SQUARE}"),
    "truncated_division": (
        lambda n, d: torch.div(distance(n, d), 3, rounding_mode="trunc").float(),
        [],
        rf"mask \w+ \(140, 140\) {SQUARE}",
    ),
    "in_place": (written_to, [], r"mask \w+ is changed in place before it is read"),
    "in_place_through_a_view": (written_through_a_view, [], r"mask \w+ is changed in place before it is read"),
    "in_place_small": (small_written_to, [shared((2, "N"))], r"mask \w+ is changed in place before it is read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, device):
    make_mask, makers, reason = REFUSED[name]
    backend, out, tensors, mask = run(make_mask, makers, device)
    (site,) = backend.last.sites
    assert not site.rewritten and count_hops(backend.graph_module) == 0
    assert re.fullmatch(reason, site.skip.reason), site.skip.reason
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, attn_mask=mask))


def test_bits_are_not_truth_values(device):
    def odd_sees_odd(n, device):
        return (positions(n, device)[:, None] & 1) == (positions(n, device)[None] & 1)

    _, out, tensors, mask = run(odd_sees_odd, [], device)
    assert_close_to_oracle(out, *tensors, mask)
