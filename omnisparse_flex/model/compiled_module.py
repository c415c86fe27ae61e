"""A module's compiled entry: run-time state goes in, one graph of its own comes out."""

from __future__ import annotations

import builtins
import contextlib
import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omnisparse_flex.backend import Backend
from omnisparse_flex.compilation.dynamo_config import dynamo_settings
from omnisparse_flex.errors import require
from omnisparse_flex.model.cache_argument import cache_in, with_cache_renamed
from omnisparse_flex.model.cache_history import remember
from omnisparse_flex.model.cache_ops import Owner
from omnisparse_flex.model.outside_masks import made, taken
from omnisparse_flex.model.promises import Teller, adds_one_token
from omnisparse_flex.model.run_state import ModelState, RunState
from omnisparse_flex.model.switches import expected_call, is_disabled, is_off, refuse_weights

#: Rows of the per-layer tensors of a module whose number of layers nobody states.
MAX_SITES = 256
#: Prefill and decode, short and long, train and eval, statistics: each is a graph of its own.
RECOMPILE_LIMIT = 64
#: Said by the report, and by Dynamo if the user asked for one graph.
APART = "inside another torch.compile OmniSparse's decoder is a graph of its own: fullgraph=True cannot be had"
VisualMask = Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]
if TYPE_CHECKING:
    module_call: Callable[..., Any]


