"""Layers that share a choice of blocks: who follows whom, what they compute, and what is said of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from omnisparse_flex import ConfigError, apply_omnisparse, calibrate, collect_stats, rewrite_report
from omnisparse_flex.attention import select as choices
from omnisparse_flex.attention import select_op
from omnisparse_flex.backend import Backend
from omnisparse_flex.masks.statistics import SAMPLED_ROWS
from omnisparse_flex.testing.oracle import dense_attention, dense_logits
from tests.helpers.sharing import LENGTH, SHARED, Spy, allowed, chain, checkpointing, sharpened
from tests.helpers.tiny import batch, build
from tests.passes.test_passes import Capture, qkv

# --- what followers compute --------------------------------------------------


def test_followers_attend_by_the_choice_of_their_lead(monkeypatch):
    spy = Spy(monkeypatch)
    model = apply_omnisparse(sharpened(5).double(), SHARED, min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(**batch((LENGTH,)))
    assert len(spy.layers) == 5 and spy.chosen == 3
    assert spy.keep(0) is spy.keep(1) and spy.keep(2) is spy.keep(3) and spy.keep(4) is None
    assert not torch.equal(spy.keep(0), spy.keep(2))
    for i, (query, key, value, site, out) in enumerate(spy.layers[:4]):
        own = choices.choose(query, key, dataclasses.replace(site, choice=None)).keep
        assert torch.equal(own, site.choice.keep) == (i in (0, 2))
        mask = allowed(site.choice.keep, LENGTH)
        assert mask.sum() < 0.9 * mask.shape[1] * LENGTH * (LENGTH + 1) / 2
        torch.testing.assert_close(out, dense_attention(query, key, value, mask=mask, scale=site.scale))
    notes = rewrite_report(model).notes
    assert [note for note in notes if "share_layers" in note] == [
        "share_layers: layers 1 use the blocks that layer 0 chooses",
        "share_layers: layers 3 use the blocks that layer 2 chooses",
    ]


def test_dense_layers_do_not_count(monkeypatch):
    spy = Spy(monkeypatch)
    config = dataclasses.replace(SHARED, target_recall=(0.5, 1.0, 0.9, 0.5, 1.0), share_layers=3)
    model = apply_omnisparse(sharpened(5), config, min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(**batch((600,)))
    assert spy.chosen == 1 and "layers 2, 3 use the blocks that layer 0 chooses" in str(rewrite_report(model))
    # All that a follower's target does is to say that it is not dense; a padded batch hides the others from SDPA.
    sparse = [site for *_, site, _ in spy.layers if site.config is not None]
    assert len(sparse) == 3 and all(site.choice is sparse[0].choice for site in sparse)


def test_one_graph_for_two_lengths():
    """The follower reads the maps of this call's length."""
    inputs = [batch((n,)) for n in (400, 700)]
    with torch.no_grad():
        dynamic = apply_omnisparse(sharpened(3), SHARED, min_seq_len=0, inner="aot_eager", dynamic=True)
        found = [dynamic(**x).logits for x in inputs]
        assert rewrite_report(dynamic).graphs == 1
        static = apply_omnisparse(sharpened(3), SHARED, min_seq_len=0, inner="eager")
        for x, logits in zip(inputs, found, strict=True):
            torch.testing.assert_close(static(**x).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductor_chooses_once_for_each_group(checkpointed, monkeypatch):
    calls, compiled = [], select_op.compiled
    monkeypatch.setattr(select_op, "compiled", lambda *args: calls.append(1) or compiled(*args))
    inputs = batch((LENGTH,))
    with torch.no_grad():
        want = apply_omnisparse(sharpened(3), SHARED, min_seq_len=0, inner="eager")(**inputs).logits
        assert not calls
        model = apply_omnisparse(sharpened(3).train(checkpointed), SHARED, min_seq_len=0, inner="inductor")
        model = checkpointing(model) if checkpointed else model
        torch.testing.assert_close(model(**inputs).logits, want, atol=1e-3, rtol=1e-3)
    assert len(calls) == 2


@pytest.mark.slow
@fresh_cache()
def test_a_shared_choice_is_cached_like_any_graph():
    def run():
        torch._dynamo.reset()
        counters.clear()
        tensors = [x[:, :2] for x in qkv("cpu")]
        with torch.no_grad():
            out = torch.compile(chain(2), backend=Backend(SHARED, min_seq_len=0), dynamic=False)(*tensors)
        return out, dict(counters["aot_autograd"])

    first, cold = run()
    again, warm = run()
    assert "autograd_cache_bypass" not in cold and "autograd_cache_bypass" not in warm
    assert warm.get("autograd_cache_hit", 0) >= 1 and torch.equal(first, again)


# --- who follows whom --------------------------------------------------------


def grouped(call, *tensors, share_layers=2, **changes):
    """The graph that is written for ``call``, and its report."""
    backend = Capture(dataclasses.replace(SHARED, share_layers=share_layers, **changes))
    out = torch.compile(call, backend=backend, fullgraph=True)(*tensors)
    torch.testing.assert_close(out.shape, call(*tensors).shape)
    return backend, [note for note in backend.log.notes if note.startswith("share_layers")]


def named(*names):
    return [f"omnisparse_{name}" for name in names]


def test_without_sharing_the_graph_is_as_ever(device):
    backend, notes = grouped(chain(2), *qkv(device), share_layers=1)
    assert backend.calls() == named("layout", "layer_0", "layer_1") and not notes
    backend, notes = grouped(chain(1), *qkv(device), share_layers=4)
    assert backend.calls() == named("layout", "layer_0") and not notes


def test_a_group_has_one_choice(device):
    backend, notes = grouped(chain(5), *qkv(device))
    want = ("layout", "choice_0", "layer_0", "layer_1", "choice_2", "layer_2", "layer_3", "layer_4")
    assert backend.calls() == named(*want)
    assert notes == [f"share_layers: layers {i + 1} use the blocks that layer {i} chooses" for i in (0, 2)]
    backend, notes = grouped(chain(5), *qkv(device), share_layers=9)
    assert backend.calls().count("omnisparse_choice_0") == 1 and len(backend.calls()) == 7
    assert notes == ["share_layers: layers 1, 2, 3, 4 use the blocks that layer 0 chooses"]


def test_another_mask_starts_another_group(device):
    backend, notes = grouped(chain(4, [True, False, False, True]), *qkv(device), share_layers=3)
    assert [site.lead and site.lead.layer for site in backend.last.sites] == [None, None, 1, None]
    assert backend.calls() == named("layout", "layer_0", "layout", "choice_1", "layer_1", "layer_2", "layer_3")
    why = "another mask, length or number of heads than the layer before"
    assert f"share_layers: layers 1, 3 choose for themselves: {why}" in notes


def test_other_lengths_and_heads_start_another_group(device):
    few, far = qkv(device, kv_heads=2)[1:], qkv(device, kv_len=300)[1:]

    def call(q, k, v, far_k, far_v, few_k, few_v):
        x = F.scaled_dot_product_attention(q, k, v)
        x = F.scaled_dot_product_attention(x, far_k, far_v)
        return F.scaled_dot_product_attention(x, few_k, few_v, enable_gqa=True)

    backend, notes = grouped(call, *qkv(device), *far, *few, share_layers=3)
    assert not any("choice" in name for name in backend.calls()) and "layers 1, 2 choose for themselves" in notes[0]


def test_refused_sites_are_nobody_s_lead(device):
    def call(q, k, v):
        q = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.0)
        q = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=1e-9)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    backend, _ = grouped(call, *qkv(device))
    sites = backend.last.sites
    assert sites[1].skip is not None and sites[2].lead is sites[0]


