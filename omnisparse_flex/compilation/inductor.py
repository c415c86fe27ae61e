"""Inductor, with the options that our graphs need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from omnisparse_flex.compilation import missing_barrier
from omnisparse_flex.compilation.cache_names import cacheable_functions

CompiledFn = Callable[..., Any]


def compile_graph(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    mode: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> CompiledFn:
    """Compile a graph that Dynamo captured.

    Args:
        graph_module: The graph, rewritten where it is to be.
        inputs: Its example inputs.
        mode: As in ``torch.compile``.
        options: Further options of Inductor.

    Returns:
        The compiled callable.
    """
    from torch._inductor import list_mode_options  # not at import: it is slow to load
    from torch._inductor.compile_fx import compile_fx

    # The cache's key holds this option, and with it our source.
    patches: dict[str, Any] = {"unsafe_marked_cacheable_functions": cacheable_functions(graph_module)}
    if mode:
        patches.update(list_mode_options(mode))
    patches.update(options)
    if device_of(inputs).type == "cpu":
        # The C++ flex template takes no epilogue, and a fused one fails to compile.
        patches["epilogue_fusion"] = False
    else:
        missing_barrier.patch_inductor()
    return cast(CompiledFn, compile_fx(graph_module, list(inputs), config_patches=patches))


def tensors_of(inputs: Sequence[Any]) -> Iterator[Tensor]:
    """Those of a graph's inputs that are tensors."""
    return (x for x in inputs if isinstance(x, Tensor))


def device_of(inputs: Sequence[Any]) -> torch.device:
    """The accelerator that holds some input, else the CPU."""
    accelerators = (x.device for x in tensors_of(inputs) if x.device.type != "cpu")
    return next(accelerators, torch.device("cpu"))