class CompiledDecoder:
    """What ``module._compiled_call_impl`` becomes.

    A call of the module runs ``call``, which prepares the model's ``ModelState`` and the cache, and then ``run``: the
    compiled code, which gets a ``RunState`` of its own, as an argument.
    Every instance compiles a code object of its own with a backend object of its own:
    Dynamo's limits and guards are then this model's alone.
    """

    def __init__(
        self, module: nn.Module, backend: Backend, dynamic: bool | None, *, forwards_kwargs: bool = False
    ) -> None:
        """Wrap ``module``; nothing is compiled before the first call.

        Args:
            module: The decoder.
            backend: Its backend.
            dynamic: As in ``torch.compile``.
            forwards_kwargs: The module hands keyword arguments on to its attention, as transformers' decoders do.
        """
        backend.stateful = True
        self.forwards_kwargs = forwards_kwargs
        self.module = module
        self.backend = backend
        self.dynamic = dynamic
        recalls = backend.config.recalls
        rows = recalls if len(recalls) > 1 else recalls * _layers_of(module)
        self.state = ModelState(torch.tensor(rows, dtype=torch.float32))
        self.owner, self.teller = Owner(), Teller()
        self.visual_mask: VisualMask | None = None
        self.configs: list[Any] = []  # that have our attention's name
        self.otherwise: VisualMask | None = None  # for calls that pass the hook by
        self.undo: Callable[[], None] = lambda: None
        self.checked = False
        self.records_steps = True  # decode steps, until one could not be recorded
        self.compiled = self._compile()
        self.apart = torch._dynamo.disable(self._call_apart, reason=APART)
        self._first = threading.RLock()
        self._warm = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; an enclosing ``torch.compile`` (the user's own) leaves it to us, as a graph of ours."""
        # Not is_compiling: that is true while any thread compiles anything.
        if torch.compiler.is_dynamo_compiling():
            return self.apart(*args, **kwargs)
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module: compiled, or densely where that is asked for."""
        checkpoints = self.module.training and getattr(self.module, "gradient_checkpointing", False)
        if checkpoints and not is_disabled() and hasattr(getattr(self.module, "config", None), "use_cache"):
            # transformers does the same, with a log line that breaks the graph.
            kwargs["use_cache"] = False
        kwargs = with_cache_renamed(self.module.forward, kwargs)
        self.prepare(kwargs, functools.partial(self._prepare, args, kwargs))
        cache: Any = cache_in(self.module.forward, kwargs)
        if not hasattr(cache, "omnisparse_call"):
            result = self.run(args, kwargs)
            return remember(result, cache, self.state.visual)
        return cache.omnisparse_call(self, args, kwargs)

    def prepare(self, kwargs: dict[str, Any], act: Callable[[], None]) -> None:
        """Do what the module's graph needs for this call.

        If the cache has recorded a step, and is asked for one more, that is done when its kernels run already:
        they do not read it, and only a graph that runs in their place does.

        Args:
            kwargs: The call's.
            act: Does it.
        """
        cache: Any = cache_in(self.module.forward, kwargs)
        if not (hasattr(cache, "omnisparse_defer") and cache.omnisparse_defer(kwargs, act)):
            act()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module, its state prepared."""
        later = getattr(cache_in(self.module.forward, kwargs), "omnisparse_later", ())
        while later:
            later.pop(0)()
        if is_off(self.configs, kwargs, self.note_once):
            with expected_call():
                return self.module._call_impl(*args, **kwargs)
        refuse_weights(self.module, kwargs)
        thread = self.backend.thread
        state, before = self.state.of_call(), thread.runs
        # Threads that start together would each compile the same.
        first = contextlib.nullcontext() if self._warm else self._first
        with first, dynamo_settings(**self._settings()), expected_call():
            masks, rest = taken(kwargs)
            result = self.compiled(state, masks, *args, **rest)
        self._warm = True
        self._note_fallbacks(thread.runs - before, state)
        if self.backend.config.budget == "peak" and not adds_one_token(args, kwargs):  # a decode step selects nothing
            self._note_broken_promise()
        return result

    def _call_apart(self, *args: Any, **kwargs: Any) -> Any:
        self.backend.log.notes[APART] = None
        return self.call(*args, **kwargs)

    def _note_fallbacks(self, ran: int, state: RunState) -> None:
        """Say what Dynamo made of a call.

        Args:
            ran: Number of graphs that ran.
            state: The call's.
        """
        if ran == 0:
            self.note_once("Dynamo ran the decoder eagerly (recompile limit or unsupported code): dense there")
            return
        if state.eager:
            layers = ", ".join(map(str, sorted(state.eager)))
            self.note_once(f"attention ran outside the graphs that Dynamo made: layers {layers} are dense")
        if not self.checked:
            self._check_rewritten()

    def _note_broken_promise(self) -> None:
        if (layer := self.teller.news(self.state.promises)) is not None:
            self.note_once(f"{layer}, under its target_recall; rewrite_report counts such calls")

    def _settings(self) -> dict[str, Any]:
        """Dynamo's settings for this module."""
        settings: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT}
        # Deepstack (Qwen3-VL) picks the visual tokens' rows: without this, a break in each of its layers.
        settings["capture_dynamic_output_shape_ops"] = True
        if self.dynamic:
            # Otherwise Dynamo makes symbols of a norm's epsilon and the like too, finds after the joint
            # graph that they must be numbers, and traces everything once more.
            settings["specialize_float"] = True
        return settings

    def stop_recording(self, reason: str) -> None:
        """Record no decode step of this module any more, and let the report say why."""
        self.records_steps = False
        self.backend.log.notes[f"no CUDA graph of a decode step, decoding runs without: {reason}"] = None

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_disabled():
            parameter = next(self.module.parameters(), None)
            if parameter is not None and self.state.recall.device != parameter.device:
                self.state.to(parameter.device)
        told = self.state.was_told()
        mask = self.otherwise if self.visual_mask is None and not told else self.visual_mask
        if mask is not None:
            self.state.visual = mask(args, kwargs)
            self.state.was_told()

    def _compile(self) -> Callable[..., Any]:
        def template(state: RunState, masks: Any, *args: Any, **kwargs: Any) -> Any:
            # module_call is a global of the function made below, one for each module.
            torch.ops.omnisparse.bind(*state.tensors)
            return module_call(*args, **kwargs)  # noqa: F821

        def template_with_keyword(state: RunState, masks: Any, *args: Any, **kwargs: Any) -> Any:
            # Layers hand it to their attention, in whatever graph that is. A layer that does not finds the operator's.
            torch.ops.omnisparse.bind(*state.tensors)
            return module_call(*args, omnisparse_state=state, **made(masks), **kwargs)  # noqa: F821

        name = "omnisparse_entry"
        scope = {"__builtins__": builtins, "torch": torch, "made": made, "module_call": self.module._call_impl}
        code = (template_with_keyword if self.forwards_kwargs else template).__code__
        function = types.FunctionType(code.replace(co_name=name), scope, name)
        compiled: Callable[..., Any] = torch.compile(function, backend=self.backend, dynamic=self.dynamic)
        return compiled

    def _check_rewritten(self) -> None:
        """Warn once if the first graphs rewrote nothing, unless length alone is the reason."""
        self.checked = True
        sites = self.backend.log.sites
        reasons = sorted({site.reason for site in sites})
        if not sites:
            self.note_once("no attention site found: nothing to rewrite")
        elif all(reasons) and not any("min_seq_len" in reason for reason in reasons):
            self.note_once(f"rewrote no attention site: {'; '.join(reasons)}")

    def note_once(self, note: str) -> None:
        """Warn, and let the report say it; the second time nothing."""
        if note not in self.backend.log.notes:
            self.backend.log.notes[note] = None
            warnings.warn(f"omnisparse: {note}", stacklevel=4)


def compiled_decoder_of(model: nn.Module) -> CompiledDecoder | None:
    """The entry that ``apply_omnisparse`` installed in ``model``, if any."""
    for module in model.modules():
        if isinstance(module._compiled_call_impl, CompiledDecoder):
            return module._compiled_call_impl
    return None


def check_visual(mask: Any, batch: int | None, length: int | None) -> Tensor | None:
    """Check a user's visual mask.

    Raises:
        ConfigError: Unless it is None or a bool (B, N) tensor of the input's size.
    """
    if mask is None:
        return None
    require(isinstance(mask, Tensor), "visual_mask", "be a bool tensor (B, N) or None", type(mask).__name__)
    require(mask.dtype == torch.bool, "visual_mask", "be bool", mask.dtype)
    require(mask.dim() == 2, "visual_mask", "have shape (B, N)", tuple(mask.shape))
    if batch is not None and length is not None:
        require(tuple(mask.shape) == (batch, length), "visual_mask", f"have shape {(batch, length)}", tuple(mask.shape))
    checked: Tensor = mask
    return checked


def _layers_of(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    return layers if isinstance(layers, int) else MAX_SITES
