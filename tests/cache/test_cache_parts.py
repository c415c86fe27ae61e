"""Properties of the slim cache's parts: what is kept, in which order, and that nothing is lost or miscounted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import OmniSparseCache
from omnisparse_flex.attention.lse_attention import attend_keys, merge
from omnisparse_flex.cache.choose_keys import (
    HeadChoice,
    choose_keys,
    droppable_mass,
    droppable_tokens,
    kept_positions,
    make_plan,
    pattern_mass,
    positions_of,
    ranked,
)
from omnisparse_flex.cache.host_memory import Copies, send
from omnisparse_flex.cache.layer import MIN_TAIL_STEP, SlimLayer
from tests.helpers.slim import changed, generate, half_lazy, prompt


@st.composite
def conversations(draw):
    """(visual, real) bool (B, S), sinks, window: any visual tokens, padding left or right."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    visual = torch.tensor(draw(st.lists(bits, min_size=batch, max_size=batch)))
    real = torch.ones_like(visual)
    for row in range(batch):
        padded = draw(st.integers(0, length - 1))
        real[row, slice(0, padded) if draw(st.booleans()) else slice(length - padded, length)] = False
    return visual, real, draw(st.integers(0, 5)), draw(st.integers(1, 5))


def plan_of(visual, real, sinks, window, count=None):
    droppable = droppable_tokens(visual, real, sinks, window)
    first = 0 if count is None else visual.shape[1] - count
    return droppable, make_plan(droppable, torch.zeros_like(droppable), real, (real & ~visual)[:, first:], first)


@given(conversations())
def test_text_sinks_and_recent_tokens_are_never_droppable(case):
    visual, real, sinks, window = case
    droppable, plan = plan_of(*case)
    for row in range(visual.shape[0]):
        present = real[row].nonzero().flatten().tolist()
        expected = [p for p in present[sinks : max(sinks, len(present) - window)] if visual[row, p]]
        assert droppable[row].nonzero().flatten().tolist() == expected
        kept = [p for p in plan.base[row].tolist() if p < plan.length]
        dropped = [p for p in plan.drop[row].tolist() if p < plan.length]
        assert dropped == expected and sorted(kept + dropped) == present and kept == sorted(kept)


@given(conversations())
def test_the_pattern_is_read_from_the_last_text(case):
    visual, real, *_ = case
    _, plan = plan_of(*case)
    for row in range(visual.shape[0]):
        text = (real & ~visual)[row].nonzero().flatten().tolist() or real[row].nonzero().flatten().tolist()
        voters = [q for q, w in zip(plan.queries[row].tolist(), plan.weights[row].tolist(), strict=True) if w > 0]
        assert voters == text[-32:]
        assert plan.weights[row].sum().item() == pytest.approx(1)


@given(conversations(), st.integers(0, 2**31 - 1), st.floats(0.05, 1.0), st.integers(0, 8))
def test_a_layer_keeps_what_it_says_and_restores_the_rest(case, seed, recall, most):
    """Lengths, order and positions of kept keys; offload and fetch give back the very values."""
    generator = torch.Generator().manual_seed(seed)
    visual, real, *_ = case
    batch, length = visual.shape
    _, plan = plan_of(*case)
    key, value = (torch.randn(batch, 3, length, size, generator=generator) for size in (4, 6))
    query = torch.randn(batch, 6, plan.queries.shape[1], 4, generator=generator)
    layer, copies = SlimLayer(0), Copies(torch.device("cpu"))
    rule = lambda mass, _: choose_keys(mass, recall, most)  # noqa: E731
    layer.store(query, key, value, plan, 0.5, first=0, chooser=rule, copies=copies)

    assert sorted(h for part in layer.kept for h in part.heads) == [0, 1, 2]
    for part in layer.kept:
        assert part.keys.shape[2] == part.positions.shape[2] == part.values.shape[2]
        for row in range(batch):
            for column, head in enumerate(part.heads):
                allowed = part.allowed
                places = part.positions[row, column].long()
                places = places if allowed is None else places[allowed[row, column]]
                assert places.tolist() == sorted(set(places.tolist()))
                always = {p for p in plan.base[row].tolist() if p < length}
                assert always <= set(places.tolist()) and (head not in layer.lazy or always == set(places.tolist()))
                assert torch.equal(part.keys[row, column, : len(places)], key[row, head, places])
                assert torch.equal(part.values[row, column, : len(places)], value[row, head, places])

    added = torch.randn(batch, 3, 2, 4, generator=generator)
    layer.append(added, torch.zeros(batch, 3, 2, 6))
    restored, restored_value = layer.restore(length + 2, key, value, copies)
    assert torch.equal(restored[:, :, :length], torch.where(real[:, None, :, None], key, 0))
    assert torch.equal(restored_value[:, :, :length], torch.where(real[:, None, :, None], value, 0))
    assert torch.equal(restored[:, :, length:], added)


