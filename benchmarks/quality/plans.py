"""The rows of each experiment, most informative first."""

from __future__ import annotations

import dataclasses

from benchmarks.quality.controls import random_keys
from benchmarks.quality.rules import Rule

#: What a row measures unless it says more: two texts of two windows; 224 look-up items.
PPL, ITEMS = "ppl:8192", "items:4096"


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule and what is measured of it.

    Attributes:
        rule: The rule.
        tasks: ``"ppl:N"`` and ``"items:N"``.
        match: Name of an earlier row whose density this (window) control takes.
    """

    rule: Rule
    tasks: tuple[str, ...] = (PPL,)
    match: str | None = None

    def at(self, tokens: int) -> Row:
        """The same row at another length."""
        return dataclasses.replace(self, tasks=tuple(f"{task.partition(':')[0]}:{tokens}" for task in self.tasks))


def token(label: str, target: float = 0.95, lazy: float | None = 0.05, **changes: object) -> Rule:
    """Token granularity, segments of 256, flattest head."""
    name = f"token256 {label} t{target} lazy{lazy}"
    return Rule(name, target=target, lazy=lazy, **changes)  # type: ignore[arg-type]


def block(label: str, size: int = 64, target: float = 0.95, lazy: float | None = None, **changes: object) -> Rule:
    """Block granularity."""
    name = f"block{size} {label} t{target} lazy{lazy}"
    return Rule(name, segment=size, unit=size, target=target, lazy=lazy, **changes)  # type: ignore[arg-type]


def with_controls(rule: Rule, tasks: tuple[str, ...]) -> list[Row]:
    """A row and its two controls."""
    window = Rule(f"{rule.name} ~ window", dense_layers=rule.dense_layers, sinks=rule.sinks)
    return [Row(rule, tasks), Row(random_keys(rule), tasks), Row(window, tasks, match=rule.name)]


DENSE = Rule("dense", estimator="dense")
#: The cheap estimators, ours first: label, estimator, options, shortlist.
CHEAP: tuple[tuple[str, str, dict[str, int | bool], float | None], ...] = (
    ("cluster16", "clustered", {"size": 16}, None),
    ("cluster16+var", "clustered", {"size": 16, "spread": True}, None),
    ("cluster16>exact.2", "clustered", {"size": 16}, 0.2),
    ("pool8>exact.2", "pooled", {"keys": 8}, 0.2),
    ("pool8", "pooled", {"keys": 8}, None),
    ("meanpool64>exact.3", "pooled", {"queries": 64, "keys": 64}, 0.3),
    ("cluster32", "clustered", {"size": 32}, None),
    ("cluster8", "clustered", {"size": 8}, None),
    ("pca16", "pca", {"dims": 16}, None),
    ("pca8>exact.2", "pca", {"dims": 8}, 0.2),
    ("antidiag8>exact.3", "antidiagonal", {"stride": 8}, 0.3),
    ("probe8", "probe", {"every": 8}, None),
    ("fp8", "fp8", {}, None),
    ("int4", "int4", {}, None),
    ("pca32", "pca", {"dims": 32}, None),
)


def _token(label: str, estimator: str, options: dict[str, int | bool], refine: float | None) -> Rule:
    return token(label, estimator=estimator, options=options, refine=refine)


def first() -> list[Row]:
    """Recall against density, cheap estimators, controls; then budgets and segments."""
    both = (PPL, ITEMS)
    rows = [Row(DENSE, both), *with_controls(token("exact"), both)]
    rows += [Row(_token(*entry), both if i < 3 else (PPL,)) for i, entry in enumerate(CHEAP)]
    rows += [
        Row(block("exact per_head", budget="per_head"), both),
        Row(block("exact"), both),
        Row(block("antidiag8 per_head", estimator="antidiagonal", options={"stride": 8}, budget="per_head")),
        Row(token("exact per_head", budget="per_head"), both),
        Row(token("exact", lazy=None)),
        Row(token("exact", target=0.9)),
    ]
    long = ("items:8192",)
    return [*rows, Row(DENSE, long), *with_controls(token("exact"), long), Row(_token(*CHEAP[0]), long)]


def rules() -> list[Row]:
    """Budget, segment, unit, lazy and group rules with true mass."""
    rows = [Row(DENSE)]
    for segment in (64, 128, 512, 0):
        rows.append(Row(dataclasses.replace(token("exact"), name=f"token{segment} exact t0.95", segment=segment)))
    for unit in (4, 16, 64):
        rows.append(Row(dataclasses.replace(token("exact"), name=f"unit{unit} exact t0.95", unit=unit)))
    for gqa in ("mean", "max"):
        rows.append(Row(token(f"exact gqa-{gqa}", gqa=gqa)))
    for lazy in (0.02, 0.1, 0.2):
        rows.append(Row(token("exact", lazy=lazy)))
    rows += [
        Row(token("exact skip", lazy_mode="skip")),
        Row(token("exact no-subsample", lazy_stride=0)),
        Row(token("exact max-rank", rank_by="max")),
        Row(token("exact budget512", budget=512)),
        Row(token("exact tail64", dense_tail=64), (PPL, ITEMS)),
        Row(block("exact", size=128)),
        Row(block("exact", lazy=0.1)),
        Row(block("probe8 per_head", estimator="probe", options={"every": 8}, budget="per_head")),
        Row(block("meanpool per_head", estimator="pooled", options={"queries": 64, "keys": 64}, budget="per_head")),
    ]
    return rows


def second() -> list[Row]:
    """One pass instead of two, the group's shared choice, leaner budgets: what the first sweep left open."""
    both, cheap = (PPL, ITEMS), {"estimator": "one_pass"}
    rows = [Row(DENSE, both), Row(token("one-pass fp8", **cheap), both)]
    rows += [Row(token("one-pass fp8 per_head", **cheap, budget="per_head"), both)]
    rows += [Row(token("exact gqa-mean", gqa="mean"), both), Row(token("exact gqa-max", gqa="max"))]
    rows += [Row(token("exact per_head gqa-mean", gqa="mean", budget="per_head"), both)]
    rows += with_controls(token("exact per_head", budget="per_head"), both)
    rows += [Row(token("one-pass fp8", target=t, **cheap), both) for t in (0.9, 0.98)]
    rows += [Row(token("one-pass fp8", lazy=x, **cheap), both) for x in (0.1, 0.2)]
    return [*rows, Row(token("one-pass 16 bits", estimator="one_pass", options={"bits8": False}))]


