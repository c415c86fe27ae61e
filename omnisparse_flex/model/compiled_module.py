"""A module's compiled entry: run-time state goes in, one graph of its own comes out."""

from __future__ import annotations

import builtins
import functools
import os
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omnisparse_flex.backend import Backend
from omnisparse_flex.compilation.dynamo_config import dynamo_settings
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.cache_argument import cache_in, with_cache_renamed
from omnisparse_flex.model.cache_ops import Owner

#: Set to a non-empty value other than 0, every model runs densely, without code changes.
DISABLE_VARIABLE = "OMNISPARSE_DISABLE"
#: Rows of the per-layer tensors of a module whose number of layers nobody states.
MAX_SITES = 256
#: Prefill and decode, short and long, train and eval, statistics: each is a graph of its own.
RECOMPILE_LIMIT = 64

VisualMask = Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]


class State:
    """Tensors that the compiled graph reads at run time, replaced between calls.

    Attributes:
        visual: bool (B, S), visual tokens, or None: all tokens are eligible.
        recall: float32 (layers,), target recall of each layer.
        stats: float32 (layers, len(STATS)) to be written, or None.
        maps: uint8 (layers, H, rows, columns) to be painted, or None.
        recalls: float32 (layers, 2, Hq) for mean and minimum true recall, or None.
    """

    # All fields are set here: class attributes would cost Dynamo extra compiles.
    def __init__(self, recall: Tensor) -> None:
        """Start without a visual mask and without statistics."""
        self.visual: Tensor | None = None
        self.recall = recall
        self.stats: Tensor | None = None
        self.maps: Tensor | None = None
        self.recalls: Tensor | None = None


if TYPE_CHECKING:
    STATE: State
    CALL: Callable[..., Any]


