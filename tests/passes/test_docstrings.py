"""The small graph in each pass's docstring is what the pass makes of it."""

from __future__ import annotations

import inspect
import sys
import textwrap

import pytest

from omnisparse_flex.passes import PIPELINE
from tests.helpers.pass_printer import LENGTH, printed, run_before

#: Queries below which a site stays dense, where the example shows a refusal.
LEAST = {"decide": 2 * LENGTH}


def shown(text: str, title: str) -> str:
    """The literal block under ``title::``."""
    _, _, rest = text.partition(f"{title}::\n\n")
    lines = []
    for line in rest.splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


@pytest.mark.parametrize("run_pass", PIPELINE, ids=lambda run_pass: run_pass.__name__)
def test_the_docstring_shows_the_graph_before_and_after(run_pass):
    text = inspect.getdoc(sys.modules[run_pass.__module__]) or ""
    rewrite = run_before(run_pass.__name__, LEAST.get(run_pass.__name__, 0))
    before = printed(rewrite)
    run_pass(rewrite)
    assert (shown(text, "Before"), shown(text, "After")) == (before, printed(rewrite))
    assert before != printed(rewrite), "the example shows nothing"
