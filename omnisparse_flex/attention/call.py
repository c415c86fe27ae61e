"""Everything about one attention call except its tensors' values."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.layout import Layout
from omnisparse_flex.masks.blocks.select import BlockSelection
from omnisparse_flex.masks.expr.expr import Expr, Loader, evaluate, plain_load
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.masks.statistics import SelectionStats, measure_selection
from omnisparse_flex.masks.tokens.select import TokenSelection


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """Everything about one attention call except its tensors' values; as it is, it keeps all that the mask allows.

    Attributes:
        mask: The model's own mask.
        score_mod: ``(score, b, h, q, kv, *score_buffers)``, the model's own, or None.
        score_buffers: Trailing arguments of ``score_mod``.
        softcap: ``c`` of ``c * tanh(logit / c)``, applied first; 0: none.
        bias: Additive logits as an expression over ``bias_buffers``, applied last, or None.
        bias_buffers: Tensors that ``bias`` reads; they may require gradients.
        scale: Logit scale; None: 1 / sqrt(D).
        sinks: (Hq,), logit of each head's virtual key without a value, or None; may require gradients. It takes
            its share of the mass after the selection. Our choice: recall is of the real tokens' mass, so what
            is selected does not depend on the sinks.
        lists: The kernel honours block lists (Inductor). Otherwise (eager, aot_eager) the
            selection rides in the ``mask_mod``.
        kernel_options: Options for the flex kernel.
    """

    mask: IndexMask | OpaqueMask
    score_mod: Callable[..., Tensor] | None = None
    score_buffers: tuple[Tensor, ...] = ()
    softcap: float = 0.0
    bias: Expr | None = None
    bias_buffers: tuple[Tensor, ...] = ()
    scale: float | None = None
    sinks: Tensor | None = None
    lists: bool = False
    kernel_options: tuple[tuple[str, Any], ...] = ()

    @property
    def changes_scores(self) -> bool:
        """Whether logits are more than scaled dot products."""
        return self.bias is not None or self.score_mod is not None or self.softcap != 0

    def scale_for(self, query: Tensor) -> float:
        """Logit scale of queries (..., D)."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def score(self, load: Loader, score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *own: Tensor) -> Tensor:
        """The model's own change of a logit; ``load`` reads the bias' buffers, ``own`` are the score_mod's."""
        if self.softcap != 0:
            score = torch.tanh(score / self.softcap) * self.softcap
        if self.score_mod is not None:
            score = self.score_mod(score, b, h, q, kv, *own)
        if self.bias is not None:
            score = score + evaluate(self.bias, load, b, h, q, kv).to(score.dtype)
        return score

    def plain_score(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """``score`` over the site's own buffers, outside a kernel and without gradients."""
        load = plain_load([x.detach() for x in self.bias_buffers])
        return self.score(load, score, b, h, q, kv, *self.score_buffers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseCall(AttentionCall):
    """A call that selects what it keeps.

    Attributes:
        config: Selection rules.
        target: Recall of this call, a number or 0-d tensor.
        min_peak: Share of a row that is a peak in this call, likewise, for the peak rule; None: the config's first.
        visual: bool (B, S), visual tokens; None: every token is eligible. See ``text_blocks``.
        q_offset: Position of query 0 among the keys.
        static: Graphs are of one length each.
        layout: The part of the selection that layers of one mask share; None: made here.
        write: Called with what the selection left behind, to record statistics; or None.
        exact: ``write`` wants true recalls too.
        note: Called with the sampled rows' true recall, the layout's ``some`` and ``target``, where the rule has such
            rows, to record what was kept of what was promised; or None.
        rules: Name under which the operators know this call's constants, where a graph is traced; or "".
    """

    config: OmniSparseConfig
    target: Tensor | float = 1.0
    min_peak: Tensor | float | None = None
    visual: Tensor | None = None
    q_offset: Tensor | int = 0
    static: bool = False
    layout: Layout | None = None
    write: Callable[[SelectionStats], None] | None = None
    exact: bool = False
    note: Callable[[Tensor, Tensor, Tensor | float], None] | None = None
    rules: str = ""

    @property
    def peak(self) -> Tensor | float:
        """``min_peak``, or the config's first."""
        return self.config.min_peak_of(0) if self.min_peak is None else self.min_peak

    def stats_of(self, selection: BlockSelection | TokenSelection, query: Tensor, key: Tensor) -> SelectionStats:
        """The record of a selection that this site made."""
        scale = self.scale_for(query)
        score = self.plain_score if self.changes_scores else None
        return measure_selection(
            selection, query, key, self.mask, self.config,
            scale=scale, score=score, exact=self.exact,
        )  # fmt: skip


#: Calls without tensors, by name.
_CALLS: dict[str, SparseCall] = {}


def register(site: SparseCall) -> str:
    """Keep what is constant about a call.

    Args:
        site: Any call with a ``IndexMask``; its tensors are left out.

    Returns:
        Its name: the same in every process, for the same constants, unless the call holds a function of its own.
    """
    assert isinstance(site.mask, IndexMask)
    bare = dataclasses.replace(
        site,
        mask=IndexMask(site.mask.expr),
        target=1.0,
        min_peak=0.0,
        score_buffers=(),
        bias_buffers=(),
        visual=None,
        q_offset=0,
        sinks=None,
        layout=None,
        write=None,
        exact=False,
        note=None,
    )
    name = hashlib.sha256(repr(bare).encode()).hexdigest()[:16]
    _CALLS[name] = bare
    return name


def registered(name: str) -> SparseCall:
    """The call without tensors that ``register`` was given."""
    return _CALLS[name]
