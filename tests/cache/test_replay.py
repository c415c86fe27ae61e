"""Recorded decode steps: when they are recorded, replayed, dropped and refused; every replay equal to running.

Without a GPU a stand-in records: its replay runs the step again, and takes back what a real one would not
do, the bookkeeping in Python. So what is left to the replay is tested here; the kernels are in test_replay_gpu.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

import omnisparse_flex.cache.store as slim_store
from omnisparse_flex import ConfigError, OmniSparseCache, collect_stats
from omnisparse_flex.cache.step_reasons import reason_of_call
from omnisparse_flex.cache.step_replay import Replay
from omnisparse_flex.model.cache_argument import cache_of
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.cache.test_cache_use import close, everything
from tests.helpers.slim import changed, generate, half_lazy, longer, prompt, steps
from tests.helpers.stand_in import SPAN, StandIn, equal, feed, filled, notes, plain, recording
from tests.helpers.tiny import cached


@pytest.fixture
def device():
    """The stand-in runs what it records: on a GPU that would advance the counters there."""
    return torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_long_answer_is_replayed_token_for_token(name, device):
    """Room grows at 64 and 128 tokens: three recordings, and three plain steps before each."""
    inputs = prompt(device, (90,), spans=SPAN)
    recorder, model = equal(name, device, lambda m, c: generate(m, inputs, c, new=150, do_sample=False))
    assert len(recorder.made) == 3 and 149 - 5 * 3 <= recorder.runs < 149
    assert notes(model) == []
    # Neither the compiler nor the graph runs while a step is replayed: prefill, and one decode graph.
    assert compiled_decoder_of(model).backend.log.graphs == 2


def test_logits_are_equal_to_the_last_bit(device):
    inputs = prompt(device, (90,), spans=SPAN)
    model = changed("llama", device)
    _, expected = steps(model, inputs, plain(model), new=30, do_sample=False)
    cache, recorder = recording(model)
    _, logits = steps(model, inputs, cache, new=30, do_sample=False)
    assert torch.equal(logits, expected) and recorder.runs > 20


@pytest.mark.parametrize("offload", [True, False])
def test_the_pattern_is_read_again_from_replayed_queries(offload, device, monkeypatch):
    """A refresh asks the queries of steps that nobody ran; it moves the rectangles, and the next recording follows."""
    monkeypatch.setattr(slim_store, "REFRESH", 12)
    monkeypatch.setattr(slim_store, "PATTERN_QUERIES", 4)
    seen = {}

    def act(model, cache):
        seen[cache] = []

        def chooser(mass, layer):
            seen[cache].append((layer, cache.get_seq_length(), mass.clone()))
            return everything(mass) if len(seen[cache]) % 4 == 3 else half_lazy(mass, layer)

        cache.store.chooser = chooser
        return generate(model, inputs, cache, new=50, do_sample=False)

    inputs = prompt(device, (90,), spans=SPAN)
    model = changed("llama", device)
    expected = act(model, plain(model, offload=offload))
    cache, recorder = recording(model, offload=offload)
    assert torch.equal(act(model, cache), expected)
    (first, second) = seen.values()
    assert len(first) == len(second) == (2 + 8 if offload else 2)
    for (layer, length, mass), (own_layer, own_length, own) in zip(first, second, strict=True):
        assert (layer, length) == (own_layer, own_length) and torch.equal(mass, own)
    assert recorder.runs > 10 and (len(recorder.made) >= 3 if offload else len(recorder.made) == 1)


def test_turns_crops_and_a_second_prompt(device):
    """Whatever happens to the cache between two answers, no recorded step survives it wrongly."""
    inputs = prompt(device, (90,), spans=SPAN)

    def act(model, cache):
        tokens = generate(model, inputs, cache, new=12, do_sample=False)
        second = generate(model, longer(inputs, tokens, device, 3), cache, new=12, do_sample=False)
        cache.crop(-5)
        third = generate(model, longer(inputs, second[:, :-4], device, 4), cache, new=12, do_sample=False)
        cache.reset()
        other = generate(model, prompt(device, (80,), 5, spans=SPAN), cache, new=12, do_sample=False)
        return torch.cat([tokens, second, third, other], 1)

    recorder, _ = equal("llama", device, act)
    assert len(recorder.made) == 4 and recorder.runs >= 4 * 6 and recorder.freed == 1


def test_a_crop_between_two_tokens(device):
    """Tokens fed, taken back and replaced: the tail is shorter, its memory the same."""
    ids = prompt(device, (60,), 3, spans=())["input_ids"]

    def act(model, cache):
        with torch.no_grad():
            model(**prompt(device, (90,), spans=SPAN), **cached(cache))
        first = feed(model, cache, ids[:, :20], 90)
        cache.crop(-7)
        second = feed(model, cache, ids[:, 20:40], 103)
        cache.crop(80)
        return torch.cat([first, second, feed(model, cache, ids[:, 40:], 80)], 1)

    recorder, _ = equal("llama", device, act)
    assert recorder.runs >= 40 and len(recorder.made) <= 3


def test_rows_are_reordered_between_tokens(device):
    ids = prompt(device, (30, 30), 3, spans=())["input_ids"]
    inputs = prompt(device, (90, 90), spans=SPAN)["input_ids"]

    def act(model, cache):
        with torch.no_grad():
            model(input_ids=inputs, **cached(cache))
        first = feed(model, cache, ids[:, :10], 90)
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        second = feed(model, cache, ids[:, 10:20], 100)
        cache.batch_select_indices(torch.tensor([1], device=device))
        return torch.cat([first, second, feed(model, cache, ids[:1, 20:], 110).expand(2, -1, -1)], 1)

    recorder, _ = equal("llama", device, act)
    assert recorder.runs >= 15 and len(recorder.made) == 3


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "top_k": 20}])
def test_other_ways_to_decode(mode, device):
    inputs = prompt(device, (90,), spans=SPAN)
    recorder, _ = equal("llama", device, lambda m, c: generate(m, inputs, c, new=25, **{"do_sample": False, **mode}))
    assert recorder.runs > 0 or "do_sample" not in mode, "a sampled answer is replayed like a greedy one"


def test_two_conversations_take_turns(device):
    """Each cache has its own recorded step; a step of one leaves the other's alone."""
    model = changed("llama", device)
    ids = prompt(device, (24,), 3, spans=())["input_ids"]
    prompts = [prompt(device, (90,), seed, spans=SPAN) for seed in (0, 7)]
    results = []
    for make in (lambda: plain(model), lambda: recording(model)[0]):
        caches = [make(), make()]
        with torch.no_grad():
            for one, cache in zip(prompts, caches, strict=True):
                model(**one, **cached(cache))
        outs = [feed(model, cache, ids[:, i : i + 1], 90 + i) for i in range(24) for cache in caches]
        results.append(torch.cat(outs, 1))
    assert torch.equal(*results)
    assert [cache.replay.count for cache in caches] == [1, 1]


