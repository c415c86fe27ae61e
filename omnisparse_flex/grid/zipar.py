"""ZipAR: an image of tokens in raster order, several rows generated side by side by a stock model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.errors import require
from omnisparse_flex.grid import request as checks
from omnisparse_flex.grid.adaptive import FirstToken
from omnisparse_flex.grid.guidance import doubled, split_guidance
from omnisparse_flex.grid.pick import Picker
from omnisparse_flex.grid.rows import Rows
from omnisparse_flex.grid.stepper import Stepper
from omnisparse_flex.model.cache_argument import NEW_NAME, OLD_NAME

#: Keyword arguments that ``generate`` hands on and the prompt's forward gets from here.
OURS = ("attention_mask", "position_ids", "use_cache", "cache_position", "assistant_model", "streamer", "synced_gpus")


@dataclass(frozen=True)
class ZipARGenerateOutput:
    """What ``zipar_generate`` returns under ``return_dict_in_generate=True``.

    Attributes:
        sequences: int64 ``(B, P + tokens)``, the prompt and the image in raster order.
        forwards: Calls of the model, the prompt's included.
        starts: int32 ``(B, rows)``, the step at which each row's first token was generated: what
            ``masks.zipar`` and ``zipar_loss`` take as ``window``.
        cache: The KV cache, in order of arrival: good for no further call.
    """

    sequences: Tensor
    forwards: int
    starts: Tensor
    cache: Any


@torch.no_grad()
def zipar_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    grid: Sequence[int] | None = None,
    image_sizes: Any = None,
    window: int | str | None = None,
    min_window: int = 4,
    eol_token_id: int | None = None,
    tail: Sequence[int] | None = None,
    even_steps: bool = False,
    **model_kwargs: Any,
) -> Tensor | ZipARGenerateOutput:
    """Generate an image of tokens, each row ``window`` columns behind the row above it.

    For ``model.generate(**inputs, custom_generate=zipar_generate, grid=(90, 90), window=16)``; ``generate`` passes
    everything up to ``generation_config``. A grid takes ``columns + (rows - 1) * window`` forwards instead of
    one for each token; with ``window`` equal to the columns the tokens are those of plain raster decoding.

    Guidance (``guidance_scale``, ``negative_prompt_ids``) runs both prompts in one batch. Logits processors see a
    prefix of raster length, in which tokens not yet generated are padding. Stopping criteria are not asked: the
    grid's size is known. ``generate`` ignores an ``assistant_model`` and a ``streamer`` for a custom callable.

    Args:
        model: A causal LM of transformers, its weights unchanged.
        input_ids: int64 ``(B, P)``, the prompt up to the image's first token, padded on the left.
        logits_processor: A ``LogitsProcessorList``.
        stopping_criteria: Not used.
        generation_config: ``do_sample``, ``return_dict_in_generate`` and so on.
        grid: Rows and columns of tokens; None: those of ``image_sizes``.
        image_sizes: What Emu3's processor returns for images to generate, a pair for each row of the batch. Prompts
            that hold images have sizes of those, and are not supported.
        window: Columns, 1 to those of the grid, or ``"adaptive"``: a row starts when seeing more of the row above
            no longer changes its first token.
        min_window: Columns of the row above that the adaptive window waits for before its first trial.
        eol_token_id: The token that ends each row. None: Emu3's own, else rows have no end, and a row that
            starts before the row above has ended is led in by a copy of that row's latest token.
        tail: Tokens that end the image. None: Emu3's own, else none.
        even_steps: Fill every forward up to the same number of tokens, so that a compiled model has one graph for
            all steps. It takes more slots of the cache: steps times rows in progress.
        **model_kwargs: The KV cache (dynamic or static), ``attention_mask``, and what the prompt's forward takes.

    Returns:
        int64 ``(B, P + rows * (columns + 1) + tail)``, without ends ``(B, P + rows * columns)``, in raster order;
        or ``ZipARGenerateOutput``.

    Raises:
        ConfigError: Before the first forward, for what cannot be generated so: see the rules in
            ``omnisparse_flex/grid/request.py``.

    Source: ZipAR, arXiv 2412.04062. Our choice: row 1 starts while row 0 is generated; keys lie in order of arrival;
    a batch's rows start together.
    """
    rows, columns = checks.check_grid(grid, image_sizes)
    fixed = checks.check_window(window, min_window, columns)
    ends = checks.structure_tokens(model, eol_token_id, tail, generation_config.eos_token_id)
    request = checks.Request(rows, columns, fixed, min_window, *ends, even_steps)
    checks.check_mode(generation_config, model_kwargs)
    checks.check_prompt(input_ids, model_kwargs)
    stepper, picker = _prepared(model, input_ids, logits_processor, generation_config, request, model_kwargs)
    order = Rows(request)
    _decode(order, stepper, picker)
    end = torch.tensor([request.tail], dtype=input_ids.dtype, device=input_ids.device).expand(len(input_ids), -1)
    sequences = torch.cat([input_ids, picker.raster, end], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    steps = torch.tensor(order.starts, dtype=torch.int32, device=input_ids.device).expand(len(input_ids), -1)
    return ZipARGenerateOutput(sequences, stepper.forwards, steps, stepper.cache)


def _prepared(
    model: Any, ids: Tensor, processors: Any, config: Any, request: checks.Request, kwargs: dict[str, Any]
) -> tuple[Stepper, Picker]:
    """What feeds the model, and what picks tokens from its logits."""
    guidance, others = split_guidance(processors)
    mask, cache = kwargs.get("attention_mask"), kwargs.get(NEW_NAME, kwargs.get(OLD_NAME))
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    pad = checks.first_id(config.pad_token_id)
    raster = ids.new_full((len(ids), request.rows, request.line), pad)
    if request.eol is not None:
        raster[..., -1] = request.eol
    picker = Picker(ids, raster.flatten(1), others, config.do_sample, None if guidance is None else guidance.scale)
    rest = {name: value for name, value in kwargs.items() if name not in (*OURS, NEW_NAME, OLD_NAME)}
    if guidance is not None:
        images = rest.get("pixel_values")
        require(images is None, "pixel_values", "be None under guidance: prompts are text", "images")
        ids, mask = doubled(ids, mask, guidance, pad)
    checks.check_room(model, request, ids.shape[1], cache, config.max_new_tokens)
    return Stepper(model, ids, mask, cache, request.slots, rest, request.width), picker


def _decode(rows: Rows, stepper: Stepper, picker: Picker) -> None:
    """Fill the picker's raster."""
    picker.put([0], stepper.prompt())
    leads: dict[int, int] = {}  # the slot of each row's lead
    first_token = FirstToken()
    while not rows.done:
        rows.step += 1
        row, lead = len(rows.starts), rows.lead() if rows.tries else None
        fed = [*rows.ongoing(), *([lead] if lead else [])]
        replaced = (rows.completed(), row if rows.tries else None)
        stepper.hide([leads.pop(old) for old in replaced if old is not None and old in leads])
        if lead:
            leads[row] = stepper.next_slot + len(fed) - 1
        logits = stepper.feed(picker.raster[:, [token.token for token in fed]], [token.place for token in fed])
        new = row * rows.request.line if rows.tries else None  # the place of the next row's first token
        targets = {token.target: at for at, token in enumerate(fed) if token.target is not None}
        if new is not None:
            trial = logits[:, [targets[new]]]
            if _starts(rows, first_token, picker, new, trial):
                rows.starts.append(rows.step)
                first_token = FirstToken()
        others = {place: at for place, at in targets.items() if place != new}
        picker.put(list(others), logits[:, list(others.values())])


def _starts(rows: Rows, first_token: FirstToken, picker: Picker, place: int, logits: Tensor) -> bool:
    """Predict the next row's first token, and say whether the row starts with it."""
    if rows.request.window is not None:
        picker.put([place], logits)
        return True
    kept = first_token.test(picker.probabilities([place], logits)[:, 0])
    picker.raster[:, place] = first_token.tokens
    return kept or rows.must_start
