"""A whole model with logit sinks, windows in every second layer, and experts."""

from __future__ import annotations

import copy

import pytest
import torch

from omnisparse_flex import (
    ConfigError,
    OmniSparseCache,
    OmniSparseConfig,
    apply_omnisparse,
    remove_omnisparse,
    rewrite_report,
)
from omnisparse_flex.backend import Backend
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.hf import attention_forward
from tests.helpers.slim import changed, half_lazy, prompt, steps
from tests.helpers.slim_oracle import masked_like
from tests.helpers.tiny import batch, build
from tests.model.test_training import gradients, worst
from tests.model.test_transformers import bracket

EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None)
TOKENS = {"granularity": "token", "segment_size": 128, "sink_size": 16, "window_size": 64}
CONFIGS = {
    "block": EVERYTHING,
    "token": OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None, **TOKENS),
}
SPARSE = {
    "block": OmniSparseConfig(target_recall=0.6, sink_size=16, window_size=64),
    "token": OmniSparseConfig(target_recall=0.6, lazy_threshold=0.05, **TOKENS),
}


def is_sink(name):
    return name.endswith("sinks")


@pytest.mark.parametrize("granularity", CONFIGS)
def test_full_budget_equals_dense(granularity, device):
    inputs = batch((300, 211), device)
    real = inputs["attention_mask"].bool()
    model = build("gpt_oss", device)
    exact = copy.deepcopy(model).double()
    without = copy.deepcopy(model)
    for layer in without.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, -1e4)
    with torch.no_grad():
        dense, expected = model(**inputs).logits[real], exact(**inputs).logits[real]
        assert (without(**inputs).logits[real] - dense).abs().max() > 0.01, "sinks without effect: a test of nothing"
    dense_grads, expected_grads = (gradients(x, inputs, enabled=False) for x in (model, exact))
    assert min(grad.abs().max() for name, grad in expected_grads.items() if is_sink(name)) > 1e-6

    apply_omnisparse(model, CONFIGS[granularity], min_seq_len=0, inner="eager")
    with torch.no_grad():
        sparse = model(**inputs).logits[real]
        assert compiled_decoder_of(model).backend.log.graphs == 1
    assert (sparse.double() - expected).abs().max() <= bracket(expected, dense)
    for key, grad in gradients(model, inputs, enabled=False).items():
        error = (grad.double() - expected_grads[key]).abs().max()
        assert error <= bracket(expected_grads[key], dense_grads[key]), key
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped
    assert not [note for note in report.notes if "eagerly" in note], report.notes
    remove_omnisparse(model)
    assert model.config._attn_implementation == "eager"


def test_full_budget_generates_the_same(device):
    inputs = batch((100, 70), device)
    model = build("gpt_oss", device)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    assert len(rewrite_report(model).rewritten) == 2


@pytest.mark.parametrize("granularity", SPARSE)
def test_a_sparse_step_trains_its_sinks_alike_with_checkpointing(granularity, device):
    inputs = batch((600, 430), device)
    model = apply_omnisparse(build("gpt_oss", device).train(), SPARSE[granularity], min_seq_len=0, inner="eager")
    plain = gradients(model, inputs, enabled=False)
    assert all(grad.any() for name, grad in plain.items() if is_sink(name))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert worst(gradients(model, inputs, enabled=False), plain) < 1e-4
    assert compiled_decoder_of(model).backend.log.graphs == 2 and len(rewrite_report(model).rewritten) == 2


@pytest.mark.parametrize(
    ("config", "least", "reason"),
    [
        (SPARSE["block"], 1000, "fewer than min_seq_len = 1000 queries"),
        (OmniSparseConfig(target_recall=1.0), 0, "dense by target_recall = 1.0"),
    ],
    ids=["short", "recall 1"],
)
def test_dense_layers_are_the_models_own(config, least, reason, device):
    inputs = {"input_ids": batch((300,), device)["input_ids"]}
    model = build("gpt_oss", device)
    with torch.no_grad():
        expected = model(**inputs).logits
        apply_omnisparse(model, config, min_seq_len=least, inner="eager")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        assert reason in {site.reason for site in rewrite_report(model).sites}


def test_uncompiled_and_disabled_are_the_models_own(device, monkeypatch):
    inputs = batch((150, 99), device)
    real = inputs["attention_mask"].bool()
    model = build("gpt_oss", device)
    with torch.no_grad():
        expected = model(**inputs).logits
        apply_omnisparse(model, SPARSE["block"], min_seq_len=0)
        monkeypatch.setenv("OMNISPARSE_DISABLE", "1")
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], atol=1e-5, rtol=1e-5)
        assert compiled_decoder_of(model).backend.log.graphs == 0
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        remove_omnisparse(model)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


def test_the_report_before_the_first_run_lists_both_kinds_of_layers(device):
    report = rewrite_report(apply_omnisparse(build("gpt_oss", device)))
    assert [site.layer for site in report.rewritten] == [0, 1] and not report.skipped


