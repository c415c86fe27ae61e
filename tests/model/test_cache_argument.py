"""The KV cache under both of transformers' names for it."""

import warnings

import pytest
import torch

from omnisparse_flex import OmniSparseCache, OmniSparseConfig, apply_omnisparse
from omnisparse_flex.model.cache_argument import NEW_NAME, OLD_NAME, cache_in, cache_name, cache_of, with_cache_renamed
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.tiny import build, cached


def new_name(x, cache=None):
    return x, cache


def old_name(x, past_key_values=None):
    return x, past_key_values


def test_the_signature_tells_the_name():
    assert cache_name(new_name) == "cache" and cache_name(old_name) == "past_key_values"
    assert cache_name(lambda **kwargs: kwargs) == "past_key_values"


@pytest.mark.parametrize("name", [NEW_NAME, OLD_NAME])
def test_a_callee_of_the_new_name_gets_it(name):
    arguments = with_cache_renamed(new_name, {"x": 1, name: "keys"})
    assert arguments == {"x": 1, "cache": "keys"} and cache_in(new_name, {name: "keys"}) == "keys"


def test_a_callee_of_the_old_name_may_get_something_else_as_cache():
    arguments = {"cache": "pages", "past_key_values": "keys"}
    assert with_cache_renamed(old_name, arguments) is arguments
    assert cache_in(old_name, arguments) == "keys" and cache_in(old_name, {"cache": "pages"}) is None


def test_calls_without_a_cache_stay_as_they_are():
    arguments = {"x": 1}
    assert with_cache_renamed(new_name, arguments) is arguments and cache_in(new_name, arguments) is None


def test_of_two_caches_the_newer_name_counts():
    assert with_cache_renamed(new_name, {"cache": 1, "past_key_values": 2}) == {"cache": 1}


def even_ids(args, kwargs):
    return kwargs["input_ids"] % 2 == 0


@pytest.fixture
def applied():
    config = OmniSparseConfig(target_recall=0.5)
    return apply_omnisparse(build("llama", "cpu"), config, min_seq_len=0, visual_mask=even_ids, inner="eager")


def both_names(model):
    """The names that the installed version takes: of the older one, its own alone."""
    newest = cache_name(model.forward)
    return (NEW_NAME, OLD_NAME) if newest == NEW_NAME else (OLD_NAME,)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_either_name_gives_one_graph_and_the_same_logits(applied):
    """Inner calls too: the decoder itself, whose wrapper would fall into pieces under Dynamo."""
    from transformers import DynamicCache

    ids = torch.randint(10, 180, (1, 40))
    outputs = []
    for name in both_names(applied):
        for module in (applied, applied.model):
            compiled_decoder_of(applied).backend.log.graphs = 0
            with torch.no_grad():
                out = module(input_ids=ids, **{name: DynamicCache(config=applied.config)}, use_cache=True)
                last = module(input_ids=ids[:, :3], **{name: cache_of(out)}, use_cache=True)
            assert compiled_decoder_of(applied).backend.log.graphs <= 2  # a prefill and a second turn
            assert not [
                note for note in compiled_decoder_of(applied).backend.log.notes if "broke" in note or "eagerly" in note
            ]
            outputs.append(last[0])
    assert torch.equal(outputs[0], outputs[-2]) and torch.equal(outputs[1], outputs[-1])


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_generate_takes_either_name(applied):
    ids = torch.randint(10, 180, (1, 40))
    answers = [
        applied.generate(ids, max_new_tokens=4, do_sample=False, **{name: OmniSparseCache(applied)})
        for name in both_names(applied)
    ]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert not [note for note in compiled_decoder_of(applied).backend.log.notes if "broke" in note or "eagerly" in note]


def test_both_names_at_once_are_treated_as_transformers_does():
    """Which of two caches is filled is transformers' choice, not ours."""
    from transformers import DynamicCache

    ids = torch.randint(10, 180, (1, 40))
    filled = []
    for model in (build("llama"), apply_omnisparse(build("llama"), min_seq_len=0, inner="eager")):
        caches = {name: DynamicCache(config=model.config) for name in (NEW_NAME, OLD_NAME)}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.model(input_ids=ids, **caches, use_cache=True)
        filled.append({name: cache.get_seq_length() for name, cache in caches.items()})
    assert filled[0] == filled[1] and sum(filled[0].values()) == 40


def test_attention_never_sees_the_cache(applied, monkeypatch):
    """Our attention function leaves a site dense that is handed a cache: the KV cache must not be one of them."""
    from transformers import AttentionInterface, DynamicCache

    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(sorted(kwargs))
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], 2), None

    AttentionInterface.register("cache_spy", spy)
    model = build("llama", "cpu")
    model.set_attn_implementation("cache_spy")
    with torch.no_grad():
        model(torch.randint(10, 180, (1, 8)), **cached(DynamicCache(config=model.config)))
    assert seen and not [names for names in seen if set(names) & {NEW_NAME, OLD_NAME}]
