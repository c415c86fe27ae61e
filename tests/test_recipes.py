"""The blocks of ``docs/recipes.md`` run, and leave a sparse model behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from omnisparse_flex import ConfigError, OmniSparseConfig, apply_omnisparse, rewrite_report
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.rules_file import load_rules, save_rules
from tests.helpers.tiny import batch, build

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
BLOCKS = dict(re.findall(r"^## (.*?)$.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
#: What a recipe needs that may not be installed.
NEEDS = {
    "PEFT, in either order": "peft",
    "Trainer": "accelerate",
    "accelerate": "accelerate",
    "device_map": "accelerate",
}


class Int8(nn.Module):
    """A linear layer whose weights are int8, with a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8(getattr(layer.self_attn, name)))
    return model


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = batch((320,), seed=index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def sparse_at_any_length(model, config=None, **options):
    return apply_omnisparse(
        model, config, min_seq_len=0, inner="aot_eager" if torch.is_grad_enabled() else "eager", **options
    )


@pytest.mark.filterwarnings("default::FutureWarning", "default::UserWarning")  # peft's, accelerate's and Trainer's own
@pytest.mark.parametrize("title", BLOCKS)
def test_recipe(title, tmp_path, monkeypatch):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    monkeypatch.setattr("omnisparse_flex.apply_omnisparse", sparse_at_any_length)  # the blocks import it
    model = build("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    names = {
        "model": model,
        "inputs": batch((320,)),
        "packed": batch((320,))["input_ids"],
        "turn": batch((150,), seed=2)["input_ids"],
        "dataset": Rows(),
        "folder": str(tmp_path),
        "quantised": quantised,
    }
    exec(compile(BLOCKS[title], title, "exec"), names)
    changed = names.get("loaded", names["model"])
    assert compiled_decoder_of(changed) is not None
    report = rewrite_report(changed)
    assert len(report.rewritten) == 1 and not report.skipped, str(report)
    assert report.compiled or "loaded" in names


def test_rules_beside_a_model(tmp_path):
    rules = OmniSparseConfig(target_recall=0.7)
    file = save_rules(rules, tmp_path)
    assert file.name == "omnisparse.json" and load_rules(tmp_path) == load_rules(str(file)) == rules
    model = apply_omnisparse(build("llama", num_hidden_layers=1), tmp_path, inner="eager")
    assert compiled_decoder_of(model).backend.config == rules
    for text, match in (
        ("[1]", "config must hold the fields"),
        ("{", "config must be valid JSON"),
        ('{"schema": 99}', "schema must be an int from 1 to"),
        ('{"recall": 1}', "config must hold only the fields"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=match):
            apply_omnisparse(model, tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match="config must be a file of rules or a directory with"):
        apply_omnisparse(model, tmp_path)
    with pytest.raises(ConfigError, match="path must be an existing directory"):
        save_rules(rules, tmp_path / "no" / "rules.json")


def test_several_devices_are_refused():
    model = build("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ConfigError, match="must have its decoder on one device, got cpu, meta"):
        apply_omnisparse(model)
