"""What a recorded decode step takes for granted: addresses, sizes and numbers, and how two steps are compared."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

if TYPE_CHECKING:
    from omnisparse_flex.model.compiled_module import Entry

#: Stands for the cache among arguments: what held the cache itself would keep it alive.
CACHE = "the cache"
#: Arguments that need no look inside.
FLAT = frozenset((Tensor, bool, int, float, str, type(None), torch.dtype))
#: Takes the place of a graph that runs: its number, what it reads, and the graph as a function.
Around = Callable[[int, list[Any], Callable[[], Any]], Any]


class Call:
    """One call of the decoder, as a flat list.

    Attributes:
        leaves: Arguments, tensors and others.
        form: Their structure: names, or a pytree's.
        facts: What must be equal in a call that replays this one: all but the tensors' contents.
    """

    def __init__(self, entry: Entry, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Flatten the arguments.

        Args:
            entry: The decoder's entry.
            cache: What stands for the cache in the arguments.
            args: Of the decoder.
            kwargs: Of the decoder.
        """
        self.entry, self.cache = entry, cache
        self.leaves: list[Any] = [*args, *kwargs.values()]
        self.form: Any = (len(args), *kwargs)
        if not all(type(x) in FLAT or x is cache for x in self.leaves):
            self.leaves, self.form = pytree.tree_flatten((args, kwargs))
        own = [
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else CACHE if x is cache else x for x in self.leaves
        ]
        kind = cache.store.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        # The entry's number: who applies OmniSparse anew has other graphs.
        modes = entry.owner.number, entry.module.training, torch.is_inference_mode_enabled(), autocast
        self.facts: tuple[Any, ...] = (modes, self.form, *own)

    def run(self, around: Around) -> Any:
        """Run the decoder on the leaves, with ``around`` in the place of each compiled graph."""
        if isinstance(self.form, tuple):
            count, *names = self.form
            args, kwargs = tuple(self.leaves[:count]), dict(zip(names, self.leaves[count:], strict=True))
        else:
            args, kwargs = pytree.tree_unflatten(self.leaves, self.form)
        log = self.entry.backend.log
        log.around = around
        try:
            return self.entry.run(args, kwargs)
        finally:
            log.around = None

    def read(self, inputs: list[Any]) -> list[Any]:
        """What to compare a graph's inputs by; see ``remembered``."""
        numbers = {id(x): number for number, x in enumerate(self.leaves)}
        return [remembered(x, numbers) for x in inputs]


def place(x: Tensor) -> tuple[int, ...]:
    """A tensor's address and sizes: whoever owns the memory, a kernel launched with them finds it."""
    return x.data_ptr(), *x.shape


def remembered(x: Any, numbers: dict[int, int]) -> Any:
    """What to compare an input of a graph by: the number of an argument, an object's identity, or a value."""
    if not isinstance(x, Tensor):
        return x
    if (number := numbers.get(id(x))) is not None:
        return "argument", number
    # Dynamo wraps the Python floats of a module anew for each call.
    return ("number", x.item()) if x.dim() == 0 and x.device.type == "cpu" else weakref.ref(x)


def alike(before: list[Any], now: list[Any]) -> bool:
    """Whether the graphs of two steps read the same: arguments, the same tensors, equal numbers."""
    return len(before) == len(now) and all(_same(a, b) for a, b in zip(before, now, strict=True))


def others(inputs: list[Any]) -> list[weakref.ref[Tensor]]:
    """The tensors among a graph's inputs that are no arguments: above all weights."""
    return [x for x in inputs if isinstance(x, weakref.ref)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
        return a() is not None and a() is b()
    return type(a) is type(b) and bool(a == b)
