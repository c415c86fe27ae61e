"""Questions about a scene, and their answers from the scene graph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.video_needle.scene import Event, Scene
from benchmarks.video_needle.vocabulary import COLOURS, COUNTS, DIGITS, DIRECTIONS, KINDS, SHAPES, TENTHS, YES_NO
from omnisparse_flex.errors import require

#: Tokens of one question of every kind together, the question marks included.
TOKENS_PER_ROUND = 24


class Question(NamedTuple):
    """A question in words, ending in ``?``, and its one-word answer."""

    kind: str
    text: str
    answer: str


def answer(scene: Scene, text: str) -> str:
    """Answer a question by looking only at the scene graph.

    Args:
        scene: The facts.
        text: A question's words.

    Returns:
        One word.

    Raises:
        ConfigError: If the question does not fit the scene: no such event, or more than one.
    """
    kind, *names = text.removesuffix(" ?").split()
    require(kind in KINDS, "question", f"begin with one of {', '.join(KINDS)}", text)
    if kind == "count":
        return COUNTS[len(scene.of_colour(COLOURS.index(names[0])))]
    found = [_find(scene, *names[i : i + 2]) for i in range(0, len(names), 2)]
    event = found[0]
    if kind == "what":
        return SHAPES[event.shape]
    if kind == "when":
        return TENTHS[10 * event.onset // scene.steps]
    if kind == "before":
        return YES_NO[event.onset < found[1].onset]
    if kind == "beside":
        require(event.digit >= 0, "question", "name an event with a digit beside it", text)
        return DIGITS[event.digit]
    return DIRECTIONS[event.direction]


def _find(scene: Scene, colour: str, shape: str | None = None) -> Event:
    hits = [e for e in scene.of_colour(COLOURS.index(colour)) if shape in (None, SHAPES[e.shape])]
    require(len(hits) == 1, "question", "name exactly one event", f"{colour} {shape or ''}".strip())
    return hits[0]


def named(scene: Scene, text: str) -> list[tuple[int, Event]]:
    """Events that a question names: the word that completes each name, counted from 0, and the event."""
    kind, *names = text.removesuffix(" ?").split()
    if kind == "count":
        return []
    size = 1 if kind == "what" else 2
    return [(i + size, _find(scene, *names[i : i + size])) for i in range(0, len(names), size)]


def ask(scene: Scene, rng: np.random.Generator, rounds: int) -> list[Question]:
    """Questions about a scene: each kind ``rounds`` times, in random order.

    Args:
        scene: The facts.
        rng: Where the choice comes from.
        rounds: Questions of each kind; they may repeat.

    Returns:
        ``len(KINDS) * rounds`` questions of ``TOKENS_PER_ROUND * rounds`` tokens together.
    """
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS) * rounds) % len(KINDS)]
    texts = [_draw(scene, rng, kind) for kind in kinds]
    return [Question(kind, text, answer(scene, text)) for kind, text in zip(kinds, texts, strict=True)]


def _draw(scene: Scene, rng: np.random.Generator, kind: str) -> str:
    if kind == "count":
        return f"count {COLOURS[_colour_to_count(scene, rng)]} ?"
    events = list(scene.events)
    if kind == "what":
        events = [event for event in events if len(scene.of_colour(event.colour)) == 1]
    if kind == "beside":
        events = [event for event in events if event.digit >= 0]
    first, *others = (events[i] for i in rng.permutation(len(events)).tolist())
    name = COLOURS[first.colour] if kind == "what" else _name(first)
    return f"before {name} {_name(others[0])} ?" if kind == "before" else f"{kind} {name} ?"


def _name(event: Event) -> str:
    return f"{COLOURS[event.colour]} {SHAPES[event.shape]}"


def _colour_to_count(scene: Scene, rng: np.random.Generator) -> int:
    """A colour whose count is 0, 1 or the repeated one's (2, 3 or 4), so that all five answers are equally likely."""
    counts = [len(scene.of_colour(colour)) for colour in range(len(COLOURS))]
    wanted = [0, 1, max(counts), max(counts), max(counts)][int(rng.integers(5))]
    fitting = [colour for colour, count in enumerate(counts) if count == wanted]
    return fitting[int(rng.integers(len(fitting)))]
