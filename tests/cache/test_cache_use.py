"""OmniSparseCache in use: turns, crops, chunks, refreshes; and what it refuses, by name."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch

import omnisparse_flex.cache.store as slim_store
from omnisparse_flex import ConfigError, OmniSparseCache, OmniSparseConfig, apply_omnisparse, remove_omnisparse
from omnisparse_flex.api import dense
from omnisparse_flex.model.cache_argument import cache_of
from omnisparse_flex.model.switches import DISABLE_VARIABLE
from tests.helpers.slim import changed, generate, half_lazy, is_visual, longer, prompt, steps
from tests.helpers.slim_oracle import kept
from tests.helpers.tiny import build, cached

SPAN = ((10, 60),)


def forward(model, ids, cache, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **cached(cache), **keywords).logits


def lazy_cache(device, name="llama", **keywords):
    model = changed(name, device)
    cache = OmniSparseCache(model, **keywords)
    cache.store.chooser = half_lazy
    return model, cache


def close(a, b):
    """Two orders of summation of the same float32 numbers, through two layers and the head."""
    return (a - b).abs().max() <= 64 * torch.finfo(torch.float32).eps * b.abs().max().clamp(min=1)


def test_is_a_transformers_cache(device):
    from transformers import Cache

    cache = OmniSparseCache(changed("llama", device))
    assert isinstance(cache, Cache) and isinstance(cache, OmniSparseCache)
    assert type(cache) is type(OmniSparseCache(changed("llama", device)))
    assert not cache.is_compileable and cache.is_croppable and not cache.is_initialized
    assert (cache.get_seq_length(), cache.get_max_length(), cache.batch_size, len(cache)) == (0, -1, -1, 2)
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False, False]
    assert cache.memory_report().ratio == 1.0 and "0 tokens" in str(cache.memory_report())


def test_a_second_turn_sees_what_the_first_dropped(device):
    """Offloaded: the question is computed over the whole conversation, as with a full cache."""
    model, cache = lazy_cache(device)
    inputs = prompt(device, (90,), spans=SPAN)["input_ids"]
    question = prompt(device, (9,), 3, spans=())["input_ids"]
    forward(model, inputs, cache)
    second = forward(model, question, cache)
    plain = build("llama", device)
    with torch.no_grad():
        expected = plain(torch.cat([inputs, question], 1)).logits[:, 90:]
    assert close(second, expected)
    dropped_model, dropped = lazy_cache(device, offload=False)
    forward(dropped_model, inputs, dropped)
    assert not close(forward(dropped_model, question, dropped), expected)


def test_a_dropped_turn_equals_the_same_tokens_one_by_one(device):
    question = prompt(device, (9,), 3, spans=())["input_ids"]
    outputs = []
    for parts in ([9], [1] * 9, [4, 5]):
        model, cache = lazy_cache(device, offload=False)
        forward(model, prompt(device, (90,), spans=SPAN)["input_ids"], cache)
        outputs.append(torch.cat([forward(model, part, cache) for part in question.split(parts, 1)], 1))
    assert close(outputs[1], outputs[0]) and close(outputs[2], outputs[0])


def test_new_visual_tokens_of_a_later_turn_are_slimmed_too(device):
    model, cache = lazy_cache(device)
    first = prompt(device, (90,), spans=SPAN)["input_ids"]
    second = prompt(device, (80,), 5, spans=((5, 55),))["input_ids"]
    forward(model, first, cache)
    before = cache.memory_report()
    logits = forward(model, second, cache)
    report = cache.memory_report()
    with torch.no_grad():
        expected = build("llama", device)(torch.cat([first, second], 1)).logits[:, 90:]
    assert close(logits, expected)
    assert report.host == 2 * before.host and len(cache.layers[0].host.spans) == 2
    lazy = next(part for part in cache.layers[0].kept if part.heads == cache.layers[0].lazy)
    assert lazy.positions.shape[2] == 170 - 2 * 50
    third = prompt(device, (6,), 8, spans=())["input_ids"]
    with torch.no_grad():
        expected = build("llama", device)(torch.cat([first, second, third], 1)).logits[:, 170:]
    assert close(forward(model, third, cache), expected)


@pytest.mark.parametrize("remaining", [93, 90, 80, 30])
@pytest.mark.parametrize("lengths", [(90,), (90, 72)])
def test_crop_into_the_tail_the_prompt_and_the_video(remaining, lengths, device):
    """A cropped conversation goes on as one that never had the rest, up to what the heads hold."""
    model, cache = lazy_cache(device)
    inputs = prompt(device, lengths, spans=SPAN)
    tokens = generate(model, inputs, cache, new=6, do_sample=False)
    masks = [kept(layer, 2) for layer in cache.layers]
    cache.crop(remaining - cache.get_seq_length())
    assert cache.get_seq_length() == remaining == len(cache._omnisparse_visual[0])
    for layer, mask in zip(cache.layers, masks, strict=True):
        prefix = min(remaining, 90)
        assert torch.equal(kept(layer, 2)[:, :, :prefix], mask[:, :, :prefix]) and layer.length == remaining
    question = prompt(device, (5,) * len(lengths), 3, spans=())["input_ids"]
    mask = torch.ones(len(lengths), remaining + 5, dtype=torch.long, device=device)
    mask[:, : min(remaining, 90)] = inputs["attention_mask"][:, :remaining]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = {"attention_mask": mask, "position_ids": positions[:, remaining:]}
    logits = forward(model, question, cache, **own)
    if remaining > 90:
        # Generated tokens were computed on the slim cache: compare with one that stopped in time.
        twin_model, twin = lazy_cache(device)
        generate(twin_model, inputs, twin, new=remaining - 89, do_sample=False)
        assert twin.get_seq_length() == remaining
        expected = forward(twin_model, question, twin, **own)
    else:
        full = torch.cat([tokens[:, :remaining], question], 1)
        expected = forward(build("llama", device), full, None, attention_mask=mask, position_ids=positions)
        expected = expected[:, remaining:]
    assert close(logits, expected)


def test_batch_selection_and_repetition(device):
    model, cache = lazy_cache(device)
    inputs = prompt(device, (90, 90, 90), spans=SPAN)
    inputs["input_ids"][1:, :10] += 1
    forward(model, inputs["input_ids"], cache)
    cache.batch_select_indices(torch.tensor([2, 0], device=device))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    order = [2, 2, 0, 0]
    history = inputs["input_ids"][order]
    question = prompt(device, (5,) * 4, 3, spans=())["input_ids"]
    with torch.no_grad():
        expected = build("llama", device)(torch.cat([history, question], 1)).logits[:, history.shape[1] :]
    assert close(forward(model, question, cache), expected)


def test_the_pattern_is_read_again_while_decoding(device, monkeypatch):
    """Every few tokens each layer fetches, chooses by what the latest queries see, and folds its tail in."""
    monkeypatch.setattr(slim_store, "REFRESH", 6)
    model, cache = lazy_cache(device)
    seen = []

    def chooser(mass, layer):
        seen.append((layer, cache.get_seq_length()))
        # After the first refresh nobody is lazy: what was dropped must come back from the host.
        return half_lazy(mass, layer) if len(seen) <= 2 else slim_store.choose_all(mass)

    monkeypatch.setattr(slim_store, "choose_all", lambda mass: everything(mass), raising=False)
    cache.store.chooser = chooser
    inputs = prompt(device, (90,), spans=SPAN)
    tokens, logits = steps(model, inputs, cache, new=20, do_sample=False)
    assert seen == [(0, 0), (1, 0), (1, 95), (0, 96), (1, 101), (0, 102), (1, 107), (0, 108)]
    assert cache.layers[0].prefix == 108 and cache.layers[1].prefix == 107
    with torch.no_grad():
        expected = build("llama", device)(tokens[:, :109]).logits[:, -1]
    assert not close(logits[:, 19], expected), "the hidden states of earlier tokens were computed on the slim cache"
    key = cache.layers[0].restore(cache.get_seq_length(), *stand_ins(cache), cache.store.copies)[0]
    with torch.no_grad():
        full = cache_of(build("llama", device)(inputs["input_ids"], use_cache=True))
    assert close(key[:, :, :90], full.layers[0].keys)


def everything(mass):
    from omnisparse_flex.cache.choose_keys import choose_keys

    return choose_keys(mass, 1.0)


def stand_ins(cache):
    part = cache.layers[0].kept[0]
    return [x.new_zeros(x.shape[0], 2, 0, x.shape[3]) for x in (part.keys, part.values)]


def test_prefill_in_chunks(device):
    """Chunks that end inside the video wait for the question: nothing is dropped before."""
    model, cache = lazy_cache(device, offload=False)
    ids = prompt(device, (90,), spans=((10, 70),))["input_ids"]
    logits = torch.cat([forward(model, part, cache) for part in ids.split([30, 30, 30], 1)], 1)
    with torch.no_grad():
        assert close(logits, build("llama", device)(ids).logits)
    assert cache.layers[0].lazy and cache.store.lossy and cache.memory_report().host == 0


@pytest.mark.parametrize("offload", [True, False])
def test_a_prefill_never_holds_two_full_layers(offload, device):
    """When a layer is slimmed, the full keys of every layer before it are gone: the peak is slim + one layer."""
    model = changed("llama", device, num_hidden_layers=4)
    cache = OmniSparseCache(model, offload=offload)
    store, alive = cache.store.store_layer, []
    full = []

    def watched(query, key, value, layer, scale):
        alive.append([i for i, ref in enumerate(full) if ref() is not None])
        full.append(weakref.ref(key))
        store(query, key, value, layer, scale)

    cache.store.store_layer, cache.store.chooser = watched, half_lazy
    inputs = prompt(device, (90,), spans=SPAN)["input_ids"]
    forward(model, inputs, cache)
    forward(model, prompt(device, (9,), 3, spans=())["input_ids"], cache) if offload else None
    assert alive == [[]] * (8 if offload else 4), alive


def test_generate_with_a_chunk_size(device):
    import transformers

    model, cache = lazy_cache(device, "llama")
    whole_model, whole = lazy_cache(device, "llama")
    inputs = prompt(device, (90,), spans=SPAN)
    expected = generate(whole_model, inputs, whole, do_sample=False)
    tokens = generate(model, inputs, cache, do_sample=False, prefill_chunk_size=37)
    assert torch.equal(tokens, expected), transformers.__version__
    assert [layer.lazy for layer in cache.layers] == [layer.lazy for layer in whole.layers]


def test_without_visual_tokens_it_is_a_full_cache(device):
    model = changed("llama", device)
    cache, inputs = OmniSparseCache(model), prompt(device, (40,), spans=())
    assert torch.equal(generate(model, inputs, cache), generate(build("llama", device), inputs))
    report = cache.memory_report()
    assert report.host == 0 and all(n == 49 for layer in report.layers for n in layer.tokens)


def test_a_recall_splits_the_heads_by_itself(device):
    model = changed("llama", device)
    inputs = prompt(device, (90,), spans=SPAN)
    sizes = []
    for recall in (1.0, 0.9, 0.6, 0.2):
        cache = OmniSparseCache(model, visual_recall=recall)
        generate(model, inputs, cache, new=3)
        sizes.append(cache.memory_report().device)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[2]


def test_max_kv_budget_bounds_k(device):
    config = OmniSparseConfig(target_recall=0.9, sink_size=4, window_size=8, max_kv_budget=7)
    model = apply_omnisparse(build("llama", device), config, min_seq_len=1 << 20, inner="eager", visual_mask=is_visual)
    cache = OmniSparseCache(model)
    generate(model, prompt(device, (90,), spans=SPAN), cache, new=2)
    assert {part.keys.shape[2] for layer in cache.layers for part in layer.kept} == {90 - 50 + 7}


def test_disabled_by_the_environment(device, monkeypatch):
    inputs = prompt(device, (90,), spans=SPAN)
    model, cache = lazy_cache(device)
    expected = generate(model, inputs, cache)
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    other, second = lazy_cache(device)
    assert torch.equal(generate(other, inputs, second), expected) and second.layers[0].lazy


def test_reset_frees_and_starts_anew(device):
    model, cache = lazy_cache(device)
    inputs = prompt(device, (90,), spans=SPAN)
    expected = generate(model, inputs, cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory_report().device == 0 and cache.batch_size == -1
    assert torch.equal(generate(model, inputs, cache), expected)
    cache.crop(-cache.get_seq_length())
    assert not cache.is_initialized
    generate(model, prompt(device, (50, 40), spans=((5, 30),)), cache)  # another batch size, after a reset
    assert cache.batch_size == 2


def test_no_host_memory_keeps_a_full_cache_and_says_so(device, monkeypatch):
    model, cache = lazy_cache(device)
    inputs = prompt(device, (90,), spans=SPAN)
    import omnisparse_flex.cache.host_memory as host_memory

    def fail(*args):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(host_memory, "send", fail)
    with pytest.warns(UserWarning, match="no host memory to offload layer"):
        tokens = generate(model, inputs, cache)
    assert torch.equal(tokens, generate(build("llama", device), inputs))
    assert cache.memory_report().host == 0 and not any(layer.lazy for layer in cache.layers)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, longer(inputs, tokens, device, 3), cache)
    assert not cache.layers[0].lazy, "a layer that had no room once stays full"


@pytest.mark.parametrize("recall", [0, -0.1, 1.5, True, "all", float("nan")])
def test_visual_recall_is_checked(recall, device):
    with pytest.raises(ConfigError, match=r"visual_recall must be in \(0, 1\], got"):
        OmniSparseCache(changed("llama", device), visual_recall=recall)


def test_what_the_constructor_refuses(device):
    model = changed("llama", device)
    with pytest.raises(ConfigError, match="offload must be True or False, got 1"):
        OmniSparseCache(model, offload=1)
    with pytest.raises(ConfigError, match="model must be changed by apply_omnisparse, got 'LlamaForCausalLM'"):
        OmniSparseCache(build("llama", device))
    with pytest.raises(ConfigError, match=r"model must be an nn\.Module, got 'str'"):
        OmniSparseCache("model")
    plain = apply_omnisparse(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="model must be a transformers model, got 'Linear'"):
        OmniSparseCache(plain)
    model.model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="model must have full attention in every layer, got"):
        OmniSparseCache(model)


def test_another_model_batch_or_mask(device):
    model, cache = lazy_cache(device)
    twin = copy.deepcopy(model)
    ids = prompt(device, (90,), spans=SPAN)["input_ids"]
    forward(model, ids, cache)
    with pytest.raises(ConfigError, match="cache must be used with the model it was made for"):
        forward(changed("llama", device), ids[:, :1], cache)
    for other in (build("llama", device), twin):
        with pytest.raises(ConfigError, match="cache must be used by the model it was made for"):
            forward(other, ids[:, :1], cache)
    with dense(model), pytest.raises(ConfigError, match="cache must be used by the model it was made for"):
        forward(model, ids[:, :1], cache)
    with pytest.raises(ConfigError, match="batch size must be the cache's 1, got 2"):
        forward(model, ids[:, :1].expand(2, 1), cache)
    with pytest.raises(ConfigError, match="attention_mask must be None or of two dimensions"):
        forward(model, ids[:, :1], cache, attention_mask=torch.ones(1, 1, 1, 91, dtype=torch.bool, device=device))
    mask = torch.ones(1, 93, dtype=torch.long, device=device)
    mask[:, 3] = 0
    with pytest.raises(ConfigError, match="attention_mask must stay the same for tokens in the cache"):
        forward(model, ids[:, :3], cache, attention_mask=mask)
    with pytest.raises(ConfigError, match="attention_mask must cover 93 tokens"):
        forward(model, ids[:, :3], cache, attention_mask=mask[:, :50])
    with torch.enable_grad(), pytest.raises(ConfigError, match="cache must be used without gradients"):
        model(input_ids=ids[:, :1], **cached(cache))
    assert cache.get_seq_length() == 90, "what is refused changes nothing"
    forward(model, ids[:, :1], cache)
    remove_omnisparse(model)
    with pytest.raises(ConfigError, match="cache must be used by the model it was made for"):
        forward(model, ids[:, :1], cache)


def test_another_device(device):
    model, cache = lazy_cache(device)
    ids = prompt(device, (90,), spans=SPAN)["input_ids"]
    forward(model, ids, cache)
    with torch.no_grad(), pytest.raises(ConfigError, match=f"device must be the cache's {ids.device}, got"):
        cache.store.begin(ids[:, :1].to("meta"), None, None)


def test_without_a_visual_mask(device):
    model = apply_omnisparse(build("llama", device), min_seq_len=1 << 20, inner="eager")
    with pytest.raises(ConfigError, match="visual_mask must be given to apply_omnisparse"):
        generate(model, prompt(device, (40,)), OmniSparseCache(model))


def test_a_failed_call_breaks_the_cache_until_reset(device, monkeypatch):
    model, cache = lazy_cache(device)
    ids = prompt(device, (90,), spans=SPAN)["input_ids"]
    forward(model, ids, cache)
    attend = cache.layers[1].attend
    monkeypatch.setattr(cache.layers[1], "attend", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, ids[:, :1], cache)
    monkeypatch.setattr(cache.layers[1], "attend", attend)
    with pytest.raises(ConfigError, match="cache must be reset after a call that failed"):
        forward(model, ids[:, :1], cache)
    cache.reset()
    forward(model, ids, cache)


def test_layers_that_do_not_pass_our_argument_are_found_out(device, monkeypatch):
    model, cache = lazy_cache(device)
    attention = model.model.layers[1].self_attn
    inner = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, omnisparse_cache=None, **k: inner(*a, **k))
    with pytest.raises(ConfigError, match="model must pass keyword arguments on to its attention"):
        forward(model, prompt(device, (90,), spans=SPAN)["input_ids"], cache)


def test_an_enclosing_compile_leaves_the_decoder_to_us(device):
    """The cache's call is entered there as without it, and the logits are the same."""
    logits = []
    for enclosing in (False, True):
        model, cache = lazy_cache(device)
        called = torch.compile(model, backend="eager") if enclosing else model
        logits.append(forward(called, prompt(device, (90,), spans=SPAN)["input_ids"], cache))
        assert cache.get_seq_length() == 90
    torch.testing.assert_close(*logits)