class Entry:
    """What ``module._compiled_call_impl`` becomes.

    Every instance compiles a code object of its own with a backend object of its own:
    Dynamo's limits and guards are then this model's alone.
    """

    def __init__(self, module: nn.Module, backend: Backend, dynamic: bool | None) -> None:
        """Wrap ``module``; nothing is compiled before the first call.

        Args:
            module: The decoder.
            backend: Its backend.
            dynamic: As in ``torch.compile``.
        """
        self.module = module
        self.backend = backend
        self.dynamic = dynamic
        recalls = backend.config.recalls
        rows = recalls if len(recalls) > 1 else recalls * _layers_of(module)
        self.state = State(torch.tensor(rows, dtype=torch.float32))
        self.owner = Owner()
        self.visual_mask: VisualMask | None = None
        self.undo: Callable[[], None] = lambda: None
        self.checked = False
        self.records = True  # decode steps, until one could not be recorded
        self.compiled = self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module: compiled, or densely where compiling is not ours to do."""
        if torch.compiler.is_compiling():
            # An enclosing torch.compile wins; its backend sees the markers as dense SDPA.
            self.backend.log.notes["an enclosing torch.compile traced through the decoder: dense there"] = None
            return self.module._call_impl(*args, **kwargs)
        checkpoints = self.module.training and getattr(self.module, "gradient_checkpointing", False)
        if checkpoints and not is_disabled() and hasattr(getattr(self.module, "config", None), "use_cache"):
            # transformers does the same, with a log line that breaks the graph.
            kwargs["use_cache"] = False
        kwargs = with_cache_renamed(self.module.forward, kwargs)
        self.prepare(kwargs, functools.partial(self._prepare, args, kwargs))
        cache: Any = cache_in(self.module.forward, kwargs)
        if not hasattr(cache, "omnisparse_call"):
            return self.run(args, kwargs)
        # A keyword argument of ours reaches every layer's attention.
        try:
            with cache.omnisparse_call(self, kwargs):
                return cache.omnisparse_run(self, args, {**kwargs, "omnisparse_cache": cache})
        finally:
            cache.omnisparse_later.clear()  # of a call that was refused

    def prepare(self, kwargs: dict[str, Any], act: Callable[[], None]) -> None:
        """Do what the module's graph needs for this call.

        If the cache has recorded a step, and is asked for one more, that is done when its kernels run already:
        they do not read it, and only a graph that runs in their place does.

        Args:
            kwargs: The call's.
            act: Does it.
        """
        cache: Any = cache_in(self.module.forward, kwargs)
        if hasattr(cache, "omnisparse_waits") and cache.omnisparse_waits(kwargs):
            cache.omnisparse_later.append(act)
        else:
            act()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module, its state prepared."""
        later = getattr(cache_in(self.module.forward, kwargs), "omnisparse_later", ())
        while later:
            later.pop(0)()
        if is_disabled():
            return self.module._call_impl(*args, **kwargs)
        runs = self.backend.log.runs
        with dynamo_settings(**self._settings()):
            result = self.compiled(*args, **kwargs)
        ran = self.backend.log.runs - runs
        if ran > 1:
            self._note_once(f"Dynamo broke the decoder into {ran} graphs: the visual mask reaches only the first")
        if ran == 0:
            self._note_once("Dynamo ran the decoder eagerly (recompile limit or unsupported code): dense there")
        elif not self.checked:
            self._check_rewritten()
        return result

    def _settings(self) -> dict[str, Any]:
        """Dynamo's settings for this module."""
        settings: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT}
        if self.dynamic:
            # Otherwise Dynamo makes symbols of a norm's epsilon and the like too, finds after the joint
            # graph that they must be numbers, and traces everything once more.
            settings["specialize_float"] = True
        return settings

    def stop_recording(self, reason: str) -> None:
        """Record no decode step of this module any more, and let the report say why."""
        self.records = False
        self.backend.log.notes[f"no CUDA graph of a decode step, decoding runs without: {reason}"] = None

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_disabled():
            parameter = next(self.module.parameters(), None)
            if parameter is not None and self.state.recall.device != parameter.device:
                self.state.recall = self.state.recall.to(parameter.device)
        if self.visual_mask is not None:
            self.state.visual = self.visual_mask(args, kwargs)

    def _compile(self) -> Callable[..., Any]:
        def template(*args: Any, **kwargs: Any) -> Any:
            # STATE and CALL are globals of the function made below, one set for each module.
            state = STATE  # noqa: F821
            torch.ops.omnisparse.bind(state.visual, state.recall, state.stats, state.maps, state.recalls)
            return CALL(*args, **kwargs)  # noqa: F821

        name = "omnisparse_entry"
        scope = {"__builtins__": builtins, "torch": torch, "STATE": self.state, "CALL": self.module._call_impl}
        function = types.FunctionType(template.__code__.replace(co_name=name), scope, name)
        compiled: Callable[..., Any] = torch.compile(function, backend=self.backend, dynamic=self.dynamic)
        return compiled

    def _check_rewritten(self) -> None:
        """Warn once if the first graphs rewrote nothing, unless length alone is the reason."""
        self.checked = True
        sites = self.backend.log.sites
        reasons = sorted({site.reason for site in sites})
        if not sites:
            self._note_once("no attention site found: nothing to rewrite")
        elif all(reasons) and not any("min_seq_len" in reason for reason in reasons):
            self._note_once(f"rewrote no attention site: {'; '.join(reasons)}")

    def _note_once(self, note: str) -> None:
        if note not in self.backend.log.notes:
            self.backend.log.notes[note] = None
            warnings.warn(f"omnisparse: {note}", stacklevel=4)


def is_disabled() -> bool:
    """Whether ``OMNISPARSE_DISABLE`` asks for dense attention everywhere."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def entry_of(model: nn.Module) -> Entry | None:
    """The entry that ``apply_omnisparse`` installed in ``model``, if any."""
    for module in model.modules():
        if isinstance(module._compiled_call_impl, Entry):
            return module._compiled_call_impl
    return None


def refuse_compiled(model: nn.Module) -> None:
    """Refuse models that the user compiled: their graph would swallow ours.

    Raises:
        ConfigError: If ``model`` or a part of it is compiled by somebody else.
    """
    if hasattr(model, "_orig_mod"):
        raise ConfigError(f"model must not be compiled yet, got {type(model).__name__}: apply before torch.compile")
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl
        if (compiled is not None and not isinstance(compiled, Entry)) or hasattr(module, "_orig_mod"):
            raise ConfigError(f"model must not be compiled yet, got a compiled part {name or 'model'!r}")


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
