"""The choice of blocks behind one operator: the same choice, one graph for all layers, and what stays out of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, backend, collect_stats, rewrite_report
from omnisparse_flex.attention import select_op
from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.select_op import call_select_op
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import grid_of, select_blocks
from omnisparse_flex.masks.expr.expr import KV, Apply, B, Const, Load, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from tests.helpers.tiny import build

CONFIGS = [
    OmniSparseConfig(target_recall=0.7, window_size=100),
    OmniSparseConfig(budget="per_head", max_kv_budget=256, lazy_threshold=0.4, last_rows=0),
]


@pytest.fixture(autouse=True)
def fresh():
    select_op.compiled.cache_clear()
    yield
    select_op.compiled.cache_clear()


def site_of(config, lengths, *, padded=False, seed=0, write=None):
    """A site as a graph holds it, and its queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(2, 4, lengths[0], 16, generator=generator)
    key = 2 * torch.randn(2, 2, lengths[1], 16, generator=generator)
    offset = lengths[1] - lengths[0]
    mask = IndexMask(causal(Const(offset)))
    if padded:
        real = torch.ones(2, lengths[1], dtype=torch.bool)
        real[1, :200] = False
        mask = IndexMask(Apply("and", (causal(Const(offset)), Load(0, (B, KV)))), (real,))
    layout = block_layout(mask, grid_of(query, key, config.split), config, q_offset=offset)
    site = SparseCall(
        config=config, mask=mask, target=torch.tensor(0.7), q_offset=offset, lists=True, layout=layout, write=write
    )
    return dataclasses.replace(site, rules=register(site)), query, key


def same(got, want, fields):
    for name in fields:
        one, two = getattr(got, name), getattr(want, name)
        assert one.dtype == two.dtype and one.shape == two.shape, name
        close = torch.allclose(one, two, atol=1e-6) if one.is_floating_point() else torch.equal(one, two)
        assert close, name


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=["peak", "per_head"])
def test_the_operator_chooses_what_the_function_chooses(config):
    padded = config is CONFIGS[1]
    for lengths in ((700, 700), (512, 900)):  # compiled for one length, then for all
        site, query, key = site_of(config, lengths, padded=padded, seed=lengths[0])
        want = select_blocks(query, key, site.mask, config, target=0.7, scale=0.25, layout=site.layout)
        same(call_select_op(query, key, site), want, ["keep"])
    everything = [name for name, *_ in select_op.PARTS]
    same(call_select_op(query, key, dataclasses.replace(site, write=print)), want, everything)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        same(call_select_op(query.requires_grad_(), key, site), want, ["keep"])


def test_the_operator_keeps_torch_s_rules():
    site, query, key = site_of(CONFIGS[0], (300, 300), padded=True)
    for record in (False, True):
        state = torch.tensor(0.7), torch.tensor(0.1)
        inputs = (query, key, list(site.layout), *state, list(site.mask.buffers), site.rules, record)
        torch.library.opcheck(
            torch.ops.omnisparse.select_blocks.default, inputs, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.slow
def test_all_layers_share_one_graph(monkeypatch):
    graphs = []

    def compile_graph(graph_module, inputs, **options):
        graphs.append(graph_module)
        return inner(graph_module, inputs, **options)

    inner = select_op.compile_graph
    monkeypatch.setattr(select_op, "compile_graph", compile_graph)
    model = build("llama", "cpu", num_hidden_layers=2)
    ids = torch.randint(10, 180, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        config = OmniSparseConfig(target_recall=(0.9, 0.5), min_peak=0.5, window_size=64)
        apply_omnisparse(model, config, min_seq_len=0)
        sparse = model(input_ids=ids).logits
        assert len(graphs) == 1 and len(rewrite_report(model).rewritten) == 2
        with collect_stats(model) as stats:
            assert torch.allclose(model(input_ids=ids).logits, sparse, atol=1e-5)
    assert len(graphs) == 2, "one more, for the statistics"
    assert len(stats.per_layer()) == 2 and not torch.allclose(dense, sparse, atol=1e-3)


@pytest.mark.slow
def test_changed_logits_stay_in_the_graph(monkeypatch):
    """Their change reads tensors and functions of the model's, which no name spells."""
    attended, calling = [], select_op.call_select_op
    monkeypatch.setattr(select_op, "call_select_op", lambda *args: attended.append(1) or calling(*args))

    def attention(query, key, value, cap):
        return torch.ops.omnisparse.attn(query, key, value, None, None, True, 0.25, 0, cap)

    for cap in (20.0, 0.0):
        own = backend.Backend(CONFIGS[0], min_seq_len=0, inner="inductor")
        # A graph from AOTAutograd's cache would not be traced.
        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
            torch.compile(attention, backend=own, dynamic=False)(*torch.randn(3, 1, 2, 300, 16), cap)
        assert [site.rewritten for site in own.last.sites] == [True]
        assert bool(attended) == (cap == 0)


def test_rules_and_shapes_have_graphs_of_their_own():
    """By its name Dynamo remembers which sizes of a function changed."""
    site, *_ = site_of(CONFIGS[0], (300, 300))
    kinds = [(4, 2, 16, torch.float32, "cpu"), (8, 8, 32, torch.float32, "cpu")]
    names = {select_op.compiled(site.rules, record, 6, kind).__name__ for kind in kinds for record in (False, True)}
    assert len(names) == 4


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_static_graphs_are_static_here_too(static, monkeypatch):
    sizes, inner = [], select_op.compile_graph

    def compile_graph(graph_module, inputs, **options):
        sizes.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return inner(graph_module, inputs, **options)

    monkeypatch.setattr(select_op, "compile_graph", compile_graph)
    before = select_op.graphs
    for length in (700, 900):
        site, query, key = site_of(CONFIGS[1], (length, length))
        site = dataclasses.replace(site, static=static, rules=register(dataclasses.replace(site, static=static)))
        call_select_op(query, key, site)
    assert select_op.graphs == before + 2 and bool(sizes[1]) != static
