"""What a call of ``zipar_generate`` asks for, checked before the first forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.grid.attention_mask import attention_of
from omnisparse_flex.grid.slots import check_cache
from omnisparse_flex.masks._checks import check_count, is_int

ADAPTIVE = "adaptive"
#: What ``generate`` may return beside the tokens, in order of steps; here a step draws several tokens.
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
#: Emu3's names of its structure tokens, in its vocabulary.
EMU3_LINE_END, EMU3_TAIL = "<|extra_200|>", ("<|extra_201|>", "<|image end|>")


@dataclass(frozen=True)
class Request:
    """A grid to generate, and how.

    Attributes:
        rows: Of the grid.
        columns: Of the grid, end-of-line tokens not counted.
        window: Columns between the starts of two rows; None: adaptive.
        min_window: Columns before the first trial of an adaptive start.
        eol: The id that ends a row; None: rows have no end.
        tail: Ids behind the last row.
        even: Whether every step feeds the same number of tokens.
    """

    rows: int
    columns: int
    window: int | None
    min_window: int
    eol: int | None
    tail: tuple[int, ...]
    even: bool = False

    @property
    def line(self) -> int:
        """Tokens of a row in the sequence."""
        return self.columns + (self.eol is not None)

    @property
    def tokens(self) -> int:
        """Tokens behind the prompt."""
        return self.rows * self.line + len(self.tail)

    @property
    def slots(self) -> int:
        """The most tokens that are fed behind the prompt, an adaptive window's trials included."""
        if self.width is not None:
            return self.width * (self.columns + (self.rows - 1) * (self.window or self.columns) - 1)
        trials = (self.columns if self.window is None else 1) * (self.rows - 1)
        return self.rows * self.columns + trials

    @property
    def width(self) -> int | None:
        """Tokens that every step feeds, if even: the rows that may be in progress at once, and the next one's lead."""
        window = self.window or self.min_window
        return min(self.rows, -(-self.columns // window)) + 1 if self.even else None


def check_grid(grid: Any, image_sizes: Any) -> tuple[int, int]:
    """Rows and columns.

    Args:
        grid: ``(rows, columns)``, or None to take it from ``image_sizes``.
        image_sizes: What Emu3's processor says for the images to generate, one pair for each batch row, or None.

    Raises:
        ConfigError: If no grid is given, it is no pair of counts, batch rows differ, or both are given and differ.
    """
    if image_sizes is not None:
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else [list(size) for size in image_sizes]
        same = all(size == sizes[0] for size in sizes)
        require(same, "image_sizes", "be one grid for the whole batch", sizes)
        given = tuple(grid) if isinstance(grid, Sequence) else grid
        agree = grid is None or given == tuple(sizes[0])
        require(agree, "grid", f"be image_sizes' {tuple(sizes[0])}, or be left out", grid)
        grid = sizes[0]
    pair = isinstance(grid, Sequence) and len(grid) == 2 and all(is_int(extent) for extent in grid)
    require(pair, "grid", "be (rows, columns)", grid)
    check_count("grid's rows", grid[0], minimum=1)
    check_count("grid's columns", grid[1], minimum=1)
    return grid[0], grid[1]


def check_window(window: Any, min_window: int, columns: int) -> int | None:
    """The fixed window, or None for the adaptive one.

    Raises:
        ConfigError: If ``window`` is neither ``"adaptive"`` nor in 1 to ``columns``, or ``min_window`` not there.
    """
    name, value = ("min_window", min_window) if window == ADAPTIVE else ("window", window)
    known = is_int(value) and 1 <= value <= columns
    rule = f"be in 1 to {columns}, the columns of the grid" + (f', or "{ADAPTIVE}"' if name == "window" else "")
    require(known, name, rule, value)
    return None if window == ADAPTIVE else window


def structure_tokens(
    model: Any, eol: int | None, tail: Sequence[int] | None, eos: Any
) -> tuple[int | None, tuple[int, ...]]:
    """The id that ends a row, and those behind the last row.

    Emu3ForConditionalGeneration knows both: its ``decode_image_tokens`` expects three tokens behind the last row.

    Args:
        model: The model of the call.
        eol: What the user gave; None: what the model knows.
        tail: What the user gave; None: what the model knows.
        eos: The id of the end of the sequence, or several, or None.
    """
    names: dict[str, int] = getattr(getattr(model, "vocabulary_mapping", None), "vocab_map", {})
    eol = names.get(EMU3_LINE_END) if eol is None else eol
    if tail is None and names:
        end = first_id(eos)
        tail = (*(names.get(name, end) for name in EMU3_TAIL), end)
    return eol, tuple(tail or ())


def first_id(ids: Any) -> int:
    """The token id that a config names, the first of several, 0 for none."""
    first = ids[0] if isinstance(ids, Sequence) and ids else ids
    return first if isinstance(first, int) else 0


def check_mode(config: Any, unused: Mapping[str, Any]) -> None:
    """Refuse what ``generate`` can do and a decoding of several rows cannot.

    Args:
        config: The GenerationConfig.
        unused: Keyword arguments of the call.

    Raises:
        ConfigError: For beams, assisted and other modes, a streamer, no cache, or outputs in order of steps.
    """
    mode = config.get_generation_mode(unused.get("assistant_model")).value
    require(mode in ("greedy_search", "sample"), "generation mode", "be greedy_search or sample", mode)
    require(unused.get("streamer") is None, "streamer", "be None: tokens do not come in raster order", "one")
    require(config.use_cache is not False, "use_cache", "be True", config.use_cache)
    for name in OUTPUTS:
        require(not getattr(config, name, False), name, "be off: a step draws several tokens", True)


def check_room(model: Any, request: Request, prompt: int, cache: Any, max_new_tokens: int | None) -> None:
    """Refuse a grid that the cache, the model's positions or the caller's limit cannot hold.

    Args:
        model: The model of the call.
        request: The grid.
        prompt: Tokens of the prompt.
        cache: The KV cache that ``generate`` prepared.
        max_new_tokens: The caller's limit, or None.

    Raises:
        ConfigError: If it does not fit, or the cache is not an empty DynamicCache or StaticCache.
    """
    config = model.config.get_text_config(decoder=True)
    attention_of(config)
    grid = f"for a grid of {request.rows} x {request.columns}"
    enough = max_new_tokens is None or max_new_tokens >= request.tokens
    require(enough, "max_new_tokens", f"be at least {request.tokens} {grid}", max_new_tokens)
    positions = getattr(config, "max_position_embeddings", None)
    fits = positions is None or prompt + request.tokens <= positions
    require(fits, "grid", f"fit {positions} positions with its prompt", prompt + request.tokens)
    length = check_cache(cache)
    if length is not None and length < prompt + request.slots:
        rule = f"give the static cache {request.slots} slots behind the prompt {grid}"
        raise ConfigError(f"max_new_tokens must {rule}, got {length - prompt}")


def check_prompt(ids: Tensor, others: Mapping[str, Any]) -> None:
    """Refuse prompts that are no token ids, and positions of several axes.

    Raises:
        ConfigError: If embeddings are given, or ``position_ids`` is not 2-D.
    """
    embeds = others.get("inputs_embeds")
    require(embeds is None and ids.shape[1] > 0, "input_ids", "hold the prompt's tokens", tuple(ids.shape))
    positions = others.get("position_ids")
    dims = 2 if positions is None else torch.as_tensor(positions).dim()
    require(dims == 2, "position_ids", "be 2-D: several axes are not supported", dims)
