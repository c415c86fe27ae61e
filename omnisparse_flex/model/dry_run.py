"""The report before the first run: trace the decoder on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from omnisparse_flex.backend import Backend, site_report
from omnisparse_flex.model.compiled_module import CompiledDecoder
from omnisparse_flex.passes import Settings, run_pipeline
from omnisparse_flex.report import RewriteReport

#: Tokens of the traced input; any length above the threshold tells the same story.
TRACE_TOKENS = 512


def explain(entry: CompiledDecoder) -> RewriteReport:
    """List the sites that a prefill above the threshold would rewrite.

    Args:
        entry: The installed entry; its module and backend are left untouched.

    Returns:
        A report with ``compiled=False``; empty for modules whose inputs only their user knows.
    """
    notes = tuple(entry.backend.log.notes)
    config = getattr(entry.module, "config", None)
    if config is None or not hasattr(config, "hidden_size"):
        return RewriteReport(notes=(*notes, "the sites of a plain module are known after its first run"))
    copy = _meta_copy(entry.module)
    tracer = _DryRunBackend(entry.backend)
    traced = CompiledDecoder(copy, tracer, dynamic=True, forwards_kwargs=entry.forwards_kwargs)
    traced.state.recall = traced.state.recall.to("meta")
    failed = _trace(traced, config)
    return RewriteReport(tuple(tracer.log.sites), False, 0, (*notes, *failed))


def _trace(traced: CompiledDecoder, config: Any) -> tuple[str, ...]:
    """Run a decoder without storage; a note where that fails, for whatever reason: it tells nothing of a real run."""
    dtype = next(traced.module.parameters()).dtype
    embeddings = torch.empty((1, TRACE_TOKENS, config.hidden_size), device="meta", dtype=dtype)
    ids = torch.zeros((1, TRACE_TOKENS), device="meta", dtype=torch.long)
    error = ""
    # Some decoders need the ids too: Gemma 4 has embeddings for each layer.
    for inputs in ({"inputs_embeds": embeddings}, {"input_ids": ids}):
        traced.backend.log.sites.clear()
        try:
            with torch.no_grad():
                traced(**inputs, use_cache=False)
        except Exception as raised:
            error = type(raised).__name__
        else:
            return ()
    return (f"the sites are known after the first run (a trace without weights failed with {error})",)


def _meta_copy(decoder: nn.Module) -> nn.Module:
    """A decoder of the same config on the meta device: shapes without storage."""
    with torch.device("meta"):
        copy: nn.Module = type(decoder)(decoder.config)
    return copy.to(next(decoder.parameters()).dtype).train(decoder.training)


class _DryRunBackend(Backend):
    """Runs the passes on each captured graph for their report, and compiles nothing; results are empty meta tensors."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend.config, min_seq_len=0, kernel=backend.kernel, inner=backend.inner)

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        rewrite = run_pipeline(graph_module, Settings(config=self.config, lists=True, stateful=True))
        self.log.sites += [site_report(site, -1) for site in rewrite.sites]
        self.thread.runs += 1
        output = graph_module.graph.find_nodes(op="output")[0]
        # Shapes are all that is asked for: hand back what the capture recorded.
        fakes = tuple(_meta(node) for node in output.args[0])
        return lambda *args: fakes


def _meta(node: Any) -> Any:
    value = node.meta.get("example_value") if hasattr(node, "meta") else node
    if isinstance(value, torch.Tensor):
        return torch.empty([int(size) for size in value.shape], dtype=value.dtype, device="meta")
    return value
