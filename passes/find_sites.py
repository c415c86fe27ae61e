"""Pass 1: find every attention site, in the graph and in its checkpointed sub-graphs.

Before::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense

After::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=keys, value=values, mask=mask
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch._higher_order_ops.flex_attention import flex_attention as flex_hop
from torch.fx import GraphModule, Node

import omnisparse_flex.attention.marker  # noqa: F401  (defines the marker)
from omnisparse_flex.errors import bug, raises_bugs
from omnisparse_flex.passes.match_eager import match_eager
from omnisparse_flex.passes.nodes import number_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Leaf, Rewrite, Site
from omnisparse_flex.passes.writes import changes_between
from omnisparse_flex.types import StateTensors

MARKERS = (torch.ops.omnisparse.attn, torch.ops.omnisparse.attn.default)
BINDS = (torch.ops.omnisparse.bind, torch.ops.omnisparse.bind.default)
#: Higher-order calls ``op(body, *operands)`` whose body we may extend by inputs.
BODY_CALLS = ("tag_activation_checkpoint", "wrap")
#: Place of the state's first operand among the marker's.
STATE_FROM = 10
#: Why a site stays dense that would otherwise select without knowing which tokens it may drop.
STATE_LOST = "the call's state (visual tokens, target recall) does not reach this graph: Dynamo broke the module"
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
#: Of the flex operator's block-mask tuple: its last entry is the mask graph.
MASK_GRAPH = -1


def find_sites(rewrite: Rewrite) -> None:
    """Fill ``scopes`` and ``sites``; changes nothing."""
    bound: StateTensors[Leaf] | None = None
    rewrite.scopes = list(scopes_of(rewrite.root))
    for scope in rewrite.scopes:
        for node in scope.graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in BINDS:
                bound = _state(node.args, scope)
                continue
            site = _match_or_refuse(scope, node)
            if site is None:
                continue
            rewrite.sites.append(site)
            for value, reader in site.reads:
                if changes_between(value, reader, site.node):
                    site.refuse(f"{value.name} is changed in place before the attention that reads it is done")
    _number_layers(rewrite.sites)
    for site in rewrite.sites:
        site.state = site.state or bound
        if rewrite.settings.stateful and site.state is None:
            site.refuse(STATE_LOST)
    for place, reason in rewrite.refused.items():
        rewrite.sites[place].refuse(reason)


def scopes_of(scope: Scope) -> list[Scope]:
    """A graph and the bodies that it calls, parents first."""
    found = [scope]
    for node in scope.graph_module.graph.nodes:
        if node.op != "call_function" or str(node.target).rsplit(".", 1)[-1] not in BODY_CALLS:
            continue
        body = node.args[0] if node.args else None
        if isinstance(body, Node) and body.op == "get_attr":
            graph_module = getattr(scope.graph_module, str(body.target))
            if isinstance(graph_module, GraphModule):
                found += scopes_of(Scope(graph_module, scope, node))
    return found


def _match_or_refuse(scope: Scope, node: Node) -> Site | None:
    """The site at ``node``, if there is one; refused where reading it failed."""
    try:
        return _match(scope, node)
    except Exception as error:
        if raises_bugs():
            raise
        site = Site("unread", scope, node, node, node, node)
        site.refuse(bug("matching", error))
        return site


def _match(scope: Scope, node: Node) -> Site | None:
    if node.target in MARKERS:
        site = _marker(scope, node)
    elif node.target is F.scaled_dot_product_attention:
        site = _sdpa(scope, node)
    elif node.target is flex_hop:
        site = _flex(scope, node)
    else:
        matched = match_eager(node)
        if matched is None:
            return None
        site = Site("eager", scope, **matched)
    site.path = _path(node)
    return site


def _marker(scope: Scope, node: Node) -> Site:
    query, key, value, padding, mask, is_causal, scale, layer, softcap, *sinks = node.args[:STATE_FROM]
    return Site(
        "marker",
        scope,
        node,
        query,  # type: ignore[arg-type]
        key,  # type: ignore[arg-type]
        value,  # type: ignore[arg-type]
        mask=mask,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        causal="lower_right" if is_causal and mask is None else "none",
        scale=number_of(scale),
        softcap=number_of(softcap) or 0.0,
        sinks=sinks[0] if sinks else node.kwargs.get("sinks"),  # type: ignore[arg-type]
        state=_state(node.args[STATE_FROM:], scope),
        layer=_layer_number(layer),
    )


def _layer_number(layer: Any) -> int:
    """The layer of a marker. Of modules that FSDP2 shards, Dynamo makes it an input of the graph: a guard fixes it."""
    number = number_of(layer)
    return -1 if number is None else int(number)


def _state(operands: Iterable[Any], scope: Scope) -> StateTensors[Leaf] | None:
    """The state that an operator is given, or None."""
    state = StateTensors(*(Leaf(x, scope) if isinstance(x, Node) else None for x in operands))
    return state if any(state) else None


def _sdpa(scope: Scope, node: Node) -> Site:
    operands: dict[str, Any] = dict(zip(_SDPA, node.args, strict=False)) | dict(node.kwargs)
    causal = operands.get("is_causal") or False
    site = Site(
        "sdpa",
        scope,
        node,
        operands["query"],
        operands["key"],
        operands["value"],
        mask=operands.get("attn_mask"),
        causal="upper_left" if causal is True else "none",
        scale=number_of(operands.get("scale")),
        dropout=_probability(operands.get("dropout_p", 0.0)),
    )
    unknown = sorted(operands.keys() - set(_SDPA))
    if unknown:
        site.refuse(f"scaled_dot_product_attention has an argument that is not known here: {', '.join(unknown)}")
    if not isinstance(causal, bool):
        site.refuse("is_causal is not known before the run")
    return site


def _probability(p: Any) -> float:
    """A dropout probability; one that nobody knows counts as certain, and so refuses the site."""
    number = number_of(p)
    return 1.0 if number is None else number


def _flex(scope: Scope, node: Node) -> Site:
    query, key, value, score_graph, block_mask, scale, _, *operands = node.args
    score_operands, mask_operands = [*operands, (), ()][:2]
    graphs = [getattr(scope.graph_module, str(g.target)) for g in (score_graph, block_mask[MASK_GRAPH])]  # type: ignore
    site = Site(
        "flex",
        scope,
        node,
        query,  # type: ignore[arg-type]
        key,  # type: ignore[arg-type]
        value,  # type: ignore[arg-type]
        scale=number_of(scale),
        mods=(graphs[0], graphs[1], tuple(score_operands), tuple(mask_operands)),  # type: ignore[arg-type]
        lists=tuple(block_mask),  # type: ignore[arg-type]
    )
    outputs = [user for user in node.users if user.args[1:2] == (0,)]
    others = [user for user in node.users if user not in outputs and user.users]
    if others or len(outputs) != 1:
        site.refuse("flex_attention returns its log-sum-exp")
    else:
        site.node = outputs[0]
    read = (query, key, value, *score_operands, *mask_operands, *block_mask)  # type: ignore[misc]
    site.reads = tuple((x, node) for x in read if isinstance(x, Node))
    return site


def _path(node: Node) -> str:
    """Innermost module of a node, in the user's spelling: ``layers.0.self_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    # ``L['self']._modules['layers']._modules['0'].attn`` and our own entry's ``module_call.__self__`` both occur.
    path = re.sub(
        r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path.replace("L['self']", "").replace("._wrapped_call_impl", "")
    )
    path = re.sub(r"\._modules|__self__|_call_impl", "", path)
    path = re.sub(r"^[LG]\.\w+|^fn\b|^module_call\b", "", path)
    return re.sub(r"\.+", ".", path).strip(".")


def _number_layers(sites: list[Site]) -> None:
    """Sites of models that do not number their layers get their order of appearance."""
    unnumbered = (site for site in sites if site.layer < 0)
    for order, site in enumerate(unnumbered):
        site.layer = order
