"""The quality lab: its estimates, its rules and its books against definitions."""

from __future__ import annotations

import dataclasses
import struct
import zipfile

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality.choose import choose, local_pairs
from benchmarks.quality.controls import matched_window, random_keys, window_share
from benchmarks.quality.costs import selection_cost
from benchmarks.quality.estimators import ESTIMATORS, exact
from benchmarks.quality.evaluate import summary
from benchmarks.quality.lab import Lab, install
from benchmarks.quality.retrieval import FORMATS, QUESTIONS, generate
from benchmarks.quality.rules import Rule
from benchmarks.quality.texts import docstrings
from benchmarks.quality.weights import unpack

TOKENS, HEADS, KV_HEADS, DIM = 128, 9, 3, 16
SMALL = {"sinks": 4, "window": 16, "segment": 32, "dense_layers": (0,)}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, HEADS, TOKENS, DIM, generator=generator) * 2
    return query, torch.randn(1, KV_HEADS, TOKENS, DIM, generator=generator)


@pytest.fixture
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * 4, intermediate_size=32, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# --- weights -----------------------------------------------------------------


def test_q4_1_is_scale_times_code_plus_minimum():
    codes = list(range(16)) * 2
    block = struct.pack("<ee", 0.5, -3.0) + bytes(codes[i] | codes[16 + i] << 4 for i in range(16))
    data = torch.frombuffer(bytearray(block * 2), dtype=torch.uint8).view(1, -1)
    assert unpack(data, "Q4_1").tolist() == [[0.5 * c - 3.0 for c in codes] * 2]


def test_q8_0_is_scale_times_code():
    codes = list(range(-16, 16))
    data = torch.frombuffer(bytearray(struct.pack("<e32b", 0.25, *codes)), dtype=torch.uint8).view(1, -1)
    assert unpack(data, "Q8_0").tolist() == [[0.25 * c for c in codes]]


# --- estimators --------------------------------------------------------------

OPTIONS = {
    "exact": {},
    "fp8": {},
    "int4": {},
    "pca": {"dims": 8},
    "pooled": {"queries": 4, "keys": 8},
    "antidiagonal": {"stride": 8},
    "probe": {"every": 8},
    "clustered": {"size": 8, "spread": True},
    "one_pass": {"sinks": 4, "window": 8, "pool": 4},
}
#: Where an estimator becomes the truth.
LIMITS = {
    "pca": {"dims": DIM},
    "pooled": {},
    "antidiagonal": {"stride": 1},
    "probe": {"every": 1},
    "clustered": {"size": 1, "rounds": 1},
    "one_pass": {"sinks": 4, "window": 8, "pool": 1, "bits8": False},
}


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"one_pass"}))
def test_rows_are_causal_distributions(name):
    rows = ESTIMATORS[name](*inputs(), DIM**-0.5, **OPTIONS[name])(32, 96)
    assert rows.shape == (1, HEADS, 64, 96)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, HEADS, 64))
    assert (rows.triu(33) == 0).all()


@pytest.mark.parametrize("name", LIMITS)
def test_an_estimator_at_full_resolution_is_exact(name):
    query, key = inputs()
    rows = ESTIMATORS[name](query, key, DIM**-0.5, **LIMITS[name])(64, TOKENS)
    torch.testing.assert_close(rows, exact(query, key, DIM**-0.5)(64, TOKENS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"exact"}))
def test_a_coarse_estimate_is_not_the_truth(name):
    query, key = inputs()
    rows = ESTIMATORS[name](query, key, DIM**-0.5, **OPTIONS[name])(64, TOKENS)
    assert (rows - exact(query, key, DIM**-0.5)(64, TOKENS)).abs().max() > 1e-3


# --- choice ------------------------------------------------------------------


