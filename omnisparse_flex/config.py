"""What changes the mathematics of the attention, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from omnisparse_flex.config_checks import AUTO, MIN_PEAK, check_together, count, is_real, one_of, resolve
from omnisparse_flex.config_schema import SCHEMA, migrated, refuse_removed, refuse_removed_scoring
from omnisparse_flex.errors import require

Budget = Literal["flattest_head", "per_head", "peak"] | int

#: Estimators by granularity; the first is what ``"auto"`` means.
SCORINGS = {"block": ("mean_pool", "tile_pool", "sampled_rows"), "token": ("one_pass",)}
#: What ``lazy_threshold="auto"`` means for blocks whose mass is counted.
LAZY_THRESHOLD = 0.05
#: Queries of a block: a segment is a whole number of them.
SEGMENT_UNIT = 128
#: Widths of a block of keys.
KEY_BLOCKS = (64, 128)
BUDGETS = ("flattest_head", "per_head", "peak")


@dataclasses.dataclass(frozen=True, slots=True)
class OmniSparseConfig:
    """The selection rule: which queries look far, and which keys they may see.

    Attributes:
        target_recall: Softmax mass a row must keep, in (0, 1]; one value, or one
            per decoder layer. A layer at 1.0 is dense. For ``budget="peak"`` the floor of every sampled row, 0.6
            unless told; for the rules that count, the share of the *estimated* mass, 0.98 unless told.
        granularity: Unit of the key selection: ``"block"`` (``key_block`` keys, for each block of
            128 queries) or ``"token"`` (single keys, for each segment of queries).
        key_block: Keys of a block, 64 or 128; the same in training, whose kernels take blocks of 128 and mask the half
            that is not kept. Block granularity; 64 for ``budget="peak"`` and 128 for the others unless told.
        segment_size: Queries that share one choice of tokens, a multiple of 128; without
            effect at block granularity.
        scoring: The estimator of attention mass. For blocks ``"sampled_rows"`` (exact rows of 16 of 128 queries,
            for ``budget="peak"`` alone), or ``"mean_pool"`` (block means, cheapest) or ``"tile_pool"`` (means of 32
            tokens) for the rules that count; for tokens ``"one_pass"`` (rows' normalisers guessed); ``"auto"``: the
            first that the budget takes.
        scoring_dims: Coordinates of each head that ``"one_pass"`` multiplies for its scores, a power of 2 from 16 to
            the head's own number: those with the largest product of mean squares in queries and keys, over all
            tokens of the call. The always-kept part, the guess and the attention take all. None: all.
        gqa_choice: Who chooses tokens: ``"group"``, the query heads of a KV head together, or ``"head"``, each query
            head for itself. Token granularity: blocks are always chosen by each query head. In tensor code (the CPU,
            changed scores) ``"head"`` copies keys and values for every query head; the kernels copy nothing.
        budget: ``"peak"``, the default of blocks, counts nothing: a block is fetched if one of the query block's
            sampled rows gives it at least that row's threshold. The threshold is ``min_peak``, less for rows that
            see many key blocks, and less for rows that would keep less than ``target_recall`` of their mass.
            ``"per_head"`` gives every head of a layer the budget that it needs;
            ``"flattest_head"`` gives all what the flattest one needs (the paper's rule); an int
            is a fixed number of tokens. Tokens, and blocks for which ``scoring``, ``max_kv_budget`` or
            ``lazy_threshold`` asks for counting, have ``"per_head"`` unless told. With
            ``gqa_choice="head"`` there is no flattest head: the kernels take a group's members one after the other,
            and its budget would need all of them at once.
        min_peak: Share of a row's attention that makes a block worth fetching, in [0, 1), for ``budget="peak"``;
            one value, or one per decoder layer. A layer at 0 is dense.
        max_kv_budget: Upper bound of the budget in tokens (always-kept keys not
            counted); None: no bound.
        lazy_threshold: A query (block) whose estimated mass beyond sinks and window is
            under this is lazy, in [0, 1], and attends only sinks, window and text; None: no query selection.
            For rules that count: with ``budget="peak"`` a query block whose rows peak nowhere fetches nothing.
            ``"auto"``: 0.05 for blocks, None for tokens. There the estimate, means of 128 keys, misses what a query
            fetches from a few of them: on text 0.05 discards queries that look far (docs/limits.md); give a number
            where you measured it.
        sink_size: First tokens every query keeps, in tokens.
        window_size: Latest tokens every query keeps, in tokens, itself included; 128 for ``budget="peak"`` and 256 for
            the others unless told.
        last_rows: Rows of exact logits that the last two query blocks are chosen by, whatever the
            estimator: a question at the end of a prompt holds unlike words, which a block's mean
            hides. The blocks are the tensor's: of a
            right-padded row they hold padding. An even number; 0: they are estimated like the
            others. Without effect at token granularity.

    Raises:
        ConfigError: On a wrong type, range or combination.

    Source: PAPER "Query selection", "KV selection with head-level dynamic budget allocation". Our
    choice: ``last_rows``, ``gqa_choice``, ``scoring_dims`` and the default values; see docs/configuration.md. Heads
    that choose, with 32 dims, are the best rule without training that we measured on SmolLM2, as masks
    (``benchmarks/quality``, row "token256 one-pass fp8 dims32 pool32 per_head d0 t0.96 lazy0.1": density 0.304,
    +0.79 % perplexity; the group's choice, "mean" in the row's name, +1.33 % at that density).
    """

    target_recall: float | tuple[float, ...] = AUTO
    granularity: str = "block"
    key_block: int = AUTO
    segment_size: int = 256
    scoring: str = "auto"
    scoring_dims: int | None = None
    gqa_choice: str = "group"
    budget: Budget = AUTO
    min_peak: float | tuple[float, ...] = MIN_PEAK
    max_kv_budget: int | None = None
    lazy_threshold: float | str | None = "auto"
    sink_size: int = 64
    window_size: int = AUTO
    last_rows: int = 64

    def __new__(cls, *args: Any, **fields: Any) -> OmniSparseConfig:
        """Say of a removed field what stands in its place; ``__init__`` would only call it unexpected."""
        refuse_removed(fields)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        """Put values in place of ``AUTO``, and check every field."""
        resolve(self)
        if isinstance(self.target_recall, Sequence) and not isinstance(self.target_recall, str):
            object.__setattr__(self, "target_recall", tuple(self.target_recall))
            require(len(self.recalls) > 0, "target_recall", "hold one value per layer", self.target_recall)
        for recall in self.recalls:
            require(is_real(recall) and 0 < recall <= 1, "target_recall", "be in (0, 1]", self.target_recall)
        one_of("granularity", self.granularity, tuple(SCORINGS))
        refuse_removed_scoring(self.scoring)
        one_of("scoring", self.scoring, ("auto", *SCORINGS[self.granularity]))
        peaks = self.budget == "peak" and self.granularity == "token"
        require(not peaks, "budget", "be per_head, flattest_head or an int at token granularity", self.budget)
        ok = type(self.key_block) is int and self.key_block in KEY_BLOCKS
        require(ok, "key_block", f"be one of {', '.join(map(str, KEY_BLOCKS))}", self.key_block)
        ok = self.key_block == SEGMENT_UNIT or self.granularity == "block"
        require(ok, "key_block", f"be {SEGMENT_UNIT} at token granularity", self.key_block)
        check_together(self)
        count("segment_size", self.segment_size, minimum=SEGMENT_UNIT)
        ok = self.segment_size % SEGMENT_UNIT == 0
        require(ok, "segment_size", f"be a multiple of {SEGMENT_UNIT}", self.segment_size)
        count("last_rows", self.last_rows, minimum=0)
        require(self.last_rows % 2 == 0, "last_rows", "be even", self.last_rows)
        if isinstance(self.budget, str):
            one_of("budget", self.budget, BUDGETS)
        else:
            count("budget", self.budget, minimum=0)
        if self.max_kv_budget is not None:
            count("max_kv_budget", self.max_kv_budget, minimum=0)
        if self.lazy_threshold is not None and self.lazy_threshold != "auto":
            ok = is_real(self.lazy_threshold) and 0 <= float(self.lazy_threshold) <= 1
            require(ok, "lazy_threshold", 'be "auto", None or in [0, 1]', self.lazy_threshold)
        count("sink_size", self.sink_size, minimum=0)
        count("window_size", self.window_size, minimum=1)
        if isinstance(self.budget, int) and self.max_kv_budget is not None:
            ok = self.budget <= self.max_kv_budget
            require(ok, "budget", f"be at most max_kv_budget={self.max_kv_budget}", self.budget)

    @property
    def recalls(self) -> tuple[float, ...]:
        """``target_recall`` as a tuple, whichever way it was given."""
        return self.target_recall if isinstance(self.target_recall, tuple) else (self.target_recall,)

    @property
    def split(self) -> int:
        """Key blocks beside each other in the width of a query block."""
        return SEGMENT_UNIT // self.key_block

    @property
    def peaks(self) -> tuple[float, ...]:
        """``min_peak`` as a tuple, whichever way it was given."""
        return self.min_peak if isinstance(self.min_peak, tuple) else (self.min_peak,)

    @property
    def scorer(self) -> str:
        """``scoring`` with ``"auto"`` resolved."""
        if self.scoring == "auto" and self.budget == "peak" and self.granularity == "block":
            return "sampled_rows"
        return SCORINGS[self.granularity][0] if self.scoring == "auto" else self.scoring

    @property
    def lazy_below(self) -> float | None:
        """``lazy_threshold`` with ``"auto"`` resolved."""
        if self.lazy_threshold == "auto":
            if self.budget == "peak":
                return None
            return LAZY_THRESHOLD if self.granularity == "block" else None
        return None if self.lazy_threshold is None else float(self.lazy_threshold)

    def recall_of(self, layer: int) -> float:
        """The target recall of one decoder layer (0-based)."""
        return self.recalls[layer] if len(self.recalls) > 1 else self.recalls[0]

    def min_peak_of(self, layer: int) -> float:
        """The smallest peak of one decoder layer (0-based)."""
        return self.peaks[layer] if len(self.peaks) > 1 else self.peaks[0]

    def is_dense(self, layer: int) -> bool:
        """Whether one decoder layer (0-based) keeps everything, by rule."""
        return self.recall_of(layer) == 1.0 or (self.budget == "peak" and self.min_peak_of(layer) == 0)

    def choices(self, heads: int, kv_heads: int) -> int:
        """How many heads choose tokens, of ``heads`` query heads over ``kv_heads`` KV heads."""
        return kv_heads if self.gqa_choice == "group" else heads

    def check_head_dim(self, dim: int) -> None:
        """Refuse more ``scoring_dims`` than a head has.

        Raises:
            ConfigError: If a head of ``dim`` coordinates has fewer.
        """
        ok = self.scoring_dims is None or self.scoring_dims <= dim
        require(ok, "scoring_dims", f"be at most the head_dim {dim}", self.scoring_dims)

    def check_layers(self, num_layers: int) -> None:
        """Refuse per-layer targets whose number is not the model's.

        Raises:
            ConfigError: If there are several targets and not ``num_layers`` of them.
        """
        ok = not isinstance(self.target_recall, tuple) or len(self.target_recall) == num_layers
        require(ok, "target_recall", f"hold one value for each of the {num_layers} layers", self.target_recall)
        ok = not isinstance(self.min_peak, tuple) or len(self.min_peak) == num_layers
        require(ok, "min_peak", f"hold one value for each of the {num_layers} layers", self.min_peak)

    @classmethod
    def paper(cls) -> OmniSparseConfig:
        """The paper's rules to the letter, as we read them: tokens, the flattest head's budget, lazy queries local."""
        return cls(
            target_recall=0.95,
            granularity="token",
            budget="flattest_head",
            lazy_threshold=0.05,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that ``from_dict`` reads back, of this version or a later one."""
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        if isinstance(self.target_recall, tuple):
            fields["target_recall"] = list(self.target_recall)
        if isinstance(self.min_peak, tuple):
            fields["min_peak"] = list(self.min_peak)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OmniSparseConfig:
        """Build a config from ``to_dict``'s output, of this version or an earlier one.

        Raises:
            ConfigError: On unknown or removed fields, invalid values, and the schema of a later version.
        """
        require(isinstance(fields, Mapping), "config", "be a mapping of field names to values", fields)
        fields = migrated(fields)
        refuse_removed(fields)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        require(not unknown, "config", f"hold only the fields {sorted(known)}", unknown)
        return cls(**fields)
