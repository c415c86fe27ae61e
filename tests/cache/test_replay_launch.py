"""What lies between a call and the launch of its recorded step: little, and all that safety needs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.cache.recorded_step import StorageWatch, TensorAddresses
from omnisparse_flex.cache.step_inputs import FlatCall
from tests.helpers.slim import changed, longer, prompt
from tests.helpers.stand_in import SPAN, feed, plain, recording
from tests.helpers.tiny import VIDEO, cached


@pytest.fixture
def device():
    """The stand-in runs what it records: on a GPU that would advance the counters there."""
    return torch.device("cpu")


def started(device, make=recording, **changes):
    """A model and a cache with a recorded step; the stand-in, if any."""
    model = changed("llama", device, **changes)
    made = make(model)
    cache, recorder = made if isinstance(made, tuple) else (made, None)
    ids = prompt(device, (6,), 3, spans=())["input_ids"]
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(cache))
    feed(model, cache, ids, 90)
    assert recorder is None or cache.replay.recorded is not None
    return model, cache, recorder


def calls_before_launch(layers, device):
    """Python and C functions called from Python, from the call of the model to the launch."""
    model, cache, recorder = started(device, num_hidden_layers=layers)
    count = [0]

    def launch():
        sys.setprofile(None)
        count.append(count[0])

    recorder.made[-1].replay = launch
    token, at = torch.full((1, 1), 20), torch.full((1, 1), 96)

    def seen(frame, event, arg):
        count[0] += event in ("call", "c_call")

    with torch.no_grad():
        sys.setprofile(seen)
        try:
            model(input_ids=token, position_ids=at, **cached(cache))
        finally:
            sys.setprofile(None)
    assert len(count) == 2, "the step was not replayed"
    return count[1]


def test_little_is_done_for_each_layer_before_the_launch(device):
    """The device is idle until then: neither the weights nor the kept keys are looked at one by one."""
    few, many = (calls_before_launch(layers, device) for layers in (2, 10))
    assert many - few <= 8 * 2, (few, many)
    assert few < 400


def test_weights_whose_memory_is_freed_are_never_read(device):
    """It may be unmapped by then: such a step is not launched, not even in vain."""
    model, cache, recorder = started(device)
    runs = recorder.runs
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data * 1.5
    feed(model, cache, torch.full((1, 1), 20), 96)
    assert recorder.runs == runs and cache.replay.recorded is None


def test_weights_that_moved_are_noticed_after_the_launch(device):
    """Their old memory is there, so it may be read: in vain."""
    model, cache, recorder = started(device)
    runs = recorder.runs
    weight = model.model.layers[1].mlp.down_proj.weight
    kept, weight.data = weight.data, weight.data * 1.5
    feed(model, cache, torch.full((1, 1), 20), 96)
    assert recorder.runs == runs + 1 and cache.replay.recorded is None and kept is not None


@pytest.mark.parametrize("name", ["tail_keys", "tail_values"])
def test_what_a_step_writes_is_looked_at_before_the_launch(name, device):
    """Even if somebody gives the very tensor other memory."""
    ids, results = prompt(device, (8,), 4, spans=())["input_ids"], []
    for make in (plain, recording):
        model, cache, recorder = started(device, make)
        tail = getattr(cache.layers[1], name)
        kept = tail.data
        tail.data = tail.data.clone()
        before = kept.clone()
        results.append(feed(model, cache, ids[:, :1], 96))
        assert torch.equal(kept, before), "written where the cache no longer is"
        results[-1] = torch.cat([results[-1], feed(model, cache, ids[:, 1:], 97)], 1)
    assert torch.equal(*results) and cache.replay.count == 2 and recorder.runs > 0


def test_places_and_memory():
    first, second = torch.zeros(4), torch.zeros(4)
    places, memory = TensorAddresses([first, second]), StorageWatch([first, second])
    assert places.hold() and memory.lasts()
    kept, first.data = first.data, torch.ones(4)
    assert not places.hold() and memory.lasts()
    first.data = kept
    assert places.hold()
    del kept
    assert places.hold() and memory.lasts()
    first.data = torch.ones(4)
    assert not places.hold() and not memory.lasts()
    places, memory = TensorAddresses([second]), StorageWatch([second])
    del second
    assert not places.hold() and not memory.lasts()


def test_memory_that_cannot_say_when_it_is_freed_is_looked_at(monkeypatch):
    """Where the Python object of a storage is made anew for each question."""

    class Passing(torch.Tensor):
        def untyped_storage(self):
            return type("Storage", (), {})()  # gone at once

    tensor = torch.zeros(4).as_subclass(Passing)
    memory = StorageWatch([tensor])
    assert memory.lasts() and memory.lasts()
    tensor.data = torch.ones(4)
    assert not memory.lasts()


def test_the_version_of_a_layer(device):
    """Another one whenever a kernel would be launched with something else, and the same for each further token."""
    layer, token = SlimLayer(0), torch.zeros(2, 2, 1, 4, device=device)
    seen = [layer.version]

    def changes(act):
        act()
        seen.append(layer.version)
        return seen[-1] not in seen[:-1]

    assert changes(lambda: layer.append(token, token))
    assert not changes(lambda: layer.append(token, token))
    assert changes(lambda: layer._count(torch.device(device))) and not changes(lambda: layer._count(device))
    assert changes(lambda: layer.append(token, token))  # that counter is void
    assert not changes(lambda: setattr(layer, "limit", 7)) and not changes(lambda: setattr(layer, "tail", 2))
    assert changes(lambda: layer.select(torch.tensor([1, 0], device=device), [1, 0]))
    assert changes(lambda: [layer.append(token, token) for _ in range(64)])
    assert changes(lambda: setattr(layer, "prefix", 9))
    assert changes(layer.clear)


def test_rectangles_are_never_changed_in_place(device):
    _, cache, _ = started(device)
    part, version = cache.layers[0].kept[0], cache.layers[0].version
    with pytest.raises(AttributeError):
        part.keys = part.values
    assert isinstance(cache.layers[0].kept, tuple)
    cache.reorder_cache(torch.tensor([0], device=device))
    assert cache.layers[0].version != version and cache.layers[0].kept[0] is not part


def test_visual_tokens_of_replayed_steps_are_remembered(device):
    """The mask is asked for every token, after the launch; a later turn finds it whole."""
    ids = prompt(device, (12,), 3, spans=((4, 9),))["input_ids"]
    assert (ids == VIDEO).any()
    histories, results = [], []
    for make in (plain, recording):
        model, cache, recorder = started(device, make)
        out = [feed(model, cache, ids, 96)]
        histories.append(cache._omnisparse_visual)
        inputs = {"attention_mask": torch.ones(1, 108, dtype=torch.long, device=device)}
        history = torch.cat([prompt(device, (90,), spans=SPAN)["input_ids"], ids[:, :6], ids], 1)
        question = longer(inputs, history, device, 5)["input_ids"][:, 108:]
        with torch.no_grad():
            out.append(model(input_ids=question, **cached(cache)).logits)
        results.append(torch.cat(out, 1))
    assert recorder.runs > 12
    assert torch.equal(*histories) and histories[0][0, 96:].tolist() == (ids[0] == VIDEO).tolist()
    assert torch.equal(*results)


def test_a_mask_function_that_fails_breaks_the_cache(device):
    """It is asked when the step runs already: the cache says so at the next call."""
    from omnisparse_flex import ConfigError

    model, cache, _ = started(device)
    hook = next(h for m in model.modules() for h in m._forward_pre_hooks.values() if hasattr(h, "given"))
    hook.given = lambda args, kwargs: kwargs["input_ids"]
    with pytest.raises(ConfigError, match="visual_mask must be bool"):
        feed(model, cache, torch.full((1, 1), 20), 96)
    with pytest.raises(ConfigError, match="cache must be reset after a call that failed"):
        feed(model, cache, torch.full((1, 1), 20), 96)
    assert cache.omnisparse_later == []


def test_a_call_that_ends_before_the_decoder_leaves_nothing_to_the_next(device):
    """Its mask is of other lengths: whoever ran next would select by it."""
    from omnisparse_flex.model.compiled_module import compiled_decoder_of

    model, cache, _ = started(device)

    def refuse(*_):
        raise RuntimeError("not now")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(RuntimeError, match="not now"):
        feed(model, cache, torch.full((1, 1), 20), 96)
    hook.remove()
    other = prompt(device, (150,), spans=((10, 100),))
    with torch.no_grad():
        model(**other)
    assert compiled_decoder_of(model).state.visual.shape == (1, 150)
    feed(model, cache, torch.full((1, 1), 20), 96)
    assert cache.omnisparse_later == [] and cache._omnisparse_visual.shape == (1, 97)


def test_a_thread_with_a_cache_of_its_own_disturbs_no_call_in_progress(device):
    """The state of a call is its thread's: both caches hold their own tokens afterwards."""
    import threading

    model, cache, _ = started(device)
    other, _ = recording(model)
    with torch.no_grad():
        model(**prompt(device, (90,), spans=SPAN), **cached(other))
    feed(model, other, prompt(device, (6,), 3, spans=())["input_ids"], 90)
    feed_, ran = cache.replay._copy_to_static_inputs, []

    def meanwhile(call):
        def run():
            feed(model, other, torch.full((1, 1), 21), 96)
            ran.append(other.get_seq_length())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        feed_(call)

    cache.replay._copy_to_static_inputs = meanwhile
    feed(model, cache, torch.full((1, 1), 20), 96)
    assert ran == [97] and cache.get_seq_length() == 97
    assert cache._omnisparse_visual.shape == other._omnisparse_visual.shape == (1, 97)


@pytest.mark.parametrize("nested", [False, True])
def test_arguments_with_and_without_structure(nested, device):
    """Flat ones need no pytree; a call is given exactly what it was called with."""
    model, cache, _ = started(device)
    from omnisparse_flex.model.compiled_module import compiled_decoder_of

    entry, x = compiled_decoder_of(model), torch.ones(2)
    args, kwargs = (x, None), {"a": 1, "cache": cache, "b": (x, {"c": 2.0}) if nested else torch.float16}
    call, twin = (FlatCall(entry, cache, args, kwargs) for _ in range(2))
    assert call.signature == twin.signature and isinstance(call.form, tuple) != nested
    assert call.signature != FlatCall(entry, cache, args, {**kwargs, "a": 2}).signature
    assert call.signature != FlatCall(entry, cache, args[:1], {"none": None, **kwargs}).signature
    seen = []
    fake = SimpleNamespace(backend=entry.backend, run=lambda args, kwargs: seen.append((args, kwargs)))
    call.decoder = fake
    call.run(lambda number, inputs, go: go())
    assert repr(seen) == repr([(args, kwargs)])
