"""Batches on the fly: scenes and questions from seeds on the CPU, pixels on whatever device trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.video_needle.questions import TOKENS_PER_ROUND, Question, ask, named
from benchmarks.video_needle.render import plan_backgrounds, render
from benchmarks.video_needle.scene import CELLS, EVENT_STEPS, Event, Scene, make_scene, scene_seed
from benchmarks.video_needle.sprites import place
from benchmarks.video_needle.vocabulary import COLOURS, DIGITS, DIRECTIONS, IDS, KINDS, SHAPES, TENTHS, TOLD
from omnisparse_flex.errors import require

#: Seconds of every video, whatever its number of frames: longer inputs are sampled more finely. Temporal
#: positions then span the same range at every length, so a model can be tested on lengths it never saw.
SECONDS = 128
#: Temporal positions per second, the ``tokens_per_second`` of the vision config.
TOKENS_PER_SECOND = 4
#: Most videos of a training step; keeps the seeds of two steps apart.
MAX_BATCH = 4096
IGNORE = -100
#: What a model may see: everything, only the last step's sprites, or none (the background alone).
VISIBLE = ("all", "last", "none")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Scenes as a model takes them; pixels are drawn by ``inputs``.

    Attributes:
        input_ids: int64 (B, N): video placeholders, then the questions, answers left out.
        answers: int64 (B, N): at each ``?`` the answer's id, elsewhere -100. Not shifted.
        narration: int64 (B, N, classes): at visual tokens what can be seen there, and where a question has named
            an event what is known of it, by class of words (``TOLD``); elsewhere -100. Not shifted.
        kinds: int64 (B, N): at each ``?`` the index of the question's kind, elsewhere -100.
        steps: Length of the videos.
        crops: As ``plan_backgrounds`` returns it.
        gains: As ``plan_backgrounds`` returns it.
        sprites: As ``place`` returns it.
    """

    input_ids: Tensor
    answers: Tensor
    narration: Tensor
    kinds: Tensor
    steps: int
    crops: Tensor
    gains: Tensor
    sprites: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if k != "steps" else v for k, v in moved.items()})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; loaders call this by its name."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.pin_memory() if k != "steps" else v for k, v in moved.items()})


def make_batch(scenes: list[Scene], questions: list[list[Question]], visible: str = "all") -> Batch:
    """Put scenes and their questions together.

    Every answer is left out of the text: it is read off at the ``?``. So no question sees another's answer.

    Args:
        scenes: All of one length.
        questions: Of each scene; all lists hold equally many of each kind.
        visible: One of ``VISIBLE``.

    Raises:
        ConfigError: On an unknown ``visible`` or scenes of different lengths.
    """
    require(visible in VISIBLE, "visible", f"be one of {', '.join(VISIBLE)}", visible)
    lengths = sorted({scene.steps for scene in scenes})
    require(len(lengths) == 1, "scenes", "have one length", lengths)
    steps = lengths[0]
    rows = [_text(asked) for asked in questions]
    text, answers, kinds = (torch.tensor([row[i] for row in rows]) for i in range(3))
    told = torch.from_numpy(np.stack([_recall(scene, asked) for scene, asked in zip(scenes, questions, strict=True)]))
    video = torch.full((len(scenes), steps * CELLS), IDS["<video>"])
    unset = torch.full_like(video, IGNORE)
    edge = lambda word, fill: torch.full((len(scenes), 1), IDS[word] if fill is None else fill)  # noqa: E731
    join = lambda middle, end, fill: torch.cat(  # noqa: E731
        [edge("<vision_start>", fill), middle, edge("<vision_end>", fill), end], dim=1
    )
    first = {"all": 0, "last": steps - 1, "none": steps}[visible]
    crops, gains = plan_backgrounds(scenes, clips=3)
    return Batch(
        input_ids=join(video, text, None),
        answers=join(unset, answers, IGNORE),
        narration=torch.cat([F.pad(_narrate(scenes), (0, 0, 1, 1), value=IGNORE), told], dim=1),
        kinds=join(unset, kinds, IGNORE),
        steps=steps,
        crops=crops,
        gains=gains,
        sprites=place(scenes, first),
    )


def _text(asked: list[Question]) -> tuple[list[int], list[int], list[int]]:
    ids, answers, kinds = [], [], []
    for question in asked:
        words = [IDS[word] for word in question.text.split()]
        ids += words
        answers += [IGNORE] * (len(words) - 1) + [IDS[question.answer]]
        kinds += [IGNORE] * (len(words) - 1) + [KINDS.index(question.kind)]
    return ids, answers, kinds


