"""A rewritten graph that the inner compiler cannot compile is compiled as it came."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule

from omnisparse_flex.compilation.inductor import CompiledFn
from omnisparse_flex.errors import bug, raises_bugs
from omnisparse_flex.passes import Rewrite, Snapshot, run_pipeline


def compile_or_restore(
    compile_it: Callable[[], CompiledFn], graph_module: GraphModule, rewrite: Rewrite, before: Snapshot | None
) -> tuple[Rewrite, CompiledFn]:
    """Compile a graph; if that fails and a pass changed it, compile what it was.

    Args:
        compile_it: Compiles ``graph_module`` as it is when called.
        graph_module: The rewritten graph.
        rewrite: What became of its sites.
        before: The graph as it came, or None: failures are raised.

    Returns:
        What became of the sites, and the compiled graph. After a failure the sites that were rewritten are skips
        that name it. Out of memory, and what the compiler raises to make Dynamo start over, are raised: they say
        nothing about the graph.
    """
    try:
        return rewrite, compile_it()
    except Exception as error:
        if before is None or raises_bugs() or not rewrite.modified or _is_no_failure(error):
            raise
        reason = bug("the inner compiler", error)
    before.restore()
    rewritten = {place: reason for place, site in enumerate(rewrite.sites) if site.rewritten}
    return run_pipeline(graph_module, rewrite.settings, before, rewritten), compile_it()


def _is_no_failure(error: Exception) -> bool:
    from torch._dynamo.exc import (
        RestartAnalysis,  # not at import: it loads Dynamo
        SkipFrame,
    )

    return isinstance(error, (torch.OutOfMemoryError, RestartAnalysis, SkipFrame))
