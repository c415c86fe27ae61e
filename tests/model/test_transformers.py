"""apply_omnisparse on stock transformers classes: equal to dense with a full budget, and nothing else disturbed."""

from __future__ import annotations

import copy

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.testing import assert_no_square, count_hops
from tests.helpers.tiny import MODELS, Spy, batch, build, cached

#: Keeps every block, but through the whole sparse path: a recall under 1 is never a dense layer.
EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None)


def bracket(expected64, dense):
    """What fp32 may differ by: a few times what dense attention itself loses against fp64."""
    scale = expected64.abs().max().item()
    return 4 * (dense.double() - expected64).abs().max().item() + 8 * torch.finfo(torch.float32).eps * scale


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_full_budget_equals_dense(name, device):
    inputs = batch((300, 257, 130), device)
    real = inputs["attention_mask"].bool()
    model = build(name, device)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        dense, expected = model(**inputs).logits[real], exact(**inputs).logits[real]
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    dense_grads, expected_grads = gradients(model, inputs), gradients(exact, inputs)

    spy = Spy()
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner=spy)
    with torch.no_grad():
        sparse = model(**inputs).logits[real]
        assert [count_hops(graph) for graph in spy.graphs] == [2], "one graph, every layer through flex"
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    assert (sparse.double() - expected).abs().max() <= bracket(expected, dense)
    for key, grad in gradients(model, inputs).items():
        error = (grad.double() - expected_grads[key]).abs().max()
        assert error <= bracket(expected_grads[key], dense_grads[key]), key
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped
    assert not [note for note in report.notes if "eagerly" in note], report.notes


@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 700, 2048])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 1), (4, 2)])
def test_lengths_and_head_ratios(length, heads, device):
    if length == 2048 and heads != (4, 2):
        pytest.skip("one head ratio is enough at the longest length")
    query_heads, kv_heads = heads
    shape = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * query_heads}
    model = build("llama", device, num_hidden_layers=1, **shape)
    inputs = batch((length,), device)
    with torch.no_grad():
        dense, expected = model(**inputs).logits, copy.deepcopy(model).double()(**inputs).logits
        spy = Spy()
        apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner=spy)
        sparse = model(**inputs).logits
    assert [count_hops(graph) for graph in spy.graphs] == [1]
    assert (sparse.double() - expected).abs().max() <= bracket(expected, dense)


def test_no_square_tensor_in_a_rewritten_graph(device):
    model = build("qwen2_5_vl", device)
    for lengths in ((300, 211), (517, 401)):
        spy = Spy()
        apply_omnisparse(model, min_seq_len=0, inner=spy)
        with torch.no_grad():
            model(**batch(lengths, device))
        assert_no_square(compiled_decoder_of(model).backend.last.root.graph_module, max(lengths))
        assert_no_square(spy.graphs[0], max(lengths))


def test_many_lengths_compile_once(device):
    model = build("qwen2_5_vl", device)
    apply_omnisparse(model, min_seq_len=0, inner="eager", dynamic=True)
    backend = compiled_decoder_of(model).backend
    with torch.no_grad():
        model(**batch((300, 299), device))
        warm = backend.log.graphs
        for length in (131, 200, 256, 257, 384, 511, 640, 700, 900, 1024):
            model(**batch((length, length - 1), device))
    assert backend.log.graphs == warm == 1
    assert backend.log.runs == 11


def test_twelve_live_models_all_stay_compiled(device):
    models = [build("llama", device, seed=seed, num_hidden_layers=1) for seed in range(12)]
    inputs = batch((140,), device)
    for model in models:
        apply_omnisparse(model, min_seq_len=0, inner="eager")
    with torch.no_grad():
        for _ in range(2):
            for model in models:
                model(**inputs)
    for model in models:
        log = compiled_decoder_of(model).backend.log
        assert (log.graphs, log.runs) == (1, 2)
        assert not log.report().notes or all("eagerly" not in note for note in log.report().notes)


def test_threshold_splits_into_two_graphs(device):
    model = build("llama", device)
    apply_omnisparse(model, min_seq_len=256, inner="eager", dynamic=True)
    with torch.no_grad():
        for length in (300, 40, 500, 255, 256, 129):
            model(**batch((length,), device))
    report = rewrite_report(model)
    assert report.graphs == 2
    assert len(report.rewritten) == 2 and not report.skipped
    assert {site.reason for site in report.sites} == {"", "fewer than min_seq_len = 256 queries"}


def test_decode_stays_dense_by_default(device):
    model = build("llama", device)
    inputs = batch((300,), device)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    apply_omnisparse(model, EVERYTHING, min_seq_len=128, inner="eager")
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
    assert "one query: decoding stays dense" in {site.reason for site in rewrite_report(model).sites}