def third() -> list[Row]:
    """Towards a quarter of dense, scores counted: fewer dims in the pass, leaner budgets, fewer active queries."""
    both = (PPL, ITEMS)

    def lean(label: str, target: float = 0.9, lazy: float = 0.1, dims: int = 0, **changes: object) -> Rule:
        changes = {"estimator": "one_pass", "options": {"dims": dims}, "budget": "per_head"} | changes
        return token(f"one-pass fp8 {label}", target=target, lazy=lazy, **changes)

    rows = [Row(DENSE, both), Row(lean("dims32 per_head", 0.95, 0.05, 32), both)]
    rows += [Row(lean("dims32 per_head", dims=32), both)]
    rows += [Row(lean("dims32 per_head gqa-mean", dims=32, gqa="mean"), both)]
    rows += [Row(lean("gqa-mean", lazy=0.05, gqa="mean", budget="flattest_head"), both), Row(lean("per_head"), both)]
    rows += [Row(lean("dims16 per_head", dims=16), both)]
    rows += with_controls(lean("dims32 per_head", lazy=0.2, dims=32), both)
    rows += [Row(lean("dims32", 0.95, 0.05, 32, budget="flattest_head"), both)]
    long = ("items:8192",)
    return [*rows, Row(DENSE, long), Row(rows[2].rule, long)]


def blocks() -> list[Row]:
    """Blocks as the library has them, 128 and one choice per KV head: what each estimate of their mass is worth."""
    estimators: dict[str, tuple[str, dict[str, int]]] = {
        "exact": ("exact", {}),
        "meanpool": ("pooled", {"queries": 128, "keys": 128}),
        "pool16": ("pooled", {"queries": 16, "keys": 16}),
        "antidiag16": ("antidiagonal", {"stride": 16}),
        "pool32": ("pooled", {"queries": 32, "keys": 32}),
        "pool8": ("pooled", {"queries": 8, "keys": 8}),
        "antidiag8": ("antidiagonal", {"stride": 8}),
        "probe8": ("probe", {"every": 8}),
        "pool32x128": ("pooled", {"queries": 32, "keys": 128}),
        "probe32": ("probe", {"every": 32}),
    }
    shape = {"size": 128, "budget": "per_head", "gqa": "mean", "dense_layers": (0,)}

    def of(label: str, target: float, note: str = "", **changes: object) -> Row:
        estimator, options = estimators[label]
        changes = {"estimator": estimator, "options": options, "window": 128} | shape | changes
        return Row(block(f"{label} per_head gqa-mean{note}", target=target, **changes))  # type: ignore[arg-type]

    few = ("exact", "meanpool", "pool16")
    rows = [Row(DENSE), *(of(label, target) for target in (0.8, 0.9) for label in estimators)]
    rows += [of(label, target, " window1", window=1) for target in (0.85, 0.92) for label in few]
    rows += [of(label, 0.9, lazy=lazy) for lazy in (0.05, 0.1) for label in few]
    return [*rows, of("exact", 0.9, " share2", share=2)]


