"""The invariants of block selection, as properties over configs, shapes, masks, padding and offsets."""

import contextlib
import dataclasses
import itertools
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks import document_ids
from omnisparse_flex.masks.blocks import select
from omnisparse_flex.masks.blocks.block_lists import block_mask_from_maps, wider
from omnisparse_flex.masks.blocks.select import BlockSelection, dense_selection, select_blocks
from omnisparse_flex.masks.blocks.text_runs import LONG_RUN
from omnisparse_flex.masks.expr.expr import KV, TRUE, Apply, B, Const, H, Load, Q, causal, causal_offset, number_in
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.testing import AttentionShape, assert_block_mask_equals, configs, mask_mods
from omnisparse_flex.testing.oracle import expand_block_map, materialize_mask
from tests.masks.test_text_runs import kept_text

CPU = torch.device("cpu")


@dataclasses.dataclass
class Case:
    """One drawn call of ``select_blocks``; ``block`` stands in for 128, so that short sequences have many blocks."""

    shape: AttentionShape
    block: int
    config: OmniSparseConfig
    mask: IndexMask | OpaqueMask
    offset: int
    visual: Tensor | None
    query: Tensor
    key: Tensor

    def select(self, target: Tensor | float | None = None, **changes) -> BlockSelection:
        config = dataclasses.replace(self.config, **changes)
        target = config.recall_of(0) if target is None else target
        scale = self.shape.head_dim**-0.5
        with mock.patch.object(select, "BLOCK", self.block):
            return select_blocks(
                self.query,
                self.key,
                self.mask,
                config,
                target=target,
                scale=scale,
                visual=self.visual,
                q_offset=self.offset,
                min_peak=config.min_peak_of(0),
            )

    @property
    def allowed(self) -> Tensor:
        """bool (B, Hq, L, S): the model's own mask, pair by pair."""
        size = (self.shape.batch, self.shape.heads, self.shape.q_len, self.shape.kv_len)
        return materialize_mask(lambda *at: self.mask(*at).to(torch.bool), *size)

    def tokens(self, selection: BlockSelection) -> Tensor:
        """bool (B, Hq, L, S): pairs of kept blocks."""
        return expand_block_map(selection.keep, self.shape.q_len, self.shape.kv_len, (self.block, self.key_block))

    @property
    def key_block(self) -> int:
        """Keys of a block; half of ``block`` where the config says 64 of 128."""
        return self.block // self.config.split

    @property
    def positions(self) -> Tensor:
        """(L, 1): where each query sits among the keys."""
        return torch.arange(self.shape.q_len)[:, None] + self.offset


@st.composite
def shapes(draw):
    q_len = draw(st.integers(1, 260))
    kv_len = draw(st.just(q_len) | st.integers(q_len, 300) | st.integers(1, 300))
    return AttentionShape(
        draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 2))), q_len, kv_len, 8
    )


@st.composite
def plain_masks(draw, shape):
    """Causal with left or right padding, packed causal, or no causality at all; and whether it is causal."""
    order = causal(Const(shape.kv_len - shape.q_len))
    valid = torch.ones(shape.batch, shape.kv_len, dtype=torch.bool)
    for row in valid:
        cut = draw(st.integers(0, shape.kv_len))
        if draw(st.booleans()):
            row[:cut] = False
        else:
            row[cut:] = False
    kind = draw(st.sampled_from(("causal", "padded", "packed", "none", "keys")))
    if kind == "packed" and shape.q_len == shape.kv_len:
        cuts = sorted({0, shape.kv_len, *draw(st.lists(st.integers(1, shape.kv_len), max_size=3))})
        ids = document_ids([[b - a for a, b in itertools.pairwise(cuts)]] * shape.batch)
        same = Apply("eq", (Load(0, (B, Q)), Load(0, (B, KV))))
        return IndexMask(Apply("and", (order, same)), (ids,)), True
    keys = Load(0, (B, KV))
    if kind in ("none", "keys"):
        return IndexMask(TRUE) if kind == "none" else IndexMask(keys, (valid,)), False
    return IndexMask(order) if kind != "padded" else IndexMask(Apply("and", (order, keys)), (valid,)), True


