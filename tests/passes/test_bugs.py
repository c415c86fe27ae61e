"""Our own failures: the site at fault stays dense and says so, the others are rewritten, and the numbers stay."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention import select_op
from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.backend import Backend
from omnisparse_flex.errors import BUG, PassError
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import grid_of, select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.passes import run as runner
from omnisparse_flex.testing import assert_close_to_oracle

EVERYTHING = OmniSparseConfig(target_recall=0.9999999, lazy_threshold=None)
N = 140


@pytest.fixture
def lenient(monkeypatch):
    """As with a user: failures become skips. The warning that they come with is expected."""
    monkeypatch.setenv("OMNISPARSE_RAISE_BUGS", "0")


def qkv(grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, N, 16, generator=generator).requires_grad_(grad) for _ in range(3)]


def two_sites(q, k, v):
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(first, k, v, is_causal=True)


def checkpointed(q, k, v):
    first = checkpoint(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), q, k, v, use_reentrant=False)
    return F.scaled_dot_product_attention(first, k, v, is_causal=True)


def fails_at(name, layer, monkeypatch):
    """Let one pass fail at one site, after it has done its work there; None: after its last site."""
    real = getattr(runner, name)

    def broken(rewrite):
        visit = rewrite.visit

        def visits(sites):
            for site in visit(sites):
                yield site
                if site.layer == layer:
                    raise PassError("a broken invariant")

        rewrite.visit = visits
        real(rewrite)
        if layer is None:
            raise PassError("a broken invariant")

    broken.__name__ = name
    monkeypatch.setattr(runner, "PIPELINE", tuple(broken if x is real else x for x in runner.PIPELINE))


def run(call, tensors, inner="eager"):
    backend = Backend(EVERYTHING, inner=inner, min_seq_len=0)
    with pytest.warns(UserWarning, match=BUG):
        out = torch.compile(call, backend=backend, fullgraph=True)(*tensors)
    return out, [site.reason for site in backend.log.sites], backend


@pytest.mark.parametrize("name", ["undo_repeat_kv", "lift_masks", "decide", "lower"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_that_fails_at_a_site_leaves_that_site_dense(name, layer, lenient, monkeypatch):
    fails_at(name, layer, monkeypatch)
    tensors = qkv()
    out, reasons, backend = run(two_sites, tensors)
    assert reasons[layer] == f"{BUG}: the pass {name} failed with PassError: a broken invariant"
    assert reasons[1 - layer] == "" and backend.log.report().rewritten
    torch.testing.assert_close(out, two_sites(*tensors))


@pytest.mark.parametrize("name", ["lower", "clean_up"])
def test_a_pass_that_fails_at_no_site_leaves_all_dense(name, lenient, monkeypatch):
    fails_at(name, None, monkeypatch)
    tensors = qkv()
    out, reasons, _ = run(two_sites, tensors)
    assert reasons == [f"{BUG}: the pass {name} failed with PassError: a broken invariant"] * 2
    torch.testing.assert_close(out, two_sites(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_checkpointed_bodies_are_brought_back_too(layer, lenient, monkeypatch):
    """The body of a checkpoint had got new inputs when its pass failed."""
    fails_at("lower", layer, monkeypatch)
    tensors = qkv(grad=True)
    out, reasons, _ = run(checkpointed, tensors)
    assert reasons[layer].startswith(BUG) and reasons[1 - layer] == ""
    wanted = torch.autograd.grad(checkpointed(*tensors).sum(), tensors)
    for got, want in zip(torch.autograd.grad(out.sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_match_that_fails_is_a_skip(lenient, monkeypatch):
    module = importlib.import_module("omnisparse_flex.passes.find_sites")
    monkeypatch.setattr(module, "_sdpa", lambda *_: 1 / 0)
    tensors = qkv()
    out, reasons, _ = run(two_sites, tensors)
    assert reasons == [f"{BUG}: matching failed with ZeroDivisionError: division by zero"] * 2
    torch.testing.assert_close(out, two_sites(*tensors), rtol=0, atol=0)


def test_an_inner_compiler_that_fails_on_our_graph_compiles_the_one_that_came(lenient):
    def picky(graph_module, inputs):
        if any("omnisparse" in str(node.target) for node in graph_module.graph.nodes):
            raise RuntimeError("no template for this\nsecond line")
        return graph_module.forward

    tensors = qkv()
    out, reasons, backend = run(two_sites, tensors, inner=picky)
    assert reasons == [f"{BUG}: the inner compiler failed with RuntimeError: no template for this"] * 2
    assert str(backend.log.report()).count("no template for this") >= 2
    torch.testing.assert_close(out, two_sites(*tensors), rtol=0, atol=0)


def test_an_inner_compiler_that_fails_on_every_graph_says_so_itself(lenient):
    def broken(graph_module, inputs):
        raise RuntimeError("broken for everybody")

    backend = Backend(EVERYTHING, inner=broken, min_seq_len=0)
    with pytest.raises(Exception, match="broken for everybody"):
        torch.compile(two_sites, backend=backend, fullgraph=True)(*qkv())


def test_out_of_memory_is_nobodys_bug(lenient):
    def full(graph_module, inputs):
        raise torch.OutOfMemoryError("full")

    backend = Backend(EVERYTHING, inner=full, min_seq_len=0)
    with pytest.raises(Exception, match="full"):
        torch.compile(two_sites, backend=backend, fullgraph=True)(*qkv())
    assert backend.log.sites == []


def test_the_projects_own_tests_see_the_failure(monkeypatch):
    fails_at("lower", 0, monkeypatch)
    with pytest.raises(Exception, match="a broken invariant"):
        torch.compile(two_sites, backend=Backend(EVERYTHING, inner="eager", min_seq_len=0))(*qkv())


def test_a_selection_that_fails_to_compile_runs_in_tensor_code(lenient, monkeypatch):
    """Its graph is compiled when it first runs: too late for the site to stay dense."""

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(select_op, "compile_graph", no_compiler)
    select_op.compiled.cache_clear()
    tensors = qkv()
    config = OmniSparseConfig(target_recall=0.9, window_size=1, sink_size=0)
    bare = register(SparseCall(config=config, mask=IndexMask(causal()), lists=True))
    layout = block_layout(IndexMask(causal()), grid_of(*tensors[:2], config.split), config)
    inputs = (*tensors[:2], list(layout), torch.tensor(0.9), torch.tensor(0.1), [], bare, True)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{BUG}: the compiled selection failed"):
            made = torch.ops.omnisparse.select_blocks(*inputs)
        select_op.failed.clear()
    wanted = select_blocks(*tensors[:2], IndexMask(causal()), config, target=0.9, scale=0.25, layout=layout)
    made = dict(zip([name for name, *_ in select_op.PARTS], made, strict=True))
    assert torch.equal(made["keep"], wanted.keep) and torch.equal(made["mass"], wanted.mass)
    select_op.compiled.cache_clear()


def test_nothing_is_copied_or_warned_of_where_nothing_fails(lenient, recwarn):
    tensors = qkv()
    backend = Backend(EVERYTHING, inner="eager", min_seq_len=0)
    out = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), backend=backend)(
        *tensors
    )
    assert [site.reason for site in backend.log.sites] == [""] and not recwarn.list
    assert_close_to_oracle(out, *tensors, torch.ones(N, N, dtype=torch.bool).tril())
