"""Pass 4: which sites pay, and which no flex kernel can run.

In this example, sites of fewer than 512 queries stay dense.

Before::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=k, value=v, mask=lt(sub(q, kv), window)

After::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=k, value=v, mask=lt(sub(q, kv), window), dense: fewer than min_seq_len = 512 queries
"""

from __future__ import annotations

import torch
from torch.fx import Node

from omnisparse_flex.attention.block_sparse import DTYPES, HEAD_DIMS, autocast_dtype
from omnisparse_flex.cost_model import Shape
from omnisparse_flex.masks.expr.expr import TRUE, Const, causal
from omnisparse_flex.passes.nodes import same_size, shape_of, value_of
from omnisparse_flex.passes.state import Rewrite, Settings, Site


def decide(rewrite: Rewrite) -> None:
    """Refuse the sites that must or should stay dense, before anything is changed."""
    for site in rewrite.visit(rewrite.open_sites()):
        reason = _unsupported(site, rewrite.settings) or _unprofitable(site, rewrite.settings)
        if reason:
            site.refuse(reason)


def _unsupported(site: Site, settings: Settings) -> str | None:
    query, key, value = (value_of(x) for x in (site.query, site.key, site.value))
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (query, key, value)):
        return "query, key and value are not (B, H, N, D)"
    if (mismatch := _mismatch(site)) is not None:
        return mismatch
    if site.dropout > 0:
        return f"attention dropout is {site.dropout}: no flex kernel drops weights"
    if settings.lists and query.dtype not in DTYPES and not _autocasts(query):
        return f"dtype {query.dtype} has no compiled flex kernel"
    if settings.lists and not (query.shape[3] in HEAD_DIMS and value.shape[3] in HEAD_DIMS):
        return f"head_dim {int(query.shape[3])} is outside {HEAD_DIMS.start}..{HEAD_DIMS.stop - 1}"
    if query.shape[1] % key.shape[1] != 0:
        return f"{query.shape[1]} query heads do not share {key.shape[1]} key heads evenly"
    dense = settings.config.is_dense(site.layer)
    if settings.config.granularity == "token" and not dense and _learns_scores(site):
        return "a learned bias has no gradient at token granularity"
    if settings.traced and _learns_scores(site, computed=True):
        return "a bias that is computed of learned tensors has its gradient in compiled kernels alone"
    dims = settings.config.scoring_dims
    if dims is not None and dims > query.shape[3]:
        return f"scoring_dims = {dims} is more than head_dim {int(query.shape[3])}"
    if _is_zero(query.shape[2]) or _is_zero(key.shape[2]) or _is_zero(query.shape[0]):
        return "the sequence is empty"
    return None


def _mismatch(site: Site) -> str | None:
    """What dense attention would broadcast and a kernel of ours would not."""
    query, key, value, out = (shape_of(x) for x in (site.query, site.key, site.value, site.node))
    sizes = {
        "batch": (query[0], key[0], value[0]),
        "key heads": (key[1], value[1]),
        "keys": (key[2], value[2]),
        "head_dim": (query[3], key[3]),
        "query heads of the output": (query[1], *out[1:2]),
    }
    for name, found in sizes.items():
        if not all(same_size(found[0], size) for size in found[1:]):
            return f"{name} is broadcast: {' against '.join(str(size) for size in found)}"
    dtypes = {value_of(x).dtype for x in (site.query, site.key, site.value)}
    if len(dtypes) > 1 and autocast_dtype(value_of(site.query).device.type) is None:
        return f"query, key and value differ in dtype: {', '.join(sorted(str(x) for x in dtypes))}"
    return None


def _unprofitable(site: Site, settings: Settings) -> str | None:
    q_len = shape_of(site.query)[2]
    if settings.config.is_dense(site.layer) and _has_fast_dense(site):
        return "dense by target_recall = 1.0"
    query, key = shape_of(site.query), shape_of(site.key)
    min_queries = settings.min_queries(Shape(int(query[1]), int(key[1]), int(query[3])))
    if min_queries == 0:
        return None
    if isinstance(q_len, int) and q_len == 1:
        return "one query: decoding stays dense"
    if min_queries is None:
        return "sparse attention pays at no length here (min_seq_len = 0 runs it)"
    # A length guard: Dynamo compiles one graph for each side of the threshold.
    if q_len < min_queries:
        return f"fewer than min_seq_len = {min_queries} queries"
    return None


def _has_fast_dense(site: Site) -> bool:
    """Whether plain SDPA runs this site without an N x N mask."""
    same = str(shape_of(site.query)[2]) == str(shape_of(site.key)[2])
    return (
        site.kind in ("marker", "sdpa")
        and site.bias is None
        and site.mask is None
        and (site.expr == TRUE or (site.expr == causal(Const(0)) and same))
    )


def _autocasts(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and autocast_dtype(x.device.type) is not None


def _learns_scores(site: Site, computed: bool = False) -> bool:
    """Whether a tensor that changes the logits wants a gradient; ``computed``: one that the graph itself makes."""
    operands = [leaf.node for leaf in site.bias_leaves if not leaf.detached]
    operands += [x for x in (site.mods[2] if site.mods is not None else ()) if isinstance(x, Node)]
    values = [value_of(x) for x in operands if not (computed and isinstance(x, Node) and x.op == "placeholder")]
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)


def _is_zero(size: object) -> bool:
    return isinstance(size, int) and size == 0
