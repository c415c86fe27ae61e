"""Who compiles the model after ``apply_omnisparse`` still gets OmniSparse, or is told that it is gone."""

from __future__ import annotations

import copy

import pytest
import torch

from omnisparse_flex import ConfigError, apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.model.compiled_module import APART, compiled_decoder_of
from omnisparse_flex.model.user_compile import REPLACED
from tests.helpers.tiny import build
from tests.model.test_state_in_every_graph import PLANTED, error, oracle, outcome, prompt


def compiled_by_call(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("compiled", [compiled_by_call, compiled_in_place])
def test_an_enclosing_compile_leaves_the_decoder_to_us(compiled, train, device):
    inputs = prompt(device)
    expected = outcome(oracle("qwen3_vl", inputs["input_ids"]), inputs, train)
    model = apply_omnisparse(build("qwen3_vl", device), PLANTED, min_seq_len=0, inner="aot_eager")
    assert error(outcome(compiled(model), inputs, train), expected) < 2e-5
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped and report.graphs == 1 and APART in report.notes


def test_fullgraph_is_refused_by_name(device):
    model = apply_omnisparse(build("llama", device), PLANTED, min_seq_len=0, inner="eager")
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph of its own"), torch.no_grad():
        whole(torch.full((1, 40), 50, device=device))


def test_a_plain_module_is_ours_inside_a_compile(device):
    from tests.test_api import GPT

    torch.manual_seed(0)
    module = apply_omnisparse(GPT().eval().to(device), PLANTED, min_seq_len=0, inner="eager")
    x = torch.randn(1, 300, 32, device=device)
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(torch.compile(module, backend="eager")(x), expected)
        torch.testing.assert_close(torch.compile(torch.nn.Sequential(module), backend="eager")(x), expected)
    assert APART in rewrite_report(module).notes and compiled_decoder_of(module).backend.log.runs == 3


def test_layers_that_the_user_compiled_are_in_our_graph(device):
    model = apply_omnisparse(build("llama", device), PLANTED, min_seq_len=0, inner="eager")
    ids = torch.full((1, 300), 50, device=device)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(ids)
    assert rewrite_report(model).graphs == 1 and len(rewrite_report(model).rewritten) == 2


def test_compiling_the_decoder_itself_warns(device):
    model = apply_omnisparse(build("llama", device), PLANTED, min_seq_len=0, inner="eager")
    model.model.compile(backend="eager")
    with pytest.warns(UserWarning, match="took the place of OmniSparse"), torch.no_grad():
        model(torch.full((1, 40), 50, device=device))
    with pytest.raises(ConfigError, match="took the place"):
        rewrite_report(model)
    assert "compile" in REPLACED


def test_removing_leaves_no_trace(device):
    model = build("llama", device)
    apply_omnisparse(model, min_seq_len=0, inner="eager")
    twin = copy.deepcopy(model)
    remove_omnisparse(model)
    assert not model.model._forward_pre_hooks and model.model._compiled_call_impl is None
    apply_omnisparse(twin, min_seq_len=0, inner="eager")
    assert len(twin.model._forward_pre_hooks) == 1
