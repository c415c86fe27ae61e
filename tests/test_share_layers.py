"""Layers that share a choice of blocks: who follows whom, what they compute, and what is said of them."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from test_passes import Capture, qkv
from tiny import batch, build
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from omnisparse_flex import (
    ConfigError,
    OmniSparseConfig,
    apply_omnisparse,
    calibrate,
    collect_stats,
    rewrite_report,
    select_op,
)
from omnisparse_flex import choice as choices
from omnisparse_flex.backend import Backend
from omnisparse_flex.masks.record import SAMPLED_ROWS
from omnisparse_flex.masks.select import BLOCK
from omnisparse_flex.passes.share import place
from omnisparse_flex.reference import dense_attention, dense_logits, expand_block_map

RULES = {"target_recall": 0.5, "sink_size": 16, "window_size": 64, "lazy_threshold": None}
ALONE = OmniSparseConfig(**RULES)
SHARED = OmniSparseConfig(**RULES, share_layers=2)
LENGTH = 1100


class Spy:
    """What every layer attended with, and how often blocks were chosen, in graphs that run eagerly."""

    def __init__(self, monkeypatch):
        self.layers, self.chosen = [], 0
        attending, selecting = sys.modules["omnisparse_flex.passes.calls"].attend, choices.select_blocks

        def attend(query, key, value, site):
            out = attending(query, key, value, site)
            self.layers.append((query, key, value, site, out))
            return out

        def select(*args, **kwargs):
            self.chosen += 1
            return selecting(*args, **kwargs)

        monkeypatch.setattr("omnisparse_flex.passes.calls.attend", attend)
        monkeypatch.setattr(choices, "select_blocks", select)

    def keep(self, layer):
        """The map that a layer was given, or None."""
        choice = self.layers[layer][3].choice
        return None if choice is None else choice.keep


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def sharpened(name="llama", layers=4, factor=30.0, **changes):
    """A model whose layers look at different blocks."""
    model = build(name, "cpu", num_hidden_layers=layers, **changes)
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.weight.data.mul_(factor)
    return model


def allowed(keep, length, groups):
    """The dense mask of a causal layer's block map."""
    kept = expand_block_map(keep, length, length, BLOCK).repeat_interleave(groups, 1)
    return kept & torch.ones(length, length, dtype=torch.bool).tril()


# --- what followers compute --------------------------------------------------


