"""One masked forward gives the logits that the parallel decoding drew from: every window, adaptive, guided."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from omnisparse_flex.errors import ConfigError  # noqa: E402
from omnisparse_flex.grid import zipar_generate, zipar_logits, zipar_loss  # noqa: E402
from tests.helpers.grids import FAMILIES, GRID, IMAGE, PAD, NoiseOfPlace, build, has_ends, prompts, structure  # noqa: E402

ROWS, COLUMNS = GRID
IMAGES = slice(IMAGE.start, IMAGE.stop)  # what the user's constraint leaves


class Recorder:
    """Logits as the decoding sees them, by place behind the prompt; trials of a place: the last one counts."""

    def __init__(self, prompt):
        self.prompt, self.seen = prompt, {}

    def __call__(self, ids, scores):
        self.seen[ids.shape[1] - self.prompt] = scores[:, IMAGES]
        return scores

    def grid(self, line):
        rows = [[self.seen[row * line + column] for column in range(COLUMNS)] for row in range(ROWS)]
        return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def decode(family, model, inputs, window, own, **arguments):
    """(grid's sequence, logits (B, rows, columns, V), output)."""
    prompt, line = inputs["input_ids"].shape[1], COLUMNS + has_ends(family)
    recorder = Recorder(prompt)
    output = model.generate(
        **inputs,
        custom_generate=zipar_generate,
        grid=GRID,
        window=window,
        **own,
        **{"do_sample": False, "min_window": 2} | arguments,
        max_new_tokens=70,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        logits_processor=[recorder, NoiseOfPlace()],
        prefix_allowed_tokens_fn=structure(family, prompt)[0],
    )
    return output.sequences[:, : prompt + ROWS * line], recorder.grid(line), output


@pytest.mark.parametrize("window", [7, 4, 2, 1, "adaptive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_forward_is_the_decoding(family, window):
    model, own = build(family)
    inputs = prompts(padded=2)
    ids, expected, output = decode(family, model, inputs, window, own)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 5), value=1)
    with torch.no_grad():
        logits = zipar_logits(model, ids, GRID, output.starts, eol=has_ends(family), attention_mask=mask)
        if window != "adaptive":
            fixed = zipar_logits(model, ids, GRID, window, eol=has_ends(family), attention_mask=mask)
            torch.testing.assert_close(fixed, logits)
    torch.testing.assert_close(logits[..., IMAGES].float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_differ(family):
    model, own = build(family)
    ids, logits, _ = decode(family, model, prompts(), COLUMNS, own)
    with torch.no_grad():
        other = zipar_logits(model, ids, GRID, 2, eol=has_ends(family))
    assert (other[..., IMAGES] - logits).abs().max() > 0.1, "a mask that hides nothing would pass"


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("family", ["emu3", "llama"])
def test_attentions_give_the_same_logits(family, attention, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *a, training=False, **k: flex_attention(*a, **k)
    )
    ids = prompts(length=5 + ROWS * (COLUMNS + has_ends(family)))["input_ids"]
    found = []
    for name in ("sdpa", attention):
        model, _ = build(family, name)
        with torch.no_grad():
            found.append(zipar_logits(model, ids, GRID, 3, eol=has_ends(family)))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)  # RMSNorm computes in float32


@pytest.mark.parametrize("negative", [5, 3])
@pytest.mark.parametrize("window", [7, 2, 1])
@pytest.mark.parametrize("family", ["emu3", "llama"])
def test_guidance_in_one_batch_equals_two_runs(family, window, negative):
    model, own = build(family)
    inputs = prompts()
    other = torch.randint(5, 30, (2, negative), generator=torch.Generator().manual_seed(9))
    arguments = {"guidance_scale": 3.0, "negative_prompt_ids": other}
    ids, mixed, output = decode(family, model, inputs, window, own, **arguments)
    assert output.forwards == COLUMNS + (ROWS - 1) * window
    with torch.no_grad():
        runs = [
            zipar_logits(model, torch.cat([prompt, ids[:, 5:]], dim=1), GRID, window, eol=has_ends(family))
            for prompt in (inputs["input_ids"], other)
        ]
    with_it, without = (run.float().log_softmax(dim=-1) for run in runs)
    expected = without + 3.0 * (with_it - without)
    torch.testing.assert_close(mixed, expected[..., IMAGES], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_at_a_full_window_equals_plain_generate(family):
    model, own = build(family, dtype=torch.float32)
    inputs = prompts()
    negative = torch.randint(5, 30, (2, 5), generator=torch.Generator().manual_seed(9))
    arguments = {"guidance_scale": 2.0, "negative_prompt_ids": negative}
    ids, _, _ = decode(family, model, inputs, COLUMNS, own, **arguments)
    allowed, tokens = structure(family, 5)
    plain = model.generate(
        **inputs,
        **arguments,
        prefix_allowed_tokens_fn=allowed,
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=PAD,
        logits_processor=[NoiseOfPlace()],
    )
    assert torch.equal(ids, plain[:, : ids.shape[1]])


@pytest.mark.parametrize("family", ["emu3", "llama"])
def test_the_adaptive_window_lies_between_its_bounds(family):
    model, own = build(family)
    _, _, output = decode(family, model, prompts(rows=1), "adaptive", own)
    gaps = output.starts[0].diff()
    assert output.forwards == int(output.starts[0, -1]) + COLUMNS
    assert (gaps > 2).all() and (gaps <= COLUMNS).all()
    assert gaps.min() < COLUMNS, "a window that never closes would be raster"
    full = decode(family, model, prompts(rows=1), "adaptive", own, min_window=COLUMNS)
    raster = decode(family, model, prompts(rows=1), COLUMNS, own)
    assert torch.equal(full[0], raster[0]) and full[2].forwards == raster[2].forwards


@pytest.mark.parametrize("eol", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_masked_logits(eol):
    family = "emu3" if eol else "llama"
    model, _ = build(family)
    ids = prompts(length=5 + ROWS * (COLUMNS + eol))["input_ids"]
    grid = ids[:, 5:].view(2, ROWS, -1)[..., :COLUMNS]
    for window in (1, 3, COLUMNS):
        chosen = zipar_logits(model, ids, GRID, window, eol=eol).log_softmax(-1).gather(-1, grid[..., None])[..., 0]
        each = zipar_loss(model, ids, GRID, window, eol=eol, reduction="none")
        torch.testing.assert_close(each, -chosen.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(zipar_loss(model, ids, GRID, window, eol=eol), each.mean())


def test_the_loss_at_a_full_window_is_the_models_own():
    model, _ = build("llama")
    ids = prompts(length=5 + ROWS * COLUMNS)["input_ids"]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
    own = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(zipar_loss(model, ids, GRID, COLUMNS, eol=False), own.float())


def test_training_draws_windows_and_learns():
    model, _ = build("llama", dtype=torch.float32)
    model.train()
    ids = prompts(rows=4, length=1 + ROWS * COLUMNS)["input_ids"]
    torch.manual_seed(0)
    drawn = {round(zipar_loss(model, ids, GRID, eol=False).item(), 4) for _ in range(8)}
    assert len(drawn) > 2, "each call has a window of its own"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        losses.append(zipar_loss(model, ids, GRID, eol=False))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_bad_grids_are_refused():
    model, _ = build("llama")
    ids = prompts(length=20)["input_ids"]
    with pytest.raises(ConfigError, match=r"input_ids must hold a prompt and 4 rows of 7 tokens, got \(2, 20\)"):
        zipar_loss(model, ids, GRID, 2, eol=False)
    with pytest.raises(ConfigError, match="window must be at most the 3 columns of a row, got 4"):
        zipar_loss(model, ids, (3, 3), 4, eol=False)
    with pytest.raises(ConfigError, match="reduction must be one of mean, none, got 'sum'"):
        zipar_loss(model, ids, (3, 3), 2, eol=False, reduction="sum")
