"""Which tokens are visual reaches every site: forward, generate, later turns, user masks, other models."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.model.cache_argument import cache_of
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.tiny import IMAGE, VIDEO, build, cached, video_inputs


@pytest.fixture
def model(device):
    model = build("qwen2_5_vl", device, num_hidden_layers=1)
    return apply_omnisparse(model, OmniSparseConfig(target_recall=0.5), min_seq_len=0, inner="eager")


def test_forward_sees_the_video_tokens(model, device):
    inputs = video_inputs(device)
    with torch.no_grad():
        model(**inputs)
    assert torch.equal(compiled_decoder_of(model).state.visual, inputs["input_ids"] == VIDEO)
    assert compiled_decoder_of(model).backend.log.graphs == 1


def test_generate_keeps_the_history(model, device):
    inputs = video_inputs(device)
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    visual = compiled_decoder_of(model).state.visual
    length = inputs["input_ids"].shape[1]
    assert visual.shape == (2, length + 3)
    assert torch.equal(visual[:, :length], inputs["input_ids"] == VIDEO) and not visual[:, length:].any()
    assert not any("eagerly" in note for note in compiled_decoder_of(model).backend.log.notes)

    cache = cache_of(out)
    turn = torch.randint(10, 180, (2, 9), device=device)
    with torch.no_grad():
        model(input_ids=turn, **cached(cache))
    assert compiled_decoder_of(model).state.visual.shape == (2, length + 3 + 9)
    cache.crop(-(3 + 9))
    with torch.no_grad():
        model(input_ids=turn, **cached(cache))
    assert torch.equal(compiled_decoder_of(model).state.visual[:, :length], inputs["input_ids"] == VIDEO)
    assert compiled_decoder_of(model).state.visual.shape == (2, length + 9)


def test_beams_repeat_the_mask(model, device):
    inputs = video_inputs(device, rows=1)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, num_beams=3, do_sample=False)
    visual = compiled_decoder_of(model).state.visual
    assert visual.shape[0] == 3 and (visual.sum(1) == 16).all()


def test_image_tokens_count_too(model, device):
    ids = torch.randint(10, 180, (1, 20), device=device)
    ids[:, 3:5] = IMAGE
    hook = next(iter(model.model._forward_pre_hooks.values()))
    mask = hook.visual((), {}, {"input_ids": ids})
    assert torch.equal(mask, ids == IMAGE)


def test_token_types_serve_when_ids_are_missing(model, device):
    kinds = torch.tensor([[0, 2, 1, 0]], device=device)
    embeddings = torch.randn(1, 4, 64, device=device)
    hook = next(iter(model.model._forward_pre_hooks.values()))
    assert torch.equal(hook.visual((), {}, {"inputs_embeds": embeddings, "mm_token_type_ids": kinds}), kinds > 0)
    assert hook.visual((), {}, {"inputs_embeds": embeddings}) is None


def test_user_masks(device):
    given = torch.zeros(2, 140, dtype=torch.bool, device=device)
    given[:, 20:90] = True
    ids = torch.randint(10, 180, (2, 140), device=device)
    for mask in (given, lambda args, kwargs: given):
        model = build("llama", device, num_hidden_layers=1)
        apply_omnisparse(model, min_seq_len=0, inner="eager", visual_mask=mask)
        with torch.no_grad():
            model(input_ids=ids)
        assert torch.equal(compiled_decoder_of(model).state.visual, given)


def test_user_mask_of_a_plain_module(device):
    from tests.test_api import GPT

    module = GPT().to(device)
    given = torch.ones(1, 200, dtype=torch.bool, device=device)
    seen = []

    def mask(args, kwargs):
        seen.append(args[0].shape)
        return given

    apply_omnisparse(module, min_seq_len=0, inner="eager", visual_mask=mask)
    module(torch.randn(1, 200, 32, device=device))
    assert seen == [(1, 200, 32)] and compiled_decoder_of(module).state.visual is given
