"""OmniSparseCache in ``generate``: equal to a full cache, or to one masked the same way, in every mode."""

from __future__ import annotations

import pytest
import torch
import transformers

from omnisparse_flex import ConfigError, OmniSparseCache, rewrite_report
from tests.helpers.slim import Recorder, changed, generate, half_lazy, longer, prompt, steps
from tests.helpers.slim_oracle import kept, masked_like
from tests.helpers.tiny import MODELS, build
from tests.model.test_transformers import bracket
from tests.model.test_visual_mask import video_inputs

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "assisted": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
#: Rows of a cache after beam search that the next turn goes on with: the first beam of each prompt, for all its beams.
FIRST_BEAMS = (0, 0, 0, 3, 3, 3)
#: In a second assisted turn transformers passes all given tokens on, cached or not; before 5.23 it also cuts the mask.
ASSISTED_TURNS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def next_turn(mode, inputs, tokens, caches, device, seed):
    """The conversation goes on, with what a user must give for it: beams chosen, or new tokens only."""
    if mode == "beams":
        for cache in caches:
            cache.reorder_cache(torch.tensor(FIRST_BEAMS, device=device))
    grown = longer({**inputs, "attention_mask": inputs["attention_mask"][:, -tokens.shape[1] :]}, tokens, device, seed)
    if mode != "assisted":
        return grown
    new, length = grown["input_ids"].shape[1] - tokens.shape[1] + 1, caches[0].get_seq_length()
    mask = torch.ones(1, length + new, dtype=torch.long, device=device)
    return {"input_ids": grown["input_ids"][:, -new:], "attention_mask": mask}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_full_recall_equals_a_dynamic_cache(name, mode, device):
    from transformers import DynamicCache

    inputs = prompt(device, (70,) if mode == "assisted" else (70, 61))
    recorder = Recorder()
    plain, slim = build(name, device), changed(name, device, recorder)
    cache = OmniSparseCache(slim, visual_recall=1.0)
    full = DynamicCache(config=plain.config.get_text_config())
    turns = 3 if mode != "assisted" or ASSISTED_TURNS else 1
    for turn in range(turns):
        expected = generate(plain, inputs, full, **MODES[mode])
        tokens = generate(slim, inputs, cache, **MODES[mode])
        assert torch.equal(tokens, expected), turn
        assert cache.get_seq_length() == full.get_seq_length() == (79, 98, 117)[turn]
        inputs = next_turn(mode, inputs, tokens, (cache, full), device, turn + 7)
    assert [layer.lazy for layer in cache.layers] == [(), ()]
    # Every graph goes through the cache in both layers; those of decoding through nothing else.
    kinds = [("attn", "cache_store") * 2, ("cache_restore", "attn", "cache_store") * 2, ("cache_attend",) * 2]
    assert set(recorder.graphs) == set(kinds if turns > 1 else kinds[::2])
    # transformers gives Qwen's first turn position ids of another shape than later ones; drafts have several tokens.
    shapes = (2 if name.startswith("qwen") else 1) * (2 if mode == "assisted" else 1)
    assert recorder.graphs.count(kinds[2]) <= shapes, "a step compiled again"
    notes = rewrite_report(slim).notes
    assert not [note for note in notes if "eagerly" in note or "broke" in note], notes


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("lengths", [(90,), (90, 71)])
@pytest.mark.parametrize("name", MODELS)
def test_a_forced_split_equals_a_full_cache_masked_the_same_way(name, lengths, offload, device):
    from transformers import DynamicCache

    inputs = prompt(device, lengths, spans=((10, 50), (55, 60)))
    slim = changed(name, device)
    cache = OmniSparseCache(slim, offload=offload)
    cache.store.chooser = half_lazy
    oracle, exact = build(name, device), build(name, device).double()
    full, full64 = (DynamicCache(config=oracle.config.get_text_config()) for _ in range(2))
    for turn in range(3 if offload else 1):
        tokens, logits = steps(slim, inputs, cache, do_sample=False)
        report = cache.memory_report()
        assert [layer.lazy for layer in report.layers] == [(0,), (1,)]
        with masked_like(cache, oracle), masked_like(cache, exact):
            expected, dense = steps(oracle, inputs, full, do_sample=False)
            expected64, logits64 = steps(exact, inputs, full64, do_sample=False)
        assert torch.equal(tokens, expected) and torch.equal(tokens, expected64), turn
        assert (logits.double() - logits64).abs().max() <= bracket(logits64, dense)
        assert (report.host > 0) == offload
        inputs = longer(inputs, tokens, device, turn + 7)


def test_the_split_changes_what_is_generated(device):
    """The control of the test above: without the mask, a full cache says something else."""
    inputs = prompt(device, (90,), spans=((10, 50), (55, 60)))
    slim = changed("llama", device)
    cache = OmniSparseCache(slim)
    cache.store.chooser = half_lazy
    _, logits = steps(slim, inputs, cache, do_sample=False)
    _, dense = steps(build("llama", device), inputs, None, do_sample=False)
    assert (logits[:, 1] - dense[:, 1]).abs().max() > 100 * torch.finfo(torch.float32).eps * dense.abs().max()


