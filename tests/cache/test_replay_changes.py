"""What may change between two tokens of one answer: a replay must never stand for a step that would differ.

The stand-in of test_replay records and replays on the CPU; each change is compared with plain steps.
"""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from torch import nn

from omnisparse_flex import ConfigError, OmniSparseCache, OmniSparseConfig, apply_omnisparse
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.switches import DISABLE_VARIABLE
from tests.helpers.slim import changed, generate, half_lazy, prompt
from tests.helpers.stand_in import SPAN, feed, notes, plain, recording
from tests.helpers.tiny import cached


@pytest.fixture
def device():
    """The stand-in runs what it records: on a GPU that would advance the counters there."""
    return torch.device("cpu")


def new_weight(model):
    """The old one stays alive, where it was: only the identity tells."""
    linear = model.model.layers[1].mlp.down_proj
    model.kept, linear.weight = linear.weight.detach(), nn.Parameter(linear.weight.detach() * 1.5)


def new_module(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def new_attribute(model):
    model.model.layers[1].self_attn.scaling *= 2


def new_weight_in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def loaded_weights(model):
    model.load_state_dict({name: x * 1.25 for name, x in model.state_dict().items()})


def applied_anew(model):
    visual = lambda args, kwargs: None if kwargs.get("input_ids") is None else kwargs["input_ids"] < 0  # noqa: E731
    apply_omnisparse(model, OmniSparseConfig(), min_seq_len=1 << 20, inner="eager", visual_mask=visual)
    compiled_decoder_of(model).checked = True  # the next graph decodes, and has nothing to rewrite


def trained(model):
    model.train()


def half_attention(model):
    model.model.layers[0].self_attn.train()


CHANGES = [
    new_weight, new_module, new_attribute, new_weight_in_place, loaded_weights, applied_anew, trained,
    half_attention,
]  # fmt: skip
SAME_NUMBERS = (applied_anew, trained, half_attention)
SAME_STEP = (new_weight_in_place, loaded_weights)


def act(model, cache, device, change=lambda model: None):
    """Eight tokens, a change of the model, and twelve more."""
    ids = prompt(device, (20,), 3, spans=())["input_ids"]
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
    first = feed(model, cache, ids[:, :8], 90)
    change(model)
    return torch.cat([first, feed(model, cache, ids[:, 8:], 98)], 1)


@functools.cache
def unchanged(device):
    """What ``act`` gives without a change."""
    return act(model := changed("llama", device), plain(model), device)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_between_two_tokens(change, device):
    expected = act(model := changed("llama", device), plain(model), device, change)
    cache, recorder = recording(model := changed("llama", device))
    assert torch.equal(act(model, cache, device, change), expected)
    assert torch.equal(expected, unchanged(device)) == (change in SAME_NUMBERS)
    assert torch.equal(expected[:, :8], unchanged(device)[:, :8])
    assert cache.replay.count == (1 if change in SAME_STEP else 2) and cache.replay.recorded is not None
    assert recorder.runs >= 12 and notes(model) == []


def collector(seen):
    """A hook; its list is a closure's, for Dynamo of torch 2.11 loses what is appended to a default argument."""

    def hook(module, args, out):
        seen.append(out)

    return hook


def test_a_hook_that_collects_sees_every_token(device):
    """Recorded or not: what it collects is each token's own. (Dynamo sees the hooks of the first call only.)"""
    found = []
    for make in (plain, lambda model: recording(model)[0]):
        model, seen = changed("llama", device), []
        cache = make(model)
        model.model.layers[0].mlp.register_forward_hook(collector(seen))
        with torch.no_grad():
            model(**prompt(device, (90,), spans=SPAN), **cached(cache))
        feed(model, cache, torch.full((1, 5), 20), 90)  # the list grows: each token is compiled anew
        found.append(seen)
    assert len(found[0]) == len(found[1]) == 1 + 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_autocast_between_two_tokens(first, device):
    model = changed("llama", device)
    ids = prompt(device, (24,), 3, spans=())["input_ids"]
    results = []
    for cache in (plain(model), recording(model)[0]):
        outs = []
        with torch.no_grad():
            model(**prompt(device, (90,), spans=SPAN), **cached(cache))
        for part, on in zip(ids.split(8, 1), (first, not first, first), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                outs.append(feed(model, cache, part, cache.get_seq_length()))
        results.append(torch.cat([x.float() for x in outs], 1))
    assert torch.equal(*results) and cache.replay.count >= 2


def test_another_attention_is_refused_as_without_recording(device):
    """The layers would never reach the cache: refused before anything is written."""
    for make in (plain, lambda model: recording(model)[0]):
        cache = make(model := changed("llama", device))
        act(model, cache, device)
        model.set_attn_implementation("sdpa")
        with pytest.raises(ConfigError, match="model must attend by 'omnisparse' with an OmniSparseCache, got 'sdpa'"):
            feed(model, cache, torch.full((1, 1), 20), 110)
        with pytest.raises(ConfigError, match="cache must be reset after a call that failed"):
            feed(model, cache, torch.full((1, 1), 20), 110)


@pytest.mark.filterwarnings("ignore:omnisparse. Dynamo broke the decoder")  # collecting them does, recorded or not
def test_more_results_between_two_tokens(device):
    flags = {"output_hidden_states": True}
    model = changed("llama", device)
    results = []
    for cache in (plain(model), recording(model)[0]):
        act(model, cache, device)
        outs = []
        with torch.no_grad():
            for i in range(10):
                more = flags if 3 <= i < 8 else {}
                at = torch.full((1, 1), 110 + i, device=device)
                out = model(
                    input_ids=torch.full((1, 1), 20), position_ids=at, **cached(cache), logits_to_keep=1, **more
                )
                outs += [out.logits, *[x for x in (out.hidden_states or ()) if x is not None]]
        results.append(outs)
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_refused_in_the_middle_of_an_answer(device):
    cache, recorder = recording(model := changed("llama", device))
    act(model, cache, device)
    runs = recorder.runs
    with torch.enable_grad(), pytest.raises(ConfigError, match="cache must be used without gradients"):
        model(input_ids=torch.full((1, 1), 20), position_ids=torch.full((1, 1), 110), **cached(cache))
    feed(model, cache, torch.full((1, 1), 20), 110)
    assert recorder.runs == runs + 1


def test_switched_off_by_the_environment(device, monkeypatch):
    expected = act(model := changed("llama", device), plain(model), device)
    cache, _ = recording(model := changed("llama", device))
    monkeypatch.delenv(DISABLE_VARIABLE, raising=False)
    found = act(model, cache, device, lambda model: monkeypatch.setenv(DISABLE_VARIABLE, "1"))
    assert torch.allclose(found, expected, atol=1e-5) and cache.replay.recorded is None


def test_an_error_in_the_middle_of_a_replayed_step(device):
    """The device is a token ahead of the books: the cache refuses to go on until it is reset."""
    cache, _ = recording(model := changed("llama", device))
    expected = act(model, cache, device)

    def interrupt():
        raise KeyboardInterrupt

    cache.replay.recorded.step.replay = interrupt
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, torch.full((1, 1), 20), 110)
    with pytest.raises(ConfigError, match="cache must be reset after a call that failed"):
        feed(model, cache, torch.full((1, 1), 20), 110)
    cache.reset()
    assert torch.equal(act(model, cache, device), expected)


def test_a_copied_cache_goes_its_own_way(device):
    """The usual way to use one prompt for several questions; recorded steps are not copied."""
    ids = prompt(device, (40,), 5, spans=())["input_ids"]
    results = []
    for make in (plain, lambda model: recording(model)[0]):
        cache = make(model := changed("llama", device))
        act(model, cache, device)
        twin = copy.deepcopy(cache)
        outs = [feed(model, one, ids[:, :20], 110) for one in (cache, twin)]
        outs.append(feed(model, cache, ids[:, 20:], 130))
        results.append(torch.cat(outs, 1))
    assert torch.equal(*results)
    assert twin.replay is not cache.replay and twin.replay.store is twin.store is not cache.store
    assert twin.replay.count == 1 and twin.store.layers is not cache.store.layers
    assert all(a is b for a, b in zip(twin.layers, twin.store.layers, strict=True))
    assert type(copy.deepcopy(OmniSparseCache(model)).replay.recorder) is type(OmniSparseCache(model).replay.recorder)


def test_two_threads_with_one_cache_are_refused(device):
    """They would write into each other's layers; a thread with a cache of its own waits for the first compile."""
    model = changed("llama", device)
    cache, errors = recording(model)[0], []

    def chooser(mass, layer):
        if layer == 0:
            other = threading.Thread(target=second)
            other.start()
            other.join()
        return half_lazy(mass, layer)

    def second():
        try:
            feed(model, cache, torch.full((1, 1), 20), 0)
        except ConfigError as error:
            errors.append(str(error))

    cache.store.chooser = chooser
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
    assert len(errors) == 1 and errors[0].startswith("model must run one call with a cache at a time")
    assert cache.get_seq_length() == 90


def test_a_weight_of_several_tensors_is_not_recorded(device):
    """A quantized or sharded weight: its parts may be exchanged where nobody looks."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = changed("llama", device)
    linear = model.model.layers[1].mlp.down_proj
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    cache, recorder = recording(model)
    act(model, cache, device)
    assert recorder.made == [] and any("tensor subclass" in note for note in notes(model))


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ({"num_beams": 3}, "what it reads lies elsewhere with every token (beam search, changing shapes)"),
        ({"prompt_lookup_num_tokens": 3}, "drafts of several tokens are verified at once"),
    ],
)
def test_the_report_says_why_an_answer_is_not_recorded(mode, reason, device):
    cache, recorder = recording(model := changed("llama", device))
    generate(model, prompt(device, (90,), spans=SPAN), cache, new=25, do_sample=False, **mode)
    assert recorder.made == [] or "num_beams" not in mode
    assert f"decode steps are not recorded as CUDA graphs: {reason}" in notes(model)


def test_a_decoder_in_parts_is_not_recorded(device):
    """A hook that breaks the graph: every part runs as it is."""
    model = changed("llama", device)
    model.model.layers[1].mlp.register_forward_hook(lambda *a: torch._dynamo.graph_break())
    cache, recorder = recording(model)
    act(model, cache, device)
    assert recorder.made == [] and any("does not run as one compiled graph" in note for note in notes(model))


def test_a_kernel_that_does_not_run_is_not_recorded(device):
    cache, recorder = recording(model := changed("llama", device))
    recorder.takes = lambda layers: False
    act(model, cache, device)
    assert recorder.made == [] and any("the decode kernel does not run here" in note for note in notes(model))


def test_recording_is_the_default_and_says_nothing_without_a_gpu(device):
    """No warning (those are errors here), no note, no bytes: a step like any other."""
    model = changed("llama", device)
    cache = OmniSparseCache(model)
    cache.store.chooser = half_lazy
    assert cache.replay is not None
    found = act(model, cache, device)
    assert torch.equal(found, act(model, plain(model), device))
    assert cache.replay.count == cache.memory_report().recorded == 0 and notes(model) == []
    assert compiled_decoder_of(model).records_steps
