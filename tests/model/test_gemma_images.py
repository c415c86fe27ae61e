"""Models of the Gemma kind with images: heads of each layer's own, masks that are made outside the decoder."""

from __future__ import annotations

import copy

import pytest
import torch

from omnisparse_flex import apply_omnisparse, rewrite_report
from tests.helpers.gemma import build, gemma3, gemma4, paligemma, prompt
from tests.helpers.planted import RULES, distance, mask_of, oracle, visual_of
from tests.model.test_transformers import EVERYTHING

WINDOW = 100


def own_mask(inputs, window):
    """What the model itself allows: causality, both directions in the image; within a window."""
    image, places = visual_of(inputs["input_ids"]), torch.arange(inputs["input_ids"].shape[1])
    pairs = (image[:, :, None] & image[:, None, :]) | (places <= places[:, None])
    return (pairs & (places > places[:, None] - window))[:, None]


def masks(inputs, windows, text_known=True):
    visual = visual_of(inputs["input_ids"])
    kept = mask_of(visual if text_known else torch.ones_like(visual), causal=False)
    return [kept & own_mask(inputs, window) for window in windows]


def outcome(model, inputs, train):
    inputs = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}
    if not train:
        with torch.no_grad():
            return model(**inputs).logits
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    decoder = model.model.language_model
    return {name: p.grad.double() for name, p in decoder.named_parameters() if p.grad is not None}


CASES = {
    "gemma3": (gemma3, (WINDOW, 10**6), False),
    "gemma3-training": (gemma3, (WINDOW, 10**6), True),
    "paligemma-training": (paligemma, (10**6, 10**6), True),
}


@pytest.mark.parametrize(("make", "windows", "train"), CASES.values(), ids=CASES.keys())
def test_masks_made_outside_are_lifted(make, windows, train):
    inputs = prompt()
    if make is paligemma:  # its prompt sees itself too; of this one, the image alone is the prefix
        inputs["token_type_ids"] = 1 - inputs["token_type_ids"]

    def answer(given):
        model = oracle(build(make), lambda module: given[module.layer_idx])
        return outcome(model, inputs, train)

    right, wrong = answer(masks(inputs, windows)), answer(masks(inputs, windows, text_known=False))
    assert distance(wrong, right) > 0.005, "the oracle sees no text dropped"
    model = apply_omnisparse(build(make), RULES, min_seq_len=0, inner="aot_eager" if train else "eager")
    assert distance(outcome(model, inputs, train), right) < 5e-5
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped and report.graphs == 1, str(report)


def test_everything_kept_is_dense_over_lengths(device):
    model = build(gemma3, device)
    dense = copy.deepcopy(model)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
    for tail in (200, 77, 130):
        inputs = prompt(device, rows=1, tail=tail)
        with torch.no_grad():
            assert distance(model(**inputs).logits, dense(**inputs).logits.double()) < 1e-5
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped and report.graphs <= 2, str(report)


def test_generate(device):
    model = build(gemma3, device)
    inputs = prompt(device, rows=1)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    assert len(rewrite_report(model).rewritten) == 2 and not rewrite_report(model).skipped, str(rewrite_report(model))


def test_generate_with_a_static_cache(device):
    from tests.helpers.tiny import batch
    from tests.helpers.tiny import build as build_tiny

    model, inputs = build_tiny("llama", device), batch((300, 257), device)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    tokens = model.generate(**inputs, **options)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
    assert torch.equal(model.generate(**inputs, **options), tokens)
    assert len(rewrite_report(model).rewritten) == 2 and not rewrite_report(model).skipped, str(rewrite_report(model))


def test_a_users_own_mask_stays_dense_with_the_reason(device):
    from tests.helpers.tiny import build as build_tiny

    model, x = build_tiny("llama", device), torch.full((1, 300), 50, device=device)
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match="is a query-by-key tensor, not a function of indices"):
        model(x, attention_mask=torch.ones(1, 1, 300, 300, dtype=torch.bool, device=device).tril())


def test_heads_differ_from_layer_to_layer(device):
    model = build(gemma4, device)
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    report = rewrite_report(model)
    assert not report.compiled and len(report.rewritten) == 2, str(report)
    with torch.no_grad():
        model(torch.randint(10, 180, (1, 300), device=device))
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped, str(report)
