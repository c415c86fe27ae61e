"""What a test of a seam says when it fails: what no longer holds, and which files of ours rely on it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("omnisparse_flex", "passes", "masks")
SOURCES = {
    file.relative_to(ROOT): file.read_text("utf-8")
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in file.parents) and file.stem != "seams"  # that only lists names
}


@contextlib.contextmanager
def seam(assumption: str, *words: str):
    """Report what fails inside as a broken assumption, with the files of ours in which all of ``words`` stand.

    Args:
        assumption: What holds of torch or transformers.
        *words: What a file that relies on it must mention.
    """
    files = [str(file) for file, text in SOURCES.items() if all(word in text for word in words)]
    assert files, f"no file of ours mentions {words}: nobody relies on this seam, drop its test"
    try:
        yield
    except Exception as error:
        found = {name: sys.modules[name].__version__ for name in ("torch", "transformers") if name in sys.modules}
        raise AssertionError(
            f"no longer true: {assumption} ({found}; {type(error).__name__}: {error}). "
            f"Files that rely on it: {', '.join(files)}"
        ) from error
