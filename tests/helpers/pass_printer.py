"""A small module in the pipeline, printed compactly: what the docstring of each pass shows before and after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.expr.expr import Apply, Expr, Load
from omnisparse_flex.passes import PIPELINE
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Rewrite, Settings, Site

#: Tokens of the example.
LENGTH = 256


def module(q: Tensor, k: Tensor, v: Tensor, window: Tensor) -> Tensor:
    """Two query heads on one KV head, under a window that a tensor holds."""
    at = torch.arange(LENGTH)
    mask = at[:, None] - at < window
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def captured() -> GraphModule:
    """The graph that Dynamo makes of ``module``."""
    graphs: list[GraphModule] = []

    def keep(graph_module: GraphModule, inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    inputs = [torch.randn(1, heads, LENGTH, 32) for heads in (2, 1, 1)]
    torch._dynamo.reset()
    torch.compile(module, backend=keep, dynamic=False)(*inputs, torch.tensor(64))
    return graphs[0]


def run_before(name: str, min_queries: int = 0) -> Rewrite:
    """The pipeline's run up to the pass ``name``, which has not run yet; shorter sites than ``least`` stay dense."""
    rules = OmniSparseConfig(scoring="mean_pool", budget="per_head")
    rewrite = Rewrite(Scope(captured()), Settings(rules, min_queries=lambda shape: min_queries))
    for run_pass in PIPELINE:
        if run_pass.__name__ == name:
            break
        run_pass(rewrite)
    return rewrite


def printed(rewrite: Rewrite) -> str:
    """One line a node and one a site; arguments that are None and what a site does not know yet are left out."""
    nodes = list(rewrite.root.graph_module.graph.nodes)
    names = {node: _name(node) for node in [*nodes, *(site.node for site in rewrite.sites)]}
    lines = [f"{names[node]} = {_call(node, names)}" for node in nodes if node.op.startswith("call")]
    lines.append(f"return {_text(nodes[-1].args[0][0], names)}")
    return "\n".join([*lines, *(_site(site, names) for site in rewrite.sites)])


def _name(node: Node) -> str:
    """The node's name without Dynamo's prefix; short names for the calls that matter."""
    short = {"scaled_dot_product": "dense", "omnisparse_layer": "sparse", "omnisparse_layout": "layout"}
    known = (name for prefix, name in short.items() if node.name.startswith(prefix))
    return next(known, node.name.removeprefix("l_").removesuffix("_"))


def _call(node: Node, names: dict[Node, str]) -> str:
    target = getattr(node.target, "__name__", str(node.target))
    if target.startswith("omnisparse_"):
        target = target.rpartition("_")[0]  # without the digest of what is constant about the site
    arguments = [_text(x, names) for x in node.args if x is not None]
    arguments += [f"{name}={_text(x, names)}" for name, x in node.kwargs.items() if x is not None]
    return f"{target}({', '.join(arguments)})"


def _text(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, slice):
        return ":"
    return f"({', '.join(_text(x, names) for x in value)})" if isinstance(value, (tuple, list)) else str(value)


def _site(site: Site, names: dict[Node, str]) -> str:
    parts = [f"query={names[site.query]}, key={names[site.key]}, value={names[site.value]}"]
    if site.leaves:
        leaves = ["S - L" if leaf.node is None else _name(leaf.node) for leaf in site.leaves]
        parts.append(f"mask={_expression(site.expr, leaves)}")
    elif site.mask is not None:
        parts.append(f"mask={names[site.mask]}")
    if site.skip is not None:
        parts.append(f"dense: {site.skip.reason}")
    return f"# site {names[site.node]}: {', '.join(parts)}" + (", rewritten" if site.rewritten else "")


def _expression(expr: Expr, leaves: list[str]) -> str:
    if isinstance(expr, Apply):
        return f"{expr.op}({', '.join(_expression(x, leaves) for x in expr.args)})"
    return leaves[expr.slot] if isinstance(expr, Load) else getattr(expr, "axis", str(expr))
