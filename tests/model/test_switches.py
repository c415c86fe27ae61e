"""What switches a changed model off, or is ours by name alone, says so."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex import ConfigError, OmniSparseCache, apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.api import dense
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.visual_mask import VisualMaskHook
from tests.helpers.planted import RULES
from tests.helpers.tiny import IMAGE, build, cached, qwen3_vl

DENSE = "attention is dense: .*call apply_omnisparse"


def ids(device, length=300):
    return torch.randint(10, 180, (1, length), generator=torch.Generator().manual_seed(0)).to(device)


def changed(device, name="llama"):
    return apply_omnisparse(build(name, device), RULES, min_seq_len=0, inner="eager")


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def test_loaded_by_name_alone(device, tmp_path):
    model = changed(device)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="omnisparse").to(device)
    x = ids(device)
    with pytest.warns(UserWarning, match=DENSE):
        actual = logits(loaded, x)
    with dense(model):
        torch.testing.assert_close(actual, logits(model, x))
    logits(loaded, x)  # said once
    apply_omnisparse(loaded, RULES, min_seq_len=0, inner="eager")
    torch.testing.assert_close(logits(loaded, x), logits(model, x))
    remove_omnisparse(loaded)
    assert loaded.config._attn_implementation == "sdpa"


def test_built_from_a_changed_models_config(device):
    model = changed(device)
    twin = type(model)(model.config).to(device)
    with pytest.warns(UserWarning, match=DENSE):
        logits(twin, ids(device))


def test_compiled_by_name_alone(device):
    model = changed(device)
    twin = torch.compile(type(model)(model.config).to(device), backend="eager")
    with pytest.warns(UserWarning, match=DENSE):
        logits(twin, ids(device))


def test_another_attention_after_apply(device):
    model, x = build("llama", device), ids(device)
    expected, visual = logits(model, x), torch.ones_like(x, dtype=torch.bool)
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager", visual_mask=visual)
    sparse = logits(model, x)
    assert not torch.allclose(sparse, expected, atol=1e-3)
    cache = OmniSparseCache(model)
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match=r"set_attn_implementation\('sdpa'\) switched OmniSparse off"):
        assert torch.equal(logits(model, x), expected)
    assert any("switched OmniSparse off" in note for note in rewrite_report(model).notes)
    with pytest.raises(ConfigError, match="with an OmniSparseCache, got 'sdpa'"), torch.no_grad():
        model(x, **cached(cache))
    model.set_attn_implementation("omnisparse")
    assert torch.equal(logits(model, x), sparse)
    model.set_attn_implementation("eager")
    remove_omnisparse(model)
    assert model.config._attn_implementation == "eager"


def test_attention_weights_are_refused(device):
    model, x = changed(device), ids(device)
    with pytest.raises(ConfigError, match="output_attentions must be False, got True"):
        model(x, output_attentions=True)
    with pytest.raises(ConfigError, match="output_attentions must be False, got True"):
        model.generate(x, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert logits(model, x).shape == (1, 300, 200)


def test_hidden_states_are_the_dense_models(device):
    """Keeping everything, so that they can be compared."""
    from tests.model.test_transformers import EVERYTHING

    model, x = build("llama", device), ids(device)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True).hidden_states
        apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="eager")
        actual = model(x, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_token_ids_in_a_part_of_the_config(device):
    model = build("qwen3_vl", device)
    vars(model.config.text_config)["video_token_id"] = vars(model.config).pop("video_token_id")
    vars(model.config)["video_token_id"] = None
    apply_omnisparse(model, RULES, inner="eager")
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, VisualMaskHook)]
    assert hooks[0].token_ids == [IMAGE, 191]


def test_a_model_that_sees_without_token_ids_warns():
    model = qwen3_vl()
    vars(model.config).update(image_token_id=None, video_token_id=None)
    with pytest.warns(UserWarning, match="names no image or video token id"):
        apply_omnisparse(model, RULES, inner="eager")
    assert compiled_decoder_of(model).undo is not None
    apply_omnisparse(model, RULES, inner="eager", visual_mask=lambda args, kwargs: None)
