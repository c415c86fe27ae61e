"""The Dynamo seam: captured graph -> passes -> inner compiler."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule

from omnisparse_flex.attention.flex_options import KERNELS, has_flash, notes
from omnisparse_flex.compilation.inductor import CompiledFn, compile_graph, device_of, tensors_of
from omnisparse_flex.compile_or_restore import compile_or_restore
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.config_schema import SCHEMA
from omnisparse_flex.cost_model import LAST, Shape, costs_of, expected_share
from omnisparse_flex.errors import BUG, ConfigError, raises_bugs, require
from omnisparse_flex.passes import Rewrite, Settings, Snapshot, run_pipeline
from omnisparse_flex.passes.dump import check_dump_folder
from omnisparse_flex.passes.nodes import shape_of
from omnisparse_flex.passes.state import Site
from omnisparse_flex.report import Log, SiteReport
from omnisparse_flex.seams import require_seams

INNERS = ("auto", "inductor", "aot_eager", "eager")
#: Queries below which a device that was never measured stays dense. Our choice: twice what an H200 needs.
UNMEASURED_MIN_QUERIES = 16384
#: What a report says where no length pays.
NEVER_PAYS = "dense: these rules pay at no length; max_kv_budget bounds what they may cost, min_seq_len=0 runs them"


class ThreadState(threading.local):
    """What a backend knows of one thread.

    Attributes:
        runs: Number of compiled graphs that ran in it.
        run_hook: Called in place of each graph, given its number, what it reads of its inputs, and itself as a
            function without arguments; or None.
    """

    runs: int = 0
    run_hook: Callable[[int, list[Any], Callable[[], Any]], Any] | None = None


class Backend:
    """One Dynamo backend object: settings, and the log of what it compiled.

    A model gets an object of its own, so that Dynamo keeps its graphs apart from every
    other model's.

    Attributes:
        stateful: Calls have run-time state, which must reach every site.
        log: What it did.
        thread: What it knows of the thread that asks.
        compile_hook: Makes the context that surrounds each inner compile, given the graph's
            number: where a command prints its progress; or None.
    """

    def __init__(
        self,
        config: OmniSparseConfig,
        *,
        min_seq_len: int | str = "auto",
        kernel: str = "auto",
        inner: str | CompiledFn = "auto",
        static: bool = False,
    ) -> None:
        """Check the options; see ``apply_omnisparse`` for their meaning, and ``passes.Settings`` for ``static``.

        Raises:
            ConfigError: On an unknown or mistyped option.
        """
        require(isinstance(config, OmniSparseConfig), "config", "be an OmniSparseConfig", config)
        valid = min_seq_len == "auto" or (isinstance(min_seq_len, int) and not isinstance(min_seq_len, bool))
        require(valid, "min_seq_len", 'be "auto" or an int of at least 0', min_seq_len)
        require(isinstance(min_seq_len, str) or min_seq_len >= 0, "min_seq_len", "be at least 0", min_seq_len)
        require(kernel in KERNELS, "kernel", f"be one of {', '.join(KERNELS)}", kernel)
        rule = f"be a Dynamo backend or one of {', '.join(INNERS)}"
        require(callable(inner) or inner in INNERS, "inner", rule, inner)
        _check_flash(kernel)
        check_dump_folder()
        require_seams("dynamo")
        if inner in ("auto", "inductor"):
            require_seams("inductor")
        self.config = config
        self.min_seq_len = min_seq_len
        self.kernel = kernel
        self.inner = inner
        self.static = static
        self.stateful = False
        self.log, self.thread = Log(), ThreadState()
        self.compile_hook: Callable[[int], contextlib.AbstractContextManager[None]] | None = None
        self.last: Rewrite | None = None

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> CompiledFn:
        """Rewrite one captured graph and hand it to the inner compiler."""
        device, needs_grad = device_of(inputs), _needs_grad(inputs)
        inner = self.inner_for(device, needs_grad)
        settings = Settings(
            config=self.config,
            min_queries=functools.partial(self.min_queries, device),
            lists=inner == "inductor",
            kernel=self.kernel,
            static=self.static,
            traced=needs_grad and inner not in ("inductor", "eager"),
            stateful=self.stateful,
            training=needs_grad,
        )
        before = None if raises_bugs() else Snapshot(graph_module)
        rewrite = run_pipeline(graph_module, settings, before)
        surrounding = self.compile_hook(self.log.graphs) if self.compile_hook else contextlib.nullcontext()
        compile_it = functools.partial(_compile, graph_module, inputs, inner, kwargs.get("mode"))
        with surrounding:
            rewrite, compiled = compile_or_restore(compile_it, graph_module, rewrite, before)
        read = [i for i, x in enumerate(graph_module.graph.find_nodes(op="placeholder")) if x.users]
        # Only now: the inner compiler may raise to make Dynamo start over with other sizes.
        log, thread, number = self.log, self.thread, self.log.graphs
        self._record(rewrite, inner)

        def run(*args: Any) -> Any:
            log.runs += 1
            thread.runs += 1
            if thread.run_hook is not None:
                return thread.run_hook(number, [args[i] for i in read], functools.partial(compiled, *args))
            return compiled(*args)

        return run

    def inner_for(self, device: torch.device, needs_grad: bool) -> str | CompiledFn:
        """The inner compiler of a graph: Inductor, but aot_eager for CPU graphs that need gradients."""
        if self.inner != "auto":
            return self.inner
        return "aot_eager" if device.type == "cpu" and needs_grad else "inductor"

    def min_queries(self, device: torch.device, shape: Shape | None = None) -> int | None:
        """The number of queries from which on attention is sparse; None: never.

        Args:
            device: Where it runs.
            shape: Heads of its attention; None: those of a 7B model.

        Returns:
            ``min_seq_len``, or the device's break-even for the rules at hand, which is noted for the report.
        """
        if isinstance(self.min_seq_len, int):
            return self.min_seq_len
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        costs = costs_of(name)
        if costs is None:
            self.log.notes[f"{name} was never measured: dense below {UNMEASURED_MIN_QUERIES} queries"] = None
            return UNMEASURED_MIN_QUERIES
        queries = costs.break_even(shape or Shape(), self.config, name)
        if queries == LAST:
            self.log.notes[f"{name}: {NEVER_PAYS}"] = None
            return None
        share = expected_share(queries, self.config)
        self.log.notes[f"{name}: sparse from {queries} queries on, if at most {share:.0%} of the pairs are kept"] = None
        return queries

    def _record(self, rewrite: Rewrite, inner: str | CompiledFn) -> None:
        self.last = rewrite
        self.log.sites += [site_report(site, self.log.graphs) for site in rewrite.sites]
        self.log.graphs += 1
        self.log.notes.update(dict.fromkeys(notes((s.layer, s.flash_refused) for s in rewrite.sites)))
        self._warn_of_bugs(rewrite)
        if rewrite.dumped_to:
            self.log.notes[f"the graph after every pass: {rewrite.dumped_to}"] = None
        name = inner if isinstance(inner, str) else getattr(inner, "__name__", type(inner).__name__)
        self.log.inners.add(name)
        if inner != "inductor":
            why = ": compiled flex_attention has no CPU backward" if self.inner == "auto" else ""
            self.log.notes[f"inner compiler {name}{why}; correct, but without sparse kernels"] = None

    def _warn_of_bugs(self, rewrite: Rewrite) -> None:
        """Say once what failed and stays dense for it; the report says which sites."""
        reasons = {site.skip.reason for site in rewrite.sites if site.skip and site.skip.reason.startswith(BUG)}
        for reason in sorted(reasons - self.log.notes.keys()):
            self.log.notes[reason] = None
            warnings.warn(f"omnisparse: {reason}; dense there", stacklevel=2)


def omnisparse_backend(graph_module: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> CompiledFn:
    """``torch.compile(model, backend="omnisparse", options={...})`` for models without transformers.

    Args:
        graph_module: From Dynamo.
        inputs: From Dynamo.
        **kwargs: ``options``: a dict with ``config`` (an ``OmniSparseConfig`` or a dict of
            its fields), ``min_seq_len``, ``kernel`` and ``inner`` as in ``apply_omnisparse``;
            ``mode`` goes to Inductor.

    Returns:
        The compiled callable. All tokens are eligible for selection.

    Raises:
        ConfigError: On unknown or invalid options.
    """
    options = dict(kwargs.pop("options", None) or {})
    backend = backend_from_options(options)
    compiled = backend(graph_module, inputs, **kwargs)
    if backend.log.sites and not backend.log.report().rewritten:
        reasons = sorted({site.reason for site in backend.log.sites})
        warnings.warn(f"omnisparse rewrote no attention site: {'; '.join(reasons)}", stacklevel=2)
    return compiled


def backend_from_options(options: Mapping[str, Any]) -> Backend:
    """Build a backend from the ``options`` of ``torch.compile``.

    Raises:
        ConfigError: On unknown or invalid options.
    """
    unknown = sorted(set(options) - set(known := ("config", "min_seq_len", "kernel", "inner")))
    require(not unknown, "options", f"hold only {', '.join(known)}", unknown)
    others = {name: value for name, value in options.items() if name != "config"}
    config = options.get("config")
    if isinstance(config, Mapping):
        config = OmniSparseConfig.from_dict({"schema": SCHEMA, **config})  # code, not rules that a version saved
    return Backend(OmniSparseConfig() if config is None else config, **others)


def site_report(site: Site, graph: int) -> SiteReport:
    """What the report says of one site."""
    shape = ", ".join(str(size) for size in shape_of(site.query))
    kv_heads = shape_of(site.key)[1] if len(shape_of(site.key)) == 4 else 0
    reason = site.skip.reason if site.skip else ""
    return SiteReport(graph, site.layer, site.path, site.kind, f"({shape})", int(kv_heads), reason)


def _compile(graph_module: GraphModule, inputs: Sequence[Any], inner: str | CompiledFn, mode: str | None) -> CompiledFn:
    if inner == "inductor":
        return compile_graph(graph_module, inputs, mode)
    from torch._dynamo.backends.registry import lookup_backend  # not at import: it loads every compiler

    compiler = inner if callable(inner) else lookup_backend(inner)
    return cast(CompiledFn, compiler(graph_module, list(inputs)))


def _needs_grad(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(inputs))


def _check_flash(kernel: str) -> None:
    if kernel == "flash" and not has_flash():
        raise ConfigError('kernel must be "auto" or "triton" unless flash-attn-4 is installed, got \'flash\'')