def test_report_before_the_first_run(device):
    model = build("qwen2_5_vl", device)
    apply_omnisparse(model)
    report = rewrite_report(model)
    assert not report.compiled and report.graphs == 0
    assert [site.layer for site in report.rewritten] == [0, 1]
    assert [site.path for site in report.rewritten] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert str(report).startswith("not compiled yet; 2 sites would be rewritten")
    assert compiled_decoder_of(model).backend.log.graphs == 0


def test_vision_tower_is_left_alone(device):
    model = build("qwen2_5_vl", device)
    apply_omnisparse(model, min_seq_len=0, inner="eager")
    assert model.model.visual.config._attn_implementation != "omnisparse"
    assert compiled_decoder_of(model).module is model.model.language_model


def test_save_and_load_round_trip(tmp_path, device):
    model = build("qwen2_5_vl", device)
    keys = list(model.state_dict())
    inputs = batch((140,), device)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(device).eval()
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert compiled_decoder_of(loaded) is None
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-4)


def test_remove_is_exact_and_applying_twice_is_once(device):
    model = build("qwen2_5_vl", device)
    inputs = batch((140, 99), device)
    with torch.no_grad():
        before = model(**inputs).logits
        assert apply_omnisparse(model, min_seq_len=0, inner="eager") is model
        first = model(**inputs).logits
        apply_omnisparse(model, min_seq_len=0, inner="eager")
        assert torch.equal(model(**inputs).logits, first)
        hooks = [len(m._forward_pre_hooks) for m in model.modules() if m._forward_pre_hooks]
        assert hooks == [1, 1]  # the visual mask's, and the decoder's own
        assert remove_omnisparse(model) is model
        assert torch.equal(model(**inputs).logits, before)
    assert not any(m._forward_pre_hooks or m._compiled_call_impl for m in model.modules())
    assert model.config.text_config._attn_implementation == "sdpa"


def test_new_config_replaces_the_old(device):
    model = build("llama", device)
    apply_omnisparse(model, OmniSparseConfig(target_recall=0.5), min_seq_len=0, inner="eager")
    apply_omnisparse(model, OmniSparseConfig(target_recall=0.9), min_seq_len=0, inner="eager")
    assert compiled_decoder_of(model).backend.config.target_recall == 0.9
    assert compiled_decoder_of(model).state.recall.tolist() == pytest.approx([0.9, 0.9])


def test_environment_variable_disables(device, monkeypatch):
    model = build("llama", device)
    inputs = batch((200,), device)
    with torch.no_grad():
        before = model(**inputs).logits
        apply_omnisparse(model, OmniSparseConfig(target_recall=0.1), min_seq_len=0, inner="eager")
        monkeypatch.setenv("OMNISPARSE_DISABLE", "1")
        assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
        assert compiled_decoder_of(model).backend.log.graphs == 0
        monkeypatch.setenv("OMNISPARSE_DISABLE", "0")
        model(**inputs)
    assert compiled_decoder_of(model).backend.log.graphs == 1


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_deep_copy_reports_its_lost_compile(name, device):
    model = apply_omnisparse(build(name, device), EVERYTHING, min_seq_len=0, inner="eager")
    inputs = batch((150,), device)
    with torch.no_grad():
        expected = model(**inputs).logits  # a compiled run leaves graphs behind, which no copy may drag along
        twin = copy.deepcopy(model)
        with pytest.warns(UserWarning, match="attention is dense: .*call apply_omnisparse"):
            torch.testing.assert_close(twin(**inputs).logits, expected)
        twin(**inputs)  # said once
    with pytest.raises(ValueError, match="a deep copy or unpickled model loses its compile"):
        rewrite_report(twin)
    apply_omnisparse(twin, min_seq_len=0, inner="eager")
    with torch.no_grad():
        twin(**batch((140,), device))
    assert compiled_decoder_of(twin).backend.log.graphs == 1 and compiled_decoder_of(model).backend.log.runs == 1


def test_static_cache_is_lifted(device):
    from transformers import StaticCache

    model = build("llama", device)
    inputs = batch((150, 133), device)
    with torch.no_grad():
        expected = model(**inputs).logits
        apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
        cache = StaticCache(config=model.config, max_cache_len=200)
        logits = model(**inputs, **cached(cache)).logits
        assert not rewrite_report(model).skipped, str(rewrite_report(model))
        step = inputs["input_ids"][:, :1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], 1)
        decoded = model(input_ids=step, attention_mask=mask, **cached(cache)).logits
        remove_omnisparse(model)
        full = {"input_ids": torch.cat([inputs["input_ids"], step], 1), "attention_mask": mask}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        again = model(**inputs).logits
        reference = model(**full, position_ids=None).logits[:, -1:]
    real = inputs["attention_mask"].bool()
    assert torch.allclose(logits[real], expected[real], atol=1e-5) and torch.equal(again, expected)
    assert decoded.shape == reference.shape and positions.shape == mask.shape
    assert torch.allclose(decoded, reference, atol=1e-5)
