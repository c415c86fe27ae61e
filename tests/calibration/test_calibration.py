"""calibrate: the targets it finds keep the recall that was asked for, and the model is left as it was."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from omnisparse_flex import (
    ConfigError,
    OmniSparseConfig,
    apply_omnisparse,
    calibrate,
    collect_stats,
    rewrite_report,
)
from omnisparse_flex.calibration import search as calibration_module
from omnisparse_flex.calibration.search import HALVINGS, MAX_DENSITY, RESERVE, _search, run_calibration
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.tiny import Paying, batch, build
from tests.test_api import GPT

#: Little is forced, so that a thousand tokens leave something to choose.
RULES = OmniSparseConfig(scoring="tile_pool", lazy_threshold=None, sink_size=1, window_size=1)
#: Attention of random weights is nearly even: little recall is cheap, much is not.
WANTED = 0.3


def sharpened(model, factor=60.0):
    """Random weights attend evenly, and even attention has no cheap blocks: make the logits larger."""
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.weight.data.mul_(factor)
    return model


def repetitive(tokens, device, seed=0):
    """Text in stretches of one topic each: a query finds its likes in a few blocks."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(10, 180, (tokens // 128 + 1, 3), generator=generator)
    picks = torch.randint(0, 3, (tokens // 128 + 1, 128), generator=generator)
    return {"input_ids": topics.gather(1, picks).flatten()[None, :tokens].to(device)}


def true_recalls(model, inputs):
    with torch.no_grad(), collect_stats(model, exact=True) as stats:
        model(**inputs)
    return {layer.layer: layer.true_recall for layer in stats.per_layer()}


@pytest.fixture(scope="module")
def calibrated(device):
    """A model that was changed first, its batches, and what calibration says of it."""
    model = sharpened(build("llama", device, num_hidden_layers=2))
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    batches = [repetitive(1000, device), repetitive(1000, device, seed=1)]
    lines = []
    result = run_calibration(model, batches, WANTED, progress=lines.append)
    return model, batches, result, lines


def test_every_head_of_a_sparse_layer_keeps_the_reserve(calibrated):
    model, batches, result, _ = calibrated
    sparse = [layer for layer in result.layers if not layer.reason]
    assert sparse, "a test of nothing: every layer stayed dense"
    apply_omnisparse(model, result.config, min_seq_len=0, inner="eager")
    found = [true_recalls(model, inputs) for inputs in batches]
    assert found[0].keys() == {layer.layer for layer in sparse}
    for layer in sparse:
        heads = torch.tensor([x[layer.layer] for x in found]).mean(0)
        assert heads.min() == pytest.approx(layer.recall, abs=0.02)
        assert heads.min() >= WANTED + (1 - WANTED) * RESERVE - 0.02
        assert 0 < layer.density <= MAX_DENSITY
    reasons = {site.layer: site.reason for site in rewrite_report(model).skipped}
    assert reasons == {layer.layer: "dense by target_recall = 1.0" for layer in result.dense}
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")


def test_a_smaller_target_would_not_do(calibrated):
    model, batches, result, _ = calibrated
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    for layer in (x for x in result.layers if not x.reason and x.target > 0.05):
        lower = [x.target for x in result.layers]
        # Two steps of the search lower: repairs may have raised the target by one.
        lower[layer.layer] = 1 - (1 - layer.target) * 2 ** (4 * calibration_module.HIGHEST / 2**HALVINGS)
        if lower[layer.layer] <= 0:
            continue
        compiled_decoder_of(model).state.recall = torch.tensor(lower)
        heads = torch.tensor([true_recalls(model, inputs)[layer.layer] for inputs in batches]).mean(0)
        assert heads.min() < layer.recall


def test_a_changed_model_is_left_as_it_was_and_its_report_names_dense_layers(calibrated, device):
    model, batches, *_ = calibrated
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    entry = compiled_decoder_of(model)
    recall, before = entry.state.recall.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.model.layers[0].eval()  # a user's own mixture
    with pytest.warns(UserWarning, match=r"calibration leaves every layer dense at a recall of 0\.9999"):
        config = calibrate(model, batches[:1], 0.9999)
    assert config.target_recall == (1.0, 1.0)
    assert rewrite_report(model).notes[-1] == "calibrated for a recall of 0.9999: 2 of 2 layers stay dense: 0, 1"
    assert compiled_decoder_of(model) is entry and torch.equal(entry.state.recall, recall) and entry.state.stats is None
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert entry.backend.log.graphs == 1, "probes must not compile"
    model.eval()


def test_progress_names_every_round(calibrated):
    *_, lines = calibrated
    assert HALVINGS + 2 <= len(lines) <= HALVINGS + 1 + calibration_module.REPAIRS
    assert lines[0] == "calibration round 1, 2 batches"


def test_the_result_prints_and_survives_json(calibrated):
    *_, result, _ = calibrated
    assert OmniSparseConfig.from_dict(json.loads(json.dumps(result.to_dict()))["config"]) == result.config
    text = str(result)
    assert "true recall wanted 0.3, asked of the batches 0.4050" in text
    assert len(re.findall(r"^\d+ .*(omnisparse|dense: .+)$", text, re.MULTILINE)) == 2
    assert result.config == dataclasses.replace(RULES, target_recall=result.config.target_recall)


def test_an_unchanged_model_is_unchanged_afterwards(device, monkeypatch):
    monkeypatch.setattr("omnisparse_flex.backend.costs_of", lambda device: Paying(256))
    monkeypatch.setattr("omnisparse_flex.backend.Backend.inner_for", lambda *_: "eager")  # no wait for Inductor
    monkeypatch.setattr(calibration_module, "MAX_DENSITY", 1.0)  # few blocks: most are kept
    model = sharpened(build("llama", device))
    inputs = batch((700, 500), device)
    with torch.no_grad():
        expected = model(**inputs).logits
    rules = dataclasses.replace(RULES, target_recall=(1.0, 0.5))
    config = calibrate(model, [inputs], 0.3, config=rules)
    assert compiled_decoder_of(model) is None and model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert config.recall_of(0) == 1.0 and 0 < config.recall_of(1) < 1
    assert dataclasses.replace(config, target_recall=(1.0, 0.5)) == rules


def test_a_failure_restores_everything(device, monkeypatch):
    model = build("llama", device).train()
    monkeypatch.setattr("omnisparse_flex.backend.costs_of", lambda device: Paying(64))
    monkeypatch.setattr("omnisparse_flex.backend.Backend.inner_for", lambda *_: "eager")
    hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, [batch((140,), device)], 0.9)
    hook.remove()
    assert compiled_decoder_of(model) is None and model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_plain_modules_and_forms_of_batches(form, device):
    torch.manual_seed(0)
    model = GPT(layers=2).eval().to(device)
    x = 5 * torch.randn(1, 900, 32)
    forms = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    config = calibrate(model, iter([forms[form]]), 0.3)
    assert len(config.target_recall) == 2 and any(t < 1 for t in config.target_recall)
    apply_omnisparse(model, config, min_seq_len=0, inner="eager")
    model(x.to(device))
    assert len(rewrite_report(model).rewritten) == sum(t < 1 for t in config.target_recall)


def test_exact_statistics_of_a_plain_module(device):
    model = apply_omnisparse(GPT(layers=2).eval().to(device), RULES, min_seq_len=0, inner="eager")
    message = "exact must be False for a module that has not run yet and whose config states no num_attention_heads"
    with pytest.raises(ConfigError, match=message), collect_stats(model, exact=True):
        pass
    x = torch.randn(1, 600, 32, device=device)
    model(x)
    with torch.no_grad(), collect_stats(model, exact=True) as stats:
        model(x)
    assert stats.layers == 2 and [len(layer.true_recall) for layer in stats.per_layer()] == [2, 2]


class Scripted:
    """A probe whose layers answer by formula: recall = target ** power, never above its ceiling."""

    def __init__(self, model, powers, ceilings, densities):
        self.entry, self.layers, self.sparse = (
            compiled_decoder_of(model),
            len(powers),
            torch.ones(len(powers), dtype=torch.bool),
        )
        self.powers, self.ceilings, self.densities = map(torch.tensor, (powers, ceilings, densities))
        self.asked = []

    def __call__(self, targets):
        self.asked.append(targets)
        recall = torch.minimum(targets**self.powers, self.ceilings.double())
        if len(self.asked) > HALVINGS + 1:  # once all are in place, layer 1 turns out a little worse
            recall[1] -= 0.004
        return recall, self.densities.double()


def test_the_search(device):
    model = apply_omnisparse(build("llama", device, num_hidden_layers=4), RULES)
    probe = Scripted(model, [1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 0.9, 1.0], [0.2, 0.3, 0.3, 0.7])
    result = _search(probe, 0.9)
    needed = 1 - 0.1 * (1 - RESERVE)
    first, second, third, fourth = result.layers
    assert needed <= first.target <= 1 - (1 - needed) * 2 ** (-1.01 * calibration_module.HIGHEST / 2**HALVINGS)
    assert second.recall >= needed and second.target**3 >= needed + 0.004, "the repair must raise it"
    assert third.reason == "its worst head reaches a true recall of 0.900 at the highest target"
    assert fourth.reason == "it would keep 0.70 of its blocks, which does not pay"
    assert (third.target, fourth.target) == (1.0, 1.0) and result.named_dense() == "2 of 4 layers stay dense: 2, 3"
    assert result.density == pytest.approx((0.2 + 0.3 + 1 + 1) / 4)
    assert (probe.asked[-1][2] == 1.0) and (probe.asked[-1][:2] < 1).all()


def test_layers_that_never_do_are_given_up(device):
    model = apply_omnisparse(build("llama", device), RULES)
    probe = Scripted(model, [1.0, 1.0], [1.0, 0.916], [0.2, 0.2])  # layer 1 drops under 0.915 in the end
    result = _search(probe, 0.9)
    reasons = ["", "its worst head still fell short of 0.915 after 4 rounds of raised targets"]
    assert [layer.reason for layer in result.layers] == reasons
    assert len(probe.asked) == HALVINGS + 1 + calibration_module.REPAIRS
    nan = Scripted(model, [1.0, 1.0], [1.0, float("nan")], [0.2, 0.2])
    assert "a true recall of nan" in _search(nan, 0.9).layers[1].reason


# --- bad input ---------------------------------------------------------------

IDS = torch.ones(1, 40, dtype=torch.long)
BAD = [
    ((3, [IDS], 0.9), {}, "model must be an nn.Module, got 'int'"),
    ((None, [IDS], 1.0), {}, "target_recall must be in (0, 1), got 1.0"),
    ((None, [IDS], 0), {}, "target_recall must be in (0, 1), got 0"),
    ((None, [IDS], True), {}, "target_recall must be in (0, 1), got True"),
    ((None, [IDS], float("nan")), {}, "target_recall must be in (0, 1), got nan"),
    ((None, [IDS], "0.9"), {}, "target_recall must be in (0, 1), got '0.9'"),
    ((None, [], 0.9), {}, "batches must hold at least one batch, got []"),
    ((None, {"input_ids": IDS}, 0.9), {}, "batches must be an iterable of batches, got 'dict'"),
    ((None, IDS, 0.9), {}, "batches must be an iterable of batches, got 'Tensor'"),
    ((None, 3, 0.9), {}, "batches must be an iterable of batches, got 'int'"),
    ((None, ["text"], 0.9), {}, "batches must hold mappings, tuples, lists or tensors, got 'str'"),
    ((None, [IDS], 0.9), {"config": {"budget": 3}}, "config must be an OmniSparseConfig or None, got {'budget': 3}"),
    (
        (None, [IDS], 0.9),
        {"config": OmniSparseConfig(budget=256)},
        "budget must follow target_recall to be calibrated, got 256",
    ),
    (
        (None, [IDS], 0.9),
        {"config": OmniSparseConfig(target_recall=1.0)},
        "target_recall must leave a layer sparse in the rules, got (1.0,)",
    ),
    (
        (None, [IDS], 0.9),
        {"config": OmniSparseConfig(target_recall=(0.9, 0.9, 0.9))},
        "target_recall must hold one value for each of the 2 layers, got (0.9, 0.9, 0.9)",
    ),
    (
        (None, [{"input_ids": IDS}], 0.9),
        {},
        "batches must hold at least min_seq_len = 2048 tokens (an option of apply_omnisparse), got at most 40",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(arguments, options, message, monkeypatch):
    monkeypatch.setattr(
        "omnisparse_flex.model.compiled_module.CompiledDecoder.__call__", lambda *a, **k: pytest.fail("the model ran")
    )
    model = build("llama") if arguments[0] is None else arguments[0]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        calibrate(model, *arguments[1:], **options)
    if arguments[0] is None:
        assert compiled_decoder_of(model) is None and model.config._attn_implementation == "sdpa"


def test_rules_of_a_changed_model_are_its_own(device):
    model = apply_omnisparse(build("llama", device), RULES)
    with pytest.raises(ConfigError, match="config must be left out for a model that apply_omnisparse changed"):
        calibrate(model, [IDS], 0.9, config=RULES)
    apply_omnisparse(model, OmniSparseConfig(budget=128))
    with pytest.raises(ConfigError, match="budget must follow target_recall to be calibrated, got 128"):
        calibrate(model, [IDS], 0.9)


def test_modules_that_run_nothing_sparsely(device):
    model = apply_omnisparse(GPT(layers=1).to(device).eval(), RULES, min_seq_len=5000, inner="eager")
    message = r"got no layer that ran sparsely: fewer than min_seq_len = 5000 queries$"
    with pytest.raises(ConfigError, match=message):
        calibrate(model, [torch.randn(1, 200, 32)], 0.9)
    assert compiled_decoder_of(model).state.stats is None


def test_disabled(device, monkeypatch):
    monkeypatch.setenv("OMNISPARSE_DISABLE", "1")
    with pytest.raises(ConfigError, match="OMNISPARSE_DISABLE must be unset or 0, got '1'"):
        calibrate(build("llama", device), [IDS], 0.9)