def test_the_experts_that_transformers_prefers_stay_in_one_graph(device):
    model = build("gpt_oss", device, experts_implementation="grouped_mm")
    inputs = batch((300,), device)
    with torch.no_grad():
        expected = model(**inputs).logits
        apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    log = compiled_decoder_of(model).backend.log
    assert (log.graphs, log.runs) == (1, 1) and len(rewrite_report(model).rewritten) == 2


@pytest.mark.filterwarnings("ignore:omnisparse. attention is dense")  # called by itself
@pytest.mark.parametrize("implementation", ["eager", "omnisparse"])
def test_attention_dropout_keeps_the_sinks(implementation, device):
    """Dropping half of the weights changes no mean; sinks lost would change it by a lot."""
    model = build("gpt_oss", device, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.5
    torch.nn.init.constant_(attention.sinks, 8.0)  # most of the mass
    hidden = torch.randn(1, 60, 64, device=device)
    angles = torch.zeros(2, 1, 60, 8, device=device)
    apply_omnisparse(model)
    mask = torch.zeros(1, 1, 60, 60, device=device).masked_fill(
        ~torch.ones(60, 60, dtype=torch.bool, device=device).tril(), -torch.inf
    )

    def run(train, rows):
        attention.train(train)
        with torch.no_grad():
            return attention(hidden.expand(rows, -1, -1), (angles[0].cos(), angles[1].sin()), mask)[0]

    attention.config._attn_implementation_internal = implementation
    expected, dropped = run(False, 1)[0], run(True, 400)
    assert (dropped[0] - expected).abs().max() > 0.1 * expected.abs().max(), "nothing was dropped"
    spread = dropped.std(0) / 20
    assert ((dropped.mean(0) - expected).abs() < 6 * spread + 1e-6).all()


@pytest.mark.filterwarnings("ignore:omnisparse. attention is dense")  # called by itself
def test_attention_dropout_is_reported(device):
    sinks = torch.full((2,), 8.0, device=device)
    tensors = [torch.randn(1, 2, 140, 16, device=device) for _ in range(3)]
    call = lambda q, k, v, s: attention_forward(torch.nn.Identity(), q, k, v, None, dropout=0.5, s_aux=s)[0]  # noqa: E731
    backend = Backend(EVERYTHING, min_seq_len=0, inner="eager")
    out = torch.compile(call, backend=backend, fullgraph=True)(*tensors, sinks)
    assert [site.reason for site in backend.log.sites] == ["attention dropout is 0.5: no flex kernel drops weights"]
    assert 0 < out.abs().max() < 0.2, "the sinks hold most of the mass"


@pytest.mark.filterwarnings("ignore:omnisparse. attention is dense")  # called by itself
def test_sinks_of_another_shape_are_refused(device):
    model = build("gpt_oss", device, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.sinks = torch.nn.Parameter(torch.zeros(2, device=device))
    apply_omnisparse(model, SPARSE["block"], min_seq_len=0, inner="eager")
    with pytest.raises(ConfigError, match=r"s_aux must have shape \(4,\), got \(2,\)"), torch.no_grad():
        model(**batch((140,), device))
    tensors = [torch.zeros(1, 4, 8, 16, device=device)] * 3
    with pytest.raises(ConfigError, match=r"s_aux must have shape \(4,\), got \(4, 1\)"):
        attention_forward(attention, *tensors, None, s_aux=torch.zeros(4, 1, device=device))
    with pytest.raises(ConfigError, match="attention must not have both s_aux and position_bias, got Tensor"):
        attention_forward(attention, *tensors, None, s_aux=torch.zeros(4, device=device), position_bias=tensors[0])


# --- the slim cache ----------------------------------------------------------

FULL = {"layer_types": ["full_attention"] * 2}


def test_a_slim_cache_has_the_sinks_too(device):
    """Lazy and fetching heads, the tail and the sink: as a full cache of the same keys, masked the same way."""
    from transformers import DynamicCache

    inputs = prompt(device, (90, 71), spans=((10, 50), (55, 60)))
    oracle, slim = build("gpt_oss", device, **FULL), changed("gpt_oss", device, **FULL)
    cache, full = OmniSparseCache(slim), DynamicCache(config=oracle.config)
    cache.store.chooser = half_lazy
    tokens, logits = steps(slim, inputs, cache, do_sample=False)
    assert [layer.lazy for layer in cache.memory_report().layers] == [(0,), (1,)]
    with masked_like(cache, oracle):
        expected, dense = steps(oracle, inputs, full, do_sample=False)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)


def test_a_slim_cache_refuses_windows(device):
    model = apply_omnisparse(build("gpt_oss", device), EVERYTHING)
    with pytest.raises(ConfigError, match="model must have full attention in every layer, got"):
        OmniSparseCache(model)