def test_mass_goes_in_parts(monkeypatch):
    torch.manual_seed(0)
    query, key, weights = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 50, 8), torch.rand(2, 9)
    rest = (torch.arange(41, 50).expand(2, -1), weights, torch.rand(2, 50) < 0.9, 0.3)
    whole = pattern_mass(query, key, *rest)
    monkeypatch.setattr("omnisparse_flex.cache.choose_keys.LOGITS", 2 * 2 * 50 * 4)
    monkeypatch.setattr("omnisparse_flex.cache.choose_keys.KEY_CHUNK", 7)
    assert torch.allclose(pattern_mass(query, key, *rest), whole, atol=1e-6)


@given(conversations(), st.integers(0, 2**31 - 1))
def test_mass_is_that_of_exact_softmax_rows(case, seed):
    generator = torch.Generator().manual_seed(seed)
    visual, real, *_ = case
    batch, length = visual.shape
    _, plan = plan_of(*case)
    query = torch.randn(batch, 4, length, 8, generator=generator)
    key = torch.randn(batch, 2, length, 8, generator=generator)
    logits = (query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    places = torch.arange(length)
    hidden = ~((places <= places[:, None]) & real[:, None, None, :])
    rows = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    expected = torch.zeros(batch, 2, length, dtype=torch.float64)
    for row in range(batch):
        for q, weight in zip(plan.queries[row].tolist(), plan.weights[row].tolist(), strict=True):
            expected[row] += weight * rows[row, :, q].view(2, 2, length).mean(1)
    chosen = query.gather(2, plan.queries[:, None, :, None].expand(-1, 4, -1, 8))
    mass = pattern_mass(chosen, key, plan.queries, plan.weights, real, 0.3)
    # float32: one rounding for each of 8 products and `length` terms, times the largest logit's slope.
    tolerance = torch.finfo(torch.float32).eps * (8 + length) * max(1.0, logits.abs().max().item())
    assert (mass.double() - expected).abs().max() <= tolerance


@given(st.integers(0, 2**31 - 1), st.integers(0, 30), st.floats(0.01, 1.0), st.one_of(st.none(), st.integers(0, 12)))
def test_every_head_keeps_its_recall_and_k_is_the_flattest_heads(seed, count, recall, most):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(2, 4, 1, generator=generator) ** 2
    mass = torch.softmax(4 * torch.randn(2, 4, max(count, 1), generator=generator), -1)[..., :count] * share
    choice = choose_keys(mass, recall, most, neighbours=0)
    assert sorted((*choice.lazy, *choice.fetching)) == [0, 1, 2, 3]
    always = 1 - mass.double().sum(-1)
    slack = torch.finfo(torch.float32).eps * 4 * (count + 1)
    needs = {}
    for head in range(4):
        ordered = mass[:, head].double().sort(-1, descending=True).values
        kept = always[:, head, None] + torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
        needs[head] = [int((kept < recall - s).sum(-1).max()) for s in (slack, -slack)]
    k = choice.picked.shape[2]
    if recall == 1.0 and count:
        assert choice.lazy == (() if k else (0, 1, 2, 3)) and k == (count if most is None else min(count, most))
        return
    for head in choice.lazy:
        assert needs[head][0] == 0 or most == 0 or count == 0
    if most is None and choice.fetching:
        assert max(low for low, _ in needs.values()) <= k <= min(count, max(high for _, high in needs.values()))
    for column, head in enumerate(choice.fetching):
        picked = choice.picked[:, column]
        assert all(len(set(row.tolist())) == k for row in picked)
        best = mass[:, head].sort(-1, descending=True).values[:, :k]
        assert torch.equal(mass[:, head].gather(1, picked).sort(-1, descending=True).values, best)


@given(st.integers(0, 2**31 - 1), st.integers(1, 30), st.integers(0, 4))
def test_keys_rank_by_the_largest_mass_around_them(seed, count, reach):
    mass = torch.rand(1, 2, count, generator=torch.Generator().manual_seed(seed))
    mass[0, 1, count // 2 :] = -1
    order = ranked(mass, reach)
    for head in range(2):
        row = mass[0, head].tolist()
        around = [max(row[max(0, i - reach) : i + reach + 1]) if m >= 0 else -1.0 for i, m in enumerate(row)]
        picked = order[0, head].tolist()
        assert sorted(picked) == list(range(count))
        assert [around[i] for i in picked] == sorted(around, reverse=True)


def test_recall_is_counted_in_mass_not_in_rank():
    """A neighbour that comes along costs a key and brings its own mass only."""
    mass = torch.zeros(1, 1, 40)
    mass[0, 0, 20] = 0.5
    assert choose_keys(mass, 0.9).picked.shape[2] <= 7 and 20 in choose_keys(mass, 0.9).picked[0, 0]
    assert choose_keys(mass, 0.9, neighbours=0).picked.tolist() == [[[20]]]


def test_k_grows_with_recall_and_one_keeps_all():
    torch.manual_seed(0)
    mass = torch.softmax(torch.randn(1, 4, 50), -1) * 0.6
    sizes = [choose_keys(mass, recall).picked.shape[2] for recall in (0.3, 0.5, 0.7, 0.9, 0.99, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == 50


@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))
def test_parts_merge_to_the_union(seed, rows, first, second):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (rows, first + second, first + second))
    allowed = torch.rand(2, 3, first + second, generator=generator) < 0.7
    logits = (query.double() * 0.4) @ key.double().transpose(2, 3)
    weights = logits.masked_fill(~allowed[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    parts = [
        attend_keys(query, key[:, :, cut], value[:, :, cut], allowed[:, :, cut], 0.4)
        for cut in (slice(0, first), slice(first, None))
    ]
    expected = weights @ value.double()
    tolerance = torch.finfo(torch.float32).eps * 32 * max(1.0, logits.abs().max().item()) * value.abs().max().item()
    assert (merge(*parts[0], *parts[1]).double() - expected).abs().max() <= tolerance


def test_long_queries_go_in_parts(monkeypatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8) for n in (9, 30, 30))
    mask = torch.rand(1, 1, 9, 30) < 0.6
    whole = attend_keys(query, key, value, mask, 0.3)
    monkeypatch.setattr("omnisparse_flex.attention.lse_attention.LOGITS", 2 * 30 * 2)
    parts = attend_keys(query, key, value, mask, 0.3)
    assert torch.allclose(whole[0], parts[0], atol=1e-6) and torch.allclose(whole[1], parts[1], atol=1e-6)


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
def test_positions(rows):
    mask = torch.tensor(rows)
    found, ragged = positions_of(mask)
    lists = [[p for p in row if p < 7] for row in found.tolist()]
    assert lists == [row.nonzero().flatten().tolist() for row in mask]
    assert ragged == (len({len(row) for row in lists}) > 1)


def storages(cache):
    """Bytes of every distinct storage that the cache's layers hold, device and host."""
    device, host = {}, {}
    for layer in cache.layers:
        tensors = [layer.tail_keys, layer.tail_values]
        for part in layer.kept:
            tensors += [part.keys, part.values, part.positions, part.counts]
        for tensor in tensors:
            if tensor is not None:
                device[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        for span in layer.host.spans:
            for tensor in (span.keys, span.values):
                host[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(device.values()), sum(host.values())


@pytest.mark.parametrize("lengths", [(500,), (500, 420)])
@pytest.mark.parametrize("offload", [True, False])
def test_reported_bytes_are_the_tensors_bytes(lengths, offload, device):
    model = changed("llama", device)
    cache = OmniSparseCache(model, offload=offload, cuda_graphs=False)  # a recorded step has memory of its own
    cache.store.chooser = half_lazy
    generate(model, prompt(device, lengths, spans=((20, 400),)), cache, new=5)
    report = cache.memory_report()
    assert storages(cache) == (report.device, report.host)
    layers, batch, heads, width, size = 2, len(lengths), 2, 2 * 16, 4
    assert report.full == layers * batch * heads * 504 * width * size
    assert report.ratio > 1.5 and report.device < report.full / 1.5
    assert report.host == (layers * batch * heads * 380 * width * size if offload else 0)
    assert str(report).count("\n") == 2 + layers + 1 and "1 of 2" in str(report)
    assert report.to_dict()["layers"][1]["lazy"] == (1,)
    # Nothing else of a slimmed layer hangs on: no view of the full keys, no room beyond one step.
    assert all(layer.tail_keys.shape[2] == MIN_TAIL_STEP for layer in cache.layers)


def test_masses_of_rows_without_a_column_are_never_picked_first():
    visual = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    real = torch.ones_like(visual)
    _, plan = plan_of(visual, real, 0, 1)
    mass = droppable_mass(torch.full((2, 1, 5), 0.2), plan)
    assert mass.tolist() == [[pytest.approx([0.2, 0.2, 0.2])], [pytest.approx([0.2, -1, -1])]]
    kept = kept_positions(plan, choose_keys(mass, 0.7).picked, 1)
    assert kept[1, 0].tolist() == [0, 1, 2, 3, 4]
    assert (kept[0, 0] < 5).sum() == 4, "two of three equal masses reach 0.8"


def test_choice_says_whether_it_drops():
    some = HeadChoice((), (0,), torch.zeros(1, 1, 3, dtype=torch.int64))
    assert some.drops(4) and not some.drops(3) and not some.drops(0)
    assert HeadChoice((0,), (), torch.zeros(1, 0, 3, dtype=torch.int64)).drops(1)


def test_a_crop_counts_no_filler_of_a_shorter_turn():
    """Fillers of a row with fewer tokens are the length of their turn, which a later crop may leave above them."""
    key, positions = torch.randn(2, 1, 5, 4), torch.tensor([[1, 2, 3], [2, 5, 5]])
    span = send(key, key, positions, 5, Copies(torch.device("cpu")))
    span.crop(7)
    assert span.counts == [3, 1]
    span.crop(3)
    assert span.counts == [2, 1]
