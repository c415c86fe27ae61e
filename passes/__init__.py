"""Graph passes: find attention sites in a captured graph and rewrite them.

The order matters: masks are lifted before ``decide`` looks at them, every refusal comes
before ``lower`` changes anything, and ``clean_up`` sees the whole graph last.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from omnisparse_flex.passes.clean_up import clean_up
from omnisparse_flex.passes.decide import decide
from omnisparse_flex.passes.find_sites import find_sites
from omnisparse_flex.passes.lift_masks import lift_masks
from omnisparse_flex.passes.lower import lower
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Rewrite, Settings, Site, Skip
from omnisparse_flex.passes.undo_repeat_kv import undo_repeat_kv

__all__ = ["PIPELINE", "Rewrite", "Settings", "Site", "Skip", "run_pipeline"]

PIPELINE: tuple[Callable[[Rewrite], None], ...] = (
    find_sites,
    undo_repeat_kv,
    lift_masks,
    decide,
    lower,
    clean_up,
)


def run_pipeline(graph_module: GraphModule, settings: Settings) -> Rewrite:
    """Rewrite a Dynamo graph in place.

    Args:
        graph_module: A graph of torch functions, as a Dynamo backend receives it.
        settings: How to rewrite.

    Returns:
        The finished run: its sites carry what became of them.
    """
    rewrite = Rewrite(Scope(graph_module), settings)
    for run_pass in PIPELINE:
        run_pass(rewrite)
    return rewrite
