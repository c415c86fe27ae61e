"""Random modules that compute attention, through the backend: mask and position spellings, forms, writes, lengths.

A case is the source of a module. The oracle is the module itself, eagerly in float64; the rewritten module must give
its numbers, and its gradients, at every length that it is called with.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re

import torch
from torch import Tensor

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend
from tests.fuzz.fuzz_spellings import FORMS, KEYS, MASKS, REPEATS, ROWS, SPELLINGS, WRITES

EVERYTHING = OmniSparseConfig(target_recall=0.9999999, lazy_threshold=None)
HEADS, DIM = 4, 8
#: Sites of all cases so far, after each call of theirs: how many were rewritten.
outcomes: collections.Counter[str] = collections.Counter()
_WORD = re.compile(r"\bx\b")


@dataclasses.dataclass(frozen=True)
class Case:
    """One module; ``lengths`` are (queries, keys) of the calls."""

    seed: int
    row: str
    key: str
    mask: str
    own: bool
    spelling: str
    repeat: tuple[str, str]
    groups: int
    form: str
    writes: tuple[tuple[str, str], ...]
    lengths: tuple[tuple[int, int], ...]
    dynamic: bool | None
    learns: bool
    granularity: str = "block"

    def script(self) -> str:
        """The module as Python."""
        logits = "logits" in {where for where, _ in self.writes}
        at = {
            place: [x for where, x in self.writes if where == place]
            for place in ("start", "mask", "repeat", "logits", "after")
        }
        form = self.form
        split = " @ v" if form.endswith(" @ v") else ".matmul(v)" if form.endswith(".matmul(v)") else None
        last = [f"out = {form}"]
        if logits and split is not None:
            last = [f"weights = {form[: -len(split)]}", *at["logits"], f"out = weights{split}"]
        names = "B, L, S = q.shape[0], q.shape[2], k.shape[2]"
        body = [
            names,
            *at["start"],
            "i, j, allowed = self.allowed(L, S, B, pos, at, pad, pre, doc, frame, level)",
            f"mask = {self.spelling}",
            *at["mask"],
            "k0, v0 = k, v",
            *[f"{x} = {_WORD.sub(x, rep)}" for x, rep in zip("kv", self.repeat, strict=True)],
            *at["repeat"],
            *last,
            *at["after"],
            "return out",
        ]
        inputs = "q, k, v, pos, at, pad, pre, doc, frame, level, slope, table, fpad"
        own = " | (j == i)" if self.own else ""
        return "\n".join(
            [
                "import math, torch",
                "import torch.nn.functional as F",
                "class Module(torch.nn.Module):",
                "    def allowed(self, L, S, B, pos, at, pad, pre, doc, frame, level):",
                f"        i, j = {self.row}, {self.key}",
                f"        return i, j, ({self.mask}){own}",
                f"    def forward(self, {inputs}):",
                *[f"        {line}" for line in body],
            ]
        )


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    low, finite = (
        r.choice(("-math.inf", "-1e9", "torch.finfo(torch.float32).min")),
        r.choice(("1e9", "torch.finfo(torch.float32).max")),
    )
    form = r.choice(FORMS).format(low=low)
    boolean = form.startswith("F.scaled") and r.random() < 0.5
    spelling = "allowed" if boolean else r.choice(SPELLINGS[1:]).format(low=low, finite=f"-{finite}")
    groups = r.choice((1, 1, 2, 4))
    repeats = [x.format(n=groups, d=DIM) for x in (REPEATS[1:] if groups > 1 else REPEATS)]
    repeat = r.choice(repeats)
    square = "is_causal=True" in form
    lengths = []
    for _ in range(r.choice((1, 2, 2, 3))):
        keys = r.choice((40, 127, 128, 150, 260))
        lengths.append((keys if square or r.random() < 0.5 else r.randint(2, keys), keys))
    return Case(
        seed,
        r.choice(ROWS),
        r.choice(KEYS),
        r.choice(MASKS),
        r.random() < 0.8,
        spelling,
        (repeat, repeat if r.random() < 0.9 else r.choice(repeats)),
        groups,
        form,
        tuple(r.choice(WRITES) for _ in range(r.choice((0, 0, 0, 1, 1, 2)))),
        tuple(lengths),
        r.choice((None, True, False)),
        r.random() < 0.3,
        r.choice(("block", "block", "block", "token")),
    )


def inputs_of(case: Case, q_len: int, kv_len: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh inputs of one call, the same for every dtype."""
    g = torch.Generator().manual_seed(case.seed)
    B, kv_heads = 2, HEADS // case.groups
    q = torch.randn(B, HEADS, q_len, DIM, generator=g)
    k, v = (torch.randn(B, kv_heads, kv_len, DIM, generator=g) for _ in range(2))
    level, slope, table = (
        torch.randn(B, kv_len, generator=g),
        torch.rand(HEADS, generator=g) / 9,
        torch.randn(HEADS, 19, generator=g),
    )
    pad = torch.arange(kv_len) >= torch.randint(0, kv_len // 2, (B, 1), generator=g)
    fpad = torch.where(pad, 0.0, random.Random(case.seed).choice((-math.inf, -1e9, torch.finfo(torch.float32).min)))
    floats = {"q": q, "k": k, "v": v, "level": level, "slope": slope, "table": table, "fpad": fpad}
    others = {
        "pos": torch.arange(kv_len - q_len, kv_len),
        "at": torch.tensor(kv_len - q_len),
        "pad": pad,
        "pre": torch.randint(0, kv_len, (B,), generator=g),
        "doc": torch.randint(0, 4, (B, kv_len), generator=g).sort(1).values,
        "frame": torch.rand(B, kv_len // 50 + 1, generator=g) < 0.6,
    }
    return {name: x.to(dtype) for name, x in floats.items()} | others


ORDER = ("q", "k", "v", "pos", "at", "pad", "pre", "doc", "frame", "level", "slope", "table", "fpad")
LEARNED = ("q", "k", "v", "slope", "table")


def problem_of(case: Case, inner: str | None = None) -> str | None:
    """What is wrong with the rewritten module, or None; also where the module itself does not run: ``invalid``."""
    try:
        names: dict[str, object] = {}
        exec(case.script(), names)
        module = names["Module"]()  # type: ignore[operator]
        for q_len, kv_len in case.lengths:
            module(*(inputs_of(case, q_len, kv_len, torch.float32)[x] for x in ORDER))
            break
    except Exception as error:
        return f"invalid: {error}"
    try:
        return _problem(case, module, inner)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch._dynamo.reset()


def _problem(case: Case, module: torch.nn.Module, inner: str | None) -> str | None:
    learns = case.learns and not any(where in ("repeat", "logits", "after") for where, _ in case.writes)
    inner = inner or ("aot_eager" if learns else "eager")
    config = dataclasses.replace(EVERYTHING, granularity=case.granularity)
    backend = Backend(config, inner=inner, min_seq_len=0)
    compiled = torch.compile(module, backend=backend, dynamic=case.dynamic)
    for q_len, kv_len in case.lengths:
        results = {}
        for name, call, dtype in (
            ("exact", module, torch.float64),
            ("near", module, torch.float32),
            ("ours", compiled, torch.float32),
        ):
            given = inputs_of(case, q_len, kv_len, dtype)
            if learns:
                given |= {x: given[x].requires_grad_() for x in LEARNED}
            results[name] = _run(call, given, learns)
        outcomes.update("rewritten" if not x.reason else "skipped" for x in backend.log.sites)
        rows = _live_rows(case, module, q_len, kv_len)
        wrong = _compare(results, rows, learns)
        if wrong:
            return f"{wrong} at {(q_len, kv_len)}; {[x.reason or 'rewritten' for x in backend.log.sites]}"
    return None


def _run(call: torch.nn.Module, given: dict[str, Tensor], learns: bool) -> list[Tensor]:
    out = call(*(given[x] for x in ORDER))
    after = [given[x].detach().double() for x in ("k", "v", "pos", "level")]
    if not learns:
        return [out.double(), *after]
    wanted = [given[x] for x in LEARNED]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad((out * weight).nan_to_num(0.0).sum(), wanted, allow_unused=True)
    return [out.detach().double(), *after, *(torch.zeros(()) if x is None else x.double() for x in grads)]


def _live_rows(case: Case, module: torch.nn.Module, q_len: int, kv_len: int) -> Tensor:
    """Rows with an allowed key, bool (B, H or 1, L); the float padding of a spelling counts."""
    given = inputs_of(case, q_len, kv_len, torch.float64)
    allowed = module.allowed(q_len, kv_len, 2, *(given[x] for x in ORDER[3:10]))[2]  # type: ignore[operator]
    allowed = torch.broadcast_to(allowed, (2, 1, q_len, kv_len))
    if "pad" in case.spelling:
        allowed = allowed & given["pad"][:, None, None]
    return allowed.any(-1)


def _compare(results: dict[str, list[Tensor]], rows: Tensor, learns: bool) -> str | None:
    whole = bool(rows.all())
    names = [
        "output",
        "k afterwards",
        "v afterwards",
        "pos afterwards",
        "level afterwards",
        *(f"gradient of {x}" for x in LEARNED),
    ]
    eps = torch.finfo(torch.float32).eps
    largest = max((float(x.nan_to_num(0.0).abs().max()) for x in results["exact"][5:]), default=0.0)
    for name, want, near, got in zip(names, results["exact"], results["near"], results["ours"], strict=False):
        if want.shape != got.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
        if name == "output":
            want, near, got = (torch.where(rows[..., None], x, 0.0) for x in (want, near, got))
            if not (want.isfinite().all() and near.isfinite().all()):
                return None  # a module that makes NaN of its own has no right answer
        elif name.startswith("gradient") and not whole:
            continue  # what a row without keys passes on is nobody's
        size = largest if name.startswith("gradient") else float(want.abs().max())
        bound = 8 * (float((near - want).abs().max()) + 16 * eps * size)
        worst = float((got - want).abs().nan_to_num(math.inf).max())
        if not worst <= bound:
            return f"{name} is off by {worst:.3g}, allowed {bound:.3g}"
    return None


def smaller(case: Case) -> list[Case]:
    """Simpler neighbours of a failing case, the simplest first."""
    plain = {
        "row": ROWS[0],
        "key": KEYS[0],
        "mask": "j <= i",
        "learns": False,
        "repeat": ("x", "x"),
        "dynamic": None,
        "granularity": "block",
    }
    tries: list[dict[str, object]] = [{name: value} for name, value in plain.items()]
    tries += [{"writes": case.writes[:i] + case.writes[i + 1 :]} for i in range(len(case.writes))]
    tries += [{"lengths": (x,)} for x in case.lengths] + [{"lengths": ((9, 9),)}, {"groups": 1, "repeat": ("x", "x")}]
    tries += [{"form": FORMS[0]}, {"spelling": "torch.where(allowed, 0.0, -math.inf)"}, {"spelling": "allowed"}]
    made = [dataclasses.replace(case, **change) for change in tries]  # type: ignore[arg-type]
    return [x for x in made if x != case]
