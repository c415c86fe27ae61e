"""The recall that is always recorded: true of the sampled rows, near that of all rows, and told where it is too low."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, rewrite_report
from omnisparse_flex.masks.blocks.promise import COUNTED_FROM, one_call
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.promises import Teller, adds_one_token, layer_recalls
from tests.helpers.tiny import build

LENGTH, DIM, HEADS = 4096, 32, 4


def exact_recall(query: Tensor, key: Tensor, keep: Tensor, width: int, scale: float) -> Tensor:
    """Every row's true recall in float64: (B, Hq, L)."""
    places = torch.arange(query.shape[2])
    logits = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    mass = torch.softmax(logits.masked_fill(places > places[:, None], float("-inf")), -1)
    return (mass * keep[:, :, places // 128][..., places // width]).sum(-1)


@pytest.mark.parametrize("width", [64, 128])
def test_it_is_the_recall_of_all_rows(width):
    """Rows of a block that look alike keep alike: within 0.01 of every row computed exactly, for each head."""
    generator = torch.Generator().manual_seed(0)
    theme = torch.randn(1, HEADS, LENGTH // 128, DIM, generator=generator).repeat_interleave(128, 2)
    query = theme + 0.3 * torch.randn(1, HEADS, LENGTH, DIM, generator=generator)
    key = torch.randn(1, 2, LENGTH // 64, DIM, generator=generator).repeat_interleave(64, 2)
    key = key + 0.3 * torch.randn(1, 2, LENGTH, DIM, generator=generator)
    config, scale = OmniSparseConfig(key_block=width, window_size=64), 0.5
    rule = {"target": config.recall_of(0), "min_peak": config.min_peak_of(0), "scale": scale}
    found = select_blocks(query, key, IndexMask(causal()), config, **rule)
    truth = exact_recall(query, key, found.keep, width, scale).mean((0, 2))
    mean, worst, calls, broken = one_call(found.recall, found.layout.some, config.recall_of(0))
    assert 0.2 < found.keep.sum() / found.layout.some.expand_as(found.keep).sum() < 0.9
    assert abs(mean - truth.mean()) < 0.01 and abs(worst - truth.min()) < 0.01
    assert (calls, broken) == (1, 0)


def test_a_call_that_kept_too_little_is_counted_and_rows_that_see_nothing_are_not():
    some = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    some[:, :, 0] = False
    recall = torch.tensor([[[0.0, 0.9, 0.9], [0.0, 0.4, 0.6]]])
    table = torch.zeros(3, 4)
    for target, told in ((0.5, [0.7, 0.5, 1, 0]), (torch.tensor(0.6), [0.7, 0.5, 2, 1])):
        torch.ops.omnisparse.write_row(table, one_call(recall, some, target), 1, COUNTED_FROM)
        assert table[1].tolist() == pytest.approx(told)
    nothing = one_call(recall, torch.zeros_like(some), 0.6)
    assert nothing.tolist() == pytest.approx([0.0, 1.0, 1, 0])
    assert table[[0, 2]].abs().sum() == 0


def test_the_news_comes_once():
    table, teller = torch.zeros(3, 4), Teller()
    assert teller.news(table) is None
    table[1:] = torch.tensor([[0.8, 0.55, 4, 1], [0.8, 0.5, 4, 2]])
    news = teller.news(table)
    assert news == layer_recalls(table)[1] and news.layer == 2 and news.broken == 2
    assert str(news) == "layer 2 kept 0.800 of its attention, its worst head 0.500"
    assert teller.news(table) is None


def test_every_call_of_a_model_is_recorded_and_the_report_tells_it():
    model = build("llama", "cpu")
    apply_omnisparse(
        model, OmniSparseConfig(target_recall=0.5, sink_size=0, window_size=16), min_seq_len=0, inner="eager"
    )
    ids = torch.randint(0, 90, (1, 600), generator=torch.Generator().manual_seed(0))
    assert rewrite_report(model).recall == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.inference_mode():
            model(ids)
        with torch.no_grad():
            model(ids)
    report = rewrite_report(model)
    assert [(x.layer, x.calls, x.broken) for x in report.recall] == [(0, 2, 0), (1, 2, 0)]
    assert all(0.5 <= x.worst_head <= x.mean <= 1.0 for x in report.recall)
    assert "recall of the last call's sampled rows: mean " in str(report)
    assert len(report.to_dict()["recall"]) == 2


def test_a_broken_promise_is_told_once_and_counted():
    model = build("llama", "cpu")
    apply_omnisparse(model, OmniSparseConfig(target_recall=0.5, window_size=16), min_seq_len=0, inner="eager")
    entry = compiled_decoder_of(model)
    ids = torch.randint(0, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)
        entry.state.promises[1] = torch.tensor([0.6, 0.3, 1.0, 1.0])  # as a layer that kept too little leaves it
        with pytest.warns(UserWarning, match="under its target_recall; rewrite_report counts such calls"):
            model(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids)
    report = rewrite_report(model)
    assert [x.broken for x in report.recall] == [0, 1]
    assert "1 of 3 calls kept less than target_recall, in layers 1" in str(report)


def test_rules_that_sample_no_rows_record_nothing():
    model = build("llama", "cpu")
    apply_omnisparse(model, OmniSparseConfig(budget="per_head"), min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(torch.randint(0, 90, (1, 300)))
    assert rewrite_report(model).recall == ()


def test_a_decode_step_is_told_from_a_call_that_selects():
    """Nothing is looked up after a decode step, which selects nothing."""
    one, many = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    assert adds_one_token((), {"input_ids": one}) and adds_one_token((one,), {})
    assert adds_one_token((), {"input_ids": None, "inputs_embeds": torch.zeros(2, 1, 8)})
    assert not adds_one_token((), {"input_ids": many}) and not adds_one_token((), {})
