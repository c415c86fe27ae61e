"""A model in a wrapper is the same model: sparse where it should be, its visual tokens known, or refused by name."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from omnisparse_flex import ConfigError, apply_omnisparse, collect_stats, remove_omnisparse, rewrite_report
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.wrappers import unwrap
from tests.helpers.tiny import IMAGE, build
from tests.model.test_state_in_every_graph import PLANTED, error, oracle, outcome, prompt


class Tuner(nn.Module):
    """PEFT's, in what counts: the base model in two modules, its ``forward`` called without its hooks."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.get_base_model().forward(*args, **kwargs)


class Engine(nn.Module):
    """DeepSpeed's and the like: the model is ``module``."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Own(nn.Module):
    """A user's own."""

    def __init__(self, model):
        super().__init__()
        self.lm = model

    def forward(self, *args, **kwargs):
        return self.lm(*args, **kwargs)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)|.*model\.layers.*(q_proj|v_proj)")
    return peft.get_peft_model(model, config)


@contextlib.contextmanager
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def gradients_or_logits(model, wrapped, inputs, train):
    """``outcome``, through the wrapper."""
    if not train:
        with torch.no_grad():
            return {"logits": wrapped(**inputs).logits.double()}
    wrapped.train().zero_grad()
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    decoder = model.model.language_model
    return {name: p.grad.double() for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("wrap", "first"),
    [(lambda m: Engine(Tuner(m)), "wrapped"), (Tuner, "applied"), (Engine, "applied")],
    ids=["engine-of-tuner", "tuner-later", "engine-later"],
)
def test_wrapped_in_either_order(wrap, first, device):
    inputs = prompt(device)
    expected = outcome(oracle("qwen3_vl", inputs["input_ids"]), inputs, False)
    model = build("qwen3_vl", device)
    wrapped = wrap(model) if first == "wrapped" else None
    assert apply_omnisparse(wrapped or model, PLANTED, min_seq_len=0, inner="eager") is (wrapped or model)
    wrapped = wrapped or wrap(model)
    assert error(gradients_or_logits(model, wrapped, inputs, False), expected) < 2e-5
    assert model.model.visual.config._attn_implementation == "sdpa" and unwrap(wrapped) is model
    assert len(rewrite_report(wrapped).rewritten) == 2 and not rewrite_report(wrapped).skipped
    with collect_stats(wrapped) as stats, torch.no_grad():
        wrapped(**inputs)
    assert 0 < stats.density < 1
    assert remove_omnisparse(wrapped) is wrapped and compiled_decoder_of(model) is None


def test_training_in_distributed_data_parallel(device, tmp_path):
    inputs = prompt(device)
    expected = outcome(oracle("qwen3_vl", inputs["input_ids"]), inputs, True)
    model = build("qwen3_vl", device)
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        apply_omnisparse(wrapped, PLANTED, min_seq_len=0, inner="aot_eager")
        assert error(gradients_or_logits(model, wrapped, inputs, True), expected) < 2e-5
    report = rewrite_report(wrapped)
    assert len(report.rewritten) == 2 and not report.skipped


@pytest.mark.filterwarnings("default::FutureWarning")  # peft's and transformers' own business
@pytest.mark.parametrize("first", ["wrapped", "applied"])
def test_lora(first, device):
    inputs = prompt(device)
    expected = outcome(oracle("qwen3_vl", inputs["input_ids"]), inputs, False)
    model = build("qwen3_vl", device)
    wrapped = lora(model) if first == "wrapped" else model
    apply_omnisparse(wrapped, PLANTED, min_seq_len=0, inner="aot_eager")
    wrapped = wrapped if first == "wrapped" else lora(model)
    with torch.no_grad():
        assert error({"logits": wrapped(**inputs).logits.double()}, expected) < 2e-5
    wrapped.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    moved = [name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved and all("lora" in name for name in moved)
    report = rewrite_report(wrapped)
    assert len(report.rewritten) == 2 and not report.skipped
    assert not any("eagerly" in note for note in report.notes), report.notes


def test_a_users_mask_reaches_a_text_model_whose_hooks_are_passed_by(device):
    model = build("llama", device)
    given = torch.zeros(1, 300, dtype=torch.bool, device=device)
    given[:, 20:280] = True
    wrapped = apply_omnisparse(Tuner(model), PLANTED, min_seq_len=0, inner="eager", visual_mask=given)
    with torch.no_grad():
        wrapped(torch.full((1, 300), 50, device=device))
    assert torch.equal(compiled_decoder_of(model).state.visual, given)


def test_a_mask_is_not_left_from_the_call_before(device):
    inputs = prompt(device)
    model = apply_omnisparse(build("qwen3_vl", device), PLANTED, min_seq_len=0, inner="eager")
    with torch.no_grad():
        model(**inputs)
        assert torch.equal(compiled_decoder_of(model).state.visual, inputs["input_ids"] == IMAGE)
        with pytest.warns(UserWarning, match="inputs_embeds without input_ids"):
            model.model.language_model(inputs_embeds=torch.randn(1, 200, 64, device=device))
    assert compiled_decoder_of(model).state.visual is None


def test_refused_by_name(device):
    model = build("llama", device)
    with pytest.raises(ConfigError, match="got Own around LlamaForCausalLM: call apply_omnisparse on its part 'lm'"):
        apply_omnisparse(Own(model))
    with pytest.raises(ConfigError, match="model must not be a DataParallel"):
        apply_omnisparse(nn.DataParallel(model))
    for wrapped in (torch.compile(model), Engine(torch.compile(model))):
        with pytest.raises(ConfigError, match="model must not be compiled yet"):
            apply_omnisparse(wrapped)
    apply_omnisparse(model, inner="eager", min_seq_len=0)
    with pytest.raises(ConfigError, match="must not run in a DataParallel"):
        model._replicate_for_data_parallel()(torch.full((1, 40), 50, device=device))
    assert len(rewrite_report(torch.compile(model)).rewritten) == 2
