"""One decode step of the decoder, recorded and replayed for the tokens that follow."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from omnisparse_flex.baked import CACHE, Call, alike, baked, others, place

if TYPE_CHECKING:
    from omnisparse_flex.entry import Entry
    from omnisparse_flex.slim_layer import SlimLayer
    from omnisparse_flex.slim_store import SlimStore

#: Arguments that a recorded step may hold as they are.
CONSTANTS = (bool, int, float, str, type(None), torch.dtype)


class Step(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Run its kernels again, on the memory that they were recorded with."""


class Recorder(Protocol):
    """What records steps: ``cuda_graphs.CudaGraphs``, or a test's stand-in."""

    bytes: int

    def serves(self, device: torch.device) -> bool:
        """Whether it can record on a device at all."""

    def takes(self, layers: Sequence[SlimLayer]) -> bool:
        """Whether the latest step of these layers ran on kernels that can be recorded."""

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
        """Record a step without running it; with it the result, which each replay fills anew."""

    def free(self) -> None:
        """Give all memory back."""


@dataclasses.dataclass(eq=False, slots=True)
class Recorded:
    """A recorded step, and all that it takes for granted.

    Attributes:
        key: What must be equal for a replay.
        step: Replays it.
        results: The leaves of its result.
        form: The result's structure.
        queries: Each layer's queries (B, Hq, 1, D), by layer.
        weights: The other tensors that its graph reads.
        addresses: Where they lay.
    """

    key: tuple[Any, ...]
    step: Step
    results: list[Any]
    form: pytree.TreeSpec
    queries: dict[int, Tensor]
    weights: list[weakref.ref[Tensor]]
    addresses: list[int]

    def holds(self) -> bool:
        """Whether its weights are where they were."""
        try:
            return [ref().data_ptr() for ref in self.weights] == self.addresses  # type: ignore[union-attr]
        except AttributeError:  # one of them is gone
            return False