def test_a_real_video_and_its_positions(device):
    """M-RoPE positions come from the video's grid; a slim cache must not move them."""
    from transformers import DynamicCache

    inputs = video_inputs(device)
    slim, oracle = changed("qwen2_5_vl", device), build("qwen2_5_vl", device)
    cache, full = OmniSparseCache(slim), DynamicCache(config=oracle.config.get_text_config())
    cache.store.chooser = half_lazy
    tokens, _ = steps(slim, inputs, cache, do_sample=False)
    with masked_like(cache, oracle):
        expected, _ = steps(oracle, inputs, full, do_sample=False)
    assert torch.equal(tokens, expected)
    assert cache.memory_report().host > 0


def test_a_long_answer_outgrows_its_room_several_times(device):
    """Nothing is planned for a length: 200 tokens after a prompt of 90, each step on the right keys."""
    from transformers import DynamicCache

    inputs = prompt(device, (90, 71), spans=((10, 50),))
    slim, oracle = changed("llama", device), build("llama", device)
    cache = OmniSparseCache(slim)
    cache.store.chooser = half_lazy
    tokens = generate(slim, inputs, cache, new=200, do_sample=False)
    assert cache.layers[0].tail_keys.shape[2] == 256
    with masked_like(cache, oracle):
        expected = generate(oracle, inputs, DynamicCache(config=oracle.config), new=200, do_sample=False)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("mode", ["sampling", "beams", "assisted"])
@pytest.mark.parametrize("name", MODELS)
def test_other_ways_to_decode_on_a_forced_split(name, mode, device):
    """Every row and every token of a draft, on the same keys."""
    from transformers import DynamicCache

    inputs = prompt(device, (90,) if mode == "assisted" else (90, 71), spans=((10, 50),))
    slim, oracle = changed(name, device), build(name, device)
    cache, full = OmniSparseCache(slim), DynamicCache(config=oracle.config.get_text_config())
    cache.store.chooser = half_lazy
    for turn in range(3 if mode != "assisted" or ASSISTED_TURNS else 1):
        tokens = generate(slim, inputs, cache, new=16, **MODES[mode])
        assert [layer.lazy for layer in cache.layers] == [(0,), (1,)]
        with masked_like(cache, oracle):
            assert torch.equal(tokens, generate(oracle, inputs, full, new=16, **MODES[mode])), turn
        inputs = next_turn(mode, inputs, tokens, (cache, full), device, turn + 7)


@pytest.mark.parametrize("seed", range(3))
def test_drafts_and_single_tokens_agree_on_the_same_keys(seed, device):
    """An assisted answer is the greedy one on the keys that it kept.

    These need not be a greedy answer's: transformers sends the first draft along with the prompt, and the pattern is
    then read from the question and a few guessed tokens.
    """
    from transformers import DynamicCache

    inputs = prompt(device, (90,), seed, spans=((10, 50),))
    slim, oracle = changed("llama", device), build("llama", device)
    answers, masks = [], []
    for mode in ("assisted", "greedy"):
        cache = OmniSparseCache(slim)
        cache.store.chooser = half_lazy
        answers.append(generate(slim, inputs, cache, new=16, **MODES[mode]))
        masks.append(torch.stack([kept(layer, 2) for layer in cache.layers]))
        with masked_like(cache, oracle):
            greedy = generate(oracle, inputs, DynamicCache(config=oracle.config), new=16, **MODES["greedy"])
        assert torch.equal(answers[-1], greedy), mode
    assert not torch.equal(*masks) or torch.equal(*answers)


def test_a_second_assisted_turn_with_the_whole_conversation(device):
    """transformers feeds all of it again, behind what the cache holds: as with any cache, or refused (5.17)."""
    from transformers import DynamicCache

    inputs, plain, slim = prompt(device), build("llama", device), changed("llama", device)
    cache, full = OmniSparseCache(slim, visual_recall=1.0), DynamicCache(config=plain.config)
    tokens = generate(slim, inputs, cache, **MODES["assisted"])
    generate(plain, inputs, full, **MODES["assisted"])
    inputs = longer(inputs, tokens, device, 7)
    greedy = generate(plain, inputs, None, do_sample=False)
    expected = generate(plain, inputs, full, **MODES["assisted"])
    assert full.get_seq_length() == 79 + 98, "transformers has learnt it: lift ASSISTED_TURNS"
    if ASSISTED_TURNS:
        assert torch.equal(generate(slim, inputs, cache, **MODES["assisted"]), expected)
        return
    with pytest.raises(ConfigError, match="attention_mask must cover 168 tokens"):
        generate(slim, inputs, cache, **MODES["assisted"])
    assert cache.get_seq_length() == 79, "what is refused changes nothing"
    assert torch.equal(generate(slim, inputs, cache, do_sample=False), greedy)


@pytest.mark.slow
def test_under_inductor(device):
    """The compiled decoder: prefill, decode and a second turn, each one graph."""
    from transformers import DynamicCache

    inputs = prompt(device, (90,), spans=((10, 50),))
    slim, oracle = changed("llama", device, "inductor"), build("llama", device)
    cache, full = OmniSparseCache(slim), DynamicCache(config=oracle.config)
    cache.store.chooser = half_lazy
    for turn in range(2):
        tokens = generate(slim, inputs, cache, do_sample=False)
        with masked_like(cache, oracle):
            assert torch.equal(tokens, generate(oracle, inputs, full, do_sample=False)), turn
        inputs = longer(inputs, tokens, device, turn + 7)
    assert rewrite_report(slim).graphs == 3 and not any("eager" in note for note in rewrite_report(slim).notes)
