"""Random calls of ``sparse_attention``: each is a few lines of Python, which say what the right numbers are as well.

The oracle shares nothing with the library: the mask is the case's own expression on the grid of all pairs, attention
is its definition in float64. What a lossy rule keeps is read off the output for one-hot values: which keys a row
weighs at all. The numbers must be the softmax over those keys, no live row may lose all of them, and the sinks and the
window must be among them.
"""

from __future__ import annotations

import dataclasses
import math
import random

import torch
from torch import Tensor

from omnisparse_flex import sparse_attention

#: Terms of masks: (what it captures, the condition). Braces are filled at random, see ``_filled``.
MASKS = (
    ("", "kv <= q + {offset}"),
    ("", "kv >= q - {small}"),
    ("", "(q - kv).abs() < {small} + 1"),
    ("", "kv < {key}"),
    ("", "kv >= {key}"),
    ("", "kv % {few} != 0"),
    ("", "(q + kv) % 2 == 0"),
    ("", "(kv // {few}) % 2 == (q // {few}) % 2"),
    ("", "(kv & 1) == (q & 1)"),
    ("", "(kv >> 4) % 2 == 0"),
    ("", "torch.where(kv < {key}, kv % 2 == 0, kv <= q)"),
    ("", "torch.div(kv, {few}, rounding_mode='trunc') % 3 > 0"),
    ("", "torch.minimum(q, kv) >= {small}"),
    ("", "(kv <= q) ^ (kv < {small})"),
    ("", "h % 2 == kv % 2"),
    ("pad = torch.arange(S) >= torch.randint(0, S, (B, 1), generator=g)", "pad[b, kv]"),
    ("pad = torch.arange(S) < torch.randint(1, S + 1, (B, 1), generator=g)", "pad[b, kv]"),
    ("pad = torch.rand(B, S, generator=g) < {share}", "pad[b, kv]"),
    ("pad = (torch.rand(B, S, generator=g) < {share}).long()", "pad[b, kv] != 0"),
    ("start = torch.randint(0, S, (B,), generator=g)", "kv >= start[b]"),
    ("start = torch.randint(0, S, (B,), generator=g)", "(kv <= q) | (kv < start[b])"),
    ("at = torch.randint(0, max(1, S - L), (), generator=g)", "kv <= q + at"),
    ("at = torch.randint(0, max(1, S - L), (3,), generator=g)", "kv <= q + at[1]"),
    ("doc = torch.randint(0, 5, (B, max(L, S)), generator=g).sort(1).values", "doc[b, q] == doc[b, kv]"),
    ("doc = torch.randint(0, 5, (max(L, S),), generator=g)", "(doc[q] == doc[kv]) | (kv == q)"),
    ("frames = torch.rand(B, S // {step} + 1, generator=g) < {share}", "frames[b, kv // {step}]"),
    ("frames = torch.rand(S // {step} + 1, generator=g) < {share}", "frames[kv // {step}] & (kv <= q + {offset})"),
    ("pairs = torch.rand(L // {step} + 1, S // {step} + 1, generator=g) < {share}", "pairs[q // {step}, kv // {step}]"),
    ("heads = torch.rand(H, S, generator=g) < {share}", "heads[h, kv]"),
    ("heads = torch.rand(H // 2 + 1, S, generator=g) < {share}", "heads[(h / 2).long(), kv]"),
    ("heads = torch.rand(H, S, generator=g) < {share}", "heads[h - 1, kv]"),
    ("rows = torch.rand(B, L, generator=g) < {share}", "rows[b, q]"),
    ("level = torch.randn(B, S, generator=g)", "level[b, kv] > 0.3"),
    (
        "level = torch.randn(B, S, generator=g).masked_fill(torch.rand(B, S, generator=g) < 0.1, math.nan)",
        "level[b, kv] > 0",
    ),
)
#: Changes of logits, of ``s``.
SCORES = (
    ("", "s * 1.5"),
    ("", "8 * torch.tanh(s / 8)"),
    ("", "s - 0.02 * (q - kv).abs()"),
    ("", "torch.where(kv <= q + {offset}, s, -math.inf)"),
    ("", "torch.where((q - kv).abs() < {small} + 1, s, s - 1e9)"),
    ("slope = torch.rand(H, generator=g)", "s - slope[h] * (q - kv).abs()"),
    ("bias = torch.randn(B, S, generator=g)", "s + bias[b, kv]"),
    ("bias = torch.where(torch.rand(B, S, generator=g) < {share}, 0.0, {low})", "s + bias[b, kv]"),
    ("bias = torch.where(torch.arange(S) >= torch.randint(0, S, (B, 1), generator=g), 0.0, {low})", "s + bias[b, kv]"),
    ("table = torch.randn(H, 41, generator=g)", "s + table[h, (q - kv).clamp(-20, 20) + 20]"),
    ("seen = torch.rand(B, S, generator=g) < {share}", "torch.where(seen[b, kv], s, {low})"),
    ("gain = torch.rand(S, generator=g)", "s * gain[kv]"),
)
EVERYTHING = {"target_recall": 0.9999999, "lazy_threshold": None}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. ``terms`` are (captured tensors, condition), ``joins`` the operators between them."""

    seed: int
    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    dim: int
    value_dim: int
    dtype: str
    terms: tuple[tuple[str, str], ...]
    joins: tuple[str, ...]
    score: tuple[str, str] | None
    causal: bool
    sinks: bool
    loud: float
    rules: tuple[tuple[str, object], ...]
    learns: bool

    def script(self) -> str:
        """The case as Python: inputs, ``mask_mod``, ``score_mod``, the call's arguments."""
        captures = [capture for capture, _ in (*self.terms, *([self.score] if self.score else []))]
        names = [f"c{i}_" for i in range(len(captures))]
        lines = [_renamed(capture, name) for capture, name in zip(captures, names, strict=True) if capture]
        conditions = [_renamed(x, name, y) for (y, x), name in zip(self.terms, names, strict=False)]
        joined = "".join(f"({x}) {j} " for x, j in zip(conditions, (*self.joins, ""), strict=False))
        mask = f"lambda b, h, q, kv: {joined.strip()}" if self.terms else "None"
        score = "None" if self.score is None else _renamed(self.score[1], names[-1], self.score[0])
        score = score if self.score is None else f"lambda s, b, h, q, kv: {score}"
        return "\n".join(
            [
                "import math, torch",
                "from omnisparse_flex import OmniSparseConfig, sparse_attention",
                f"B, Hkv, H = {self.batch}, {self.kv_heads}, {self.kv_heads * self.group}",
                f"L, S = {self.q_len}, {self.kv_len}",
                f"g = torch.Generator().manual_seed({self.seed})",
                f"query = {self.loud} * torch.randn(B, H, L, {self.dim}, generator=g)",
                f"key = torch.randn(B, Hkv, S, {self.dim}, generator=g)",
                f"value = torch.randn(B, Hkv, S, {self.value_dim}, generator=g)",
                f"query, key, value = (x.to(torch.{self.dtype}) for x in (query, key, value))",
                *lines,
                f"mask_mod = {mask}",
                f"score_mod = {score}",
                f"sinks = {'torch.randn(H, generator=g)' if self.sinks else 'None'}",
                f"config = OmniSparseConfig(**{dict(self.rules)})",
                "options = dict(config=config, mask_mod=mask_mod, score_mod=score_mod, sinks=sinks, enable_gqa=True, "
                f"is_causal={self.causal})",
            ]
        )


