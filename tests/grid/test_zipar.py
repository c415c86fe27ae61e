"""ZipAR on stock models: raster tokens at a full window, forwards, caches, attentions, guidance."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from omnisparse_flex.grid import zipar_generate  # noqa: E402
from tests.helpers.grids import (  # noqa: E402
    EOF,
    EOI,
    EOL,
    EOS,
    FAMILIES,
    GRID,
    PAD,
    NoiseOfPlace,
    build,
    count_forwards,
    has_ends,
    prompts,
    raster,
    structure,
)

ROWS, COLUMNS = GRID


def zipar(family, model, inputs, window, own, grid=GRID, **arguments):
    allowed, _ = structure(family, inputs["input_ids"].shape[1], grid)
    options = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": PAD, "prefix_allowed_tokens_fn": allowed}
    return model.generate(
        **inputs, custom_generate=zipar_generate, grid=grid, window=window, **own, **options | arguments
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_of_a_row_gives_raster_tokens(family, attention, cache):
    model, own = build(family, attention, torch.float32)
    inputs = prompts(padded=2)
    limit = {"cache_implementation": "static"} if cache == "static" else {}
    tokens = zipar(family, model, inputs, COLUMNS, own, **limit)
    assert torch.equal(tokens, raster(family, model, inputs))
    assert tokens[:, 5:].unique().numel() > 5, "a model that repeats itself would prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_noise_of_the_place_gives_raster_tokens(family):
    model, own = build(family, dtype=torch.float32)
    inputs = prompts(rows=3)
    processors = [transformers.TemperatureLogitsWarper(1.5), NoiseOfPlace()]
    tokens = zipar(family, model, inputs, COLUMNS, own, logits_processor=processors)
    assert torch.equal(tokens, raster(family, model, inputs, logits_processor=processors))
    other = zipar(family, model, inputs, COLUMNS, own, logits_processor=[*processors[:1], NoiseOfPlace(1)])
    assert not torch.equal(tokens, other)


@pytest.mark.parametrize("window", [7, 4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_are_columns_and_a_window_for_each_further_row(family, window):
    model, own = build(family)
    calls = count_forwards(model)
    output = zipar(family, model, prompts(), window, own, return_dict_in_generate=True)
    assert output.forwards == len(calls) == COLUMNS + (ROWS - 1) * window
    assert output.starts.tolist() == [[row * window for row in range(ROWS)]] * 2
    # A grid's last token predicts nothing; every other is fed once, and each further row has one lead. Where rows
    # have no end and do not overlap, the row's last token is the lead.
    leads = 0 if family == "llama" and window == COLUMNS else ROWS - 1
    assert sum(calls[1:]) == ROWS * COLUMNS - 1 + leads
    assert max(calls[1:]) <= -(-COLUMNS // window) + 2


@pytest.mark.parametrize("window", [7, 4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_a_raster_with_ends(family, window):
    model, own = build(family)
    inputs = prompts(rows=3)
    tokens = zipar(family, model, inputs, window, own)
    assert torch.equal(tokens[:, :5], inputs["input_ids"])
    line = COLUMNS + has_ends(family)
    grid = tokens[:, 5 : 5 + ROWS * line].view(3, ROWS, line)
    assert (grid[..., :COLUMNS] < EOL).all() and (grid[..., COLUMNS:] == EOL).all()
    assert tokens[:, 5 + ROWS * line :].tolist() == [[EOF, EOI, EOS] if family == "emu3_images" else []] * 3


def test_emu3_decodes_the_picture_and_reads_the_grid_from_image_sizes():
    model, own = build("emu3_images", dtype=torch.float32)
    inputs = {**prompts(), "image_sizes": torch.tensor([GRID, GRID])}
    tokens = zipar("emu3_images", model, inputs, 2, own)
    from_sizes = model.generate(
        **inputs,
        custom_generate=zipar_generate,
        window=2,
        do_sample=False,
        max_new_tokens=60,
        prefix_allowed_tokens_fn=structure("emu3_images", 5)[0],
    )
    assert torch.equal(tokens, from_sizes)
    picture = model.decode_image_tokens(image_tokens=tokens[:, 5:], height=ROWS, width=COLUMNS)
    assert picture.shape[0] == 2 and picture.shape[-2:] == (2 * ROWS, 2 * COLUMNS)


@pytest.mark.parametrize(("family", "window"), [("emu3", 4), ("emu3", "adaptive"), ("llama", 2), ("llama", "adaptive")])
def test_attentions_and_caches_give_the_same_tokens(family, window, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    # Compiling for a CPU would take minutes; the mask is what is tested.
    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *a, training=False, **k: flex_attention(*a, **k)
    )
    found = []
    for attention, cache in (("sdpa", None), ("eager", None), ("flex_attention", None), ("sdpa", "static")):
        model, own = build(family, attention, torch.float32)
        limit = {} if cache is None else {"cache_implementation": cache}
        noise = [NoiseOfPlace()]
        found.append(
            zipar(family, model, prompts(padded=2), window, own, min_window=2, logits_processor=noise, **limit)
        )
    assert all(torch.equal(tokens, found[0]) for tokens in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_token(family):
    model, own = build(family)
    padded = prompts(padded=2)
    alone = {name: value[:1, 2:] for name, value in padded.items()}
    both = zipar(family, model, padded, 3, own, logits_processor=[NoiseOfPlace()], do_sample=False)
    allowed_alone = zipar(family, model, alone, 3, own, do_sample=False, logits_processor=[Shifted(2)])
    assert torch.equal(both[:1, 2:], allowed_alone)


class Shifted(NoiseOfPlace):
    """The noise that a row had in a batch whose prompts were longer."""

    def __init__(self, longer):
        super().__init__()
        self.longer = longer

    def __call__(self, ids, scores):
        filled = torch.nn.functional.pad(ids, (self.longer, 0))
        return super().__call__(filled, scores.expand(2, -1))[:1]


def test_prompts_and_samples_of_a_batch_are_independent():
    model, own = build("llama")
    inputs = prompts(rows=1)
    torch.manual_seed(0)
    tokens = zipar("llama", model, inputs, 2, own, do_sample=True, temperature=1.5, num_return_sequences=3)
    assert tokens.shape == (3, 5 + ROWS * COLUMNS) and len(tokens.unique(dim=0)) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [7, 4, 2, 1, "adaptive"])
@pytest.mark.parametrize("family", ["emu3", "llama"])
def test_even_steps_feed_one_number_of_tokens_and_change_nothing(family, window, attention):
    model, own = build(family, attention)
    expected = zipar(family, model, prompts(padded=2), window, own, min_window=2, logits_processor=[NoiseOfPlace()])
    calls = count_forwards(model)
    static = {"cache_implementation": "static", "max_new_tokens": 160}
    even = {"logits_processor": [NoiseOfPlace()], "min_window": 2, "even_steps": True, "guidance_scale": 1.0}
    assert torch.equal(zipar(family, model, prompts(padded=2), window, own, **static, **even), expected)
    assert len(set(calls[1:])) == 1 and calls[1] <= -(-COLUMNS // (2 if window == "adaptive" else window)) + 1


def test_a_compiled_model_has_one_graph_for_all_even_steps():
    from torch._dynamo.testing import CompileCounter

    model, own = build("emu3", dtype=torch.float32)
    even = {"even_steps": True, "cache_implementation": "static", "max_new_tokens": 100}
    expected = zipar("emu3", model, prompts(), 2, own, **even)
    graphs = CompileCounter()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=graphs, dynamic=False)
    assert torch.equal(zipar("emu3", model, prompts(), 2, own, **even), expected)
    assert graphs.frame_count == 2, "the prompt, and every step"


def test_through_apply_omnisparse_it_stays_dense_and_the_same():
    from omnisparse_flex import apply_omnisparse

    model, own = build("llama", dtype=torch.float32, num_hidden_layers=1)
    before = zipar("llama", model, prompts(), 2, own, grid=(2, 4))
    apply_omnisparse(model, min_seq_len=0, inner="eager")
    assert torch.equal(zipar("llama", model, prompts(), 2, own, grid=(2, 4)), before)
