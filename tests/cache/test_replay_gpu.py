"""Decode steps as real CUDA graphs, through Inductor and the decode kernel."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import omnisparse_flex.cache.store as slim_store
from omnisparse_flex import OmniSparseCache
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.slim import changed, generate, half_lazy, longer, prompt
from tests.helpers.stand_in import feed, notes
from tests.helpers.tiny import cached

pytestmark = pytest.mark.gpu

SPAN = ((10, 50),)
CUDA = torch.device("cuda")


def cache_of(model, **keywords):
    cache = OmniSparseCache(model, **{"cuda_graphs": True, **keywords})
    cache.store.chooser = half_lazy
    return cache


@pytest.mark.parametrize("lengths", [(90,), (90, 90)])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_a_hundred_tokens_with_and_without(name, lengths):
    """The same tokens; room grows once, at 64: two recordings. One prefill graph and one for every decode step."""
    inputs = prompt(CUDA, lengths, spans=SPAN)
    model = changed(name, CUDA, "inductor")
    expected = generate(model, inputs, cache_of(model, cuda_graphs=False), new=101, do_sample=False)
    graphs = compiled_decoder_of(model).backend.log.graphs
    cache = cache_of(model)
    tokens = generate(model, inputs, cache, new=101, do_sample=False)
    assert torch.equal(tokens, expected)
    assert cache.replay.count == 2 and cache.replay.recorded is not None and notes(model) == []
    assert compiled_decoder_of(model).backend.log.graphs == graphs == 2
    # The device counted the replayed tokens as Python did.
    assert {int(layer.counter) for layer in cache.layers} == {layer.tail for layer in cache.layers} == {100}
    report = cache.memory_report()
    assert report.recorded > 0 and "recorded step" in str(report)


def logits_of(model, cache, ids, start):
    with torch.no_grad():
        model(**prompt(CUDA, (90,), spans=SPAN), **cached(cache))
    return feed(model, cache, ids, start)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_logits_and_cached_keys_are_equal_bit_for_bit(inner):
    """The same kernels in the same order: not a bit differs, in what comes out and in what stays."""
    ids = prompt(CUDA, (60,), 3, spans=())["input_ids"]
    model = changed("llama", CUDA, inner)
    plain, cache = cache_of(model, cuda_graphs=False), cache_of(model)
    assert torch.equal(logits_of(model, plain, ids, 90), logits_of(model, cache, ids, 90))
    assert cache.replay.count == 1
    for own, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(own.tail_keys, other.tail_keys) and torch.equal(own.tail_values, other.tail_values)


@pytest.mark.parametrize("offload", [True, False])
def test_refreshes(offload, monkeypatch):
    """Layers read their pattern anew from replayed queries, and the next steps read other memory."""
    monkeypatch.setattr(slim_store, "REFRESH", 24)
    monkeypatch.setattr(slim_store, "PATTERN_QUERIES", 8)
    inputs = prompt(CUDA, (90,), spans=SPAN)
    model = changed("llama", CUDA, "inductor")
    expected = generate(model, inputs, cache_of(model, offload=offload, cuda_graphs=False), new=120, do_sample=False)
    cache = cache_of(model, offload=offload)
    assert torch.equal(generate(model, inputs, cache, new=120, do_sample=False), expected)
    assert cache.replay.count >= (4 if offload else 1) and notes(model) == []
    assert (cache.layers[0].prefix > 90) == offload


def test_turns_crops_and_two_conversations():
    """Recorded steps of several caches, of one model, between turns, crops and prompts."""
    model = changed("llama", CUDA, "inductor")
    ids = prompt(CUDA, (40,), 3, spans=())["input_ids"]
    results = []
    for graphs in (False, True):
        caches = [cache_of(model, cuda_graphs=graphs) for _ in range(2)]
        outs = []
        inputs = prompt(CUDA, (90,), spans=SPAN)
        tokens = generate(model, inputs, caches[0], new=20, do_sample=False)
        outs.append(generate(model, longer(inputs, tokens, CUDA, 3), caches[0], new=20, do_sample=False))
        caches[0].crop(-9)
        with torch.no_grad():
            model(**prompt(CUDA, (90,), 7, spans=SPAN), **cached(caches[1]))
        length = caches[0].get_seq_length()
        for i in range(40):
            outs.append(feed(model, caches[0], ids[:, i : i + 1], length + i))
            outs.append(feed(model, caches[1], ids[:, i : i + 1], 90 + i))
        results.append(outs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert caches[0].replay.count == 3 and caches[1].replay.count == 1 and notes(model) == []


def test_recording_again_takes_no_further_memory():
    """One pool for each cache: a new recording takes the place of the old one, and a reset gives it back."""
    model = changed("llama", CUDA, "inductor")
    ids = prompt(CUDA, (12,), 3, spans=())["input_ids"]
    cache = cache_of(model)
    with torch.no_grad():
        model(**prompt(CUDA, (90,), spans=SPAN), **cached(cache))
    sizes = []
    for turn in range(6):
        feed(model, cache, ids, 90)
        assert cache.replay.count == turn + 1 and cache.replay.recorded is not None
        sizes.append(cache.memory_report().recorded)
        cache.crop(-12)
        cache.reorder_cache(torch.tensor([0], device=CUDA))  # its keys lie elsewhere now
    assert sizes[0] > 0 and len(set(sizes)) == 1, sizes
    cache.reset()
    assert cache.memory_report().device == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_replay_waits_for_nothing():
    """The host never waits for the device between two tokens, with the mask that ``generate`` gives."""
    model = changed("llama", CUDA, "inductor")
    cache = cache_of(model)
    ids = prompt(CUDA, (30,), 3, spans=())["input_ids"]
    mask = torch.ones(1, 120, dtype=torch.long, device=CUDA)
    places = torch.arange(120, device=CUDA)[None]
    with torch.no_grad():
        model(**prompt(CUDA, (90,), spans=SPAN), **cached(cache))
        try:
            for i in range(30):
                if i == 8:
                    assert cache.replay.recorded is not None
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                token = {"input_ids": ids[:, i : i + 1], "position_ids": places[:, 90 + i : 91 + i]}
                model(**token, attention_mask=mask[:, : 91 + i], **cached(cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.replay.count == 1 and {int(layer.counter) for layer in cache.layers} == {30}


class Waits(torch.nn.Module):
    """A part of the model that waits for the device: it cannot be recorded."""

    def forward(self, x):
        return wait(x)


@torch.library.custom_op("omnisparse_tests::wait", mutates_args=())
def wait(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 if bool(torch.isfinite(x).all()) else 0.0)


@wait.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_step_that_cannot_be_recorded_runs():
    """CUDA refuses the recording in its middle; the cache, the model and the next cache are none the worse."""
    inputs = prompt(CUDA, (90,), spans=SPAN)
    model = changed("llama", CUDA)
    model.model.layers[1].mlp.act_fn = torch.nn.Sequential(model.model.layers[1].mlp.act_fn, Waits())
    expected = generate(model, inputs, cache_of(model, cuda_graphs=False), new=20, do_sample=False)
    tokens = generate(model, inputs, cache_of(model), new=20, do_sample=False)
    assert torch.equal(tokens, expected)
    assert torch.equal(generate(model, inputs, cache_of(model), new=20, do_sample=False), expected)
    assert len(notes(model)) == 1 and "no CUDA graph of a decode step, decoding runs without" in notes(model)[0]
    assert torch.rand(4, device=CUDA).unique().numel() > 1  # the generator records no more
    generate(model, inputs, cache_of(model), new=5, do_sample=True)
    other = changed("llama", CUDA)  # and another model is still recorded
    cache = cache_of(other)
    generate(other, inputs, cache, new=20, do_sample=False)
    assert cache.replay.count == 1


def test_a_dropped_cache_gives_its_memory_back():
    model = changed("llama", CUDA, "inductor")
    inputs = prompt(CUDA, (90,), spans=SPAN)
    for _ in range(2):  # the first leaves what the compiler and cuBLAS keep
        generate(model, inputs, cache_of(model), new=20, do_sample=False)
    gc.collect()
    before = torch.cuda.memory_allocated()
    cache = cache_of(model)
    generate(model, inputs, cache, new=20, do_sample=False)
    assert cache.replay.recorded is not None and torch.cuda.memory_allocated() > before
    del cache
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_token_decoded_in_vain_is_taken_back(inner):
    """A replay starts before the guards are checked; where they call for another graph, nothing of it stays."""
    results = []
    for graphs in (False, True):
        torch._dynamo.reset()  # else the second model begins with the changed scale as an input, and rounds otherwise
        model = changed("llama", CUDA, inner)
        cache = cache_of(model, cuda_graphs=graphs)
        ids = prompt(CUDA, (30,), 3, spans=())["input_ids"]
        with torch.no_grad():
            model(**prompt(CUDA, (90,), spans=SPAN), **cached(cache))
        outs = [feed(model, cache, ids[:, :10], 90)]
        model.model.layers[1].self_attn.scaling *= 2
        outs.append(feed(model, cache, ids[:, 10:], 100))
        results.append((torch.cat(outs, 1), [(x.tail_keys, x.tail_values, x.tail) for x in cache.layers]))
    assert cache.replay.count == 2 and cache.replay.recorded is not None
    (first, plain), (second, own) = results
    torch.testing.assert_close(first, second)
    for (*states, tail), (*other_states, other) in zip(plain, own, strict=True):
        assert tail == other == 30
        torch.testing.assert_close(states, other_states)
    assert {int(layer.counter) for layer in cache.layers} == {30}


def test_recording_is_the_default():
    model = changed("llama", CUDA)
    cache = OmniSparseCache(model)
    generate(model, prompt(CUDA, (90,), spans=SPAN), cache, new=20, do_sample=False)
    assert cache.replay.count == 1 and notes(model) == []


def test_a_copied_cache_records_for_itself():
    model = changed("llama", CUDA, "inductor")
    ids = prompt(CUDA, (40,), 3, spans=())["input_ids"]
    cache = cache_of(model)
    with torch.no_grad():
        model(**prompt(CUDA, (90,), spans=SPAN), **cached(cache))
    feed(model, cache, ids[:, :10], 90)
    twin = copy.deepcopy(cache)
    first, second = (feed(model, one, ids[:, 10:], 100) for one in (cache, twin))
    assert torch.equal(first, second) and (cache.replay.count, twin.replay.count) == (1, 1)


def test_inside_a_graph_that_somebody_else_records():
    """Ours would void it: there, a step runs as it is."""
    from omnisparse_flex.cache.cuda_graph import CudaGraphs

    recorder, found = CudaGraphs(), [CudaGraphs().serves(CUDA)]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        found.append(recorder.serves(CUDA))
        torch.zeros(1, device=CUDA)
    assert found == [True, False]