def chosen(rule: Rule):
    query, key = inputs()
    mass = exact(query, key, DIM**-0.5)(0, TOKENS)
    local = local_pairs(rule, 0, TOKENS, mass.device)
    return mass, local, choose(mass, local, rule, 0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("unit", [1, 8, 32])
@pytest.mark.parametrize("budget", ["flattest_head", "per_head"])
def test_kept_mass_reaches_the_target_of_each_segment(unit, budget):
    rule = Rule("r", target=0.8, unit=unit, budget=budget, **SMALL)
    mass, local, found = chosen(rule)
    kept = (mass * found.keep).unflatten(2, (-1, 32)).sum((-1, -2)) / 32
    assert (kept >= 0.8 - 1e-5).all()
    assert (local <= found.keep).all() and not found.keep.triu(1).any()
    if budget == "flattest_head":
        assert (found.budget == found.budget.amax(1, keepdim=True)).all()


def test_a_token_choice_is_the_heaviest_columns():
    rule = Rule("r", budget=5, **SMALL)
    mass, local, found = chosen(rule)
    column = (mass * ~local)[:, :, 96:].sum(2)
    for head in range(HEADS):
        best = set(column[0, head].topk(5).indices.tolist())
        far = found.keep[0, head, TOKENS - 1] & ~local[TOKENS - 1]
        assert set(far.nonzero().flatten().tolist()) <= best and far.any()


def test_blocks_keep_whole_blocks():
    sizes = {**SMALL, "segment": 8, "unit": 8}
    _, _, found = chosen(Rule("r", target=0.6, budget="per_head", **sizes))
    tiles = found.keep.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).float().mean((3, 5))
    below = tiles[..., 15, :15]
    assert set(below.flatten().tolist()) == {0.0, 1.0}


def test_lazy_queries_keep_the_local_part_alone():
    rule = Rule("r", lazy=0.5, lazy_stride=16, target=0.9, **SMALL)
    mass, local, found = chosen(rule)
    breadth = (mass * ~local).sum(-1)
    assert torch.equal(found.lazy, breadth < 0.5)
    off = ~found.active
    assert off.any() and found.active.any()
    assert torch.equal(found.keep[off], local.expand_as(found.keep)[off])
    assert found.active[:, :, ::16].all()
    assert not chosen(dataclasses.replace(rule, lazy_mode="skip"))[2].keep[off].any()


def test_heads_of_a_group_share_a_choice():
    for gqa in ("mean", "max"):
        _, _, found = chosen(Rule("r", target=0.7, gqa=gqa, **SMALL))
        groups = found.keep.unflatten(1, (KV_HEADS, -1))
        assert (groups == groups[:, :, :1]).all() and (groups[:, 0] != groups[:, 1]).any()


def test_the_random_control_keeps_as_many_keys():
    rule = Rule("r", target=0.7, **SMALL)
    top, other = chosen(rule)[2], chosen(random_keys(rule))[2]
    assert torch.equal(top.budget, other.budget) and (top.keep != other.keep).any()


def test_window_share_counts_pairs():
    for sinks, window in ((0, 1), (4, 16), (64, 100), (8, 200)):
        local = local_pairs(Rule("r", sinks=sinks, window=window), 0, TOKENS, torch.device("cpu"))
        assert window_share(sinks, window, TOKENS) == pytest.approx(local.sum().item() / (TOKENS * (TOKENS + 1) / 2))


def test_a_matched_window_reaches_the_density():
    rule = matched_window(Rule("w", sinks=4, dense_layers=(0, 1, 2)), 0.4, TOKENS)
    density = 0.1 + 0.9 * window_share(4, rule.window, TOKENS)
    assert 0.4 <= density < 0.4 + 0.9 * 2 / TOKENS and rule.budget == 0


