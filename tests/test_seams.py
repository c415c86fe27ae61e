"""What this library assumes of the inside of torch and transformers: one quick test for each.

A test that fails says which assumption does not hold any more, and which files of ours rely on it.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from omnisparse_flex import seams
from tests.helpers.assumption import SOURCES, seam


def test_a_broken_seam_names_what_broke_and_who_relies_on_it() -> None:
    told = r"no longer true: x is 2 .*AssertionError: it is 1.*trace_mask\.py"
    with pytest.raises(AssertionError, match=told), seam("x is 2", "def trace_mask_mod"):
        raise AssertionError("it is 1")
    with pytest.raises(AssertionError, match="drop its test"), seam("x is 2", "no such " + "word anywhere"):
        pass


# Names.


@pytest.mark.parametrize("name", sorted(name for kind in seams.SEAMS.values() for name in kind))
def test_a_name_that_is_looked_up_at_run_time_exists(name: str) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    with seam(f"{name} exists", re.split(r"[.:]", name)[-1]):
        assert seams.exists(name) and seams.is_written(name)


def private_imports() -> set[str]:
    """``module:name`` of every import from the inside of torch or transformers in our source."""
    inside = re.compile(r"torch\.(.*\._|_|fx\.experimental|utils\._)|transformers\.|torch\.utils$")
    return {
        f"{node.module}:{alias.name}"
        for text in SOURCES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and inside.match(node.module or "")
        for alias in node.names
    }


def private_attributes() -> set[str]:
    """``torch._a.b`` and ``torch.ops.aten.c`` as our source writes them."""
    dotted = re.compile(r"(?<![\w./])torch\.(?:_[A-Za-z]\w*|ops\.aten)(?:\.\w+)+")
    return {name for text in SOURCES.values() for name in dotted.findall(text)}


@pytest.mark.parametrize("name", sorted(private_imports()))
def test_what_our_source_imports_from_inside_exists(name: str) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    with seam(f"{name} exists", name.partition(":")[2]):
        assert seams.exists(name) or seams.exists(f"{name.replace(':', '.')}:__name__")


@pytest.mark.parametrize("name", sorted(private_attributes()))
def test_what_our_source_reads_inside_torch_exists(name: str) -> None:
    if "_cuda_" in name and torch.version.cuda is None:
        pytest.skip("a torch without CUDA")
    with seam(f"{name} exists", name):
        path = name.split(".")[1:]
        assert seams.exists(f"torch:{'.'.join(path)}") or any(
            seams.exists(f"torch.{'.'.join(path[:i])}:{'.'.join(path[i:])}") for i in range(1, len(path))
        ) or seams.exists(f"{name}:__name__")  # fmt: skip


# FlexAttention.


def causal_blocks(length: int, mask_mod):
    from torch.nn.attention.flex_attention import BlockMask

    blocks = length // 128
    keep = torch.ones(blocks, blocks).tril()
    number, order = keep.sum(-1), keep.sort(dim=-1, descending=True, stable=True).indices
    lists = {"kv_num_blocks": number[None, None].int(), "kv_indices": order[None, None].int()}
    rest = ("full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    return BlockMask((length, length), **lists, **dict.fromkeys(rest), BLOCK_SIZE=(128, 128), mask_mod=mask_mod)


def test_a_block_mask_is_made_of_lists_and_its_tuple_ends_with_the_mask() -> None:
    with seam("BlockMask takes its lists by name, and as_tuple() ends with mask_mod", "as_tuple()[:-1]"):
        mask_mod = lambda b, h, q, kv: q >= kv  # noqa: E731
        made = causal_blocks(256, mask_mod)
        assert made.as_tuple()[-1] is mask_mod


def test_the_flex_operator_runs_as_we_call_it() -> None:
    what = "flex_attention's operator takes mask buffers last, and returns (out, log-sum-exp to base 2, ...)"
    with seam(what, "import flex_attention as flex_hop", "OUTPUT_LOGSUMEXP"):
        from torch._higher_order_ops.flex_attention import flex_attention as flex_hop

        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 256, 16).unbind(0)
        shift = lambda b, h, i, j, offset: j <= i + offset  # noqa: E731
        lists = (*causal_blocks(256, None).as_tuple()[:-1], shift)
        options = dict.fromkeys(("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "OUTPUT_MAX"), False)
        options |= {"WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True}
        score = lambda s, b, h, i, j: s  # noqa: E731
        out, lse, *_ = flex_hop(q, k, v, score, lists, 0.25, options, (), (torch.tensor(0),))
        logits = (q @ k.mT * 0.25).masked_fill(~torch.ones(256, 256, dtype=torch.bool).tril(), -math.inf)
        torch.testing.assert_close(out, logits.softmax(-1) @ v)
        torch.testing.assert_close(lse * math.log(2), logits.logsumexp(-1))


# Dynamo: what a captured graph looks like.


class Captured(list):
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __call__(self, graph_module, inputs):
        self.append(graph_module)
        return graph_module.forward

    def nodes(self, graph_module=None):
        return [n for n in (graph_module or self[0]).graph.nodes if n.op == "call_function"]


def capture(function, *inputs) -> Captured:
    graphs = Captured()
    torch.compile(function, backend=graphs, fullgraph=True)(*inputs)
    return graphs


class Layer(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_sdpa_is_one_node_that_knows_its_module_and_its_shape() -> None:
    what = "Dynamo keeps F.scaled_dot_product_attention as one node, with nn_module_stack and example_value"
    with seam(what, "F.scaled_dot_product_attention", "nn_module_stack"):
        model = nn.ModuleDict({"inner": Layer()})
        graphs = capture(lambda q: model["inner"](q), torch.randn(1, 2, 8, 16))
        (node,) = [n for n in graphs.nodes() if n.target is F.scaled_dot_product_attention]
        path, kind = list(node.meta["nn_module_stack"].values())[-1]
        assert "inner" in path and (kind is Layer or "Layer" in str(kind))
        assert tuple(node.args[0].meta["example_value"].shape) == (1, 2, 8, 16)


def test_flex_attention_is_one_node_with_its_graphs_in_known_places() -> None:
    what = "Dynamo writes flex_attention as its operator: graphs in args 3 and 4[-1], the scale in 5, buffers from 7 on"
    with seam(what, "node.target is flex_hop", "MASK_GRAPH"):
        from torch._higher_order_ops.flex_attention import flex_attention as flex_hop
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        table = torch.zeros(128, dtype=torch.int64)
        mask = create_block_mask(lambda b, h, i, j: table[i] == table[j], None, None, 128, 128, device="cpu")
        q = torch.randn(1, 1, 128, 16)
        graphs = capture(lambda q: flex_attention(q, q, q, block_mask=mask, scale=0.5), q)
        (node,) = [n for n in graphs.nodes() if n.target is flex_hop]
        score, blocks, scale, _, score_buffers, mask_buffers = node.args[3:9]
        assert score.op == blocks[-1].op == "get_attr" and scale == 0.5
        assert isinstance(getattr(graphs[0], blocks[-1].target), torch.fx.GraphModule)
        assert len(score_buffers) == 0 and len(mask_buffers) == 1


def test_a_checkpointed_function_is_a_body_with_operands() -> None:
    what = "activation checkpointing is tag_activation_checkpoint(body, *operands), the body a graph of its own"
    with seam(what, "tag_activation_checkpoint"):
        layer = Layer()
        q = torch.randn(1, 2, 8, 16, requires_grad=True)
        graphs = capture(lambda q: checkpoint(layer, q, use_reentrant=False), q)
        (node,) = [n for n in graphs.nodes() if "tag_activation_checkpoint" in str(n.target)]
        assert str(node.target).rsplit(".", 1)[-1] == "tag_activation_checkpoint" and node.args[0].op == "get_attr"
        body = getattr(graphs[0], node.args[0].target)
        assert F.scaled_dot_product_attention in [n.target for n in graphs.nodes(body)]


def test_a_composite_operator_is_one_node_and_one_with_an_effect_stays() -> None:
    what = "Dynamo keeps a CompositeImplicitAutograd operator as one node, and one without users if it has an effect"
    with seam(what, "CompositeImplicitAutograd", "has_side_effect"):
        import omnisparse_flex.attention.marker  # noqa: F401

        def call(q, recall):
            torch.ops.omnisparse.bind(None, recall, None, None, None)
            return torch.ops.omnisparse.attn(q, q, q, None, None, True, 0.25, 0, 0.0, None)

        targets = [str(n.target) for n in capture(call, torch.randn(1, 2, 8, 16), torch.ones(2)).nodes()]
        assert [t for t in targets if "omnisparse.bind" in t] and [t for t in targets if "omnisparse.attn" in t]


def test_functions_with_code_objects_of_their_own_are_compiled_apart() -> None:
    with seam("Dynamo's cache and limits belong to a code object", "__code__.replace(co_name="):

        def template(x):
            return module_call(x)  # noqa: F821

        graphs = []
        for call in (torch.sin, torch.cos, torch.exp):
            function = types.FunctionType(
                template.__code__.replace(co_name="own"), {**globals(), "module_call": call}, "own"
            )
            graphs.append(Captured())
            with torch._dynamo.config.patch(recompile_limit=1):
                torch.compile(function, backend=graphs[-1])(torch.ones(2))
        assert [len(kept) for kept in graphs] == [1, 1, 1]


def test_settings_of_dynamo_can_be_entered_again() -> None:
    what = "torch._dynamo.config.patch can be entered again and again where configs live in context variables"
    with seam(what, "_config_module", "ContextVar"):
        from omnisparse_flex.compilation.dynamo_config import dynamo_settings

        before = torch._dynamo.config.recompile_limit
        for _ in range(3):
            with dynamo_settings(recompile_limit=before + 1), dynamo_settings(recompile_limit=before + 1):
                assert torch._dynamo.config.recompile_limit == before + 1
        assert torch._dynamo.config.recompile_limit == before


def test_indexing_by_an_index_is_traced_and_not_read() -> None:
    with seam("TransformGetItemToIndex keeps table[index] in a graph", "TransformGetItemToIndex"):
        from omnisparse_flex.attention.trace_mask import trace_mask_mod

        table = torch.tensor([0, 0, 1, 1])
        program = trace_mask_mod(lambda b, h, q, kv: table[q] == table[kv], torch.device("cpu"))
        assert {buffer.data_ptr() for buffer in program.buffers} == {table.data_ptr()}


def test_a_compiled_call_takes_the_place_of_a_modules_own() -> None:
    with seam("nn.Module calls _compiled_call_impl if there is one, hooks and all", "_compiled_call_impl"):
        layer = nn.Linear(2, 2)
        layer._compiled_call_impl = lambda x: ("ours", layer._call_impl(x))
        assert layer(torch.ones(2))[0] == "ours"
        layer._compiled_call_impl = None
        assert isinstance(layer(torch.ones(2)), torch.Tensor)
        assert "_compiled_call_impl" not in layer.state_dict()


# Inductor.


def test_inductor_takes_our_options() -> None:
    with seam(
        "compile_fx takes config_patches, and modes are dicts of options", "config_patches=", "list_mode_options"
    ):
        from torch._inductor import config, list_mode_options
        from torch._inductor.compile_fx import compile_fx

        assert "config_patches" in inspect.signature(compile_fx).parameters
        with config.patch({**list_mode_options("max-autotune"), "epilogue_fusion": False}):
            assert config.epilogue_fusion is False


def test_the_cache_of_compiled_graphs_asks_which_functions_are_safe() -> None:
    with seam("AOTAutograd's cache reads unsafe_marked_cacheable_functions", "unsafe_marked_cacheable_functions"):
        from torch._functorch._aot_autograd import autograd_cache

        assert "unsafe_marked_cacheable_functions" in inspect.getsource(autograd_cache)


def test_the_missing_barrier_is_written_by_torch_or_can_be_by_us() -> None:
    what = "CSEProxy.load(name, index) knows its kernel, whose cse lists invalidated stores"
    with seam(what, "invalidated_stores", "CSEProxy.load"):
        from torch._inductor.codegen import common, triton

        if "invalidated_stores" in inspect.getsource(triton.TritonKernel.load):
            return  # torch's own mend
        assert list(inspect.signature(common.CSEProxy.load).parameters) == ["self", "name", "index"]
        assert "self.kernel" in inspect.getsource(common.CSEProxy)
        assert "invalidated_stores" in inspect.getsource(common.CSE)