def _renamed(text: str, prefix: str, capture: str | None = None) -> str:
    """``text`` with the captured tensor's name made this term's own."""
    name = (text if capture is None else capture).split(" = ")[0]
    if not name:
        return text
    parts = text.split(name)
    return parts[0] + "".join(
        f"{prefix}{name}{x}" if x[:1] in (" ", "[", "") or x[:1] == ")" else name + x for x in parts[1:]
    )


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    q_len = r.choice((1, 7, 64, 127, 128, 129, 200, 257, 300, r.randint(1, 330)))
    kv_len = q_len if r.random() < 0.6 else r.choice((1, 100, 128, 255, 300, q_len + 77, r.randint(1, 330)))
    terms = tuple(_filled(r, r.choice(MASKS), q_len, kv_len) for _ in range(r.choice((0, 1, 1, 2, 2, 3))))
    score = _filled(r, r.choice(SCORES), q_len, kv_len) if r.random() < 0.4 else None
    dtype = r.choice(("float32", "float32", "float32", "float16", "bfloat16"))
    return Case(
        seed=seed,
        batch=r.choice((1, 2)),
        kv_heads=r.choice((1, 2)),
        group=r.choice((1, 2, 3)),
        q_len=q_len,
        kv_len=kv_len,
        dim=r.choice((8, 16, 32)),
        value_dim=r.choice((8, 16)),
        dtype=dtype,
        terms=terms,
        joins=tuple(r.choice("&&&|") for _ in terms[1:]),
        score=score,
        causal=r.random() < 0.5,
        sinks=r.random() < 0.15,
        loud=r.choice((1.0, 1.0, 1.0, 20.0, 3000.0)),
        rules=tuple(_rules(r).items()),
        learns=dtype == "float32" and r.random() < 0.4,
    )


