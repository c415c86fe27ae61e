"""Each pass by itself: how many it found, what it wrote, that the numbers stay, and what it leaves alone."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import omnisparse_flex.attention.marker  # noqa: F401  (defines it)
from omnisparse_flex.backend import Backend
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.passes import Settings, run_pipeline
from omnisparse_flex.passes.nodes import op_name
from omnisparse_flex.testing import assert_close_to_oracle, assert_no_square, count_hops

EVERYTHING = OmniSparseConfig(target_recall=0.9999999, lazy_threshold=None)
N = 140


class Capture(Backend):
    """A backend that keeps the graph as it came and as it was rewritten."""

    def __init__(self, config=EVERYTHING, inner="eager", min_seq_len=0):
        super().__init__(config, inner=inner, min_seq_len=min_seq_len)

    def __call__(self, graph_module, inputs, **kwargs):
        self.before, self.graph_module = str(graph_module.graph), graph_module
        return super().__call__(graph_module, inputs, **kwargs)

    def reasons(self):
        return [site.skip.reason if site.skip else "" for site in self.last.sites]

    def calls(self):
        """Names of the functions that the graph and its sub-graphs call."""
        return [
            re.sub(r"_[0-9a-f]{16}$", "", op_name(node).rpartition(".")[2])  # ours end in a digest of their constants
            for module in self.graph_module.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
            if node.op == "call_function"
        ]


def qkv(device, kv_heads=4, grad=False, kv_len=N):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, N, 16), (2, kv_heads, kv_len, 16), (2, kv_heads, kv_len, 16)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(grad) for shape in shapes]


def causal(device, kv_len=N):
    return torch.ones(N, kv_len, dtype=torch.bool, device=device).tril(kv_len - N)


def compiled(call, *args, **options):
    backend = Capture(**options)
    return backend, torch.compile(call, backend=backend, fullgraph=True)(*args)


# --- SDPA and its heads ------------------------------------------------------


def expand_then_reshape(x):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, 2, length, dim).reshape(batch, heads * 2, length, dim)


REPEATS = {
    "expand_reshape": expand_then_reshape,
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "torch_repeat_interleave": lambda x: torch.repeat_interleave(x, 2, 1),
    "then_contiguous": lambda x: expand_then_reshape(x).contiguous(),
}


@pytest.mark.parametrize("is_causal", [True, False])
def test_sdpa(is_causal, device):
    tensors = qkv(device)
    backend, out = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), *tensors)
    assert backend.reasons() == [""] and backend.calls() == ["omnisparse_layout", "omnisparse_layer_0"]
    assert_close_to_oracle(out, *tensors, causal(device) if is_causal else None)


def test_sites_of_one_mask_share_its_layout(device):
    """Also where a site attends over another's output: the dense node before it is gone."""
    tensors = qkv(device)

    def three_sites(q, k, v):
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, k, v, is_causal=True), k, v)

    backend, out = compiled(three_sites, *tensors)
    assert backend.calls() == [f"omnisparse_{x}" for x in ("layout", "layer_0", "layer_1", "layout", "layer_2")]
    torch.testing.assert_close(out, three_sites(*tensors))


def test_sites_of_other_lengths_have_a_layout_of_their_own(device):
    (q, k, v), (_, far_k, far_v) = qkv(device), qkv(device, kv_len=300)
    backend, _ = compiled(
        lambda *t: F.scaled_dot_product_attention(F.scaled_dot_product_attention(*t[:3]), *t[3:]), q, k, v, far_k, far_v
    )
    assert backend.calls().count("omnisparse_layout") == 2


def test_sdpa_scale_and_upper_left_causality(device):
    tensors = qkv(device, kv_len=200)
    backend, out = compiled(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5), *tensors
    )
    assert backend.reasons() == [""]
    assert_close_to_oracle(out, *tensors, torch.ones(N, 200, dtype=torch.bool, device=device).tril(), scale=0.5)


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_go_back_to_their_own(name, device):
    tensors, repeat = qkv(device, kv_heads=2), REPEATS[name]
    backend, out = compiled(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True), *tensors
    )
    (site,) = backend.last.sites
    assert site.key.meta["example_value"].shape[1] == 2
    assert backend.calls() == ["omnisparse_layout", "omnisparse_layer_0"], "the copies are dead"
    assert_close_to_oracle(out, *tensors, causal(device))