@st.composite
def any_masks(draw, shape):
    """Whatever the zoo makes, read into a program or left opaque, under causality or not; or windows by head."""
    if draw(st.integers(0, 4)) == 0:  # head h sees h times so many keys
        past = Const(shape.kv_len - shape.q_len)
        reach = Apply("mul", (Apply("add", (H, Const(1))), Const(draw(st.integers(1, 100)))))
        near = Apply("lt", (Apply("sub", (Apply("add", (Q, past)), KV)), reach))
        return IndexMask(Apply("and", (causal(past), near))), True
    case = draw(mask_mods(shape.batch, shape.q_len, shape.kv_len))
    is_causal = draw(st.booleans())
    order = IndexMask(causal(Const(shape.kv_len - shape.q_len)) if is_causal else TRUE)
    if draw(st.integers(0, 3)):
        return OpaqueMask(order, case.mask_mod), is_causal
    return order.intersect(trace_mask_mod(case.mask_mod, CPU)), is_causal


@st.composite
def cases(draw, masks=plain_masks):
    shape = draw(shapes())
    mask, is_causal = draw(masks(shape))
    seed = draw(st.integers(0, 2**16))
    query, key, _ = shape.inputs(seed=seed)
    sharpness = draw(st.sampled_from((1.0, 4.0)))  # block means of noise alone would give flat rows only
    visual = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        visual = torch.rand(shape.batch, shape.kv_len, generator=generator) < draw(
            st.sampled_from((0.0, 0.5, 0.99, 1.0))
        )
    offset = shape.kv_len - shape.q_len if is_causal else 0
    if not is_causal and isinstance(mask, IndexMask) and (position := causal_offset(mask.expr)) is not None:
        offset = int(number_in(position, mask.buffers, CPU))  # as ``sparse_attention`` and the passes read it
    return Case(
        shape, draw(st.sampled_from((16, 16, 128))), draw(configs()), mask, offset, visual, query * sharpness, key
    )


def counting(masks=plain_masks):
    """Cases of rules that count mass or a number; the peak rule's are in ``test_peaks``."""
    names = ("target_recall", "key_block", "last_rows", "sink_size", "window_size")

    def counted(case):
        fields = {name: getattr(case.config, name) for name in names}
        return dataclasses.replace(case, config=OmniSparseConfig(budget="per_head", **fields))

    return cases(masks).map(lambda case: counted(case) if case.config.budget == "peak" else case)


# --- what is kept ------------------------------------------------------------


@given(cases() | cases(any_masks))
def test_kept_blocks_may_be_seen_and_no_row_loses_every_key(case):
    selection, allowed = case.select(), case.allowed
    assert not (selection.keep & ~selection.layout.some).any(), "a block without an allowed pair is computed"
    sees = allowed.any(-1)
    assert torch.equal((case.tokens(selection) & allowed).any(-1), sees), "a row with an allowed key keeps none"


@given(cases() | cases(any_masks))
def test_window_text_and_first_keys_are_kept_by_every_row(case):
    selection, allowed, config = case.select(), case.allowed, case.config
    lost = allowed & ~case.tokens(selection)
    keys = torch.arange(case.shape.kv_len)
    assert not (lost & ((case.positions - keys).abs() < config.window_size)).any()
    assert not (lost & (keys < config.sink_size)).any()
    if case.visual is not None:
        own = case.positions.squeeze(1).clamp(0, case.shape.kv_len - 1)
        text = torch.stack([kept_text(row, LONG_RUN) for row in case.visual.tolist()])[:, own] & (keys <= own[:, None])
        shown = case.visual.cumsum(-1)[:, own] > 0
        assert not (lost & (text & shown.unsqueeze(-1)).unsqueeze(1)).any()


@given(cases())
def test_sinks_are_the_first_keys_a_row_may_see(case):
    lost = case.allowed & ~case.tokens(case.select())
    assert not (lost & (case.allowed.cumsum(-1) <= case.config.sink_size)).any()


@settings(max_examples=50)
@given(cases())
def test_without_visual_tokens_every_token_is_eligible(case):
    blind = dataclasses.replace(case, visual=torch.zeros(case.shape.batch, case.shape.kv_len, dtype=torch.bool))
    assert torch.equal(blind.select().keep, dataclasses.replace(case, visual=None).select().keep)


# --- how much is kept --------------------------------------------------------