def test_results_belong_to_the_caller(device):
    """Hidden states of earlier tokens stay as they were; the cache comes back as itself."""
    model = changed("llama", device)
    cache, recorder = recording(model)
    kept = []
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
        for i in range(10):
            token = torch.full((1, 1), 20 + i, device=device)
            at = torch.full((1, 1), 90 + i, device=device)
            out = model.model(input_ids=token, position_ids=at, **cached(cache))
            assert cache_of(out) is cache and type(out).__name__ == "BaseModelOutputWithPast"
            kept.append((out.last_hidden_state, out.last_hidden_state.clone()))
    assert recorder.runs > 5 and all(torch.equal(a, b) for a, b in kept)
    assert len({a.data_ptr() for a, _ in kept}) == len(kept)


def test_positions_from_a_length_are_never_recorded(device):
    """Without position ids the decoder counts them from the cache's length: such a graph changes with each token."""
    ids = prompt(device, (12,), 3, spans=())["input_ids"]

    def act(model, cache):
        with torch.no_grad():
            model(**prompt(device, (90,), spans=SPAN), **cached(cache))
            return torch.cat([model(input_ids=part, **cached(cache)).logits for part in ids.split(1, 1)], 1)

    recorder, model = equal("llama", device, act)
    assert recorder.made == []
    assert notes(model) == [
        "decode steps are not recorded as CUDA graphs: the graph computes with a number or tensor that changes"
    ]


