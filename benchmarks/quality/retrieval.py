"""Generated look-up items: facts hidden in real text, asked for at its end.

Several questions share one context, so that 200 items cost a dozen forward passes: each answer is scored where it
is predicted, and the right answers stand behind the earlier questions (teacher forcing).
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import torch
from torch import Tensor

QUESTIONS = 16
#: Questions asked first and not scored: they show the model what is wanted.
WARM_UP = 2
#: name, statement of a fact, question up to the answer; the needles lie apart, the list in one piece.
FORMATS = {
    "needles": ("\n{name} {word}. {name} {word}. {name} {word}.\n", "{name}"),
    "list": ("{name} {word}. {name} {word}. {name} {word}.\n", "{name}"),
}
#: Facts in a context, per format, those that are not asked for included. Each is stated three times: dense attention of
#: this small model then finds nearly all (one prose statement: 59 % at 4K), and only then can the test tell.
FACTS = {"needles": 18, "list": 18}
NAMES = re.findall(
    r"\w+",
    """
    Alice Brian Carla David Emily Frank Grace Henry Irene James Karen Louis Maria Nancy Oscar Peter Quinn Robert
    Sarah Thomas Ursula Victor Wendy Xavier Yvonne Zachary Arthur Bella Colin Diana Edward Fiona George Hannah Ivan
    Julia Kevin Laura Martin Nora Oliver Paula Ralph Susan Tina Walter
    """,
)
WORDS = re.findall(
    r"\w+",
    """
    apple bridge candle dragon engine forest garden hammer island jacket kitchen ladder mirror needle orange pencil
    river silver table uncle valley window yellow copper doctor eagle finger guitar honey iron jungle lemon magnet
    nurse ocean paper queen rabbit saddle tiger violin winter bottle camera desert feather glass horse knife market
    piano rocket salt train whale cotton butter castle coffee wheat stone
    """,
)


@dataclasses.dataclass(frozen=True)
class Items:
    """Contexts of one length and format.

    Attributes:
        ids: int32 (C, N), the tokens.
        positions: int64 (C, Q), where each answer is predicted.
        answers: int64 (C, Q), the right token.
        candidates: int64 (C, F), the words of all facts of the context, among them the right ones.
        depths: float32 (C, Q), where the fact stands, as a share of N.
    """

    ids: Tensor
    positions: Tensor
    answers: Tensor
    candidates: Tensor
    depths: Tensor


def generate(tokenizer: Any, text: Tensor, kind: str, tokens: int, contexts: int, seed: int = 0) -> Items:
    """Contexts of exactly ``tokens`` tokens each.

    Args:
        tokenizer: The model's.
        text: int32 (M,), real text to hide the facts in.
        kind: A key of ``FORMATS``.
        tokens: N.
        contexts: C; each holds ``QUESTIONS`` items.
        seed: Of all random choices.

    Returns:
        The items; names, words, depths and the order of the questions differ in each context.
    """
    rng = random.Random(f"{seed}/{kind}/{tokens}")
    words = [word for word in WORDS if len(_ids(tokenizer, f" {word}")) == 1]
    rows = [_context(tokenizer, text, kind, tokens, rng, words) for _ in range(contexts)]
    dtypes = (torch.int32, torch.int64, torch.int64, torch.int64, torch.float32)
    return Items(*(torch.tensor(column, dtype=d) for column, d in zip(zip(*rows, strict=True), dtypes, strict=True)))


def _context(
    tokenizer: Any, text: Tensor, kind: str, tokens: int, rng: random.Random, words: list[str]
) -> tuple[list[int], list[int], list[int], list[int], list[float]]:
    statement, question = FORMATS[kind]
    names, values = rng.sample(NAMES, FACTS[kind]), rng.sample(words, FACTS[kind])
    facts = [_ids(tokenizer, statement.format(name=n, word=w)) for n, w in zip(names, values, strict=True)]
    answers = [_ids(tokenizer, f" {word}")[0] for word in values]
    asked = rng.sample(range(len(names)), WARM_UP + QUESTIONS)
    tail, places = _ids(tokenizer, "\n\n"), []
    for index in asked:
        tail += _ids(tokenizer, question.format(name=names[index]))
        places.append(len(tail) - 1)
        tail += [answers[index], *_ids(tokenizer, "\n")]
    room = tokens - len(tail) - sum(map(len, facts))
    start = rng.randrange(len(text) - room)
    body, depths = _hidden(text[start : start + room].tolist(), facts, kind, rng)
    ids = [*body, *tail]
    positions = [len(body) + place for place in places[WARM_UP:]]
    asked = asked[WARM_UP:]
    return ids, positions, [answers[i] for i in asked], answers, [depths[i] / tokens for i in asked]


def _hidden(text: list[int], facts: list[list[int]], kind: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """The text with the facts at random depths (``list``: all at one), and where each fact begins."""
    together = [rng.randrange(len(text))] * len(facts)
    cuts = together if kind == "list" else sorted(rng.randrange(len(text)) for _ in facts)
    body: list[int] = []
    starts, done = [], 0
    for cut, fact in zip(cuts, facts, strict=True):
        body += text[done:cut]
        starts.append(len(body))
        body += fact
        done = cut
    return body + text[done:], starts


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
