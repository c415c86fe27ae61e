"""Runs the passes over one captured graph, and takes back what a failing pass did."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from torch.fx import GraphModule

from omnisparse_flex.errors import bug, raises_bugs
from omnisparse_flex.passes.clean_up import clean_up
from omnisparse_flex.passes.decide import decide
from omnisparse_flex.passes.dump import start_dump
from omnisparse_flex.passes.find_sites import find_sites
from omnisparse_flex.passes.lift_masks import lift_masks
from omnisparse_flex.passes.lower import lower
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.snapshot import Snapshot
from omnisparse_flex.passes.state import Rewrite, Settings
from omnisparse_flex.passes.undo_repeat_kv import undo_repeat_kv

#: The passes in their order, each with the reason for its place.
PIPELINE: tuple[Callable[[Rewrite], None], ...] = (
    find_sites,  # first: the others look at sites only
    undo_repeat_kv,  # before decide, which compares the heads of queries and keys
    lift_masks,  # before decide, which skips a site whose mask cannot be lifted
    decide,  # after everything that may skip a site, before anything of it is changed
    lower,  # writes the sparse call of every site that is left
    clean_up,  # last: removes what only the dense attention used
)


def run_pipeline(
    graph_module: GraphModule,
    settings: Settings,
    before: Snapshot | None = None,
    refused: Mapping[int, str] | None = None,
) -> Rewrite:
    """Rewrite a Dynamo graph in place.

    Where a pass fails, the graph is brought back to what it was and rewritten without the site at fault, which then
    is a skip that names the failure; where no site is, without any. ``OMNISPARSE_RAISE_BUGS`` raises instead.

    Args:
        graph_module: A graph of torch functions, as a Dynamo backend receives it.
        settings: How to rewrite.
        before: The graph as it is now; None: copied here.
        refused: Reasons of sites that are to stay dense, by their place in ``Rewrite.sites``.

    Returns:
        The finished run: its sites carry what became of them.
    """
    reasons = dict(refused or {})
    if before is None and not raises_bugs():
        before = Snapshot(graph_module)
    while True:
        rewrite = Rewrite(Scope(graph_module), settings, refused=reasons)
        dump = start_dump(graph_module)
        try:
            for run_pass in PIPELINE:
                run_pass(rewrite)
                if dump is not None:
                    dump.passed(run_pass.__name__)
        except Exception as error:
            if before is None or raises_bugs():
                raise
            before.restore()
            faults = _faults(rewrite, run_pass.__name__, error)
            if not faults.keys() - reasons.keys():
                return _untouched(graph_module, settings, reasons)
            reasons |= faults
        else:
            rewrite.dumped_to = None if dump is None else str(dump.folder)
            return rewrite


def _faults(rewrite: Rewrite, name: str, error: Exception) -> dict[int, str]:
    """The site that a pass failed at, or every site that was not refused before, and the reason."""
    failed = rewrite.open_sites() if rewrite.visited is None else [rewrite.visited]
    reason = bug(f"the pass {name}", error)
    return {place: reason for place, site in enumerate(rewrite.sites) if site in failed}


def _untouched(graph_module: GraphModule, settings: Settings, reasons: Mapping[int, str]) -> Rewrite:
    """A run that changes nothing: a pass fails though every site is refused."""
    rewrite = Rewrite(Scope(graph_module), settings, refused=reasons)
    with contextlib.suppress(Exception):
        find_sites(rewrite)
    return rewrite
