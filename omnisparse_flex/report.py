"""What became of every attention site, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class SiteReport:
    """One attention site in one compiled graph.

    Attributes:
        graph: Number of the compiled graph, 0-based; -1 for a trace without weights.
        layer: Decoder layer, 0-based.
        path: Module path, "" if the graph does not say.
        kind: ``marker``, ``sdpa``, ``flex`` or ``eager``: how attention was spelled.
        queries: Shape (B, Hq, L, D) as text; symbols stand for dynamic sizes.
        kv_heads: Number of key heads.
        reason: Why it stays dense; "" where it was rewritten.
    """

    graph: int
    layer: int
    path: str
    kind: str
    queries: str
    kv_heads: int
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRecall:
    """What a layer kept of its attention, measured on exact rows of every query block, by the peak rule.

    Attributes:
        layer: Decoder layer, 0-based.
        mean: Mean true recall of the rows in the last call, 0-1.
        worst_head: The same of the head that kept least.
        calls: Calls so far.
        broken: Calls in which a head kept less than ``target_recall``.
    """

    layer: int
    mean: float
    worst_head: float
    calls: int
    broken: int

    def __str__(self) -> str:
        """One sentence on the last call."""
        return f"layer {self.layer} kept {self.mean:.3f} of its attention, its worst head {self.worst_head:.3f}"


@dataclasses.dataclass(frozen=True, slots=True)
class RewriteReport:
    """Every attention site of a model: rewritten, or skipped with the reason.

    Attributes:
        sites: One entry per site and compiled graph (lengths below and above the
            threshold, prefill and decode compile separately).
        compiled: Whether a real graph was compiled; False: a trace without weights.
        graphs: Number of graphs compiled so far.
        notes: What the user should know, e.g. a frame that ran eagerly.
        recall: What each layer kept in the last call, if its rule samples rows; layers in checkpoints record nothing.
    """

    sites: tuple[SiteReport, ...] = ()
    compiled: bool = False
    graphs: int = 0
    notes: tuple[str, ...] = ()
    recall: tuple[LayerRecall, ...] = ()

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        """Sites that run sparse attention in at least one graph; one entry each."""
        return tuple({_key(s): s for s in reversed(self.sites) if not s.reason}.values())[::-1]

    @property
    def skipped(self) -> tuple[SiteReport, ...]:
        """Sites that stay dense in every graph; one entry each, with its first reason."""
        sparse = {_key(s) for s in self.rewritten}
        return tuple({_key(s): s for s in reversed(self.sites) if _key(s) not in sparse}.values())[::-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "compiled": self.compiled,
            "graphs": self.graphs,
            "notes": list(self.notes),
            "rewritten": len(self.rewritten),
            "skipped": len(self.skipped),
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "recall": [dataclasses.asdict(layer) for layer in self.recall],
        }

    def __str__(self) -> str:
        """A table: one line per site, graphs merged where they agree."""
        head = f"{len(self.rewritten)} sites rewritten, {len(self.skipped)} skipped, {self.graphs} graphs compiled"
        if not self.compiled:
            head = f"not compiled yet; {len(self.rewritten)} sites would be rewritten, {len(self.skipped)} skipped"
        rows = [("layer", "site", "kind", "queries", "KV heads", "attention")]
        seen: dict[tuple[Any, ...], None] = {}
        for site in self.sites:
            outcome = f"dense: {site.reason}" if site.reason else "omnisparse"
            seen[(str(site.layer), site.path, site.kind, site.queries, str(site.kv_heads), outcome)] = None
        lines = [head, *(f"note: {note}" for note in self.notes), *self._recall_lines()]
        return "\n".join([*lines, *table([*rows, *seen])] if seen else lines)

    def _recall_lines(self) -> list[str]:
        """The last call's recall in a line, and what to know of the calls before."""
        if not self.recall:
            return []
        worst = min(self.recall, key=lambda layer: layer.worst_head)
        mean = sum(layer.mean for layer in self.recall) / len(self.recall)
        lines = [f"recall of the last call's sampled rows: mean {mean:.3f}, worst head {worst.worst_head:.3f} "]
        lines[0] += f"(layer {worst.layer})"
        broken = [layer for layer in self.recall if layer.broken]
        if broken:
            most = max(layer.broken for layer in broken)
            told = f"{most} of {worst.calls} calls kept less than target_recall, in layers "
            lines.append(told + ", ".join(str(layer.layer) for layer in broken))
        return lines


@dataclasses.dataclass(eq=False)
class Log:
    """What one backend object did; the report and the fall-back check read it.

    Attributes:
        sites: Reports of every compiled graph.
        graphs: Number of graphs compiled.
        runs: Number of compiled graphs that ran.
        inners: Inner compilers used.
        notes: Remarks for the report.
    """

    sites: list[SiteReport] = dataclasses.field(default_factory=list)
    graphs: int = 0
    runs: int = 0
    inners: set[str] = dataclasses.field(default_factory=set)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def report(self) -> RewriteReport:
        """The report so far."""
        return RewriteReport(tuple(self.sites), self.graphs > 0, self.graphs, tuple(self.notes))


def _key(site: SiteReport) -> tuple[int, str, str]:
    return site.layer, site.path, site.kind


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned lines, the first as a heading.

    Args:
        rows: Equal-length rows of cells.

    Returns:
        One line per row, and a rule under the first.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