@pytest.mark.parametrize("lengths", [(90, 71), (90, 90)])
def test_padding(lengths, device):
    """Rows of one length need no mask; padded ones do, and run as before."""
    inputs = prompt(device, lengths, spans=SPAN)
    recorder, model = equal("llama", device, lambda m, c: generate(m, inputs, c, new=20, do_sample=False))
    padded = lengths[0] != lengths[1]
    assert (len(recorder.made), len(notes(model))) == ((0, 1) if padded else (1, 0))
    assert all("the prompt has padding" in note for note in notes(model))


@pytest.mark.parametrize("replays", [True, False])
def test_a_mask_that_forbids_a_decoded_token(replays, device):
    """No graph sees the mask of an unpadded cache, and yet its zeros count: as those of a graph that does."""
    ids = prompt(device, (30, 30), 3, spans=())["input_ids"]
    inputs = prompt(device, (90, 90), spans=SPAN)["input_ids"]
    mask = torch.ones(2, 120, dtype=torch.long, device=device)
    mask[1, 100:104] = 0

    def act(cache, **extra):
        out = []
        with torch.no_grad():
            model(input_ids=inputs, **cached(cache))
            for i in range(30):
                own = {"attention_mask": mask[:, : 91 + i], "input_ids": ids[:, i : i + 1]}
                at = torch.full((2, 1), 90 + i, device=device)
                cache.store.tokens.padded = extra.get("padded", cache.store.tokens.padded)
                out.append(model(**own, position_ids=at, **cached(cache)).logits)
        return torch.cat(out, 1)

    model = changed("llama", device)
    expected = act(plain(model), padded=True)  # the mask goes through the graph
    cache = recording(model)[0] if replays else plain(model)
    assert torch.equal(act(cache), expected)
    assert not torch.equal(act(plain(model)), feed(model, filled(model, inputs), ids, 90)), "the zeros change nothing"
    short = mask[:, :50]
    with pytest.raises(ConfigError, match="attention_mask must cover 121 tokens"), torch.no_grad():
        model(input_ids=ids[:, :1], attention_mask=short, **cached(cache))


def test_marks_of_inference_mode_are_written_outside_of_it(device):
    tokens = plain(changed("llama", device)).store.tokens
    mask = torch.ones(1, 8, dtype=torch.long, device=device)
    mask[0, 5] = 0
    tokens.batch, tokens.device = 1, device
    for length, mode in ((5, torch.inference_mode()), (6, torch.no_grad())):
        tokens.length = length
        with mode:
            tokens.mark(1, mask)
    assert tokens.marks[0, :8].tolist() == [True] * 5 + [False] + [True] * 2


def test_weights_that_move_end_a_recorded_step(device):
    model = changed("llama", device)
    ids = prompt(device, (20,), 3, spans=())["input_ids"]
    results = []
    for cache in (plain(model), recording(model)[0]):
        with torch.no_grad():
            model(**prompt(device, (90,), spans=SPAN), **cached(cache))
            first = feed(model, cache, ids[:, :8], 90)
            weight = model.model.layers[1].mlp.down_proj.weight
            old = weight.data
            weight.data = old * 1.5
            second = feed(model, cache, ids[:, 8:], 98)
            weight.data = old
        results.append(torch.cat([first, second], 1))
    assert torch.equal(*results) and cache.replay.count == 2


def test_a_module_exchanged_between_two_answers(device):
    """``generate`` goes on by one token, which is no turn: what was recorded before it counts no more."""
    inputs = prompt(device, (90,), spans=SPAN)

    def act(model, cache):
        tokens = generate(model, inputs, cache, new=12, do_sample=False)
        model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
        more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return generate(model, more, cache, new=12, do_sample=False)

    recorder, _ = equal("llama", device, act)
    assert len(recorder.made) == 2 and recorder.runs >= 12


def test_an_argument_on_another_device_is_not_recorded(device):
    """The host would read it once, while the step is recorded."""
    cache, _ = recording(model := changed("llama", device))
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
    call = SimpleNamespace(decoder=compiled_decoder_of(model), cache=cache, leaves=[torch.zeros(1, device="meta")])
    assert reason_of_call(call, {}, cache.store.device) == "an argument lies on another device"