def test_heads_tiled_in_another_order_are_left_alone(device):
    tensors = qkv(device, kv_heads=2)
    backend, out = compiled(
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), *tensors
    )
    (site,) = backend.last.sites
    assert site.rewritten and site.key.meta["example_value"].shape[1] == 4
    assert_close_to_oracle(out, tensors[0], *(x.repeat(1, 2, 1, 1) for x in tensors[1:]))


def test_marker(device):
    padding = torch.arange(N, device=device) >= torch.tensor([[0], [50]], device=device)

    def call(q, k, v, padding):
        return torch.ops.omnisparse.attn(q, k, v, padding, None, True, 0.25, 3, 2.0)

    tensors = qkv(device, kv_heads=2)
    backend, out = compiled(call, *tensors, padding)
    (site,) = backend.last.sites
    assert (site.kind, site.layer, site.softcap, site.scale) == ("marker", 3, 2.0, 0.25)
    assert backend.calls() == ["omnisparse_layout", "omnisparse_layer_3"]
    assert_close_to_oracle(out, *tensors, causal(device) & padding[:, None, None], softcap=2.0, scale=0.25)


# --- matmul, softmax, matmul -------------------------------------------------

EAGER = {
    "plain": lambda q, k, v, m: torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v,
    "added": lambda q, k, v, m: torch.softmax(q @ k.transpose(-2, -1) / 4.0 + m.log(), dim=-1) @ v,
    "filled": lambda q, k, v, m: ((q @ k.mT) * 0.25).masked_fill(~m.bool(), float("-inf")).softmax(-1) @ v,
    "scaled_query": lambda q, k, v, m: torch.matmul(F.softmax((q * 0.25) @ k.permute(0, 1, 3, 2), dim=-1), v),
    "upcast": lambda q, k, v, m: F.softmax(q @ k.mT * 0.25, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "no_dropout": lambda q, k, v, m: F.dropout(torch.softmax(q @ k.mT * 0.25, -1), 0.1, training=False) @ v,
}


@pytest.mark.parametrize("name", EAGER)
def test_eager_attention(name, device):
    tensors, keys = qkv(device), torch.ones(1, 1, 1, N, device=device)
    keys[..., 100:] = 0
    backend, out = compiled(EAGER[name], *tensors, keys)
    (site,) = backend.last.sites
    assert site.kind == "eager" and site.rewritten, site.skip
    assert not {"matmul", "softmax"} & set(backend.calls())
    assert_close_to_oracle(out, *tensors, keys.bool() if name in ("added", "filled") else None)


def probabilities_read(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights.mean()


def logits_read(q, k, v):
    logits = q @ k.mT
    return torch.softmax(logits, -1) @ v, logits.amax()


NO_SITES = {
    "probabilities_read": probabilities_read,
    "logits_read": logits_read,
    "softmax_over_queries": lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v,
    "sigmoid": lambda q, k, v: torch.sigmoid(q @ k.mT) @ v,
    "no_attention": lambda q, k, v: F.relu(q) @ k.mT @ v,
}


@pytest.mark.parametrize("name", NO_SITES)
def test_nothing_matched_leaves_the_graph_as_it_was(name, device):
    tensors = qkv(device)
    backend, out = compiled(NO_SITES[name], *tensors)
    assert backend.last.sites == [] and not backend.last.modified
    assert str(backend.graph_module.graph) == backend.before
    torch.testing.assert_close(out, NO_SITES[name](*tensors), rtol=0, atol=0)


# --- flex_attention ----------------------------------------------------------


def flex_call(mask_mod, device, score_mod=None, **options):
    block_mask = create_block_mask(mask_mod, None, None, N, N, device=device) if mask_mod else None

    def call(q, k, v):
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, **options)

    return call


# Dynamo instantiates autograd functions when a mod indexes a captured tensor.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_flex_keeps_its_mods_and_loses_its_block_mask(device):
    ids, slopes = torch.arange(N, device=device) // 60, torch.rand(4, device=device)
    tensors = qkv(device)

    def mask_mod(b, h, q, kv):
        return (ids[q] == ids[kv]) & (q >= kv)

    def score_mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv)

    backend, out = compiled(flex_call(mask_mod, device, score_mod), *tensors)
    (site,) = backend.last.sites
    assert site.kind == "flex" and site.rewritten, site.skip
    assert count_hops(backend.graph_module) == 0, "the operator is back only when the call is traced"
    mask = (ids[:, None] == ids) & causal(device)
    assert_close_to_oracle(out, *tensors, mask, score_mod=score_mod)