# --- model -------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 32])
def test_a_target_of_one_is_dense(model, unit):
    ids = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits
        lab = install(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        with lab.using(Rule("r", target=1.0, unit=unit, **SMALL)) as books:
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert summary(books.items())["attention"] == 1.0


def test_books_count_the_window_and_the_selection(model):
    lab: Lab = install(model)
    with torch.inference_mode(), lab.using(Rule("r", budget=0, **SMALL)) as books:
        model(torch.zeros(1, TOKENS, dtype=torch.int64))
    found, share = summary(books.items()), window_share(4, 16, TOKENS)
    assert found["attention"] == found["rectangle"] == pytest.approx((1 + 2 * share) / 3)
    assert found["selection"] == 0.0 and 0 < found["recall_min"] <= found["recall_mean"] < 1


def test_costs():
    assert selection_cost(Rule("r"), 8192, 64, 3, 1.0) == 1.0
    assert selection_cost(Rule("r", "pca", {"dims": 16}), 8192, 64, 3, 1.0) == 0.25
    cluster = Rule("r", "clustered", {"size": 16, "rounds": 3})
    assert selection_cost(cluster, 8192, 64, 3, 1.0) == pytest.approx(1 / 16 + 1 / 16)
    refined = dataclasses.replace(cluster, refine=0.2)
    assert selection_cost(refined, 8192, 64, 3, 0.5) == pytest.approx(0.125 + 0.1)


def test_docstrings_of_a_wheel_come_in_order_and_only_the_long_ones(tmp_path):
    long, short = "Says " * 50, "Says little."
    files = {"b.py": f'"""{long}b."""', "a.py": f'def f():\n    """{long}a."""\n\ndef g():\n    """{short}"""'}
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name, source in {**files, "broken.py": "def", "notes.txt": long}.items():
            archive.writestr(name, source)
    assert docstrings(tmp_path / "x.whl") == f"{long}a.\n\n{long}b."


# --- look-up items -----------------------------------------------------------


class Letters:
    """A tokenizer that knows each word or mark as a whole."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True):
        pieces = text.replace("\n", " \n ").replace(".", " .").replace("  ", " ").strip(" ").split(" ")
        ids = [self.known.setdefault(piece, len(self.known)) for piece in pieces]
        return type("Encoding", (), {"input_ids": ids})()


@pytest.mark.parametrize("kind", FORMATS)
def test_answers_stand_behind_their_questions_and_in_the_text(kind):
    tokenizer = Letters()
    items = generate(tokenizer, torch.full((2000,), 5000), kind, 512, contexts=3)
    assert items.ids.shape == (3, 512) and items.positions.shape == items.answers.shape == (3, QUESTIONS)
    for c in range(3):
        ids = items.ids[c].long()
        assert torch.equal(ids[items.positions[c] + 1], items.answers[c])
        for q in range(QUESTIONS):
            name, answer = ids[items.positions[c, q]].item(), items.answers[c, q].item()
            start = round(items.depths[c, q].item() * 512)
            near = ids[start : start + 5].tolist()
            assert near[near.index(name) + 1] == answer
            assert answer in items.candidates[c]
    assert not torch.equal(items.answers[0], items.answers[1])


def test_figures_of_a_sweep_compare_a_row_with_its_controls():
    from benchmarks.quality.figures import ROW, figures

    def row(nll, rank, density):
        ppl = {"nll": {"text": nll}, "density": density, "attention": density / 2, "discarded_of_lazy": 0.9}
        return {"ppl:8192": ppl, "items:8192": {"list": {"rank": rank, "items": 10}}}

    names = (ROW, "dense", f"{ROW} ~ window", f"{ROW} ~ random")
    rows = dict(
        zip(names, (row(2.01, 0.8, 0.4), row(2.0, 0.9, 1.0), row(2.5, 0.1, 0.4), row(2.6, 0.2, 0.4)), strict=True)
    )
    found = {name: value for name, (value, *_) in figures(rows).items()}
    assert found["smollm2.ppl_delta_pct.8k"] == pytest.approx(1.005, abs=1e-3)
    assert found["smollm2.retrieval_loss_points.8k"] == pytest.approx(10)
    assert found["smollm2.retrieval_gain_over_window.8k"] == pytest.approx(70)
    assert found["smollm2.retrieval_gain_over_random.8k"] == pytest.approx(60)
    assert (found["smollm2.density.8k"], found["smollm2.attention_density.8k"]) == (0.4, 0.2)


def test_every_plan_is_priced_and_names_each_row_once():
    from benchmarks.quality.plans import PLANS

    for name, rows in PLANS.items():
        pairs = [(row.rule.name, task) for row in rows for task in row.tasks]
        assert len(set(pairs)) == len(pairs), name
        assert all(row.rule.estimator in {"dense", *ESTIMATORS} for row in rows), name
        assert all(0 <= selection_cost(row.rule, 8192, 64, 3, 0.5) <= 1 for row in rows), name