def _filled(r: random.Random, term: tuple[str, str], q_len: int, kv_len: int) -> tuple[str, str]:
    values = {
        "offset": r.choice((0, kv_len - q_len, r.randint(-3, kv_len))),
        "small": r.choice((0, 1, 5, 40, 130)),
        "key": r.randint(0, kv_len),
        "few": r.choice((2, 3, 7, 33)),
        "step": r.choice((3, 16, 50, 64, 128, 200)),
        "share": r.choice((0.05, 0.5, 0.9)),
        "low": r.choice(("-math.inf", "-1e9", "torch.finfo(torch.float32).min", "-1e4", "-1e7")),
    }
    capture, text = (x.format(**values) for x in term)
    return capture, text


def _rules(r: random.Random) -> dict[str, object]:
    """Rules: half of the time all is kept."""
    rules: dict[str, object] = {"granularity": r.choice(("block", "block", "token"))}
    if r.random() < 0.5:
        return rules | EVERYTHING
    rules |= {
        "target_recall": r.choice((0.3, 0.9, 0.98)),
        "sink_size": r.choice((0, 1, 64)),
        "window_size": r.choice((1, 64, 256)),
    }
    rules["lazy_threshold"] = r.choice((None, 0.05, 0.5))
    kind = r.random()
    if kind < 0.2:
        rules["budget"] = r.choice((0, 128, 256))
    elif kind < 0.4:
        rules["max_kv_budget"] = r.choice((0, 128))
    return rules


