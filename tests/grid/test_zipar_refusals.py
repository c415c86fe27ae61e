"""What ZipAR cannot do is refused by name, before the first forward."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from omnisparse_flex.errors import ConfigError  # noqa: E402
from omnisparse_flex.grid import zipar_generate  # noqa: E402
from tests.helpers.grids import EOL, build, cached, count_forwards, prompts, small  # noqa: E402


def refused(message, model=None, inputs=None, **arguments):
    model = build("llama", dtype=torch.float32)[0] if model is None else model
    calls = count_forwards(model)
    options = {"grid": (3, 5), "window": 2, "do_sample": False, "max_new_tokens": 40, "pad_token_id": 3}
    with pytest.raises(ConfigError) as raised:
        model.generate(**(inputs or prompts()), custom_generate=zipar_generate, **options | arguments)
    assert str(raised.value) == message and not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "generation mode must be greedy_search or sample, got 'beam_search'"),
        ({"prompt_lookup_num_tokens": 3}, "generation mode must be greedy_search or sample, got 'assisted_generation'"),
        ({"output_scores": True}, "output_scores must be off: a step draws several tokens, got True"),
        ({"use_cache": False}, "use_cache must be True, got False"),
        ({"window": 0}, 'window must be in 1 to 5, the columns of the grid, or "adaptive", got 0'),
        ({"window": 6}, 'window must be in 1 to 5, the columns of the grid, or "adaptive", got 6'),
        ({"window": None}, 'window must be in 1 to 5, the columns of the grid, or "adaptive", got None'),
        ({"window": 2.0}, 'window must be in 1 to 5, the columns of the grid, or "adaptive", got 2.0'),
        ({"window": "adaptive", "min_window": 0}, "min_window must be in 1 to 5, the columns of the grid, got 0"),
        ({"grid": None}, "grid must be (rows, columns), got None"),
        ({"grid": (3, 5, 1)}, "grid must be (rows, columns), got (3, 5, 1)"),
        ({"grid": [(3, 5), (3, 4)]}, "grid must be (rows, columns), got [(3, 5), (3, 4)]"),
        ({"grid": (0, 5)}, "grid's rows must be an int of at least 1, got 0"),
        ({"max_new_tokens": 14}, "max_new_tokens must be at least 15 for a grid of 3 x 5, got 14"),
        ({"grid": (100, 6), "max_new_tokens": 700}, "grid must fit 512 positions with its prompt, got 605"),
        (
            {"cache_implementation": "static", "max_new_tokens": 17},
            "max_new_tokens must give the static cache 17 slots behind the prompt for a grid of 3 x 5, got 16",
        ),
    ],
)
def test_calls_are_refused(arguments, message):
    refused(message, **arguments)


def test_unlike_grids_of_one_batch_are_refused():
    sizes = {"image_sizes": torch.tensor([[3, 5], [3, 4]])}
    refused("image_sizes must be one grid for the whole batch, got [[3, 5], [3, 4]]", grid=None, **sizes)
    sizes = {"image_sizes": [[3, 4], [3, 4]]}
    refused("grid must be image_sizes' (3, 4), or be left out, got (3, 5)", **sizes)


def test_attention_that_takes_no_mask_is_refused():
    model, _ = build("llama", dtype=torch.float32)
    model.config._attn_implementation_internal = (
        "flash_attention_2"  # set_attn_implementation would ask for the package
    )
    rule = "take a mask (sdpa, omnisparse, eager, flex_attention)"
    refused(f"attn_implementation must {rule}, got 'flash_attention_2'", model, prompts())


def test_sliding_windows_are_refused():
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    mistral = MistralForCausalLM(MistralConfig(**small(sliding_window=8)))
    mixed = Qwen2Config(**small(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    refused("sliding_window must be None: rows above lie outside a window, got 8", mistral)
    rule = "layer_types must be full_attention in every layer, got sliding_attention"
    refused(rule, Qwen2ForCausalLM(mixed))
    full = Qwen2ForCausalLM(Qwen2Config(**small(use_sliding_window=False))).eval()
    tokens = full.generate(**prompts(), custom_generate=zipar_generate, grid=(3, 5), window=2, max_new_tokens=40)
    assert tokens.shape == (2, 20)


def test_caches_that_cannot_be_filled_in_order_of_arrival_are_refused():
    from omnisparse_flex import OmniSparseCache, apply_omnisparse

    model, _ = build("llama", dtype=torch.float32)
    used = transformers.DynamicCache()
    model(**prompts(), **cached(used))
    refused("cache must be empty, got 5", model, **cached(used))
    apply_omnisparse(model, inner="eager")
    rule = "cache must be a DynamicCache or a StaticCache, got 'OmniSparseCache'"
    refused(rule, model, **cached(OmniSparseCache(model)))


def test_embeddings_positions_of_axes_streamers_and_assistants_are_refused():
    model, _ = build("llama", dtype=torch.float32)
    calls = count_forwards(model)
    config = transformers.GenerationConfig(pad_token_id=3, do_sample=False)
    ids = prompts()["input_ids"]

    def call(message, **arguments):
        with pytest.raises(ConfigError) as raised:
            zipar_generate(model, ids, [], [], config, grid=(3, 5), window=2, eol_token_id=EOL, **arguments)
        assert str(raised.value) == message and not calls

    call("generation mode must be greedy_search or sample, got 'assisted_generation'", assistant_model=model)
    call("streamer must be None: tokens do not come in raster order, got 'one'", streamer=object())
    call("input_ids must hold the prompt's tokens, got (2, 5)", inputs_embeds=torch.zeros(2, 5, 32))
    call("position_ids must be 2-D: several axes are not supported, got 3", position_ids=torch.zeros(3, 2, 5))
    call("cache must be a DynamicCache or a StaticCache, got 'NoneType'")


def test_guidance_takes_text_and_rows_that_divide():
    negative = torch.full((3, 4), 5)
    rule = "negative_prompt_ids must have rows that divide 2, got 3"
    refused(rule, guidance_scale=2.0, negative_prompt_ids=negative)
