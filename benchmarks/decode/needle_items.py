"""Look-up conversations for ``needle_decode.py``: facts hidden in prose, two questions after it.

The prose is Python's own language reference, which every interpreter carries (``pydoc_data``).
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import torch
from torch import Tensor

#: Facts in a context. Two are given with their answers as examples, two are asked.
FACTS = 5
#: Words of an answer: the first is predicted with the question, the others while decoding.
WORDS_PER_ANSWER = 3
#: Times that a fact is said. The small model must find it with a full cache, or nothing can be compared.
REPEATS = 4
NAMES = re.findall(
    r"\w+",
    """
    Alice Brian David Emily Frank Grace Henry James Karen Louis Maria Nancy Oscar Peter Robert Sarah Thomas
    Victor Arthur Bella Colin Diana Edward George Hannah Ivan Julia Kevin Laura Martin Paula Ralph Susan
    Walter
    """,
)
WORDS = re.findall(
    r"\w+",
    """
    apple bridge candle dragon engine forest garden hammer island jacket kitchen ladder mirror needle orange
    pencil river silver table uncle valley window yellow copper doctor eagle finger guitar honey iron jungle
    lemon magnet nurse ocean paper queen rabbit tiger violin winter bottle camera desert feather glass horse
    knife market piano rocket salt train whale cotton butter castle coffee wheat stone
    """,
)


@dataclasses.dataclass(frozen=True)
class Items:
    """Conversations of one length.

    Attributes:
        context: int64 (C, span), prose and facts: the "visual" tokens.
        first: int64 (C, Q1), two examples and the first question.
        second: int64 (C, Q2), the second question, about another fact.
        answers: int64 (C, 2, WORDS_PER_ANSWER).
    """

    context: Tensor
    first: Tensor
    second: Tensor
    answers: Tensor


def make_items(tokenizer: Any, tokens: int, count: int, seed: int = 0) -> Items:
    """``count`` conversations whose context and first question are ``tokens`` tokens long."""
    from pydoc_data.topics import topics

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    prose = encode("\n".join(topics[name] for name in sorted(topics)))
    words = [word for word in WORDS if len(encode(f" {word}")) == 1]
    width = min(len(encode(f"\n{name}")) for name in NAMES)
    names = [name for name in NAMES if len(encode(f"\n{name}")) == width]
    rng = random.Random(f"{seed}/{tokens}")
    rows = [_conversation(rng, encode, prose, names, words, tokens) for _ in range(count)]
    return Items(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def _conversation(
    rng: random.Random, encode: Any, prose: list[int], names: list[str], words: list[str], tokens: int
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    chosen = rng.sample(names, FACTS)
    answers = [rng.sample(words, WORDS_PER_ANSWER) for _ in chosen]
    said = [f"{name} {' '.join(answer)}." for name, answer in zip(chosen, answers, strict=True)]
    facts = [encode("\n" + " ".join([text] * REPEATS) + "\n") for text in said]
    examples, asked = (0, 1), (2, 3)
    question = encode("\n\n" + "\n".join(said[i] for i in examples) + f"\n{chosen[asked[0]]}")
    room = tokens - len(question) - sum(map(len, facts))
    start = rng.randrange(len(prose) - room)
    cuts, order = sorted(rng.randrange(room) for _ in facts), rng.sample(range(FACTS), FACTS)
    context: list[int] = []
    done = 0
    for cut, fact in zip(cuts, order, strict=True):
        context += prose[start + done : start + cut] + facts[fact]
        done = cut
    context += prose[start + done : start + room]
    wanted = [[encode(f" {word}")[0] for word in answers[i]] for i in asked]
    return context, question, encode(f".\n{chosen[asked[1]]}"), wanted