class Replay:
    """The decode steps of one cache: run while they differ, recorded after two that were alike, then replayed.

    A recorded step has addresses, sizes and numbers baked in. All of them are compared before every
    replay, so that whatever changes the cache need not announce it. A comparison cannot see whether
    the compiled graph computes with a number that grows with the tokens (positions from a length):
    so two steps in a row are watched, and everything that the graph reads must be an argument of the
    call, which is copied in, or the very same in both. One that reads more is never recorded.

    Our choice: what is not a graph's input (hooks, attributes of modules) counts as unchanged within an answer.

    Attributes:
        store: The cache's layers.
        recorder: Records steps.
        recorded: The step at hand, or None.
        count: Steps recorded so far.
    """

    def __init__(self, store: SlimStore, recorder: Recorder) -> None:
        """Start with nothing recorded."""
        self.store, self.recorder, self.count = store, recorder, 0
        self.forget()

    def forget(self) -> None:
        """Drop the recorded step; its memory serves the next one."""
        self.recorded: Recorded | None = None
        self._buffers: list[Tensor | None] = []
        self._fits: tuple[Any, ...] | None = None
        self._before: tuple[tuple[Any, ...], list[Any]] | None = None
        self._steady = False

    def drop(self) -> None:
        """Drop the recorded step and its memory."""
        self.forget()
        self.recorder.free()

    def run(self, entry: Entry, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the decoder, inside the cache's call.

        Args:
            entry: The decoder's entry.
            cache: What stands for the cache in the arguments.
            args: The decoder's arguments.
            kwargs: The decoder's keyword arguments.

        Returns:
            The decoder's result, from a replay if a recorded step is the same; its tensors belong to the caller.
        """
        store, device = self.store, self.store.device
        if not (entry.records and store.is_step and device and self.recorder.serves(device)):
            self.forget()
            return entry.run(args, kwargs)
        call = Call(entry, cache, args, kwargs)
        if reason := self._reason(call, kwargs):
            self.forget()
            self._note(entry, reason)
            return entry.run(args, kwargs)
        self._feed(call)
        key = self._key(call) if self.recorder.takes(store.layers) else None
        if self.recorded is not None and not (self.recorded.key == key and self.recorded.holds()):
            self.recorded = None
        if key is not None and not store.changes:
            if self.recorded is None and self._steady and self._before is not None and self._before[0] == key:
                self.recorded = self._record(call, device, *self._before)
            if self.recorded is not None:
                return self._replay(self.recorded, call)
        return self._watch(call, key)

    def _reason(self, call: Call, kwargs: dict[str, Any]) -> str:
        """Why no step like this one is ever recorded, or ""."""
        state = call.entry.state
        if any(x is not None for x in (state.stats, state.maps, state.recalls)):
            return "statistics are collected"
        if kwargs.get("attention_mask") is not None:
            return "a mask is needed: the prompt has padding, or position_ids were not given"
        if not all(isinstance(x, (Tensor, *CONSTANTS)) or x is call.cache for x in call.leaves):
            return "an argument is neither a tensor nor a constant"
        if any(isinstance(x, Tensor) and x.device != self.store.device for x in call.leaves):
            return "an argument lies on another device"  # a number that the host reads would be recorded as it is
        return ""

    def _note(self, entry: Entry, reason: str) -> None:
        entry.backend.log.notes[f"decode steps are not recorded as CUDA graphs: {reason}"] = None

    def _feed(self, call: Call) -> None:
        """Copy the call's tensors to where recorded steps read them.

        Steps that run read them there too: so compiled code meets the same tensors in every step, however the
        caller made them (slices at growing offsets), and has nothing left to compile while a step is recorded.
        """
        if self._fits != call.facts:
            self._fits = call.facts
            self._buffers = [
                torch.empty_like(x, memory_format=torch.contiguous_format) if isinstance(x, Tensor) else None
                for x in call.leaves
            ]
        for buffer, leaf in zip(self._buffers, call.leaves, strict=True):
            if buffer is not None:
                buffer.copy_(leaf)
        call.leaves = [x if buffer is None else buffer for x, buffer in zip(call.leaves, self._buffers, strict=True)]

    def _key(self, call: Call) -> tuple[Any, ...]:
        """All that a recorded step has baked in and that may differ at the next one."""
        store = self.store
        marks = None if store.marks is None else place(store.marks)
        return (call.facts, marks, *(baked(layer) for layer in store.layers))

    def _watch(self, call: Call, key: tuple[Any, ...] | None) -> Any:
        """Run the step, and see whether it was like the one before."""
        before, self._before, self._steady = self._before, None, False
        result, inputs = call.run()
        if inputs is not None and key is not None and self._key(call) == key:
            self._before = key, inputs
            if before is not None and before[0] == key:
                reason = "" if alike(before[1], inputs) else "the graph computes with a number or tensor that changes"
                if any(x.device != self.store.device for ref in others(inputs) if (x := ref()) is not None):
                    reason = "the decoder lies on several devices"
                self._steady = not reason
                if reason:
                    self._note(call.entry, reason)
        lent = {x.untyped_storage().data_ptr() for x in self._buffers if x is not None}
        return pytree.tree_map_only(
            Tensor, lambda x: x.clone() if x.untyped_storage().data_ptr() in lent else x, result
        )

    def _record(self, call: Call, device: torch.device, key: tuple[Any, ...], before: list[Any]) -> Recorded | None:
        """Record the step without running it; None, and everything as it was, if that fails."""
        store, entry = self.store, call.entry
        tails = [layer.tail for layer in store.layers]
        store.recorded = {}
        try:
            step, (result, inputs) = self.recorder.record(call.run, device)
        except Exception as error:  # whatever it is, the step can run without
            entry.stop_recording(f"{type(error).__name__}: {error}")
            self.recorder.free()
            return None
        finally:
            queries, store.recorded = store.recorded, None
            for layer, tail in zip(store.layers, tails, strict=True):
                layer.tail = tail  # its kernels did not run yet
        if inputs is None or not alike(before, inputs) or self._key(call) != key:
            entry.stop_recording("the recorded step differed from those before it")
            self.recorder.free()
            return None
        leaves, form = pytree.tree_flatten(result)
        results = [CACHE if x is call.cache else x for x in leaves]
        if not all(isinstance(x, (Tensor, *CONSTANTS)) for x in results):  # its tensors would change under the caller
            entry.stop_recording("the decoder returns more than tensors and constants")
            self.recorder.free()
            return None
        self.count += 1
        weights = others(inputs)
        addresses = [x.data_ptr() for ref in weights if (x := ref()) is not None]
        return Recorded(key, step, results, form, queries, weights, addresses)

    def _replay(self, recorded: Recorded, call: Call) -> Any:
        recorded.step.replay()
        self.store.replayed(recorded.queries)
        own = [x.clone() if isinstance(x, Tensor) else call.cache if x is CACHE else x for x in recorded.results]
        return pytree.tree_unflatten(own, recorded.form)
