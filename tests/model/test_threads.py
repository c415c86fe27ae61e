"""Calls of several threads on one model do not share what belongs to one call."""

from __future__ import annotations

import threading

import pytest
import torch

from omnisparse_flex import ConfigError, OmniSparseCache, OmniSparseConfig, apply_omnisparse
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.tiny import IMAGE, build, cached

THREADS, CALLS = 4, 80
#: Keeps text and a query block's own keys: what is text decides the result.
PLANTED = OmniSparseConfig(target_recall=0.5, budget=0, last_rows=0, sink_size=0, window_size=1)


def prompts(device, length=400):
    """Equal lengths, another text block in each."""
    ids = torch.full((THREADS, length), IMAGE, device=device)
    ids[:, -20:] = 50
    for row in range(THREADS):
        ids[row, 20 + 70 * row : 30 + 70 * row] = 60 + row
    return ids.split(1)


def in_threads(work):
    """Run ``work(number)`` in each thread at once; what the first one raises is raised here."""
    start, errors = threading.Barrier(THREADS), []

    def run(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def model(device):
    return apply_omnisparse(build("llama", device), PLANTED, min_seq_len=0, inner="eager")


@pytest.fixture
def model_with_images(device):
    model = build("qwen2_5_vl", device, num_hidden_layers=1)
    return apply_omnisparse(model, PLANTED, min_seq_len=0, inner="eager")


def test_each_call_has_its_own_visual_mask(model_with_images, device):
    model, ids, wrong = model_with_images, prompts(device), []

    @torch.no_grad()
    def call(number):
        # Given: a Qwen model would look for pixels behind the placeholders.
        embeddings = model.get_input_embeddings()(ids[number])
        kinds = (ids[number] == IMAGE).int()
        return model.model(inputs_embeds=embeddings, mm_token_type_ids=kinds).last_hidden_state

    expected = [call(number) for number in range(THREADS)]
    apart = min((a - b).abs().max() for a in expected for b in expected if a is not b)
    assert apart > 1e-3, "another's mask would not be seen"

    def work(number):
        for _ in range(CALLS):
            if (call(number) - expected[number]).abs().max() > 1e-5:
                wrong.append(number)

    in_threads(work)
    assert wrong == [] and compiled_decoder_of(model).backend.log.graphs == 1


def test_compiling_threads_wait_for_one_another(model, device):
    ids, results = prompts(device), {}

    def work(number):
        with torch.no_grad():
            results[number] = model(input_ids=ids[number]).logits

    in_threads(work)
    with torch.no_grad():
        assert all(torch.allclose(results[i], model(input_ids=ids[i]).logits, atol=1e-5) for i in range(THREADS))
    assert compiled_decoder_of(model).backend.log.graphs == 1
    assert not any("eagerly" in note for note in compiled_decoder_of(model).backend.log.notes)


def test_each_thread_may_use_a_slim_cache_of_its_own(device):
    mask = lambda args, kwargs: kwargs["input_ids"] < 100  # noqa: E731
    model = apply_omnisparse(build("llama", device), PLANTED, min_seq_len=0, inner="eager", visual_mask=mask)
    torch.manual_seed(3)
    ids = [torch.cat([torch.randint(10, 99, (1, 300)), torch.full((1, 20), 150 + i)], 1).to(device) for i in range(4)]
    answers = lambda i: model.generate(  # noqa: E731
        ids[i], **cached(OmniSparseCache(model)), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    expected = [answers(i) for i in range(THREADS)]

    def work(number):
        for _ in range(3):
            assert torch.equal(answers(number), expected[number])

    in_threads(work)


def test_one_cache_serves_one_call_at_a_time(device):
    model = apply_omnisparse(build("llama", device), min_seq_len=0, inner="eager", visual_mask=lambda a, k: None)
    cache = OmniSparseCache(model)
    cache.mode = "decode"  # as another thread's call leaves it while it runs
    with pytest.raises(ConfigError, match="run one call with a cache at a time"), torch.no_grad():
        model(torch.full((1, 8), 50, device=device), **cached(cache))
