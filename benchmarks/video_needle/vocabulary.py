"""The words of the task: one token each, so that an answer is one token."""

from __future__ import annotations

from types import MappingProxyType

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white")
SHAPES = ("disc", "square", "triangle", "cross", "diamond", "ring")
DIRECTIONS = ("left", "right", "up", "down")
DIGITS = tuple(str(d) for d in range(10))
TENTHS = tuple(f"tenth-{d}" for d in range(10))
COUNTS = tuple(f"{d}-times" for d in range(5))
YES_NO = ("no", "yes")

#: What can be asked, with the words that answer it. The first word of a question is its kind.
ANSWERS = MappingProxyType(
    {
        "what": SHAPES,
        "when": TENTHS,
        "count": COUNTS,
        "before": YES_NO,
        "beside": DIGITS,
        "motion": DIRECTIONS,
    }
)
KINDS = tuple(ANSWERS)

SPECIAL = ("<pad>", "<end>", "<vision_start>", "<vision_end>", "<video>", "<image>")
WORDS = (*SPECIAL, "?", *KINDS, *COLOURS, *SHAPES, *DIRECTIONS, *DIGITS, *TENTHS, *COUNTS, *YES_NO)
IDS = MappingProxyType({word: i for i, word in enumerate(WORDS)})
#: What can be told of a single visual token, one word of each class.
TOLD = (COLOURS, SHAPES, DIRECTIONS, DIGITS, TENTHS)
#: Size of the embedding: a round number, with room for words to come.
SIZE = 80


def encode(text: str) -> list[int]:
    """Token ids of words separated by spaces.

    Raises:
        ValueError: On a word that the task does not know.
    """
    unknown = [word for word in text.split() if word not in IDS]
    if unknown:
        raise ValueError(f"text must hold only words of the task, got {unknown}")
    return [IDS[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words of token ids, separated by spaces."""
    return " ".join(WORDS[i] if i < len(WORDS) else "<unused>" for i in ids)
