"""Every operator that a pass recognises is recognised with all its arguments: one that nobody asked for is no match."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend
from omnisparse_flex.passes.arguments import INERT, OF_FUNCTION, PARAMETERS, arguments, is_plain
from omnisparse_flex.passes.nodes import op_name

EVERYTHING = OmniSparseConfig(target_recall=0.9999999, lazy_threshold=None)
N, D = 64, 16
#: aten names of what Dynamo spells otherwise.
ATEN = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "iadd": "add",
    "not": "bitwise_not",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "requires_grad_": "detach",
}
#: Other names of the parameters that a table of ours names.
SAME = {"self": "input", "train": "training", "indices": "input", "a": "input", "b": "other"}
#: Passed by nobody to a function of Python: they are parts of TorchScript.
SCRIPT = {"int", "float", "complex", "str", "t", "left_t", "right_", "bool", "enum", "device", "default"}


def overloads(name):
    packet = getattr(torch.ops.aten, ATEN.get(name, name), None)
    for overload in packet.overloads() if packet else ():
        arguments_ = getattr(packet, overload)._schema.arguments
        if not (overload in SCRIPT and arguments_ and arguments_[0].name in ("a", "l", "n", "list")):
            yield overload, arguments_


WALKED = [
    (name, overload, argument.name)
    for name in sorted(PARAMETERS)
    for overload, found in overloads(name)
    for argument in found
    if SAME.get(argument.name, argument.name) not in (*PARAMETERS[name], *INERT)
]


def test_the_walk_reaches_what_it_is_for():
    assert {("add", "Tensor", "alpha"), ("div", "Tensor_mode", "rounding_mode"), ("max", "dim", "dim")} <= set(WALKED)
    assert len(WALKED) > 100


@pytest.mark.parametrize(("name", "overload", "argument"), WALKED)
def test_no_overload_brings_an_argument_that_is_overlooked(name, overload, argument):
    graph = Graph()
    operand = graph.placeholder("x")
    given = dict.fromkeys(PARAMETERS[name], operand) | {argument: operand}
    first = next(iter(PARAMETERS[name]))
    node = graph.call_function(getattr(torch.ops.aten, ATEN.get(name, name)), (given.pop(first),), given)
    node = graph.call_method(name, node.args, node.kwargs)
    understood = arguments(node, *PARAMETERS[name])
    assert understood is None, f"{name}.{overload} has {argument}"


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_all_by_name_and_all_by_position_are_the_same(name):
    graph, parameters = Graph(), PARAMETERS[name]
    operands = [graph.placeholder(f"x{i}") for i in range(len(parameters))]
    by_place = graph.call_method(name, tuple(operands))
    by_name = graph.call_method(name, (operands[0],), dict(zip(parameters[1:], operands[1:], strict=True)))
    expected = dict(zip(parameters, operands, strict=True))
    assert arguments(by_place, *parameters) == arguments(by_name, *parameters) == expected
    assert arguments(graph.call_method(name, (*operands, operands[0])), *parameters) is None, "one too many"
    assert arguments(graph.call_method(name, tuple(operands), {parameters[0]: operands[0]}), *parameters) is None


@pytest.mark.parametrize("function", OF_FUNCTION, ids=lambda f: f.__name__)
def test_functions_that_differ_from_their_method(function):
    graph = Graph()
    operand = graph.placeholder("x")
    names = OF_FUNCTION[function]
    assert arguments(graph.call_function(function, (operand,) * len(names)), *names) == dict.fromkeys(names, operand)
    assert arguments(graph.call_function(function, (operand,) * len(names)), *names[:1]) is None
    assert arguments(graph.call_function(function, (operand,), {"unheard_of": 1}), *names) is None


def test_sizes_by_position_and_nothing_unknown_by_name():
    graph = Graph()
    operand = graph.placeholder("x")
    assert is_plain(graph.call_method("view", (operand, 2, 3), {"memory_format": None}))
    assert not is_plain(graph.call_method("view", (operand,), {"dtype": torch.int32}))


@torch.library.custom_op("omnisparse_tests::add", mutates_args=())
def strange_add(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return input - other


@strange_add.register_fake
def _(input, other):
    return torch.empty_like(input)


def softmax(x, dim):
    """Not torch's."""
    return torch.softmax(-x, dim)


