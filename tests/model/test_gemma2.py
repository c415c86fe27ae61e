"""A decoder whose logits have a soft cap: rewritten on every transformers, and exact where it stays dense."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, remove_omnisparse, rewrite_report
from tests.helpers.tiny import text_config

pytest.importorskip("transformers")

IDS = torch.arange(10, 170)[None]


def gemma2(**changes):
    """A soft cap that matters, a window in every other layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    fields = {"head_dim": 16, "sliding_window": 48, "attn_logit_softcapping": 0.2, "query_pre_attn_scalar": 1}
    config = Gemma2Config(**text_config(**fields | changes), attn_implementation="eager")
    return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
def test_the_soft_cap_is_kept() -> None:
    model = gemma2()
    dense = model(IDS).logits
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(IDS).logits - dense).abs().max() > 1e-2, "a soft cap that does not matter tests nothing"

    model = gemma2()
    apply_omnisparse(model, OmniSparseConfig(target_recall=1.0), min_seq_len=0, inner="eager")
    torch.testing.assert_close(model(IDS).logits, dense, atol=2e-4, rtol=2e-4)
    report = rewrite_report(model)
    assert len({site.layer for site in report.sites}) == 2 and report.graphs == 1
    assert remove_omnisparse(model).config._attn_implementation == "eager"
    assert torch.equal(model(IDS).logits, dense)


@torch.no_grad()
def test_selection_leaves_something_out() -> None:
    model = gemma2()
    dense = model(IDS.repeat(1, 4)).logits
    rules = OmniSparseConfig(target_recall=0.5, budget="per_head", sink_size=0, window_size=16)
    apply_omnisparse(model, rules, min_seq_len=0, inner="eager")
    assert (model(IDS.repeat(1, 4)).logits - dense).abs().max() > 1e-3
    assert len(rewrite_report(model).rewritten) == 2


def test_dropout_keeps_the_soft_cap() -> None:
    """Attention dropout stays dense; transformers' SDPA function would lose the cap."""
    model = gemma2(attention_dropout=0.5).train()
    torch.manual_seed(1)
    expected = model(IDS).logits
    apply_omnisparse(model, min_seq_len=0, inner="eager")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="no attention site found: nothing to rewrite"):
        found = model(IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
