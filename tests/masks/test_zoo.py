"""Each factory thrice: against its definition in loops, as structural facts, through FlexAttention against SDPA."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks.causal import causal
from omnisparse_flex.masks.combine import intersect, union
from omnisparse_flex.masks.document import document, document_ids
from omnisparse_flex.masks.near_to_far import near_to_far, near_to_far_order
from omnisparse_flex.masks.padding import padding
from omnisparse_flex.masks.sinks_and_window import sinks_and_window
from omnisparse_flex.masks.sliding_window import sliding_window
from omnisparse_flex.masks.visual_text import visual_text
from omnisparse_flex.masks.zipar import zipar
from omnisparse_flex.testing import AttentionShape, assert_close_to_oracle, assert_mask_mod_equals, mask_mods
from omnisparse_flex.testing.oracle import materialize_mask

B, N = 2, 144  # one full block of 128 and a ragged one
LENGTHS = [[100, 44], [1, 29, 114]]
SPANS = [[(10, 50), (60, 61)], [(0, 7), (100, 144)]]
VALID = [(0, 144), (33, 144)]  # the second row is padded on the left
PREFIX, GRID = 24, (3, 5, 8)
ORDER = near_to_far_order(*GRID)
LINES = (24, 6, 19)  # prefix, rows, columns; an end-of-line token after each row
COPIES = (19, 6, 20)  # prefix, rows, columns; five copies behind the grid
STARTS = [[0, 2, 9, 10, 28, 30], [0, 19, 21, 22, 30, 40]]

VISUAL = torch.tensor([[any(start <= i < end for start, end in row) for i in range(N)] for row in SPANS])
IDS = document_ids(LENGTHS)
KEPT = torch.tensor([[start <= j < end for j in range(N)] for start, end in VALID])


def document_of(b, i):
    for doc, end in enumerate(itertools.accumulate(LENGTHS[b])):
        if i < end:
            return doc


def same_span(b, i, j):
    return any(start <= i < end and start <= j < end for start, end in SPANS[b])


def shell_of(i):
    _, height, width = GRID
    frame, rest = divmod(i - PREFIX, height * width)
    return frame + sum(divmod(rest, width))


def near_to_far_rule(b, i, j):
    if j < PREFIX:  # the whole condition for the grid, the earlier part of it for the condition itself
        return i >= PREFIX or j <= i
    return i >= PREFIX and shell_of(j) <= shell_of(i)


def shells_rule(b, i, j):
    """In shell order the same rule holds for the tokens that lie there."""
    return near_to_far_rule(b, *(k if k < PREFIX else PREFIX + int(ORDER[k - PREFIX]) for k in (i, j)))


def line_token(starts, i):
    """(raster position, step) of a token; an end of line is the column before the next row."""
    prefix, rows, columns = LINES
    if i < prefix:
        return i, -1
    row, column = divmod(i - prefix, columns + 1)
    ends = column == columns and row < rows - 1
    return i, starts[row + 1] - 1 if ends else starts[row] + column


def zipar_rule(starts):
    def rule(b, i, j):
        (q_place, q_step), (k_place, k_step) = line_token(starts[b], i), line_token(starts[b], j)
        return k_place <= q_place and k_step <= q_step

    return rule


def copy_token(starts, i):
    """(raster position, step, step from which it is gone) of a token or of a copy behind the grid."""
    prefix, rows, columns = COPIES
    if i < prefix:
        return i, -1, None
    if i < prefix + rows * columns:
        row, column = divmod(i - prefix, columns)
        return i, starts[row] + column, None
    row = i - prefix - rows * columns
    return prefix + (row + 1) * columns - 1, starts[row + 1] - 1, starts[row] + columns - 1


def copies_rule(starts):
    def rule(b, i, j):
        (q_place, q_step, _), (k_place, k_step, gone) = copy_token(starts[b], i), copy_token(starts[b], j)
        return k_place <= q_place and k_step <= q_step and (gone is None or q_step < gone)

    return rule


def even(rows, window):
    return [[window * row for row in range(rows)]] * B


CASES = {
    "causal": (causal(), lambda b, i, j: j <= i),
    "causal_offset": (causal(7), lambda b, i, j: j <= i + 7),
    "causal_run_time_offset": (causal(torch.tensor(-7)), lambda b, i, j: j <= i - 7),
    "sliding_window": (sliding_window(20), lambda b, i, j: i - 20 < j <= i),
    "sinks_and_window": (sinks_and_window(4, 30), lambda b, i, j: j <= i and (j < 4 or i - j < 30)),
    "document": (document(IDS), lambda b, i, j: document_of(b, i) == document_of(b, j)),
    "padding": (padding(KEPT), lambda b, i, j: VALID[b][0] <= j < VALID[b][1]),
    "visual_text": (visual_text(VISUAL), lambda b, i, j: j <= i or same_span(b, i, j)),
    "near_to_far": (near_to_far(PREFIX, *GRID), near_to_far_rule),
    "near_to_far_shells": (near_to_far(PREFIX, *GRID, order="shells"), shells_rule),
    "zipar": (zipar(*LINES, 4), zipar_rule(even(6, 4))),
    "zipar_starts": (zipar(*LINES, torch.tensor(STARTS)), zipar_rule(STARTS)),
    "zipar_copies": (zipar(*COPIES, 7, eol=False), copies_rule(even(6, 7))),
    "zipar_copies_starts": (zipar(*COPIES, torch.tensor(STARTS), eol=False), copies_rule(STARTS)),
    "intersect": (
        intersect(causal(), document(IDS), padding(KEPT)),
        lambda b, i, j: j <= i and document_of(b, i) == document_of(b, j) and VALID[b][0] <= j < VALID[b][1],
    ),
    "union": (
        union(sliding_window(3), visual_text(VISUAL), near_to_far(PREFIX, *GRID)),
        lambda b, i, j: i - 3 < j <= i or j <= i or same_span(b, i, j) or near_to_far_rule(b, i, j),
    ),
}


def by_loops(rule):
    pairs = [[[rule(b, i, j) for j in range(N)] for i in range(N)] for b in range(B)]
    return torch.tensor(pairs)[:, None]


def dense(mask_mod, n=N, batch=1):
    return materialize_mask(mask_mod, batch, 1, n, n)[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(case):
    mask_mod, rule = CASES[case]
    assert_mask_mod_equals(mask_mod, by_loops(rule))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_a_dense_mask_built_without_indices(data):
    batch, q_len, kv_len = (
        data.draw(st.integers(1, top), label=name) for top, name in ((3, "B"), (70, "L"), (70, "S"))
    )
    case = data.draw(mask_mods(batch, q_len, kv_len))
    assert_mask_mod_equals(case.mask_mod, case.dense)


@pytest.mark.parametrize("case", CASES)
def test_flex_attention_equals_sdpa(case):
    mask_mod, rule = CASES[case]
    query, key, value = AttentionShape(batch=B, kv_heads=2, group=2, q_len=N, kv_len=N, head_dim=16).inputs()
    block_mask = create_block_mask(mask_mod, B, None, N, N, device="cpu")
    output = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
    assert_close_to_oracle(output, query, key, value, by_loops(rule))


@pytest.mark.slow
def test_inductor_compiles_every_captured_table():
    mask_mod = intersect(union(*(mask_mod for mask_mod, _ in CASES.values())), sinks_and_window(4, 30), padding(KEPT))
    query, key, value = AttentionShape(batch=B, kv_heads=2, group=1, q_len=N, kv_len=N, head_dim=16).inputs()
    block_mask = create_block_mask(mask_mod, B, None, N, N, device="cpu")
    output = torch.compile(flex_attention, fullgraph=True)(query, key, value, block_mask=block_mask)
    assert_close_to_oracle(output, query, key, value, materialize_mask(mask_mod, B, 1, N, N))


@pytest.mark.parametrize("case", CASES)
def test_traces_to_pointwise_operations_on_small_tables(case):
    mask_mod, rule = CASES[case]
    scalars = [torch.zeros((), dtype=torch.int64) for _ in range(4)]
    with TransformGetItemToIndex():  # as FlexAttention does, so that ``table[b, idx]`` stays an index
        graph = make_fx(mask_mod)(*scalars)
    called = {node.target.overloadpacket.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert called <= {"le", "lt", "gt", "eq", "add", "sub", "bitwise_and", "bitwise_or", "index"}
    assert all(table.numel() <= B * N for table in graph.buffers())
    for b, i, j in ((0, 0, 0), (1, 40, 35), (0, 9, 99), (1, 143, 33), (1, 101, 130)):
        allowed = graph(*(torch.tensor(index) for index in (b, 0, i, j)))
        assert allowed.shape == () and bool(allowed) == rule(b, i, j)


@pytest.mark.parametrize("dynamic", [False, True])
def test_factories_can_be_called_inside_a_compiled_region(dynamic):
    def mask(visual, ids, kept, offset):
        mask_mod = union(causal(offset), visual_text(visual), near_to_far(PREFIX, *GRID, order="shells"))
        mask_mod = union(mask_mod, zipar(*LINES, 4), zipar(*COPIES, 7, eol=False))
        mask_mod = intersect(mask_mod, document(ids), padding(kept), sinks_and_window(4, 30), causal())
        i = torch.arange(N)
        return mask_mod(torch.arange(B)[:, None, None], torch.zeros(()), i[:, None], i)

    inputs = (VISUAL, IDS, KEPT, torch.tensor(3))
    compiled = torch.compile(mask, backend="eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(*inputs), mask(*inputs))


def test_run_time_offset_is_read_at_each_call():
    offset = torch.tensor(0)
    mask_mod = causal(offset)
    assert dense(mask_mod).sum() == N * (N + 1) // 2
    offset.fill_(N)
    assert dense(mask_mod).all()


@pytest.mark.parametrize("offset", [0, 5, 200, -5])
def test_causal_row_sums(offset):
    rows = (torch.arange(N) + 1 + offset).clamp(0, N)
    assert torch.equal(dense(causal(offset))[0].sum(-1), rows)


def test_windows_nest():
    rows = torch.arange(N) + 1
    assert torch.equal(dense(sliding_window(1))[0], torch.eye(N, dtype=torch.bool))
    assert torch.equal(dense(sliding_window(20))[0].sum(-1), rows.clamp(max=20))
    assert torch.equal(dense(sliding_window(N)), dense(causal()))
    assert torch.equal(dense(sinks_and_window(0, 20)), dense(sliding_window(20)))
    assert torch.equal(dense(sinks_and_window(4, 20))[0].sum(-1), rows.clamp(max=24))
    assert torch.equal(dense(sinks_and_window(N, 1)), dense(causal()))


def test_documents_are_disjoint_squares():
    mask = dense(document(IDS), batch=B)
    assert torch.equal(mask, mask.mT)
    assert mask.sum((1, 2)).tolist() == [sum(length**2 for length in row) for row in LENGTHS]
    assert document_ids([[2, 1], [1, 2]]).tolist() == [[0, 0, 1], [0, 1, 1]]


def test_documents_need_not_be_contiguous():
    mask = dense(document(torch.tensor([[7, -1, 7]])), n=3)
    assert mask[0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_padding_is_the_same_for_every_query_and_may_leave_none():
    kept = KEPT.clone()
    kept[0] = False
    mask = dense(padding(kept), batch=B)
    assert torch.equal(mask, kept[:, None, :].expand(B, N, N))


def test_visual_text_between_causal_and_full():
    nothing, everything = torch.zeros(1, N, dtype=torch.bool), torch.ones(1, N, dtype=torch.bool)
    assert torch.equal(dense(visual_text(nothing)), dense(causal()))
    assert dense(visual_text(everything)).all()
    above_the_diagonal = dense(visual_text(VISUAL), batch=B).triu(1)
    assert above_the_diagonal.sum((1, 2)).tolist() == [
        sum((end - start) * (end - start - 1) // 2 for start, end in row) for row in SPANS
    ]


@pytest.mark.parametrize(
    ("grid", "passes"), [((1, 1, 1), 1), ((1, 6, 6), 11), ((1, 16, 16), 31), ((4, 16, 16), 34), ((3, 5, 8), 14)]
)
def test_near_to_far_decodes_one_shell_a_pass(grid, passes):
    prefix = 5
    frames, height, width = grid
    n = prefix + frames * height * width
    mask = dense(near_to_far(prefix, *grid), n=n)[0]
    shells = mask[prefix:].unique(dim=0)  # tokens of one pass see the same keys
    assert len(shells) == passes == frames + height + width - 2  # 2n - 1 for an image of n x n
    assert torch.equal(mask[:prefix, :prefix], torch.ones(prefix, prefix, dtype=torch.bool).tril())
    assert mask[prefix:, :prefix].all() and not mask[:prefix, prefix:].any()
    inside = mask[prefix:, prefix:]
    assert inside.diagonal().all() and (inside | inside.mT).all()  # of two grid tokens at least one sees the other
    own_shell = inside & inside.mT
    assert torch.equal(own_shell.float() @ own_shell.float() > 0, own_shell)  # each shell sees all of itself
    assert own_shell.sum() == sum(count**2 for count in own_shell.unique(dim=0).sum(-1).tolist())


@pytest.mark.parametrize(("grid", "share"), [((1, 32, 32), 0.67), ((1, 64, 64), 0.55), ((16, 16, 16), 0.55)])
def test_in_shell_order_flex_attention_skips_blocks(grid, share):
    n = grid[0] * grid[1] * grid[2]
    blocks = {
        order: create_block_mask(near_to_far(0, *grid, order=order), None, None, n, n, device="cpu")
        for order in ("raster", "shells")
    }
    kept = {order: 1 - mask.sparsity() / 100 for order, mask in blocks.items()}
    assert kept["raster"] > 0.999 and kept["shells"] == pytest.approx(share, abs=0.005)


def test_shell_order_is_a_permutation_of_the_same_mask():
    order = near_to_far_order(*GRID)
    assert torch.equal(order.sort().values, torch.arange(GRID[0] * GRID[1] * GRID[2]))
    assert near_to_far_order(1, 2, 3).tolist() == [0, 1, 3, 2, 4, 5]
    raster = dense(near_to_far(0, *GRID), n=len(order))[0]
    assert torch.equal(dense(near_to_far(0, *GRID, order="shells"), n=len(order))[0], raster[order][:, order])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 1), (4, 6)])
def test_zipar_with_a_window_of_a_row_is_causal(rows, columns):
    prefix, starts = 3, columns * torch.arange(rows)[None]
    for window in (columns, starts):
        lines = dense(zipar(prefix, rows, columns, window), n=prefix + rows * (columns + 1))[0]
        assert torch.equal(lines, torch.ones_like(lines).tril())
        copies = dense(zipar(prefix, rows, columns, window, eol=False), n=prefix + rows * columns + rows - 1)[0]
        grid = prefix + rows * columns
        assert torch.equal(copies[:grid, :grid], torch.ones(grid, grid, dtype=torch.bool).tril())
        assert not copies[:, grid:].any()  # the true token is always there
        assert torch.equal(copies[grid:, :grid], copies[prefix + columns - 1 : grid - 1 : columns, :grid])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_zipar_sees_the_row_above_up_to_its_window(window):
    prefix, rows, columns = 2, 4, 5
    mask = dense(zipar(prefix, rows, columns, window), n=prefix + rows * (columns + 1))[0]
    assert mask[prefix:, :prefix].all()
    grid = mask[prefix:, prefix:].view(rows, columns + 1, rows, columns + 1)
    for row, column in itertools.product(range(rows), range(columns)):
        seen = grid[row, column]
        assert not seen[row + 1 :].any()
        for above in range(row + 1):
            expected = min(columns, column + 1 + window * (row - above))
            assert seen[above, :columns].sum() == (column + 1 if above == row else expected)
        assert seen[:row, columns].all()  # the ends of all rows that came before


def test_near_to_far_keeps_raster_order_within_a_row_of_one():
    assert torch.equal(dense(near_to_far(0, 1, 1, N)), dense(causal()))
    assert torch.equal(dense(near_to_far(N - 1, 1, 1, 1)), dense(causal()))


def test_combinations_follow_set_algebra():
    mods = [CASES[name][0] for name in ("causal", "document", "padding")]
    masks = torch.stack([dense(mod, batch=B) for mod in mods])
    assert torch.equal(dense(intersect(*mods), batch=B), masks.all(0))
    assert torch.equal(dense(union(*mods), batch=B), masks.any(0))
    assert torch.equal(dense(intersect(mods[1]), batch=B), masks[1])
    a, b, c = mods
    assert torch.equal(
        dense(intersect(a, union(b, c)), batch=B), dense(union(intersect(a, b), intersect(a, c)), batch=B)
    )


@pytest.mark.parametrize(
    ("mask_mod", "name"),
    [
        (causal(), "causal"),
        (causal(3), "causal_offset"),
        (sliding_window(20), "sliding_window_20"),
        (sinks_and_window(4, 30), "sinks_4_window_30"),
        (document(IDS), "document"),
        (padding(KEPT), "padding"),
        (visual_text(VISUAL), "visual_text"),
        (near_to_far(5, 4, 16, 16), "near_to_far_5_4x16x16"),
        (near_to_far(5, 4, 16, 16, order="shells"), "near_to_far_5_4x16x16_shells"),
        (zipar(5, 4, 6, 3), "zipar_5_4x6_window_3"),
        (zipar(5, 6, 6, torch.tensor(STARTS), eol=False), "zipar_5_6x6_starts_copies"),
        (intersect(causal(), document(IDS)), "causal_and_document"),
        (union(causal(), padding(KEPT)), "causal_or_padding"),
    ],
)
def test_names_read_well_in_dumps(mask_mod, name):
    assert mask_mod.__name__ == name and name.isidentifier()


LONG = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal(1.5), "offset must be an int or a 0-d int tensor, got 1.5"),
        (lambda: causal(True), "offset must be an int or a 0-d int tensor, got True"),
        (
            lambda: causal(torch.tensor([1])),
            "offset must be an int or a 0-d int tensor, got a torch.int64 tensor of shape (1,)",
        ),
        (
            lambda: causal(torch.tensor(1.0)),
            "offset must be an int or a 0-d int tensor, got a torch.float32 tensor of shape ()",
        ),
        (lambda: sliding_window(0), "size must be an int of at least 1, got 0"),
        (lambda: sliding_window("8"), "size must be an int of at least 1, got '8'"),
        (lambda: sinks_and_window(-1, 4), "sink_size must be an int of at least 0, got -1"),
        (lambda: sinks_and_window(4, 0), "window_size must be an int of at least 1, got 0"),
        (lambda: document([[0, 1]]), "ids must be an int tensor of shape (B, N), got [[0, 1]]"),
        (
            lambda: document(LONG.float()),
            "ids must be an int tensor of shape (B, N), got a torch.float32 tensor of shape (2, 3)",
        ),
        (
            lambda: document(LONG[0]),
            "ids must be an int tensor of shape (B, N), got a torch.int64 tensor of shape (3,)",
        ),
        (lambda: document_ids([3, 4]), "lengths must hold one sequence of lengths for each batch row, got [3, 4]"),
        (lambda: document_ids([[3, 0]]), "lengths must be an int of at least 1, got 0"),
        (
            lambda: document_ids([[3], [4]]),
            "lengths must sum to the same positive total in every row, got [[3], [4]]",
        ),
        (lambda: document_ids([]), "lengths must sum to the same positive total in every row, got []"),
        (lambda: document_ids([[]]), "lengths must sum to the same positive total in every row, got [[]]"),
        (
            lambda: padding(LONG),
            "valid must be a bool tensor of shape (B, S), got a torch.int64 tensor of shape (2, 3)",
        ),
        (
            lambda: visual_text(torch.ones(3, dtype=torch.bool)),
            "visual must be a bool tensor of shape (B, N), got a torch.bool tensor of shape (3,)",
        ),
        (lambda: near_to_far(-1, 1, 2, 2), "prefix must be an int of at least 0, got -1"),
        (lambda: near_to_far(0, 0, 2, 2), "frames must be an int of at least 1, got 0"),
        (lambda: near_to_far(0, 1, 2.0, 2), "height must be an int of at least 1, got 2.0"),
        (lambda: near_to_far(0, 1, 2, None), "width must be an int of at least 1, got None"),
        (lambda: near_to_far(0, 1, 2, 2, order="rows"), "order must be one of raster, shells, got 'rows'"),
        (lambda: near_to_far_order(1, 0, 2), "height must be an int of at least 1, got 0"),
        (lambda: zipar(-1, 2, 2, 1), "prefix must be an int of at least 0, got -1"),
        (lambda: zipar(0, 0, 2, 1), "rows must be an int of at least 1, got 0"),
        (lambda: zipar(0, 2, True, 1), "columns must be an int of at least 1, got True"),
        (lambda: zipar(0, 2, 2, 0), "window must be an int of at least 1, got 0"),
        (lambda: zipar(0, 2, 2, 3), "window must be at most the 2 columns of a row, got 3"),
        (
            lambda: zipar(0, 2, 2, LONG),
            "window must be an int or an int tensor of shape (B, 2), got a torch.int64 tensor of shape (2, 3)",
        ),
        (lambda: intersect(), "mods must hold at least one mask_mod, got ()"),
        (lambda: union(causal(), 3), "mods must be callables (b, h, q_idx, kv_idx) -> bool tensor, got 3"),
    ],
)
def test_bad_input_is_refused_in_the_house_wording(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert str(raised.value) == message
