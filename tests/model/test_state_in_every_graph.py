"""The call's state reaches every graph that Dynamo makes of a decoder, and the text that must be kept is kept.

The selection is planted: a budget of 0 keeps, of the blocks of 128 keys, those with text and the query's own. Without
its state a site would take all tokens for visual ones and keep its own block alone.
"""

from __future__ import annotations

import functools

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.model.compiled_module import CompiledDecoder, compiled_decoder_of
from omnisparse_flex.passes.find_sites import STATE_LOST
from omnisparse_flex.testing import dense_oracle
from tests.helpers.tiny import IMAGE, build, with_images

PLANTED = OmniSparseConfig(target_recall=0.5, budget=0, last_rows=0, sink_size=0, window_size=1)
BLOCK = 128


def prompt(device):
    """Blocks 1 and 4 of six are wholly visual."""
    return with_images((20, 130, 30), (32, 32), device=device)


def planted_mask(ids, *, lost=False):
    """bool (B, 1, N, N): what the rule keeps; ``lost``: what it would keep if it did not know the text."""
    places = torch.arange(ids.shape[1], device=ids.device)
    own = places[:, None] // BLOCK == places // BLOCK
    causal = places <= places[:, None]
    text = torch.stack([(ids[:, places // BLOCK == j] != IMAGE).any(1) for j in range(int(places[-1]) // BLOCK + 1)], 1)
    kept = text[:, None, places // BLOCK] & (not lost)
    return (causal & (own | kept))[:, None]


def oracle(name, ids, *, lost=False, **changes):
    """The model of ``build`` in float64, with dense attention under the planted mask."""
    from transformers import AttentionInterface

    mask = planted_mask(ids, lost=lost)

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = dense_oracle(query, key, value, mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("planted", attention)
    model = build(name, ids.device, **changes).double()
    model.model.language_model.config._attn_implementation = "planted"
    return model


def outcome(model, inputs, train):
    """Logits, or the gradients of the decoder's weights under the next-token loss."""
    inputs = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}
    if not train:
        with torch.no_grad():
            return {"logits": model(**inputs).logits.double()}
    model.train().zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    decoder = model.model.language_model
    return {name: p.grad.double() for name, p in decoder.named_parameters() if p.grad is not None}


def error(actual, expected):
    return max(float((actual[k] - expected[k]).norm() / expected[k].norm()) for k in expected)


def broken(monkeypatch):
    """Let Dynamo break at data-dependent shapes, as it does by itself: before and in each deepstack layer."""
    whole = CompiledDecoder._settings

    def settings(self):
        return whole(self) | {"capture_dynamic_output_shape_ops": False}

    monkeypatch.setattr(CompiledDecoder, "_settings", settings)


CASES = {
    "whole-forward": ("qwen3_vl", False, False),
    "whole-training": ("qwen3_vl", False, True),
    "pieces-forward": ("qwen3_vl", True, False),
    "pieces-training": ("qwen3_vl", True, True),
    "moe-whole-forward": ("qwen3_vl_moe", False, False),
    "moe-pieces-training": ("qwen3_vl_moe", True, True),
}


@pytest.mark.parametrize(("name", "pieces", "train"), CASES.values(), ids=CASES.keys())
def test_text_is_kept_in_every_graph(name, pieces, train, device, monkeypatch):
    if pieces:
        broken(monkeypatch)
    inputs = prompt(device)
    check = functools.partial(error, expected=outcome(oracle(name, inputs["input_ids"]), inputs, train))
    assert check(outcome(oracle(name, inputs["input_ids"], lost=True), inputs, train)) > 0.02, "the oracle sees no loss"

    model = apply_omnisparse(build(name, device), PLANTED, min_seq_len=0, inner="aot_eager")
    assert check(outcome(model, inputs, train)) < 2e-5
    report = rewrite_report(model)
    assert {site.layer for site in report.rewritten} == {0, 1} and not report.skipped
    assert (report.graphs > 1) == pieces


def test_checkpointed_training_in_pieces(device, monkeypatch):
    broken(monkeypatch)
    inputs = prompt(device)
    expected = outcome(oracle("qwen3_vl", inputs["input_ids"]), inputs, True)
    model = apply_omnisparse(build("qwen3_vl", device), PLANTED, min_seq_len=0, inner="aot_eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert error(outcome(model, inputs, True), expected) < 2e-5
    assert len(rewrite_report(model).rewritten) == 2


@pytest.mark.slow
def test_inductor_keeps_the_text(device):
    inputs = prompt(device)
    expected = outcome(oracle("qwen3_vl", inputs["input_ids"], num_hidden_layers=1), inputs, False)
    model = build("qwen3_vl", device, num_hidden_layers=1)
    apply_omnisparse(model, PLANTED, min_seq_len=0, inner="inductor")
    assert error(outcome(model, inputs, False), expected) < 1e-4
    assert rewrite_report(model).graphs == 1 and len(rewrite_report(model).rewritten) == 1


def test_statistics_reach_every_graph(device, monkeypatch):
    broken(monkeypatch)
    model = apply_omnisparse(build("qwen3_vl", device), PLANTED, min_seq_len=0, inner="eager")
    with collect_stats(model, exact=True) as stats, torch.no_grad():
        model(**prompt(device))
    assert [layer.layer for layer in stats.per_layer()] == [0, 1]
    assert all(0 < layer.density < 1 and len(layer.true_recall) == 4 for layer in stats.per_layer())


def test_lengths_share_one_graph(device):
    """A picked number of rows is no reason to compile anew."""
    model = apply_omnisparse(build("qwen3_vl", device), PLANTED, min_seq_len=0, inner="eager")
    for tail in (30, 44, 61, 100):
        inputs = with_images((20, 130, tail), (32, 32), device=device)
        outcome(model, inputs, False)
    assert compiled_decoder_of(model).backend.log.graphs <= 2


def test_a_plain_module_in_pieces_is_dense_where_its_state_is_lost(device):
    from tests.test_api import GPT

    class Pieces(GPT):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    torch.manual_seed(0)
    module, x = Pieces().eval().to(device), torch.randn(1, 300, 32, device=device)
    with torch.no_grad():
        expected = module(x)
        apply_omnisparse(module, PLANTED, min_seq_len=0, inner="eager")
        with pytest.warns(UserWarning, match="does not reach this graph"):
            torch.testing.assert_close(module(x), expected)
    report = rewrite_report(module)
    assert not report.rewritten and {site.reason for site in report.skipped} == {STATE_LOST}