def smaller(case: Case) -> list[Case]:
    """Simpler neighbours of a failing case, the simplest first."""
    tries = [
        {"learns": False},
        {"sinks": False},
        {"score": None},
        {"causal": False},
        {"loud": 1.0},
        {"dtype": "float32"},
    ]
    for i in range(len(case.terms)):
        rest = case.terms[:i] + case.terms[i + 1 :]
        tries.append({"terms": rest, "joins": (case.joins[:i] + case.joins[i + 1 :])[: max(0, len(rest) - 1)]})
    tries += [{"batch": 1}, {"group": 1}, {"kv_heads": 1}, {"dim": 8}, {"value_dim": 8}]
    tries += [{"rules": tuple(EVERYTHING.items())}]
    for name in ("q_len", "kv_len"):
        length = getattr(case, name)
        tries += [{name: n} for n in (length // 2, length - 1) if n >= 1]
    made = [dataclasses.replace(case, **change) for change in tries]
    return [x for x in made if x != case]


# --- the oracle ---------------------------------------------------------------


def problem_of(case: Case) -> str | None:
    """What is wrong with the library's answer, or None."""
    try:
        return _problem(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _problem(case: Case) -> str | None:
    names: dict[str, object] = {}
    exec(case.script(), names)
    query, key, options = (names[x] for x in ("query", "key", "options"))
    logits, allowed = expected_logits(names, case)
    weights = read_weights(query, key, options)
    if not weights.isfinite().all():
        return "a weight is not finite"
    support = weights > 0
    if (support & ~allowed).any():
        return f"{int((support & ~allowed).sum())} forbidden pairs have a weight"
    live = allowed & (logits > -1e6)
    lost = live.any(-1) & ~support.any(-1)
    if not case.sinks and lost.any():
        return f"{int(lost.sum())} live rows lost every key"
    everything = case.rules[-1][0] == "lazy_threshold" and dict(case.rules)["target_recall"] == 0.9999999
    kept = live if everything else support & live
    if not everything and (missing := _missing(case, names, live, kept, logits)) is not None:
        return missing
    # Rows that an additive mask forbids altogether have no right answer.
    rows = live.any(-1) | ~allowed.any(-1)
    return compare(names, kept, rows, case)


def expected_logits(names: dict[str, object], case: Case) -> tuple[Tensor, Tensor]:
    """float64 logits (B, H, L, S), after every change, and which pairs the mask allows."""
    query, key = (x.detach().double() for x in (names["query"], names["key"]))  # type: ignore[attr-defined]
    B, H, L, _ = query.shape
    S = key.shape[2]
    at = (
        torch.arange(B)[:, None, None, None],
        torch.arange(H)[:, None, None],
        torch.arange(L)[:, None],
        torch.arange(S),
    )
    logits = query @ key.repeat_interleave(case.group, 1).mT * case.dim**-0.5
    if names["score_mod"] is not None:
        logits = names["score_mod"](logits, *at)  # type: ignore[operator]
    allowed = torch.ones(B, H, L, S, dtype=torch.bool)
    if names["mask_mod"] is not None:
        allowed = allowed & names["mask_mod"](*at)  # type: ignore[operator]
    if case.causal:
        allowed = allowed & (at[3] <= at[2] + S - L)
    return logits, allowed & (logits > -math.inf)


def read_weights(query: Tensor, key: Tensor, options: dict[str, object], width: int = 128) -> Tensor:
    """The weight of every pair (B, H, L, S), from outputs for one-hot values."""
    B, heads, S, _ = key.shape
    found = []
    with torch.no_grad():
        for start in range(0, S, width):
            hot = torch.zeros(S, width, dtype=key.dtype)
            hot[range(start, min(S, start + width)), range(min(width, S - start))] = 1.0
            found.append(sparse_attention(query, key, hot.expand(B, heads, S, width).contiguous(), **options))  # type: ignore[arg-type]
    return torch.cat(found, -1)[..., :S].double()


def _missing(case: Case, names: dict[str, object], live: Tensor, kept: Tensor, logits: Tensor) -> str | None:
    """First keys that a rule dropped, though their weight is not too small to be seen.

    First among those that any query of the same 128, in any head of the group, may see: the unit that keeps.
    """
    S, rules = live.shape[-1], dict(case.rules)
    any_head = live.unflatten(1, (case.kv_heads, -1)).any(2).repeat_interleave(case.group, 1)
    units = torch.nn.functional.pad(any_head, (0, 0, 0, -case.q_len % 128)).unflatten(2, (-1, 128)).any(3)
    start = units.to(torch.uint8).argmax(-1, keepdim=True).repeat_interleave(128, 2)[:, :, : case.q_len]
    keys = torch.arange(S)
    first = live & (keys < start + rules["sink_size"]) & (keys // 128 == start // 128)  # type: ignore[operator]
    total = logits.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
    if names["sinks"] is not None:
        total = torch.logaddexp(total, names["sinks"].double()[:, None, None])  # type: ignore[attr-defined]
    lost = first & ~kept & (logits - total > -10)
    return f"{int(lost.sum())} of the first keys are not kept" if lost.any() else None


def compare(names: dict[str, object], kept: Tensor, rows: Tensor, case: Case) -> str | None:
    """Output and gradients against the definition over the pairs that are kept."""
    inputs = [x.clone().requires_grad_(case.learns) for x in (names["query"], names["key"], names["value"])]  # type: ignore[attr-defined]
    exact = [x.detach().double().requires_grad_(case.learns) for x in inputs]
    rival = [x.detach().float().requires_grad_(case.learns) for x in inputs]
    out = sparse_attention(*inputs, **names["options"])  # type: ignore[arg-type]
    wanted, close = define(*exact, kept, names, case), define(*rival, kept, names, case)
    pairs = [("output", out.detach(), wanted.detach(), close.detach())]
    if case.learns:
        weight = (
            torch.randn(wanted.shape, generator=torch.Generator().manual_seed(case.seed)).double() * rows[..., None]
        )
        grads = [
            torch.autograd.grad((x * weight.to(x.dtype)).sum(), given)
            for x, given in ((out, inputs), (wanted, exact), (close, rival))
        ]
        pairs += [
            (f"gradient of {n}", *found)
            for n, found in zip(("query", "key", "value"), zip(*grads, strict=True), strict=True)
        ]
    eps, single = torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps
    loudest = float(expected_logits(names, case)[0].masked_fill(~kept, 0.0).abs().max())
    largest = max(float(x.abs().max()) for _, _, x, _ in pairs[1:]) if case.learns else 0.0
    for name, got, want, near in pairs:
        if name == "output":
            got, want, near = (torch.where(rows[..., None], x.double(), 0.0) for x in (got, want, near))
        # The rival's own error, and roundings: of the result, and of logits, which kernels keep in float32. Terms of
        # a gradient cancel: what is rounded is as large as the largest gradient.
        size = float(want.abs().max()) if name == "output" else largest
        bound = 8 * (float((near.double() - want).abs().max()) + size * (eps + loudest * single))
        worst = float((got.double() - want).abs().nan_to_num(math.inf).max())
        if worst > bound:
            return f"{name} is off by {worst:.3g}, allowed {bound:.3g}"
    return None


def define(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, names: dict[str, object], case: Case) -> Tensor:
    """Attention over the kept pairs by definition, in the inputs' own type."""
    B, H, L, S = kept.shape
    at = (
        torch.arange(B)[:, None, None, None],
        torch.arange(H)[:, None, None],
        torch.arange(L)[:, None],
        torch.arange(S),
    )
    logits = query @ key.repeat_interleave(case.group, 1).mT * case.dim**-0.5
    if names["score_mod"] is not None:
        logits = names["score_mod"](logits, *at)  # type: ignore[operator]
    logits = torch.where(kept, logits, -torch.inf)
    columns = [logits]
    if names["sinks"] is not None:
        columns.append(names["sinks"].to(logits.dtype)[:, None, None].expand(B, H, L, 1))  # type: ignore[attr-defined]
    weights = torch.softmax(torch.cat(columns, -1), -1).nan_to_num(0.0)[..., :S]
    return torch.where(kept.any(-1, keepdim=True), weights @ value.repeat_interleave(case.group, 1), 0.0)