softmax = torch._dynamo.allow_in_graph(softmax)


def test_a_name_alone_is_not_enough():
    graph = Graph()
    operand = graph.placeholder("x")
    for function in (softmax, torch.ops.omnisparse_tests.add.default, torch.ops.omnisparse_tests.add):
        assert op_name(graph.call_function(function, (operand, -1))) not in PARAMETERS


# --- whole sites: a look-alike's numbers are those of the module as it is -----

MASK = torch.full((N, N), -3.0).triu(1)
CALLS = {
    "add, alpha": lambda q, k, v: torch.softmax(torch.add(q @ k.mT / 4, MASK, alpha=3), -1) @ v,
    "add, alpha by the method": lambda q, k, v: (q @ k.mT / 4).add(MASK, alpha=-1).softmax(-1) @ v,
    "sub": lambda q, k, v: torch.softmax(torch.sub(q @ k.mT / 4, MASK), -1) @ v,
    "div, truncated": lambda q, k, v: torch.softmax(torch.div(q @ k.mT, 4, rounding_mode="trunc"), -1) @ v,
    "div, floored, by the method": lambda q, k, v: (q @ k.mT).div(4, rounding_mode="floor").softmax(-1) @ v,
    "query floored": lambda q, k, v: torch.softmax(torch.div(q, 0.5, rounding_mode="floor") @ k.mT, -1) @ v,
    "logits as integers": lambda q, k, v: torch.softmax((q @ k.mT).to(torch.int32).float(), -1) @ v,
    "weights as integers": lambda q, k, v: (torch.softmax(q @ k.mT, -1) * 8).int().float() @ v,
    "a strange softmax": lambda q, k, v: softmax(q @ k.mT / 4, -1) @ v,
    "a strange add": lambda q, k, v: torch.softmax(torch.ops.omnisparse_tests.add(q @ k.mT / 4, MASK), -1) @ v,
    "softmax of a type": lambda q, k, v: F.softmax(q @ k.mT / 4, -1, dtype=torch.float64).float() @ v,
    "softmax over queries by name": lambda q, k, v: F.softmax(input=q @ k.mT / 4, dim=2) @ v,
    "transposed by name": lambda q, k, v: torch.softmax(q @ k.transpose(dim0=-1, dim1=2) / 4, dim=-1) @ v,
    "swapped by name": lambda q, k, v: torch.softmax(q @ torch.swapaxes(k, axis0=3, axis1=-2) / 4, dim=-1) @ v,
    "permuted from the end": lambda q, k, v: torch.softmax(q @ k.permute(0, 1, -1, -2) / 4, dim=-1) @ v,
    "all by name": lambda q, k, v: torch.matmul(input=torch.softmax(input=torch.matmul(q, other=k.mT), dim=3), other=v),
    "filled by name": lambda q, k, v: (q @ k.mT).masked_fill(mask=MASK < 0, value=-math.inf).softmax(dim=-1) @ v,
    "dropout by name": lambda q, k, v: F.dropout(input=(q @ k.mT).softmax(-1), p=0.3, training=False) @ v,
    "dropout of torch": lambda q, k, v: torch.dropout((q @ k.mT).softmax(-1), 0.3, train=False) @ v,
}
MASKS = {
    "add, alpha": lambda i, j: torch.add(i, j, alpha=-1) >= 0,
    "sub, alpha": lambda i, j: torch.sub(i, j, alpha=2) >= 0,
    "rsub": lambda i, j: torch.rsub(i, j, alpha=2) <= 0,
    "div, truncated": lambda i, j: torch.div(i - j, 8, rounding_mode="trunc") >= 0,
    "div, floored": lambda i, j: torch.div(i - j, 8, rounding_mode="floor") >= 0,
    "fmod": lambda i, j: torch.fmod(i - j, 5) != -1,
    "maximum over keys": lambda i, j: (j + 0 * i).max(dim=1, keepdim=True).values >= 2 * j,
    "clamped by name": lambda i, j: (i - j).clamp(max=9) >= torch.clamp(j * 0, min=-5),
    "shifted diagonal by name": lambda i, j: torch.ones(N, N, dtype=torch.bool).tril(diagonal=3),
    "one more by name": lambda i, j: torch.arange(start=1, end=N + 1)[:, None] > j,
    "two steps": lambda i, j: 2 * i >= torch.arange(0, 2 * N, step=2),
    "reinterpreted": lambda i, j: (i + 1).float().view(torch.int32) >= (j + 1).float().view(torch.int32),
    "positions in half": lambda i, j: (i.bfloat16() * 33).to(torch.int64) >= (j.bfloat16() * 33).to(torch.int64),
    "positions in bytes": lambda i, j: (i * 5).to(torch.int8) >= (j * 5).to(torch.int8),
    "arange of bytes": lambda i, j: i >= torch.arange(N, dtype=torch.uint8) * 5,
    "where by name": lambda i, j: torch.where(condition=i >= j, input=j >= 0, other=j < 0),
    "three in a row": lambda i, j: (i >= j).unsqueeze(dim=0),
    "transposed by name": lambda i, j: (j >= i).transpose(dim0=1, dim1=0),
    "flipped": lambda i, j: (i + j >= N).flip(1),
    "rolled": lambda i, j: (i >= j).roll(2, 1) | (i == j),
    "cumulated": lambda i, j: (i == j).cumsum(1) > 0,
}