@given(counting())
def test_kept_mass_reaches_the_target_unless_the_budget_binds(case):
    rule = "per_head" if isinstance(case.config.budget, int) else case.config.budget
    selection = case.select(budget=rule)
    total, kept = selection.mass.sum(-1), (selection.mass * selection.keep).sum(-1)
    sees = selection.layout.some.any(-1)
    assert ((total - sees.float()).abs() < 1e-5).all(), "a row's mass is 1, or 0 if it sees nothing"
    due = selection.active & ~selection.overflow
    assert (kept[due] >= case.config.recall_of(0) * total[due] - 1e-5).all()
    if case.config.max_kv_budget is None:
        assert not selection.overflow.any()
    else:
        assert selection.budget.max() <= -(-case.config.max_kv_budget // case.key_block)


@given(counting())
def test_no_head_asks_for_more_than_it_needs(case):
    selection = case.select(budget="per_head", max_kv_budget=None)
    eligible = selection.layout.some & ~selection.layout.forced
    mass = (selection.mass * eligible).sort(-1, descending=True).values
    kept = (selection.mass * selection.layout.forced).sum(-1) + (mass.cumsum(-1) - mass).gather(
        -1, (selection.needs - 1).clamp(min=0)[..., None]
    ).squeeze(-1)
    asking = (selection.needs > 0) & (selection.needs < eligible.sum(-1))
    target = case.config.recall_of(0)
    if target < 1:
        assert (kept <= target * selection.mass.sum(-1) + 1e-5)[asking].all(), "one block fewer would have been enough"


@given(counting())
def test_the_flattest_head_sets_the_budget_of_all(case):
    selection = case.select(budget="flattest_head")
    asked = torch.where(selection.active, selection.needs, 0).amax(1, keepdim=True)
    assert torch.equal(selection.budget, torch.where(selection.active, asked, 0))
    picked = (selection.keep & ~selection.layout.forced).sum(-1)
    eligible = (selection.layout.some & ~selection.layout.forced).sum(-1)
    assert torch.equal(picked, torch.minimum(selection.budget, eligible))


@given(counting(), st.integers(0, 600))
def test_a_fixed_budget_counts_tokens(case, tokens):
    selection = case.select(budget=tokens, max_kv_budget=None)
    blocks = torch.where(selection.active, -(-tokens // case.key_block), 0)
    assert torch.equal(selection.budget, blocks)


@given(cases(), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_more_recall_keeps_more(case, first, second):
    low, high = (case.select(target=target) for target in sorted((first, second)))
    assert (low.needs <= high.needs).all() and (low.budget <= high.budget).all()
    assert not (low.keep & ~high.keep).any()


@given(cases(), st.sampled_from((1.0, 1, torch.tensor(1.0), torch.tensor(1.5))))
def test_a_target_of_one_keeps_everything(case, target):
    open_ended = {"lazy_threshold": None, "max_kv_budget": None, "budget": "per_head"}
    selection = case.select(target=target, **({} if case.config.budget == "peak" else open_ended))
    assert torch.equal(selection.keep, selection.layout.some.expand_as(selection.keep))


# --- the same every time, and as lists ---------------------------------------


def tensors_of(selection):
    fields = dict(zip((x.name for x in dataclasses.fields(selection)), dataclasses.astuple(selection), strict=True))
    return [*fields.pop("layout"), *fields.values()]


@given(cases())
def test_selection_depends_on_values_alone(case):
    expected = tensors_of(case.select())
    learning = dataclasses.replace(
        case, query=case.query.clone().requires_grad_(), key=case.key.clone().requires_grad_()
    )
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with mode():
            again = tensors_of(learning.select())
        assert not any(x.requires_grad for x in again)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@given(cases() | cases(any_masks))
def test_lists_denote_the_selection(case):
    selection, lengths = case.select(), (case.shape.q_len, case.shape.kv_len)
    maps = selection.keep, selection.layout.full
    found = block_mask_from_maps(*maps, case.mask, lengths, case.block, transposed=True, key_block=case.key_block)
    assert_block_mask_equals(found, case.tokens(selection) & case.allowed)


@given(cases() | cases(any_masks))
def test_wide_lists_and_a_narrow_map_denote_the_selection(case):
    """As in training, where the kernels take wide blocks alone."""
    selection, lengths = case.select(), (case.shape.q_len, case.shape.kv_len)

    def in_map(b, h, q, kv):
        return case.mask(b, h, q, kv).to(torch.bool) & selection.keep[b, h, q // case.block, kv // case.key_block]

    maps = wider(selection.keep, selection.layout.full, case.config.split)
    found = block_mask_from_maps(*maps, in_map, lengths, case.block, transposed=True)
    assert_block_mask_equals(found, case.tokens(selection) & case.allowed)


@given(cases() | cases(any_masks))
def test_a_dense_selection_keeps_what_the_mask_allows(case):
    with mock.patch.object(select, "BLOCK", case.block):
        keep, full = dense_selection(case.query, case.key, case.mask)
    lengths = (case.shape.q_len, case.shape.kv_len)
    assert not (case.allowed & ~expand_block_map(keep, *lengths, case.block)).any()
    assert not (expand_block_map(full, *lengths, case.block) & ~case.allowed).any()