def fourth() -> list[Row]:
    """Towards a quarter of dense: layer 1 sparse too, normalisers guessed from coarser means."""

    def lean(target: float, lazy: float, pool: int, **changes: object) -> Rule:
        label = f"one-pass fp8 dims32 pool{pool} per_head" + "".join(f" {x}" for x in changes.values()) + " d0"
        fields = {"estimator": "one_pass", "options": {"dims": 32, "pool": pool}, "budget": "per_head"}
        return token(label, target, lazy, dense_layers=(0,), **fields, **changes)

    tasks = (PPL, "items:8192")
    rows = [Row(DENSE, tasks), Row(lean(0.95, 0.1, 32), tasks), Row(lean(0.96, 0.1, 32), tasks)]
    rows += with_controls(lean(0.96, 0.1, 32), tasks)[1:]
    rows += [Row(lean(0.95, 0.1, 16), tasks), Row(lean(0.95, 0.05, 32), tasks)]
    return [*rows, Row(lean(0.95, 0.1, 32, gqa="mean"), tasks), Row(lean(0.97, 0.2, 32), tasks)]


def fifth() -> list[Row]:
    """Lazy queries known before the pass: by keys that leaders look at, by means; and a pass of fewer coordinates."""
    both = (PPL, "items:8192")

    def lean(how: str, target: float = 0.96, lazy: float | None = 0.1, dims: int = 32, **options: object) -> Rule:
        options = {"dims": dims, "pool": 32, **options}
        fields = {"estimator": "one_pass", "options": options, "budget": "per_head", "dense_layers": (0,)}
        return token(f"one-pass fp8 dims{dims} {how} per_head d0", target, lazy, **fields)

    rows = [Row(DENSE, both), *with_controls(lean("leaders128", 0.95, leaders=128), both)]
    rows += [Row(lean("leaders128", t, x, leaders=128), both) for t, x in ((0.96, 0.1), (0.95, 0.05))]
    rows += [Row(lean("means", lazy=x, early=True)) for x in (0.05, 0.005)]
    for x in (0.05, 0.02):
        rows += [Row(lean("scatter", lazy=x, early=True, scatter=True))]
        rows += [Row(lean("scatter pool8", lazy=x, early=True, scatter=True, pool=8))]
        rows += [Row(lean("scatter level", lazy=x, early=True, scatter=True, level=True))]
        rows += [Row(lean("means level", lazy=x, early=True, level=True))]
    rows += [Row(lean("rest", dims=d, rest=True)) for d in (8, 16, 32)]
    return rows + [Row(lean("all", t, None)) for t in (0.9, 0.93)]


def budgets() -> list[Row]:
    """Budget rules beside one another: each estimator of blocks, and tokens as the library's kernels choose them."""
    rows = [Row(DENSE)]
    shape = {"size": 128, "gqa": "mean", "dense_layers": (0,), "window": 128}
    pools = {"meanpool": 128, "pool32": 32}
    for rule, targets in (("flattest_head", (0.7, 0.8)), (1024, (0.9,)), (1536, (0.9,)), ("per_head", (0.85,))):
        for label, size in pools.items():
            options = {"queries": size, "keys": size}
            changes = {"estimator": "pooled", "options": options, "budget": rule} | shape
            rows += [Row(block(f"{label} {rule} gqa-mean", target=t, **changes)) for t in targets]  # type: ignore[arg-type]
    for rule, targets in (("per_head", (0.95, 0.98)), ("flattest_head", (0.9,)), (512, (0.9,)), (1024, (0.9,))):
        changes = {"estimator": "one_pass", "budget": rule, "gqa": "mean"}
        rows += [Row(token(f"one-pass fp8 {rule} gqa-mean", t, **changes)) for t in targets]
    return rows


def lengths() -> list[Row]:
    """Density needed at 2K, 4K and 8K, true mass, three targets."""
    tasks = tuple(f"ppl:{tokens}" for tokens in (2048, 4096, 8192))
    return [Row(DENSE, tasks), *(Row(token("exact", target=t), tasks) for t in (0.95, 0.9, 0.98))]


def quick() -> list[Row]:
    """Recall against density in a few rows; look-up items last."""
    rows = [
        Row(DENSE),
        Row(token("exact")),
        Row(block("exact")),
        Row(block("exact per_head", budget="per_head")),
        Row(block("meanpool per_head", estimator="pooled", options={"queries": 64, "keys": 64}, budget="per_head")),
        Row(_token(*CHEAP[0])),
        *with_controls(token("exact"), (PPL,))[1:],
        *(Row(_token(*entry)) for entry in CHEAP[1:]),
    ]
    return [*rows, Row(DENSE, (ITEMS,)), *with_controls(token("exact"), (ITEMS,))]


PLANS = {
    "first": first(),
    "second": second(),
    "third": third(),
    "blocks": blocks(),
    "fourth": fourth(),
    "fifth": fifth(),
    "budgets": budgets(),
    "rules": rules(),
    "lengths": lengths(),
    "quick": quick(),
}
