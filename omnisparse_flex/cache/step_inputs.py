"""The inputs of a decode step, and how those of two steps are compared."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

if TYPE_CHECKING:
    from omnisparse_flex.model.compiled_module import CompiledDecoder

#: Takes the cache's place in a signature: a reference to the cache would keep it alive.
CACHE = "the cache"
#: Types of arguments that hold no further arguments.
FLAT = frozenset((Tensor, bool, int, float, str, type(None), torch.dtype))
#: Called in place of a compiled graph: with its number, its inputs, and the graph as a function without arguments.
RunHook = Callable[[int, list[Any], Callable[[], Any]], Any]


class FlatCall:
    """One call of the decoder, as a flat list.

    Attributes:
        leaves: The arguments, flat.
        form: Their structure: the number of positional arguments and the keywords, or a pytree's.
        signature: Everything that a replay of this call requires to be equal, all but the tensors' contents.
    """

    def __init__(self, decoder: CompiledDecoder, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Flatten the arguments.

        Args:
            decoder: The compiled decoder.
            cache: The cache, as it appears among the arguments.
            args: The decoder's positional arguments.
            kwargs: The decoder's keyword arguments.
        """
        self.decoder, self.cache = decoder, cache
        self.leaves: list[Any] = [*args, *kwargs.values()]
        self.form: Any = (len(args), *kwargs)
        if not all(type(x) in FLAT or x is cache for x in self.leaves):
            self.leaves, self.form = pytree.tree_flatten((args, kwargs))
        described = [
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else CACHE if x is cache else x for x in self.leaves
        ]
        kind = cache.store.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        # The entry's number changes when OmniSparse is applied anew, and so do the graphs.
        modes = decoder.owner.number, decoder.module.training, torch.is_inference_mode_enabled(), autocast
        self.signature: tuple[Any, ...] = (modes, self.form, *described)

    def run(self, run_hook: RunHook) -> Any:
        """Run the decoder on the leaves, with ``run_hook`` called in place of each compiled graph."""
        if isinstance(self.form, tuple):
            count, *names = self.form
            args, kwargs = tuple(self.leaves[:count]), dict(zip(names, self.leaves[count:], strict=True))
        else:
            args, kwargs = pytree.tree_unflatten(self.leaves, self.form)
        thread = self.decoder.backend.thread
        thread.run_hook = run_hook
        try:
            return self.decoder.run(args, kwargs)
        finally:
            thread.run_hook = None

    def read(self, inputs: list[Any]) -> list[Any]:
        """The identity of each of a graph's inputs; see ``identity``."""
        numbers = {id(x): number for number, x in enumerate(self.leaves)}
        return [identity(x, numbers) for x in inputs]


def storage_key(x: Tensor) -> tuple[int, ...]:
    """A tensor's address and sizes: what a launched kernel knows of it."""
    return x.data_ptr(), *x.shape


def identity(x: Any, numbers: dict[int, int]) -> Any:
    """What identifies an input of a graph: the number of an argument, a reference to a tensor, or a value."""
    if not isinstance(x, Tensor):
        return x
    if (number := numbers.get(id(x))) is not None:
        return "argument", number
    # Dynamo wraps the Python floats of a module anew for each call.
    return ("number", x.item()) if x.dim() == 0 and x.device.type == "cpu" else weakref.ref(x)


def same_inputs(before: list[Any], now: list[Any]) -> bool:
    """Whether the graphs of two steps read the same arguments, the same tensors and equal numbers."""
    return len(before) == len(now) and all(_same(a, b) for a, b in zip(before, now, strict=True))


def weights_of(inputs: list[Any]) -> list[weakref.ref[Tensor]]:
    """The tensors among a graph's inputs that are no arguments, in general its weights."""
    return [x for x in inputs if isinstance(x, weakref.ref)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        return a() is not None and a() is b()
    return type(a) is type(b) and bool(a == b)
