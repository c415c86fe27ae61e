"""The things that appear: small drawings, and where each one stands."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from benchmarks.video_needle.scene import EVENT_STEPS, Scene
from benchmarks.video_needle.vocabulary import DIGITS, DIRECTIONS, SHAPES

#: Side of a cell in pixels: one patch, one visual token.
CELL = 16
#: Shift along the direction of motion in each frame of an event, in pixels.
SHIFTS = (-3, -2, -1, 1, 2, 3)
#: Index of "does not move", after the directions.
STILL = len(DIRECTIONS)
MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
#: Columns of a sprite: video, step, cell, glyph, direction, first phase, colour.
COLUMNS = 7
#: Colours of the vocabulary in its order; then the grey of distractors; then that of digits.
PALETTE = (
    (230, 30, 30),
    (30, 200, 40),
    (40, 70, 240),
    (240, 225, 30),
    (230, 40, 220),
    (30, 220, 225),
    (250, 140, 20),
    (250, 250, 250),
    (120, 120, 120),
    (190, 170, 140),
)
GREY, DIGIT_COLOUR = 8, 9
#: Digits in rows of three pixels.
FONT_ROWS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}


def place(scenes: list[Scene], first_step: int = 0) -> Tensor:
    """Everything that stands in some cell at some step.

    Args:
        scenes: The videos.
        first_step: What stands earlier is left out (for the baseline that sees only the end).

    Returns:
        int64 (sprites, ``COLUMNS``); no two share video, step and cell.
    """
    rows = [_thing(video, e.onset, e.cell, e.shape, e.direction, e.colour) for video, e in _events(scenes)]
    rows += [_digit(video, e.onset, e.digit_cell, e.digit) for video, e in _events(scenes) if e.digit >= 0]
    for video, scene in enumerate(scenes):
        for d in scene.distractors:
            if d.digit >= 0:
                rows.append(_digit(video, d.onset, d.cell, d.digit))
            else:
                rows.append(_thing(video, d.onset, d.cell, d.shape, d.direction, GREY))
    things = np.asarray(rows, dtype=np.int64).reshape(-1, COLUMNS)
    sprites = np.repeat(things, EVENT_STEPS, axis=0)
    passed = np.tile(np.arange(EVENT_STEPS), len(things))
    sprites[:, 1] += passed
    sprites[:, 5] = 2 * passed
    return torch.from_numpy(sprites[sprites[:, 1] >= first_step])


def _events(scenes: list[Scene]) -> list:
    return [(video, event) for video, scene in enumerate(scenes) for event in scene.events]


def _thing(video: int, onset: int, cell: int, shape: int, direction: int, colour: int) -> tuple[int, ...]:
    return video, onset, cell, shape, direction, 0, colour


def _digit(video: int, onset: int, cell: int, digit: int) -> tuple[int, ...]:
    return video, onset, cell, len(SHAPES) + digit, STILL, 0, DIGIT_COLOUR


@functools.cache
def atlas() -> Tensor:
    """Every drawing in every place of its path.

    Returns:
        uint8 (glyphs, directions + 1, phases, CELL, CELL): 0 background, 1 the sprite's colour, 2 its black outline.
    """
    rows = []
    for glyph in (*SHAPES, *DIGITS):
        moves = [MOVES[name] for name in DIRECTIONS] + [(0, 0)]
        rows.append([[_draw(glyph, dy * shift, dx * shift) for shift in SHIFTS] for dy, dx in moves])
    return torch.from_numpy(np.asarray(rows, dtype=np.uint8))


def _draw(glyph: str, dy: int, dx: int) -> np.ndarray:
    """One glyph, shifted by (dy, dx) from the middle of its cell."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    y, x = y - dy, x - dx
    fill = _digit_mask(glyph, y, x) if glyph in FONT_ROWS else _shape_mask(glyph, y, x)
    padded = np.pad(fill, 1)
    near = [np.roll(padded, (dy, dx), (0, 1))[1:-1, 1:-1] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.where(fill, 1, np.where(np.any(near, axis=0), 2, 0))


def _shape_mask(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    radius = np.hypot(y, x)
    if name == "disc":
        return radius < 4.6
    if name == "ring":
        return (radius < 4.9) & (radius > 2.4)
    if name == "square":
        return np.maximum(abs(y), abs(x)) < 4
    if name == "diamond":
        return abs(y) + abs(x) < 5.1
    if name == "triangle":
        return (abs(y) < 4.6) & (2 * abs(x) < y + 5.2)
    return (np.minimum(abs(y), abs(x)) < 1.6) & (np.maximum(abs(y), abs(x)) < 4.6)


def _digit_mask(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    row, column = np.floor(y / 2 + 2.5).astype(int), np.floor(x / 2 + 1.5).astype(int)
    bits = np.asarray([[value >> (2 - i) & 1 for i in range(3)] for value in FONT_ROWS[name]], dtype=bool)
    inside = (row >= 0) & (row < 5) & (column >= 0) & (column < 3)
    return inside & bits[row.clip(0, 4), column.clip(0, 2)]
