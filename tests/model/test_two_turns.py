"""The second turn over any cache sees the first turn's visual tokens and its text, each row its own."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from omnisparse_flex import apply_omnisparse, collect_stats
from omnisparse_flex.model.cache_argument import cache_of
from omnisparse_flex.model.cache_history import HISTORY, remember
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.planted import RULES, distance, mask_of, oracle, visual_of, wrongs
from tests.helpers.tiny import IMAGE, build, cached, with_images


def conversation(device):
    """Two rows of unlike layout, of one image each, and a second turn of text."""
    rows = [with_images(texts, (32,), device=device, seed=i) for i, texts in enumerate(((20, 200), (140, 80)))]
    first = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    turn = torch.randint(10, 180, (2, 150), generator=torch.Generator().manual_seed(5)).to(device)
    return first, turn


def whole(first, turn):
    ids = torch.cat([first["input_ids"], turn], 1)
    return first | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def logits(model, inputs, **more):
    pixels = {"pixel_values": inputs["pixel_values"].to(model.dtype)} if "pixel_values" in inputs else {}
    with torch.no_grad():
        return model(**inputs | pixels, **more)


def expected_for(mask, inputs, length):
    return logits(oracle(build("qwen3_vl"), mask), inputs).logits[:, -length:]


@pytest.fixture(scope="module")
def answers():
    """Inputs, the second turn's right logits, and its wrong ones by name."""
    first, turn = conversation("cpu")
    inputs = whole(first, turn)
    visual, past = visual_of(inputs["input_ids"]), first["input_ids"].shape[1]
    right = expected_for(mask_of(visual), inputs, turn.shape[1])
    wrong = {name: expected_for(mask, inputs, turn.shape[1]) for name, mask in wrongs(visual, past).items()}
    return first, turn, right, wrong


def named_error(actual, right, wrong):
    """The distance, and what the outcome is nearest to."""
    nearest = min(wrong, key=lambda name: distance(actual, wrong[name]))
    return distance(actual, right), f"as if: {nearest} ({distance(actual, wrong[nearest]):.1e})"


def test_the_oracle_sees_every_wrong(answers):
    *_, right, wrong = answers
    assert {name: round(distance(x, right), 3) for name, x in wrong.items() if distance(x, right) < 0.02} == {}


def own_cache(model, first):
    return cache_of(logits(model, first, use_cache=True))


def copied_cache(model, first):
    return copy.deepcopy(own_cache(model, first))


def cropped_cache(model, first):
    cache = own_cache(model, first)
    deltas = model.model.rope_deltas
    logits(model, {"input_ids": torch.full((2, 7), 50)}, **cached(cache))
    model.model.rope_deltas = deltas
    cache.crop(-7)
    return cache


def chunked_cache(model, first):
    """A prefill of two chunks: the second one text alone."""
    from transformers import DynamicCache

    cache, cut = DynamicCache(config=model.config), first["input_ids"].shape[1] - 40
    head = {name: x[:, :cut] if x.dim() == 2 and x.shape[1] > cut and name != "pixel_values" else x
            for name, x in first.items()}  # fmt: skip
    logits(model, head, **cached(cache))
    logits(model, {"input_ids": first["input_ids"][:, cut:]}, **cached(cache))
    return cache


def static_cache(model, first):
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=800)
    logits(model, first, **cached(cache))
    return cache


WAYS = (copied_cache, cropped_cache, chunked_cache, static_cache)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_second_turn(way, answers):
    first, turn, right, wrong = answers
    model = apply_omnisparse(build("qwen3_vl"), RULES, min_seq_len=0, inner="eager", dynamic=True)
    cache = way(model, first)
    with collect_stats(model) as stats:
        actual = logits(model, {"input_ids": turn}, **cached(cache)).logits
    far, what = named_error(actual, right, wrong)
    assert far < 2e-5, what
    assert stats.density < 0.9
    assert compiled_decoder_of(model).state.visual.shape[0] == 2


def test_second_turn_as_embeddings(answers):
    first, turn, right, wrong = answers
    model = apply_omnisparse(build("qwen3_vl"), RULES, min_seq_len=0, inner="eager", dynamic=True)
    cache = own_cache(model, first)
    embeddings = model.get_input_embeddings()(turn)
    far, what = named_error(logits(model, {"inputs_embeds": embeddings}, **cached(cache)).logits, right, wrong)
    assert far < 2e-5, what


@pytest.mark.parametrize("output", [lambda cache: (torch.zeros(1), cache), lambda cache: SimpleNamespace(cache=cache)])
def test_what_a_decoder_returns_beside_its_states(output):
    cache = SimpleNamespace(get_seq_length=lambda: 3)
    remember(output(cache), None, None)
    remember(output(cache), None, torch.ones(1, 2, dtype=torch.bool))  # of another length: not this call's
    assert not hasattr(cache, HISTORY)
    remember(output(cache), None, visual := torch.ones(1, 3, dtype=torch.bool))
    assert getattr(cache, HISTORY) is visual
    remember((torch.zeros(1),), None, visual)
    remember(SimpleNamespace(past_key_values=None), None, visual)
    given = SimpleNamespace(get_seq_length=lambda: 3)
    remember(output(None), given, visual)  # made between the model and its decoder
    assert getattr(given, HISTORY) is visual
