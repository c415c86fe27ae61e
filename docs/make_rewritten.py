"""Write ``docs/rewritten.md``: what is rewritten exactly, what stays dense, and why, as this machine finds it now."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# What is rewritten

Each line is a spelling that was run through the backend with rules that keep everything, and compared with itself run
eagerly: *exact* means that the site was rewritten and the numbers are those of the model. Every other line says why
the site stays dense. `i`, `j` are positions of queries and keys, `order` is a float causal mask. This page is written
by `docs/make_rewritten.py` from `tests/helpers/spellings.py`; a test keeps it current.
"""


def page() -> str:
    """The page's text."""
    from tests.helpers import spellings

    lines = [HEAD]
    for group, rows in itertools.groupby(spellings.ROWS, key=lambda row: row.group):
        lines += [f"\n## {group}\n", "| spelling | outcome |", "|---|---|"]
        for row in rows:
            code = row.code.replace("|", "\\|")
            lines.append(f"| `{code}` | {spellings.outcome(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    os.environ["OMNISPARSE_RAISE_BUGS"] = "1"
    warnings.simplefilter("ignore")
    (HERE / "rewritten.md").write_text(page(), "utf-8")