def _narrate(scenes: list[Scene]) -> Tensor:
    """Words for what is seen at single visual tokens: a dense signal that teaches to see before to search.

    At an event all that is known of it so far, so that whoever finds the event by one of its
    properties finds the others in the same place; at digits the digit; and at one cell of every step the
    tenth of the video.
    """
    steps = scenes[0].steps
    words = np.full((len(scenes), steps, CELLS, len(TOLD)), IGNORE, dtype=np.int64)
    colour, shape, direction, digit, tenth = range(len(TOLD))
    tenths = [IDS[TENTHS[10 * step // steps]] for step in range(steps)]
    for row, scene in enumerate(scenes):
        words[row, np.arange(steps), (np.arange(steps) * 5 + scene.background) % CELLS, tenth] = tenths
        for e in scene.events:
            span = slice(e.onset, e.onset + EVENT_STEPS)
            words[row, span, e.cell, colour] = IDS[COLOURS[e.colour]]
            words[row, span, e.cell, shape] = IDS[SHAPES[e.shape]]
            words[row, span, e.cell, direction] = IDS[DIRECTIONS[e.direction]]
            words[row, span, e.cell, tenth] = tenths[e.onset]
            if e.digit >= 0:
                words[row, span, e.digit_cell, digit] = IDS[DIGITS[e.digit]]
                # A token sees what came before it: a digit further down the frame is known one step later.
                words[row, e.onset + 1 : e.onset + EVENT_STEPS, e.cell, digit] = IDS[DIGITS[e.digit]]
        for d in scene.distractors:
            if d.digit >= 0:
                words[row, d.onset : d.onset + EVENT_STEPS, d.cell, digit] = IDS[DIGITS[d.digit]]
    return torch.from_numpy(words.reshape(len(scenes), -1, len(TOLD)))


def _recall(scene: Scene, asked: list[Question]) -> np.ndarray:
    """All that is known of an event, at the word of a question that completes its name.

    Whoever can tell it there has found the event; every question but the count is then a choice among what was told.
    """
    words = np.full((sum(len(q.text.split()) for q in asked), len(TOLD)), IGNORE, dtype=np.int64)
    start = 0
    for question in asked:
        for at, event in named(scene, question.text):
            words[start + at] = _facts(event, scene.steps)
        start += len(question.text.split())
    return words


def _facts(event: Event, steps: int) -> list[int]:
    """The words of ``TOLD`` for an event; -100 for a digit that it has not."""
    facts = (COLOURS[event.colour], SHAPES[event.shape], DIRECTIONS[event.direction])
    digit = IDS[DIGITS[event.digit]] if event.digit >= 0 else IGNORE
    return [*(IDS[word] for word in facts), digit, IDS[TENTHS[10 * event.onset // steps]]]


def batch_of(
    split: str, first: int, size: int, steps: int, rounds: int, visible: str = "all"
) -> tuple[Batch, list[Scene], list[list[Question]]]:
    """Videos ``first`` to ``first + size - 1`` of a split, with their questions.

    The same arguments always give the same batch.
    """
    scenes = [make_scene(scene_seed(split, index), steps) for index in range(first, first + size)]
    rngs = [np.random.default_rng((scene_seed(split, index), steps, 1)) for index in range(first, first + size)]
    questions = [ask(scene, rng, rounds) for scene, rng in zip(scenes, rngs, strict=True)]
    return make_batch(scenes, questions, visible), scenes, questions


def position_ids(steps: int, rounds: int, device: torch.device | str = "cpu") -> Tensor:
    """The M-RoPE positions that Qwen2.5-VL itself computes for such a sequence, without its loop.

    Returns:
        int64 (3, 1, N): time, row, column.
    """
    grid = int(CELLS**0.5)
    step, row, column = torch.meshgrid(torch.arange(steps), torch.arange(grid), torch.arange(grid), indexing="ij")
    time = (step * (TOKENS_PER_SECOND * SECONDS / steps)).long()
    video = torch.stack([time, row, column]).reshape(3, -1) + 1
    text = torch.arange(1 + TOKENS_PER_ROUND * rounds) + 1 + grid
    start = torch.zeros((3, 1), dtype=torch.long)
    return torch.cat([start, video, text.expand(3, -1)], dim=1).unsqueeze(1).to(device)


def inputs(batch: Batch, positions: Tensor, clips: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the stock model takes: ids, positions and freshly drawn pixels.

    The videos of a batch go through the vision tower as one long video: it looks at single
    frames, so the result is the same and its loop over videos is short.
    """
    grid = int(CELLS**0.5)
    thw = torch.tensor([[len(batch.input_ids) * batch.steps, grid, grid]], device=clips.device)
    return {
        "input_ids": batch.input_ids,
        "position_ids": positions.expand(3, len(batch.input_ids), -1),
        "pixel_values_videos": render(batch.crops, batch.gains, batch.sprites, clips, dtype),
        "video_grid_thw": thw,
    }
