"""Layers that share a choice of blocks, in training: their gradients, and activation checkpointing.

A checkpointed body is a graph of its own, which runs again in the backward: a choice must reach every body.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from omnisparse_flex import apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.attention import select as choices
from omnisparse_flex.backend import Backend
from omnisparse_flex.passes.share import place
from tests.helpers.sharing import LENGTH, SHARED, Spy, allowed, chain, checkpointing, sharpened
from tests.helpers.tiny import batch
from tests.passes.test_passes import Capture


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
def test_gradients_equal_dense_under_the_lead_s_map(checkpointed, monkeypatch):
    """Also where both sites are in one checkpointed body, or each is in a body of its own."""
    spy = Spy(monkeypatch)
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared, plain = Stack(2), Stack(2)
    with torch.no_grad():
        apply_omnisparse(shared, SHARED, min_seq_len=0, inner="eager")(x)
    query, key, _, site, _ = spy.layers[1]
    assert spy.chosen == 1 and spy.keep(0) is spy.keep(1)
    assert not torch.equal(spy.keep(1), choices.choose(query, key, dataclasses.replace(site, choice=None)).keep)
    plain.masks = [allowed(spy.keep(1), LENGTH)] * 2
    shared.checkpointed = checkpointed
    want = gradients(plain, x)
    got = gradients(apply_omnisparse(shared, SHARED, min_seq_len=0, inner="aot_eager"), x)
    for name in want:
        # FlexAttention's log-sum-exp is float32.
        torch.testing.assert_close(got[name], want[name], atol=1e-6 * want[name].abs().max().item(), rtol=1e-5)


def test_training_and_inference_choose_alike():
    model, inputs = apply_omnisparse(sharpened(3), SHARED, min_seq_len=0, inner="aot_eager"), batch((LENGTH,))
    maps = []
    for train in (False, True):
        model.train(train)
        with collect_stats(model, maps=True) as stats, torch.set_grad_enabled(train):
            model(**inputs)
        maps.append(torch.stack([stats.block_maps(i) for i in range(3)]))
    assert torch.equal(*maps) and torch.equal(maps[0][0], maps[0][1]) and not torch.equal(maps[0][0], maps[0][2])


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all", "some"])
def test_checkpointing_changes_no_choice(layers, monkeypatch):
    """Training with it, training without and evaluation attend by the same maps, chosen once for each group."""
    spy = Spy(monkeypatch)
    inputs = batch((900, 600))
    model = apply_omnisparse(sharpened(4), SHARED, min_seq_len=0, inner="eager")
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
    model = apply_omnisparse(sharpened(2).train(), SHARED, min_seq_len=0, inner="aot_eager", dynamic=True)
    checkpointing(model)
    static = apply_omnisparse(sharpened(2).train(), SHARED, min_seq_len=0, inner="eager")
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
def test_a_choice_reaches_every_body(name, inner, monkeypatch):
    spy = Spy(monkeypatch)

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
        model = apply_omnisparse(sharpened(2), SHARED, min_seq_len=0, inner=inner)
        checkpointing(model.train(), checkpointed)
        with torch.no_grad(), collect_stats(model, exact=True, maps=True) as stats:
            model(**batch((LENGTH,)))
        told = {name: torch.tensor(x) for name, x in dataclasses.asdict(stats.per_layer()[-1]).items()}
        found.append((told, stats.block_maps(1)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0][0]["layer"] == 1 and found[0][0]["budget"] > 0