def compare(call):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, N, D, generator=generator) for _ in range(3)]
    backend = Backend(EVERYTHING, inner="eager", min_seq_len=0)
    torch.testing.assert_close(torch.compile(call, backend=backend, fullgraph=True)(*tensors), call(*tensors))
    return backend


@pytest.mark.parametrize("name", CALLS)
def test_lookalikes_of_attention(name):
    compare(CALLS[name])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("additive", [False, True])
def test_lookalikes_in_masks(name, additive):
    def call(q, k, v):
        i, j = torch.arange(N)[:, None], torch.arange(N)[None]
        mask = MASKS[name](i, j)
        mask = mask | (i == j)
        mask = torch.zeros(()).masked_fill(~mask, -math.inf) if additive else mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compare(call)


def test_embeddings_that_scale_or_change_their_table():
    weight, bucket = torch.randn(8, 3), (torch.arange(N)[:, None] - torch.arange(N)).clamp(0, 7)

    for options in ({"max_norm": 0.5}, {"padding_idx": 2}, {}):
        table = weight.clone()

        def call(q, k, v, table=table, options=options):
            bias = F.embedding(bucket, table, **options).permute(2, 0, 1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        compare(call)


def test_keys_repeated_unevenly():
    def call(q, k, v):
        k, v = (x[:, :2].repeat_interleave(torch.tensor([1, 2]), 1, output_size=3) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    assert compare(call).log.report().rewritten[0].kv_heads == 3


def test_causality_that_is_not_known_before_the_run():
    class Site:
        pass

    graph = Graph()
    tensors = [graph.placeholder(x) for x in "qkvc"]
    node = graph.call_function(F.scaled_dot_product_attention, tuple(tensors[:3]), {"is_causal": tensors[3]})
    import importlib

    find_sites = importlib.import_module("omnisparse_flex.passes.find_sites")
    site = find_sites._sdpa(Site(), node)
    assert site.skip.reason == "is_causal is not known before the run"
    node = graph.call_function(F.scaled_dot_product_attention, tuple(tensors[:3]), {"window": 3})
    assert "window" in find_sites._sdpa(Site(), node).skip.reason