FLEX_REFUSED = {
    "no_block_mask": (None, "flex_attention has a block mask without a mask_mod: its lists alone define it"),
    "log_sum_exp": (lambda b, h, q, kv: q >= kv, "flex_attention returns its log-sum-exp"),
}


@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
@pytest.mark.parametrize("name", FLEX_REFUSED)
def test_flex_left_alone(name, device):
    mask_mod, reason = FLEX_REFUSED[name]
    returns_lse = name == "log_sum_exp"
    flex, tensors = flex_call(mask_mod, device, return_lse=returns_lse), qkv(device)

    def call(q, k, v):
        out = flex(q, k, v)
        return out[0] * out[1][..., None] if returns_lse else out

    backend, out = compiled(call, *tensors)
    assert backend.reasons() == [reason] and count_hops(backend.graph_module) == 1
    torch.testing.assert_close(out, call(*tensors))


# --- sub-graphs --------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpointed_bodies(inner, device):
    def layer(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def call(q, k, v, keys):
        mask = torch.ones(N, N, dtype=torch.bool, device=q.device).tril() & keys[:, None, None]
        first = checkpoint(layer, q, k, v, mask, use_reentrant=False)
        return checkpoint(layer, first, k, v, mask, use_reentrant=False)

    tensors = qkv(device, grad=True)
    keys = torch.arange(N, device=device) < torch.tensor([[N], [90]], device=device)
    backend, out = compiled(call, *tensors, keys, inner=inner)
    assert backend.reasons() == ["", ""] and backend.calls().count("tag_activation_checkpoint") == 2
    assert_no_square(backend.graph_module, N)
    grad = torch.ones_like(out)
    expected = call(*tensors, keys)
    torch.testing.assert_close(out, expected)
    for got, wanted in zip(*(torch.autograd.grad(x, tensors, grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# --- the pipeline ------------------------------------------------------------


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


DENSE = OmniSparseConfig(target_recall=1.0)
REFUSALS = {
    "dropout": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        {},
        "attention dropout is 0.1: no flex kernel drops weights",
    ),
    "eager_dropout": (
        lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.25) @ v,
        {},
        "attention dropout is 0.25: no flex kernel drops weights",
    ),
    "short": (sdpa, {"min_seq_len": 141}, "fewer than min_seq_len = 141 queries"),
    "one_query": (lambda q, k, v: sdpa(q[:, :, :1], k, v), {"min_seq_len": 1}, "one query: decoding stays dense"),
    "dense_layer": (sdpa, {"config": DENSE}, "dense by target_recall = 1.0"),
    "three_dimensions": (lambda q, k, v: sdpa(q[0], k[0], v[0]), {}, "query, key and value are not (B, H, N, D)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_their_reason_and_change_nothing(name, device):
    call, options, reason = REFUSALS[name]
    backend, _ = compiled(call, *qkv(device), **options)
    assert backend.reasons() == [reason]
    assert str(backend.graph_module.graph) == backend.before


def test_one_refusal_does_not_stop_the_others(device):
    tensors = qkv(device)
    backend, _ = compiled(lambda q, k, v: sdpa(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), k, v), *tensors)
    assert backend.reasons() == ["attention dropout is 0.1: no flex kernel drops weights", ""]
    assert backend.calls() == ["scaled_dot_product_attention", "omnisparse_layout", "omnisparse_layer_1"]


def test_pipeline_is_idempotent(device):
    backend, _ = compiled(sdpa, *qkv(device))
    after = str(backend.graph_module.graph)
    again = run_pipeline(backend.graph_module, Settings(EVERYTHING, lists=False))
    assert again.sites == [] and not again.modified and str(backend.graph_module.graph) == after


def test_sites_without_numbers_count_up_and_take_their_layer_target(device):
    config = OmniSparseConfig(target_recall=(0.9999999, 1.0, 0.9999999), lazy_threshold=None)
    backend, _ = compiled(lambda q, k, v: sdpa(sdpa(sdpa(q, k, v), k, v), k, v), *qkv(device), config=config)
    assert [site.layer for site in backend.last.sites] == [0, 1, 2]
    assert backend.reasons() == ["", "dense by target_recall = 1.0", ""]
