"""The graph checks count what runs and find what is quadratic, in sub-graphs too."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from omnisparse_flex.testing import AttentionShape, assert_no_square, count_hops


def captured(function, *inputs, dynamic=False):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (graph,) = graphs
    return graph


N = 130
INPUTS = AttentionShape(batch=1, kv_heads=2, group=1, q_len=N, kv_len=N, head_dim=16).inputs()


def flex(query, key, value):
    return flex_attention(query, key, value, score_mod=lambda score, b, h, q, kv: score + q - kv)


def checkpointed(query, key, value):
    return checkpoint(flex, query, key, value, use_reentrant=False)


@pytest.mark.parametrize(
    ("function", "hops"),
    [
        (F.scaled_dot_product_attention, 0),
        (flex, 1),
        (checkpointed, 1),
        (lambda q, k, v: flex(checkpointed(q, k, v), checkpointed(k, q, v), flex(v, k, q)), 4),
    ],
)
def test_count_hops(function, hops):
    assert count_hops(captured(function, *INPUTS)) == hops


def test_count_hops_counts_a_body_once_for_each_call_of_it():
    graph = captured(checkpointed, *INPUTS).graph
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    with graph.inserting_after(call):
        graph.node_copy(call)
    assert count_hops(graph.owning_module) == 2


def test_count_hops_leaves_a_body_that_nothing_calls_out():
    graph = captured(checkpointed, *INPUTS).graph
    graph.output_node().args = ((next(iter(graph.nodes)),),)
    for node in reversed(graph.nodes):
        if node.op == "call_function":
            graph.erase_node(node)
    assert graph.find_nodes(op="get_attr") and count_hops(graph.owning_module) == 0


def masked_sdpa(query, key, value):
    length = query.shape[2]
    return F.scaled_dot_product_attention(query, key, value, query.new_ones(length, length).tril())


@pytest.mark.parametrize("dynamic", [False, True])
def test_assert_no_square_finds_the_mask(dynamic):
    assert_no_square(captured(flex, *INPUTS, dynamic=dynamic), N)
    square = captured(masked_sdpa, *INPUTS, dynamic=dynamic)
    assert_no_square(square, 999)
    with pytest.raises(AssertionError, match=r"^2 values hold 130 x 130 elements:\n.*new_ones.* has shape \("):
        assert_no_square(square, N)


def test_assert_no_square_looks_into_checkpoint_bodies():
    graph = captured(lambda q, k, v: checkpoint(masked_sdpa, q, k, v, use_reentrant=False), *INPUTS)
    with pytest.raises(AssertionError, match="130 x 130"):
        assert_no_square(graph, N)


def test_assert_no_square_refuses_a_graph_without_shapes():
    with pytest.raises(AssertionError, match="nothing was checked"):
        assert_no_square(torch.fx.symbolic_trace(lambda x: x @ x.mT), N)