def test_statistics_end_a_recorded_step(device):
    model = changed("llama", device)
    cache, recorder = recording(model)
    ids = prompt(device, (20,), 3, spans=())["input_ids"]
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
    feed(model, cache, ids[:, :8], 90)
    runs = recorder.runs
    with collect_stats(model):
        feed(model, cache, ids[:, 8:14], 98)
    assert runs == 5 and recorder.runs == runs and cache.replay.recorded is None


class Failing(StandIn):
    """Fails in the middle of a step, when a layer has taken the token already."""

    def record(self, step, device):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")


class Wandering(StandIn):
    """The step does something else while it is recorded: here, a layer's counter is made anew."""

    def record(self, step, device):
        result = super().record(step, device)
        self.store.layers[1].table = (torch.zeros(1), torch.zeros(1))
        return result


class Returning(StandIn):
    """The graph returns an object of its own."""

    def record(self, step, device):
        step, outputs = super().record(step, device)
        return step, (*outputs, object())


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Failing, "RuntimeError: operation not permitted when stream is capturing"),
        (Wandering, "the recorded step differed from those before it"),
        (Returning, "the decoder's graph returns more than tensors and constants"),
    ],
)
def test_a_recording_that_fails_changes_nothing(recorder, reason, device):
    inputs = prompt(device, (90,), spans=SPAN)
    model = changed("llama", device)
    expected = generate(model, inputs, plain(model), new=20, do_sample=False)
    for turn in range(2):
        cache = OmniSparseCache(model)
        cache.store.chooser = half_lazy
        cache.replay = Replay(cache.store, recorder(cache.store))
        tokens = generate(model, inputs, cache, new=20, do_sample=False)  # no warning; never tried again
        assert torch.equal(tokens, expected) and cache.replay.recorded is None
        assert cache.replay.recorder.freed == (turn == 0)
    assert notes(model) == [f"no CUDA graph of a decode step, decoding runs without: {reason}"]


def test_a_dropped_cache_is_freed_at_once(device):
    """Nothing in a recorded step holds the cache: its memory does not wait for the garbage collector."""
    model = changed("llama", device)
    inputs = prompt(device, (90,), spans=SPAN)
    generate(model, inputs, recording(model)[0], new=12, do_sample=False)
    gc.collect()  # what the compiler left behind
    cache, recorder = recording(model)
    generate(model, inputs, cache, new=12, do_sample=False)
    assert cache.replay.recorded is not None
    recorder.store = recorder.made = cache.replay.recorded.step = None  # the stand-in's own references
    keys = weakref.ref(cache.layers[0].kept[0].keys)
    gc.disable()
    try:
        del cache, recorder
        assert keys() is None
    finally:
        gc.enable()


def test_arguments_may_be_slices_and_expanded(device):
    """However the caller makes the tensors of a token, the compiler sees one form of them, and compiles once."""
    model = changed("llama", device)
    ids = prompt(device, (30,), 3, spans=())["input_ids"]
    positions = torch.arange(90, 120, device=device)[None]
    cache, recorder = recording(model)
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
        for i in range(30):
            at = positions[:, i : i + 1] if i % 2 else positions[0, i].expand(1, 1)
            model(input_ids=ids[:, i : i + 1], position_ids=at, **cached(cache))
    assert compiled_decoder_of(model).backend.log.graphs == 2 and (len(recorder.made), recorder.runs) == (1, 27)


def test_the_switch(device):
    model = changed("llama", device)
    with pytest.raises(ConfigError, match="cuda_graphs must be True or False, got 1"):
        OmniSparseCache(model, cuda_graphs=1)
    assert OmniSparseCache(model, cuda_graphs=False).replay is None
    assert OmniSparseCache(model).memory_report().recorded == 0


def test_a_tail_that_decodes_on_does_not_grow_without_need(device):
    """Room doubles up to 512 tokens at a time, and after a refresh holds all of the next tail."""
    from omnisparse_flex.cache.layer import SlimLayer

    layer, rooms = SlimLayer(0), []
    token = torch.zeros(1, 2, 1, 4, device=device)
    for _ in range(1600):
        layer.append(token, token)
        rooms.append(layer.tail_keys.shape[2])
    assert sorted(set(rooms)) == [64, 128, 256, 512, 1024, 1536, 2048] and rooms[63:65] == [64, 128]
    layer.clear()
    layer.room = 512
    layer.append(token, token)
    assert layer.tail_keys.shape[2] == 512 and close(layer.tail_keys[:, :, :1], token)
