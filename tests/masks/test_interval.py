"""Block bounds of index expressions: the truth is always inside, and exact for the masks that matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisparse_flex.attention.scalar_graph import UntraceableError
from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.masks import causal, document, document_ids, intersect, padding, sliding_window
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import KV, TRUE, Apply, B, Const, H, Index, Load, Q
from omnisparse_flex.masks.expr.expr import causal as causal_expr
from omnisparse_flex.masks.expr.index_mask import NO_MASK, IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.testing import assert_mask_mod_equals, mask_mods
from omnisparse_flex.testing.oracle import materialize_mask

CPU = torch.device("cpu")


def true_bounds(dense, grid):
    """``(full, some)`` by looking at every pair; keys past the end keep their block from being full."""
    tall, wide = grid.q_blocks * grid.block, grid.kv_blocks * grid.kv_block

    def blocks(fill_rows, fill_keys):
        padded = torch.full((*dense.shape[:2], tall, wide), fill_keys, dtype=torch.bool)
        padded[:, :, grid.q_len :, : grid.kv_len] = fill_rows
        padded[:, :, : grid.q_len, : grid.kv_len] = dense
        return padded.unflatten(3, (-1, grid.kv_block)).unflatten(2, (-1, grid.block))

    return blocks(True, False).all(-1).all(3), blocks(False, False).any(-1).any(3)


def assert_contains_truth(program, grid):
    sizes = (grid.batch, grid.heads, grid.q_len, grid.kv_len)
    dense = materialize_mask(lambda *at: program.pairs(*at).to(torch.bool), *sizes)
    true_full, true_some = true_bounds(dense, grid)
    full, some = program.bounds(grid)
    assert full.dtype == some.dtype == torch.bool
    assert not (full & ~true_full).any(), "a block is called full that is not"
    assert not (true_some & ~some).any(), "a block is called empty that is not"


def assert_exact(program, grid):
    dense = materialize_mask(program, grid.batch, grid.heads, grid.q_len, grid.kv_len)
    for actual, expected in zip(program.bounds(grid), true_bounds(dense, grid), strict=True):
        assert torch.equal(actual.expand_as(expected), expected)


# --- random expressions ------------------------------------------------------


@st.composite
def grids(draw, batch=2, heads=3):
    q_len = draw(st.integers(1, 70))
    kv_len = draw(st.just(q_len) | st.integers(1, 70))
    block, split = draw(st.sampled_from((4, 8, 16, 32))), draw(st.sampled_from((1, 1, 2)))
    return Grid(batch, heads, q_len, kv_len, block, CPU, split)


TABLE = 9


def buffers_of(grid, seed):
    """One buffer for each slot that ``expressions`` loads from."""
    generator = torch.Generator().manual_seed(seed)

    def ints(*shape):
        return torch.randint(-4, 20, shape, generator=generator)

    longest = max(grid.q_len, grid.kv_len)
    return (
        ints(longest),
        ints(grid.batch, longest).sort(-1).values,
        ints(grid.batch, grid.heads),
        ints(),
        ints(grid.heads, TABLE),
        torch.rand(grid.batch, longest, generator=generator) < 0.8,
    )


def apply(op, *args):
    return st.tuples(*args).map(lambda given: Apply(op, given))


def table_load(index):
    clamped = Apply("maximum", (Apply("minimum", (index, Const(TABLE - 1))), Const(0)))
    return Load(4, (H, clamped))


INDICES = st.sampled_from((Q, KV, Q, KV, B, H))
INT_LEAVES = (
    INDICES
    | st.integers(-30, 80).map(Const)
    | st.sampled_from((Load(0, (Q,)), Load(0, (KV,)), Load(1, (B, Q)), Load(1, (B, KV)), Load(2, (B, H)), Load(3, ())))
)
BOOL_LEAVES = st.sampled_from((Load(5, (B, Q)), Load(5, (B, KV)), TRUE, Const(False)))


def int_exprs(depth):
    if depth == 0:
        return INT_LEAVES
    x, condition, positive = int_exprs(depth - 1), bool_exprs(depth - 1), st.integers(1, 40).map(Const)
    return st.one_of(
        INT_LEAVES,
        *(apply(op, x, x) for op in ("add", "sub", "minimum", "maximum")),
        *(apply(op, x) for op in ("neg", "abs")),
        apply("mul", x, st.integers(-3, 3).map(Const) | INDICES),
        *(apply(op, x, positive) for op in ("floor_divide", "remainder")),
        apply("where", condition, x, x),
        apply("cast_int", condition),
        x.map(table_load),
    )


def float_exprs(depth):
    real = apply("mul", apply("cast_float", int_exprs(depth)), st.sampled_from((Const(0.05), Const(-0.02))))
    return st.one_of(real, apply("tanh", real), apply("exp", real), apply("log", apply("abs", real)))


def bool_exprs(depth):
    x, compare = int_exprs(max(depth - 1, 0)), st.sampled_from(("le", "lt", "ge", "gt", "eq", "ne"))
    compared = compare.flatmap(lambda op: apply(op, x, x))
    if depth == 0:
        return BOOL_LEAVES | compared
    y = bool_exprs(depth - 1)
    real = float_exprs(max(depth - 2, 0))
    return st.one_of(
        compared,
        *(apply(op, y, y) for op in ("and", "or", "xor")),
        apply("not", y),
        apply("where", y, y, y),
        apply("cast_bool", x),
        st.sampled_from(("le", "gt")).flatmap(lambda op: apply(op, real, st.floats(-1, 1).map(Const))),
    )


@given(grids(), bool_exprs(3), st.integers(0, 2**16))
def test_bounds_contain_the_truth(grid, expr, seed):
    assert_contains_truth(IndexMask(expr, buffers_of(grid, seed)), grid)


@settings(max_examples=60)  # tracing takes its time; the expressions above are the property's 200
@given(st.data(), grids(heads=1))
def test_bounds_of_the_zoo_contain_the_truth(data, grid):
    case = data.draw(mask_mods(grid.batch, grid.q_len, grid.kv_len))
    program = trace_mask_mod(case.mask_mod, CPU)
    assert_mask_mod_equals(program, case.dense)
    assert_contains_truth(program, grid)


@given(st.data(), grids(heads=1))
def test_bounds_of_an_opaque_mask_are_exact(data, grid):
    case = data.draw(mask_mods(grid.batch, grid.q_len, grid.kv_len))
    assert_exact(OpaqueMask(IndexMask(causal_expr(Const(grid.kv_len - grid.q_len))), case.mask_mod), grid)


# --- exactness ---------------------------------------------------------------


@given(grids(), st.integers(-80, 80))
def test_causal_is_exact(grid, offset):
    assert_exact(IndexMask(causal_expr(Const(offset))), grid)


@given(grids(), st.integers(-80, 80), st.integers(1, 80))
def test_causal_window_is_exact(grid, offset, size):
    near = Apply("lt", (Apply("sub", (Apply("add", (Q, Const(offset))), KV)), Const(size)))
    assert_exact(IndexMask(Apply("and", (causal_expr(Const(offset)), near))), grid)


@given(grids(), st.integers(0, 2**16))
def test_padding_is_exact(grid, seed):
    valid = torch.rand(grid.batch, grid.kv_len, generator=torch.Generator().manual_seed(seed)) < 0.7
    assert_exact(IndexMask(Load(0, (B, KV)), (valid,)), grid)


@given(grids(), st.integers(0, 2**16), st.booleans())
def test_documents_are_exact(grid, seed, is_causal):
    longest = max(grid.q_len, grid.kv_len)
    same = Apply("eq", (Load(0, (B, Q)), Load(0, (B, KV))))
    expr = Apply("and", (causal_expr(), same)) if is_causal else same
    # Ids that rise by at most one, as packing makes them: a gap would be an interval without a member.
    steps = torch.rand(grid.batch, longest, generator=torch.Generator().manual_seed(seed)) < 0.1
    assert_exact(IndexMask(expr, (steps.int().cumsum(-1),)), grid)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (40, 40), (17, 40)])
def test_traced_factories_are_exact(q_len, kv_len):
    grid = Grid(2, 1, q_len, kv_len, 8, CPU)
    valid = torch.arange(kv_len) < torch.tensor([[3], [kv_len]])
    ids = document_ids([[10, 30], [25, 15]])
    for mask_mod in (
        causal(),
        causal(kv_len - q_len),
        sliding_window(11),
        padding(valid),
        document(ids),
        intersect(causal(), document(ids)),
    ):
        assert_exact(trace_mask_mod(mask_mod, CPU), grid)


HALF_OF_THE_KEYS = {
    "a term of keys": IndexMask(Apply("lt", (Apply("remainder", (KV, Const(16))), Const(8)))),
    "a table by position": IndexMask(
        Load(0, (Apply("floor_divide", (KV, Const(8))),)), (torch.tensor([True, False, True, True, False]),)
    ),
    "padding": IndexMask(Load(0, (KV,)), (torch.arange(40) % 16 < 8,)),
}


@pytest.mark.parametrize("name", HALF_OF_THE_KEYS)
@pytest.mark.parametrize("split", [1, 2])
def test_narrow_key_blocks_have_bounds_of_their_own(name, split):
    grid = Grid(2, 1, 33, 40, 16, CPU, split)
    assert_exact(HALF_OF_THE_KEYS[name], grid)
    assert_exact(HALF_OF_THE_KEYS[name].intersect(IndexMask(causal_expr())), grid)


# --- what is known and what is not -------------------------------------------


def test_an_operation_without_a_rule_bounds_nothing():
    grid = Grid(1, 1, 20, 20, 8, CPU)
    full, some = IndexMask(Apply("gt", (Apply("div", (Q, Const(3))), Const(100.0)))).bounds(grid)
    assert not full.any() and some.all()


def test_an_unknown_part_leaves_the_known_part_of_a_conjunction():
    grid = Grid(1, 1, 20, 20, 8, CPU)
    unknown = Apply("gt", (Apply("div", (Q, Const(3))), Const(100.0)))
    full, some = IndexMask(Apply("and", (unknown, Apply("le", (KV, Q))))).bounds(grid)
    assert not full.any() and torch.equal(some[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("slot_axes", [("q", "q"), ("kv", "kv"), ("q", "kv")])
def test_a_matrix_read_at_token_pairs_is_bounded(slot_axes):
    grid = Grid(1, 1, 20, 20, 8, CPU)
    buffer = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    assert_contains_truth(IndexMask(Load(0, tuple(Index(axis) for axis in slot_axes)), (buffer,)), grid)


def test_a_buffer_shorter_than_the_sequence_bounds_nothing():
    # Reading past its end is the kernel's own affair (it yields 0); the bounds must not invent an answer.
    grid = Grid(1, 1, 20, 20, 8, CPU)
    full, some = IndexMask(Load(0, (KV,)), (torch.ones(10, dtype=torch.bool),)).bounds(grid)
    assert not full.any() and some.all()


BITS = {
    "and": lambda b, h, q, kv: (q & 1) == (kv & 1),
    "or": lambda b, h, q, kv: (q | 4) == (kv | 4),
    "xor": lambda b, h, q, kv: (q ^ kv) < 7,
    "not": lambda b, h, q, kv: ~q < -kv,
    "shifts_by_division": lambda b, h, q, kv: q // 3 >= kv // 5,
    "ones": lambda b, h, q, kv: torch.ones_like(q) - kv >= -7,
    "ones_of_bool": lambda b, h, q, kv: torch.ones_like(q, dtype=torch.bool) & (q > kv),
    "logical_and": lambda b, h, q, kv: torch.logical_and(q, kv),
    "logical_or": lambda b, h, q, kv: torch.logical_or(q, kv),
    "logical_xor": lambda b, h, q, kv: torch.logical_xor(q, kv),
    "logical_not": lambda b, h, q, kv: torch.logical_not(kv),
    "floor_of_a_negative": lambda b, h, q, kv: (q - kv) // 4 >= -2,
    "remainder_of_a_negative": lambda b, h, q, kv: (q - kv) % 5 <= 2,
    "scaled_add": lambda b, h, q, kv: torch.add(q, kv, alpha=2) > 30,
    "scaled_sub": lambda b, h, q, kv: torch.sub(q, kv, alpha=3) < 9,
    "reversed_sub": lambda b, h, q, kv: 20 - q >= kv,
    "truncating_div": lambda b, h, q, kv: torch.div(q - kv, 4, rounding_mode="trunc") == 0,
    "number_of_a_bool": lambda b, h, q, kv: ((q > 3) + (kv > 3)) >= 1,
}


@pytest.mark.parametrize("name", BITS)
def test_integer_operators_keep_their_meaning_or_are_refused(name):
    grid = Grid(1, 1, 19, 23, 8, CPU)
    try:
        program = trace_mask_mod(BITS[name], CPU)
    except UntraceableError:
        program = OpaqueMask(NO_MASK, BITS[name])
    else:
        truth = materialize_mask(BITS[name], 1, 1, grid.q_len, grid.kv_len)
        assert torch.equal(materialize_mask(program, 1, 1, grid.q_len, grid.kv_len), truth)
    assert_contains_truth(program, grid)