# --- what is said of them ----------------------------------------------------


def test_statistics_are_of_a_follower_s_own_attention(monkeypatch):
    spy = Spy(monkeypatch)
    config = dataclasses.replace(SHARED, last_rows=0)
    model = apply_omnisparse(sharpened(2), config, min_seq_len=0, inner="eager")
    with torch.no_grad(), collect_stats(model, exact=True, maps=True) as stats:
        model(**batch((LENGTH,)))
    lead, follower = stats.per_layer()
    assert torch.equal(stats.block_maps(0), stats.block_maps(1))
    query, key, _, site, _ = spy.layers[1]
    blocks = site.choice.layout.some.expand_as(site.choice.keep)
    assert follower.density == pytest.approx((site.choice.keep.sum() / blocks.sum()).item(), rel=1e-5)
    assert lead.density > follower.density, "its selection has a price"
    assert (lead.budget, lead.active_share) == (follower.budget, follower.active_share)

    rows = (torch.arange(SAMPLED_ROWS) + 1) * LENGTH // SAMPLED_ROWS - 1
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mass = dense_logits(query, key, site.scale).masked_fill(~seen, float("-inf")).softmax(-1)
    recall = (mass * allowed(site.choice.keep, LENGTH)).sum(-1)[0, :, rows]
    assert torch.tensor(follower.true_recall) == pytest.approx(recall.mean(-1).float(), abs=1e-4)
    assert torch.tensor(follower.worst_true_recall) == pytest.approx(recall.amin(-1).float(), abs=1e-4)
    assert lead.estimated_recall != follower.estimated_recall and 0 < follower.estimated_recall < 1


def test_the_report_before_the_first_run_tells():
    model = apply_omnisparse(build("llama", "cpu"), SHARED, min_seq_len=0)
    assert "share_layers: layers 1 use the blocks that layer 0 chooses" in rewrite_report(model).notes


def test_calibration_is_refused():
    model, rule = build("llama", "cpu"), "share_layers must be 1 to be calibrated, got 2"
    with pytest.raises(ConfigError, match=rule):
        calibrate(model, [batch((300,))], 0.9, config=SHARED)
    with pytest.raises(ConfigError, match=rule):
        calibrate(apply_omnisparse(model, SHARED), [batch((300,))], 0.9)
