"""``docs/messages.md`` knows every warning and note that the code can give."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = " ".join((ROOT / "docs" / "messages.md").read_text().split())
#: Pieces of text below this length say nothing.
SHORT = 12


def said():
    """(file, expression) of every warning and note in the package."""
    for folder in ("omnisparse_flex", "passes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if any(part.is_symlink() for part in file.parents):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in ("warn", "note_once"):
                    yield file, node.args[0]
                elif isinstance(node, ast.Assign) and ".notes[" in ast.unparse(node.targets[0]):
                    yield file, node.targets[0].slice


def pieces(file, expression):
    """The fixed texts in it, names of the module's constants looked up."""
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for node in ast.walk(expression):
        text = getattr(module, node.id, "") if isinstance(node, ast.Name) else getattr(node, "value", "")
        if isinstance(text, str):
            yield from re.split(r"[{};(]| \.\.\.", text)


def test_every_message_is_on_the_page():
    missing = []
    for file, expression in said():
        texts = [" ".join(x.removeprefix("omnisparse:").split()) for x in pieces(file, expression)]
        longer = [text for text in texts if len(text) >= SHORT]
        if longer and not any(text.strip(" :,")[:40] in PAGE for text in longer):
            missing.append(f"{file.name}: {longer[0]}")
    assert not missing
