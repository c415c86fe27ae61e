"""What happens in a video: a scene graph, drawn from one integer seed."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from benchmarks.video_needle.vocabulary import COLOURS, DIGITS, DIRECTIONS, SHAPES
from omnisparse_flex.errors import require

#: A frame is GRID x GRID cells, one visual token each; a step is two frames, one row of tokens in time.
GRID, CELLS = 4, 16
#: Steps that an event lasts (six frames), and steps of the slot it sits in: events never overlap in time.
EVENT_STEPS, SLOT = 3, 4
#: Lengths of video that have a name, in steps: 512, 2K, 8K and 32K visual tokens; 128 and 256 only to begin with.
STEPS = {128: 8, 256: 16, 512: 32, 2048: 128, 8192: 512, 32768: 2048}
#: First seed of each split. Splits are ranges, so no seed is in two of them.
SPLITS = {"train": 0, "val": 1 << 40, "test": 1 << 41}
SEEDS_PER_SPLIT = 1 << 40


class Event(NamedTuple):
    """A coloured shape that slides through its cell for ``EVENT_STEPS`` steps.

    Attributes:
        onset: First step.
        cell: Row-major cell.
        colour: Index into ``COLOURS``.
        shape: Index into ``SHAPES``; no two events share colour and shape.
        direction: Index into ``DIRECTIONS``.
        digit: The digit shown in a neighbouring cell, or -1.
        digit_cell: That cell, or -1.
    """

    onset: int
    cell: int
    colour: int
    shape: int
    direction: int
    digit: int
    digit_cell: int


class Distractor(NamedTuple):
    """A grey shape that slides, or a digit that stands beside nothing.

    Attributes:
        onset: First step.
        cell: Row-major cell.
        shape: Index into ``SHAPES``, or -1 for a digit.
        direction: Index into ``DIRECTIONS`` (of a shape).
        digit: The digit, or -1 for a shape.
    """

    onset: int
    cell: int
    shape: int
    direction: int
    digit: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """A video as facts.

    Attributes:
        steps: Length in steps of two frames.
        events: In order of time.
        distractors: In no order.
        background: Seed of the background's clip, crop, motion and colours.
    """

    steps: int
    events: tuple[Event, ...]
    distractors: tuple[Distractor, ...]
    background: int

    def of_colour(self, colour: int) -> list[Event]:
        """Events of one colour, in order of time."""
        return [event for event in self.events if event.colour == colour]


def scene_seed(split: str, index: int) -> int:
    """The seed of video ``index`` of a split.

    Raises:
        ConfigError: On an unknown split or an index outside it.
    """
    require(split in SPLITS, "split", f"be one of {', '.join(SPLITS)}", split)
    require(0 <= index < SEEDS_PER_SPLIT, "index", f"be in [0, {SEEDS_PER_SPLIT})", index)
    return SPLITS[split] + index


def distance(a: int, b: int) -> tuple[int, int]:
    """Rows and columns between two cells."""
    return abs(a // GRID - b // GRID), abs(a % GRID - b % GRID)


NEIGHBOURS = tuple(tuple(b for b in range(CELLS) if sum(distance(a, b)) == 1) for a in range(CELLS))
FAR = tuple(tuple(b for b in range(CELLS) if max(distance(a, b)) > 1) for a in range(CELLS))


def make_scene(seed: int, steps: int) -> Scene:
    """Draw a scene.

    One colour appears two, three or four times, three to five others once, the rest never; so
    counts can be asked evenly. Videos too short for that (below 32 steps) hold an event in every slot, as many
    colours once as there is room for. Distractors grow with the length, one in eight slots' cells at most.

    Args:
        seed: From ``scene_seed``.
        steps: Length; a multiple of ``SLOT``, at least two of them.

    Returns:
        The scene; the same seed and length always give the same one.

    Raises:
        ConfigError: On another length.
    """
    require(steps >= 2 * SLOT and steps % SLOT == 0, "steps", f"be a multiple of {SLOT} of at least {2 * SLOT}", steps)
    rng = np.random.default_rng((seed, steps))
    slots = steps // SLOT
    repeats = min(int(rng.integers(2, 5)), slots // 2)
    room = slots - repeats
    singles = int(rng.integers(min(3, room), min(5, room) + 1))
    colours = rng.permutation(len(COLOURS))[: singles + 1].tolist()
    looks = [(colours[0], shape) for shape in rng.permutation(len(SHAPES))[:repeats].tolist()]
    looks += [(colour, int(rng.integers(len(SHAPES)))) for colour in colours[1:]]
    order = rng.permutation(len(looks)).tolist()
    chosen = np.sort(rng.permutation(slots)[: len(looks)]).tolist()
    with_digit = int(rng.integers(len(looks)))  # at least this one, so that its digit can be asked
    events = [_event(rng, slot, *looks[i], i == with_digit) for slot, i in zip(chosen, order, strict=True)]
    distractors = _distractors(rng, events, slots)
    return Scene(steps, tuple(events), tuple(distractors), int(rng.integers(1 << 31)))


def _event(rng: np.random.Generator, slot: int, colour: int, shape: int, needs_digit: bool) -> Event:
    cell, direction, late, digit = (int(rng.integers(n)) for n in (CELLS, len(DIRECTIONS), 2, len(DIGITS)))
    beside = int(rng.choice(NEIGHBOURS[cell])) if rng.random() < 0.7 or needs_digit else -1
    return Event(slot * SLOT + late, cell, colour, shape, direction, digit if beside >= 0 else -1, beside)


def _distractors(rng: np.random.Generator, events: list[Event], slots: int) -> list[Distractor]:
    """Decoy digits in the same frames as half of the events, and lone things anywhere else."""
    taken = {}
    for event in events:
        if rng.random() < 0.5:
            taken[event.onset // SLOT, int(rng.choice(FAR[event.cell]))] = True
    busy = {event.onset // SLOT for event in events}
    for slot, cell in zip(
        rng.integers(slots, size=slots // 4).tolist(), rng.integers(CELLS, size=slots // 4).tolist(), strict=True
    ):
        if slot not in busy:
            taken[slot, cell] = bool(rng.random() < 0.5)
    found = []
    for (slot, cell), is_digit in taken.items():
        onset = slot * SLOT + int(rng.integers(2))
        shape, direction, digit = (int(rng.integers(n)) for n in (len(SHAPES), len(DIRECTIONS), len(DIGITS)))
        found.append(Distractor(onset, cell, -1 if is_digit else shape, direction, digit if is_digit else -1))
    return found
