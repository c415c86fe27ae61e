"""Token granularity in whole models: through the graph, in training and under every inner compiler."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.backend import Backend
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.testing import assert_no_square
from tests.helpers.tiny import MODELS, batch, build
from tests.model.test_training import gradients, worst
from tests.model.test_transformers import bracket

TOKENS = {"granularity": "token", "segment_size": 128, "sink_size": 16, "window_size": 64}
#: Keeps every key, but through the whole token path: a recall under 1 is never a dense layer.
EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None, **TOKENS)
SPARSE = OmniSparseConfig(target_recall=0.6, lazy_threshold=0.05, **TOKENS)


def operators(model):
    """How often the rewritten graph calls our token operator, sub-graphs included."""
    graphs = compiled_decoder_of(model).backend.last.root.graph_module.modules()
    return sum("omnisparse_layer" in str(n.target) for g in graphs if hasattr(g, "graph") for n in g.graph.nodes)


@pytest.mark.parametrize("name", MODELS)
def test_full_budget_equals_dense(name, device):
    inputs = batch((900, 700), device)
    real = inputs["attention_mask"].bool()
    model = build(name, device)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        dense, expected = model(**inputs).logits[real], exact(**inputs).logits[real]
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="aot_eager")
    with torch.no_grad(), collect_stats(model) as stats:
        sparse = model(**inputs).logits[real]
    assert [layer.budget > 0 for layer in stats.per_layer()] == [True, True], "keys were gathered"
    with torch.no_grad():
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    assert (sparse.double() - expected).abs().max() <= bracket(expected, dense)
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped
    assert not [note for note in report.notes if "eagerly" in note], report.notes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_dense(checkpointing, device):
    inputs = batch((600, 411), device)
    model = build("qwen2_5_vl", device).train()
    dense, expected = (
        gradients(model, inputs, enabled=False),
        gradients(copy.deepcopy(model).double(), inputs, enabled=False),
    )
    apply_omnisparse(model, EVERYTHING, min_seq_len=0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sparse = gradients(model, inputs, enabled=False)
    assert operators(model) == 2
    for key, grad in sparse.items():
        assert (grad.double() - expected[key]).abs().max() <= bracket(expected[key], dense[key]), key


def test_a_sparse_step_trains_alike_with_checkpointing_and_in_one_graph(device):
    inputs = batch((600, 430), device)
    model = apply_omnisparse(build("llama", device).train(), SPARSE, min_seq_len=0)
    plain = gradients(model, inputs, enabled=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert worst(gradients(model, inputs, enabled=False), plain) < 1e-4
    assert compiled_decoder_of(model).backend.log.graphs == 2


def test_statistics_of_tokens(device):
    inputs = batch((900, 700), device)
    model = apply_omnisparse(
        build("llama", device), dataclasses.replace(SPARSE, target_recall=0.9), min_seq_len=0, inner="aot_eager"
    )
    kept = []
    for train in (False, True):
        model.train(train)
        with collect_stats(model, exact=True, maps=True) as stats, torch.set_grad_enabled(train):
            model(**inputs)
        kept.append(stats.raw.clone())
    assert torch.equal(*kept), "the same selection in training and inference"
    for layer in stats.per_layer():
        assert 0 < layer.density < 1 and layer.budget > 0 and layer.estimated_recall >= 0.9
        assert all(
            0 < low <= mean <= 1.0001 for low, mean in zip(layer.worst_true_recall, layer.true_recall, strict=True)
        )
        assert stats.block_maps(layer.layer).any()


def test_no_square_tensor_and_one_graph_for_many_lengths(device):
    model = build("qwen2_5_vl", device)
    apply_omnisparse(model, SPARSE, min_seq_len=0, inner="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (300, 131, 257, 517, 640):
            model(**batch((length, length - 1), device))
            assert_no_square(compiled_decoder_of(model).backend.last.root.graph_module, length)
    assert compiled_decoder_of(model).backend.log.graphs == 1


@pytest.mark.slow
def test_through_inductor(device):
    inputs = batch((500, 300), device)
    model = build("llama", device)
    with torch.no_grad():
        apply_omnisparse(model, SPARSE, min_seq_len=0, inner="aot_eager")
        expected = model(**inputs).logits
        apply_omnisparse(model, SPARSE, min_seq_len=0, inner="inductor")
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], atol=2e-4, rtol=2e-4)
    assert len(rewrite_report(model).rewritten) == 2


def test_a_learned_bias_stays_dense_by_name(device):
    """Token granularity has gradients for queries, keys and values only: no silent zero for the others."""
    slopes = torch.full((4,), 0.1, device=device, requires_grad=True)

    def biased(q, k, v, slopes):
        places = torch.arange(q.shape[2], device=q.device)
        bias = (places - places[:, None])[None] * slopes[:, None, None]
        mask = torch.where(places <= places[:, None], 0.0, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(bias + mask)[None])

    backend = Backend(SPARSE, min_seq_len=0, inner="aot_eager")
    # As in a model, the projections train too: the dense kernel keeps no LSE when only its bias does (torch 2.11).
    tensors = [torch.randn(1, 4, 320, 16, device=device, requires_grad=True) for _ in range(3)]
    torch.compile(biased, backend=backend)(*tensors, slopes).sum().backward()
    (site,) = backend.log.sites
    assert site.reason == "a learned bias has no gradient at token granularity" and slopes.grad.any()
