"""A learned tensor that a mask, bias or score_mod closes over gets its gradient, or the site says that it cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from omnisparse_flex import sparse_attention
from omnisparse_flex.backend import Backend
from tests.helpers.rewriting import keep_all, qkv

N = 70


def far():
    return torch.arange(N)[:, None] - torch.arange(N)


def buckets():
    return far().clamp(0, 9)


def order():
    return torch.zeros(N, N).masked_fill(far() < 0, -torch.inf)


#: Biases of learned tensors: a table (4, 10), keys (N,) and slopes (4,).
BIASES = {
    "a table": lambda t, k, s: t[:, buckets()],
    "a transposed embedding": lambda t, k, s: F.embedding(buckets(), t.T).permute(2, 0, 1),
    "keys": lambda t, k, s: k[None, None],
    "slopes": lambda t, k, s: -s[:, None, None] * far().abs(),
    "all": lambda t, k, s: t[:, buckets()] + k * s[:, None, None],
    "detached": lambda t, k, s: t[:, buckets()].detach() + k,
    "one of two detached": lambda t, k, s: t[:, buckets()] + t.detach()[:, buckets()] * 2,
    "compared": lambda t, k, s: torch.where(k > 0, 0.0, -5.0) + k,
    "forbidding": lambda t, k, s: torch.where(k > -1, k, -torch.inf)[None, None] + torch.zeros(N, 1),
}
CALLS = {
    "sdpa": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    "product": lambda q, k, v, m: torch.softmax(q @ k.mT / 4 + m, -1) @ v,
}


def learned():
    g = torch.Generator().manual_seed(5)
    tensors = [*qkv(N), torch.randn(4, 10, generator=g), torch.randn(N, generator=g), torch.rand(4, generator=g) / 9]
    tensors[4][0] = 0.5  # the first key: no row without any
    return [x.requires_grad_() for x in tensors]


def gradients(call, tensors):
    out = call(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    found = torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if x is None else x for x, t in zip(found, tensors, strict=True))]


def check(call, compiled):
    exact = gradients(call, [x.detach().double().requires_grad_() for x in learned()])
    near, got = gradients(call, learned()), gradients(compiled, learned())
    largest = max(x.abs().max() for x in exact)
    for one, two, three in zip(exact, near, got, strict=True):
        bound = 8 * ((two - one).abs().max() + 16 * torch.finfo(torch.float32).eps * largest)
        assert (three - one).abs().max() <= bound


SITES = [(name, "sdpa", "block") for name in BIASES]
SITES += [("a table", form, how) for form in ("product", "checkpointed") for how in ("block", "token")]
SITES += [("keys", "sdpa", "token"), ("one of two detached", "checkpointed", "block")]


@pytest.mark.parametrize(("name", "form", "granularity"), SITES)
def test_in_graphs(name, form, granularity):
    attend = CALLS.get(form, CALLS["sdpa"])

    def call(q, k, v, t, keys, s):
        if form == "checkpointed":
            return checkpoint(
                lambda *x: attend(*x[:3], order() + BIASES[name](*x[3:])), q, k, v, t, keys, s, use_reentrant=False
            )
        return attend(q, k, v, order() + BIASES[name](t, keys, s))

    backend = Backend(keep_all(granularity=granularity), inner="aot_eager", min_seq_len=0)
    check(call, torch.compile(call, backend=backend, fullgraph=True))
    refused = "a learned bias has no gradient at token granularity" if granularity == "token" else ""
    computed = "a bias that is computed of learned tensors has its gradient in compiled kernels alone"
    assert [x.reason for x in backend.log.sites] == [computed if "embedding" in name else refused]


def test_a_bias_without_a_gradient_stays_at_token_granularity():
    def call(q, k, v, t, keys, s):
        return CALLS["sdpa"](q, k, v, order() + t.detach()[:, buckets()])

    backend = Backend(keep_all(granularity="token"), inner="aot_eager", min_seq_len=0)
    check(call, torch.compile(call, backend=backend, fullgraph=True))
    assert [x.reason for x in backend.log.sites] == [""]


SCORE_MODS = {
    "keys": lambda t, k, s: lambda x, b, h, i, j: x + k[j],
    "a table": lambda t, k, s: lambda x, b, h, i, j: x + t[h, (i - j).clamp(0, 9)],
    "slopes": lambda t, k, s: lambda x, b, h, i, j: x - s[h] * (i - j).abs(),
    "a product": lambda t, k, s: lambda x, b, h, i, j: x * s[h] + k[j] * s[h],
    "a choice": lambda t, k, s: lambda x, b, h, i, j: torch.where(k[j] > -1, x + k[j], -torch.inf),
    "computed before": lambda t, k, s: (lambda twice: lambda x, b, h, i, j: x + twice[j])(2 * k),
}


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("name", SCORE_MODS)
def test_in_the_functional_form(name, granularity):
    def ours(q, k, v, t, keys, s):
        mask = lambda b, h, i, j: (i >= j) & ((keys[j] > -2) | (i == j))  # noqa: E731
        config = keep_all(granularity=granularity)
        return sparse_attention(q, k, v, config=config, score_mod=SCORE_MODS[name](t, keys, s), mask_mod=mask)

    def dense(q, k, v, t, keys, s):
        at = (
            torch.arange(2)[:, None, None, None],
            torch.arange(4)[:, None, None],
            torch.arange(N)[:, None],
            torch.arange(N),
        )
        logits = SCORE_MODS[name](t, keys, s)(q @ k.mT / 4, *at)
        allowed = (far() >= 0) & ((keys > -2) | (far() == 0))
        return torch.softmax(logits.masked_fill(~allowed, -torch.inf), -1) @ v

    exact = gradients(dense, [x.detach().double().requires_grad_() for x in learned()])
    near, got = gradients(dense, learned()), gradients(ours, learned())
    alive = exact[0].isfinite().all() and all(x.isfinite().all() for x in exact)
    assert alive or name == "a choice"
    largest = max(x.nan_to_num(0.0).abs().max() for x in exact)
    for one, two, three in zip(exact, near, got, strict=True) if alive else ():
        bound = 8 * ((two - one).abs().max() + 16 * torch.finfo(torch.float32).eps * largest)
        assert (three - one).abs().max() <= bound