def test_followers_attend_by_the_choice_of_their_lead(spy):
    model = apply_omnisparse(sharpened(layers=5).double(), SHARED, min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(**batch((LENGTH,)))
    assert len(spy.layers) == 5 and spy.chosen == 3
    assert spy.keep(0) is spy.keep(1) and spy.keep(2) is spy.keep(3) and spy.keep(4) is None
    assert not torch.equal(spy.keep(0), spy.keep(2))
    for i, (query, key, value, site, out) in enumerate(spy.layers[:4]):
        own = choices.choose(query, key, dataclasses.replace(site, choice=None)).keep
        assert torch.equal(own, site.choice.keep) == (i in (0, 2))
        mask = allowed(site.choice.keep, LENGTH, 2)
        assert mask.sum() < 0.9 * mask.shape[1] * LENGTH * (LENGTH + 1) / 2
        torch.testing.assert_close(out, dense_attention(query, key, value, mask=mask, scale=site.scale))
    notes = rewrite_report(model).notes
    assert [note for note in notes if "share_layers" in note] == [
        "share_layers: layers 1 use the blocks that layer 0 chooses",
        "share_layers: layers 3 use the blocks that layer 2 chooses",
    ]


def test_dense_layers_do_not_count(spy):
    config = dataclasses.replace(SHARED, target_recall=(0.5, 1.0, 0.9, 0.5, 1.0), share_layers=3)
    model = apply_omnisparse(sharpened(layers=5), config, min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(**batch((600,)))
    assert spy.chosen == 1 and "layers 2, 3 use the blocks that layer 0 chooses" in str(rewrite_report(model))
    # All that a follower's target does is to say that it is not dense; a padded batch hides the others from SDPA.
    sparse = [site for *_, site, _ in spy.layers if site.config is not None]
    assert len(sparse) == 3 and all(site.choice is sparse[0].choice for site in sparse)


class Stack(nn.Module):
    """Layers of attention whose masks can be given; ``checkpointed``: so many to a body, 0: no bodies."""

    def __init__(self, layers=3, checkpointed=0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 96, dtype=torch.float64) for _ in range(layers))
        self.masks, self.checkpointed = [None] * layers, checkpointed
        for layer in self.layers:
            layer.weight.data.mul_(4)

    def attend(self, x, i):
        q, k, v = self.layers[i](x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[i], is_causal=self.masks[i] is None)
        return x + out.transpose(1, 2).flatten(2)

    def attend_from(self, x, first, last):
        for i in range(first, last):
            x = self.attend(x, i)
        return x

    def forward(self, x):
        if not self.checkpointed:
            return self.attend_from(x, 0, len(self.layers))
        for i in range(0, len(self.layers), self.checkpointed):
            x = checkpoint(self.attend_from, x, i, i + self.checkpointed, use_reentrant=False)
        return x


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_gradients_equal_dense_under_the_lead_s_map(checkpointed, spy):
    """Also where both sites are in one checkpointed body, or each is in a body of its own."""
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared, plain = Stack(2), Stack(2)
    with torch.no_grad():
        apply_omnisparse(shared, SHARED, min_seq_len=0, inner="eager")(x)
    query, key, _, site, _ = spy.layers[1]
    assert spy.chosen == 1 and spy.keep(0) is spy.keep(1)
    assert not torch.equal(spy.keep(1), choices.choose(query, key, dataclasses.replace(site, choice=None)).keep)
    plain.masks = [allowed(spy.keep(1), LENGTH, 1)] * 2
    shared.checkpointed = checkpointed
    want = gradients(plain, x)
    got = gradients(apply_omnisparse(shared, SHARED, min_seq_len=0, inner="aot_eager"), x)
    for name in want:
        # FlexAttention's log-sum-exp is float32.
        torch.testing.assert_close(got[name], want[name], atol=1e-6 * want[name].abs().max().item(), rtol=1e-5)


def test_training_and_inference_choose_alike():
    model, inputs = apply_omnisparse(sharpened(layers=3), SHARED, min_seq_len=0, inner="aot_eager"), batch((LENGTH,))
    maps = []
    for train in (False, True):
        model.train(train)
        with collect_stats(model, maps=True) as stats, torch.set_grad_enabled(train):
            model(**inputs)
        maps.append(torch.stack([stats.block_maps(i) for i in range(3)]))
    assert torch.equal(*maps) and torch.equal(maps[0][0], maps[0][1]) and not torch.equal(maps[0][0], maps[0][2])


def test_one_graph_for_two_lengths():
    """The follower reads the maps of this call's length."""
    inputs = [batch((n,)) for n in (400, 700)]
    with torch.no_grad():
        dynamic = apply_omnisparse(sharpened(layers=3), SHARED, min_seq_len=0, inner="aot_eager", dynamic=True)
        found = [dynamic(**x).logits for x in inputs]
        assert rewrite_report(dynamic).graphs == 1
        static = apply_omnisparse(sharpened(layers=3), SHARED, min_seq_len=0, inner="eager")
        for x, logits in zip(inputs, found, strict=True):
            torch.testing.assert_close(static(**x).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductor_chooses_once_for_each_group(checkpointed, monkeypatch):
    calls, compiled = [], select_op.compiled
    monkeypatch.setattr(select_op, "compiled", lambda *args: calls.append(1) or compiled(*args))
    inputs = batch((LENGTH,))
    with torch.no_grad():
        want = apply_omnisparse(sharpened(layers=3), SHARED, min_seq_len=0, inner="eager")(**inputs).logits
        assert not calls
        model = apply_omnisparse(sharpened(layers=3).train(checkpointed), SHARED, min_seq_len=0, inner="inductor")
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
    backend = Capture(dataclasses.replace(ALONE, share_layers=share_layers, **changes))
    out = torch.compile(call, backend=backend, fullgraph=True)(*tensors)
    torch.testing.assert_close(out.shape, call(*tensors).shape)
    return backend, [note for note in backend.log.notes if note.startswith("share_layers")]


def chain(layers, is_causal=None):
    orders = [True] * layers if is_causal is None else is_causal

    def call(q, k, v):
        for order in orders:
            q = F.scaled_dot_product_attention(q, k, v, is_causal=order)
        return q

    return call


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


# --- activation checkpointing ------------------------------------------------


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def checkpointing(model, layers=None):
    """Every layer in a body of its own, or some of them."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = layers is None or i in layers
    return model


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all", "some"])
def test_checkpointing_changes_no_choice(layers, spy):
    """Training with it, training without and evaluation attend by the same maps, chosen once for each group."""
    inputs = batch((900, 600))
    model = apply_omnisparse(sharpened(layers=4), SHARED, min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(**inputs)
    evaluated = [spy.keep(i) for i in range(4)]
    assert spy.chosen == 2 and not torch.equal(evaluated[0], evaluated[2])
    want = loss_and_gradients(model.train(), inputs)
    checkpointing(model, layers)
    spy.layers, spy.chosen = [], 0
    got = loss_and_gradients(model, inputs)
    trained = [spy.keep(i) for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))
    again = sorted(range(4) if layers is None else layers, reverse=True)
    if len(spy.layers) > 4:  # torch 2.11 computes nothing again without a partitioner
        assert len(spy.layers) == 4 + len(again) and spy.chosen == 2 + sum(i % 2 == 0 for i in again)
        assert all(torch.equal(spy.keep(4 + place), trained[i]) for place, i in enumerate(again))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert [note for note in rewrite_report(model).notes if "share_layers" in note] == [
        f"share_layers: layers {i + 1} use the blocks that layer {i} chooses" for i in (0, 2)
    ]


def test_checkpointed_layers_share_in_one_graph_for_two_lengths():
    model = apply_omnisparse(sharpened(layers=2).train(), SHARED, min_seq_len=0, inner="aot_eager", dynamic=True)
    checkpointing(model)
    static = apply_omnisparse(sharpened(layers=2).train(), SHARED, min_seq_len=0, inner="eager")
    for length in (400, 600):
        got, want = (loss_and_gradients(each, batch((length,))) for each in (model, static))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert rewrite_report(model).graphs == 1


def test_a_backward_keeps_the_choice_instead_of_choosing_again():
    """The partitioner keeps what one body reads of another, so that both directions see one map, in all layers."""
    graphs = []

    def inner(graph_module, inputs):
        keep = lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward)  # noqa: E731
        compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        return compiler(graph_module, inputs)

    x = torch.randn(1, 600, 32, dtype=torch.float64)
    gradients(torch.compile(Stack(2, checkpointed=1), backend=Backend(SHARED, min_seq_len=0, inner=inner)), x)
    sorts = [sum("sort" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert len(sorts) == 2 and sorts[0] > 0 and sorts[1] == 0


def in_body(*calls):
    """A checkpointed body that makes these calls one after the other."""

    def call(q, k, v):
        def body(q, k, v):
            for each in calls:
                q = each(q, k, v)
            return q

        return checkpoint(body, q, k, v, use_reentrant=False, preserve_rng_state=len(calls) > 1)

    return call


def causal_site(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


PLACES = {
    "bodies": [in_body(causal_site), in_body(causal_site), in_body(causal_site)],
    "body_then_outside": [in_body(causal_site), causal_site, causal_site],
    "outside_then_body": [causal_site, in_body(causal_site, causal_site)],
    "between": [causal_site, in_body(causal_site), causal_site],
    "from_a_body_in_a_body": [in_body(in_body(causal_site), causal_site), in_body(causal_site)],
    "into_a_body_in_a_body": [in_body(causal_site, in_body(causal_site)), causal_site],
    "from_depth_to_depth": [in_body(in_body(causal_site)), in_body(causal_site, in_body(causal_site))],
}


TRACED = ("bodies", "outside_then_body", "from_depth_to_depth")


@pytest.mark.parametrize(("name", "inner"), [*((x, "eager") for x in PLACES), *((x, "aot_eager") for x in TRACED)])
def test_a_choice_reaches_every_body(name, inner, spy):
    def call(q, k, v):
        for each in PLACES[name]:
            q = each(q, k, v)
        return q

    generator = torch.Generator().manual_seed(0)
    tensors = [(3 * torch.randn(1, 2, 700, 16, generator=generator)).requires_grad_() for _ in range(3)]
    results, config = [], dataclasses.replace(SHARED, share_layers=3)
    for function in (chain(3), call):
        backend = Capture(config, inner=inner)
        out = torch.compile(function, backend=backend, fullgraph=True)(*tensors)
        assert [site.lead is None for site in sorted(backend.last.sites, key=place)] == [True, False, False]
        assert sum("choice" in name for name in backend.calls()) == 1
        assert spy.chosen == (1 if inner == "eager" else 2)  # which traces twice
        results.append((out, torch.autograd.grad(out.square().sum(), tensors)))
        spy.chosen = 0
    torch.testing.assert_close(*results)
    assert (results[0][0] - causal_site(*tensors)).abs().max() > 1e-2


RECORDING = [pytest.param("eager"), pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("inner", RECORDING)
def test_a_record_outside_tells_of_a_choice_inside(inner):
    """Bodies write no records; that of a follower outside has its lead's budgets all the same."""
    found = []
    for checkpointed in ((), (0,)):
        model = apply_omnisparse(sharpened(layers=2), SHARED, min_seq_len=0, inner=inner)
        checkpointing(model.train(), checkpointed)
        with torch.no_grad(), collect_stats(model, exact=True, maps=True) as stats:
            model(**batch((LENGTH,)))
        told = {name: torch.tensor(x) for name, x in dataclasses.asdict(stats.per_layer()[-1]).items()}
        found.append((told, stats.block_maps(1)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0][0]["layer"] == 1 and found[0][0]["budget"] > 0


# --- what is said of them ----------------------------------------------------


def test_statistics_are_of_a_follower_s_own_attention(spy):
    config = dataclasses.replace(SHARED, last_rows=0)
    model = apply_omnisparse(sharpened(layers=2), config, min_seq_len=0, inner="eager")
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
    recall = (mass * allowed(site.choice.keep, LENGTH, 2)).sum(-1)[0, :, rows]
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
