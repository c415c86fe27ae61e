"""One decode step of the decoder, recorded and replayed for the tokens that follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omnisparse_flex.cache.recorded_step import Memory, Places, Recorded, Recorder
from omnisparse_flex.cache.step_inputs import Call, alike, others, place

if TYPE_CHECKING:
    from omnisparse_flex.cache.store import SlimStore
    from omnisparse_flex.model.compiled_module import Entry

#: Arguments that a recorded step may hold as they are.
CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
#: Steps in a row that could not be recorded, after which the report says why.
PATIENCE = 8


class Replay:
    """The decode steps of one cache: run while they differ, recorded after two that were alike, then replayed.

    What is recorded is the compiled graph, not the call around it. Dynamo checks its guards for every token as it
    does for a step that runs (weights, hooks, attributes of modules, configs, autocast, ...), and does in Python what
    the decoder does there; only the graph's kernels come from the recording. They start before the guards are
    checked, which takes the host long: if another graph is called for, what they decoded is void.

    A recorded step has addresses, sizes and numbers baked in. Before every launch the cache is asked whether it is as
    it was (whatever changes a layer need not announce it), and whether all that the step writes lies where it lay. Of
    the weights, which it reads, only that their memory was not freed: where they lie is asked with the guards.

    A comparison cannot see whether the compiled graph computes with a number that grows with the tokens (positions
    from a length): so two steps in a row are watched, and everything that the graph reads must be an argument of the
    call, which is copied in, or the very same in both. One that reads more is never recorded.

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
        self._before: tuple[tuple[Any, ...], int, list[Any]] | None = None
        self._steady = False
        self._unlike = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        """A copied cache lies elsewhere: it records steps of its own."""
        return type(self)(copy.deepcopy(self.store, memo), copy.deepcopy(self.recorder, memo))

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
            if store.recording and store.cropped and device and self.recorder.serves(device):
                self._note(entry, "drafts of several tokens are verified at once")
            return entry.run(args, kwargs)
        call = Call(entry, cache, args, kwargs)
        if reason := self._reason(call, kwargs):
            self.forget()
            self._note(entry, reason)
            return entry.run(args, kwargs)
        self._feed(call)
        key: tuple[Any, ...] | None = self._key(call)
        known = self.recorded
        if known is not None and not (known.key == key and known.is_safe()):
            known = self.recorded = self._before = None
        if known is None and not self.recorder.takes(store.layers):
            key = None
        if key is None or store.changes:
            return self._watch(call, key)
        if known is not None:
            return self._replay(call, known)
        return self._watch(call, key, record=self._steady)

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
        return (call.facts, marks, *[layer.version for layer in store.layers])

    def _replay(self, call: Call, known: Recorded) -> Any:
        """Replay a step, if its graph is what the decoder runs now."""
        known.step.replay()
        self.store.ahead = True
        replayed = False

        def around(number: int, inputs: list[Any], go: Callable[[], Any]) -> Any:
            nonlocal replayed
            same = number == known.number and known.weights.hold() and alike(known.inputs, call.read(inputs))
            if self.store.ahead and same:
                replayed = True
                return self._outputs(known)
            return go()  # the first layer finds the store ahead, and takes the token back

        result = call.run(around)
        if not replayed:
            self.recorded = self._before = None
        return result

    def _outputs(self, known: Recorded) -> list[Any]:
        self.store.replayed(known.queries)
        return [x.clone() if isinstance(x, Tensor) else x for x in known.outputs]

    def _watch(self, call: Call, key: tuple[Any, ...] | None, record: bool = False) -> Any:
        """Run the step, and see whether it is like the one before; or record and replay it, if it still is."""
        before, self._before, self._steady = self._before, None, False
        log, ran = call.entry.backend.log, list[tuple[int, list[Any]]]()
        graphs = log.graphs

        def around(number: int, inputs: list[Any], go: Callable[[], Any]) -> Any:
            read = call.read(inputs)
            ran.append((number, read))
            if record and before is not None and _same(before, (key, number, read)):
                self.recorded = self._record(call, go, *before)
                if self.recorded is not None:
                    self.recorded.step.replay()
                    return self._outputs(self.recorded)
            return go()

        result = call.run(around)
        one, reason = len(ran) == 1 and log.graphs == graphs, ""
        if one and key is not None and self._key(call) == key:
            self._before = key, *ran[0]
            if before is not None and before[:2] == self._before[:2]:
                reason = self._changes(before[2], ran[0][1])
                self._steady = not reason
        self._unlike = 0 if self._steady else self._unlike + 1
        if self._unlike == PATIENCE:
            self._note(call.entry, reason or self._why(one))
        return pytree.tree_map_only(Tensor, self._own, result)

    def _own(self, x: Tensor) -> Tensor:
        """The tensor, or a copy of it if it lies in a buffer that the next token overwrites."""
        if is_traceable_wrapper_subclass(x):  # computed from a weight of that kind
            return x
        place = x.untyped_storage().data_ptr()
        lent = any(place == own.untyped_storage().data_ptr() for own in self._buffers if own is not None)
        return x.clone() if lent else x

    def _changes(self, before: list[Any], now: list[Any]) -> str:
        """Why a graph that read this in two steps must not be recorded, or ""."""
        tensors = [x for ref in others(now) if (x := ref()) is not None]
        if not alike(before, now):
            return "the graph computes with a number or tensor that changes"
        if any(is_traceable_wrapper_subclass(x) for x in tensors):
            return "a weight is a tensor subclass, whose parts could move unseen"
        if any(x.device != self.store.device for x in tensors):
            return "the decoder lies on several devices"
        return ""

    def _why(self, one: bool) -> str:
        """Why many steps in a row were not alike."""
        if not self.recorder.takes(self.store.layers):
            return "the decode kernel does not run here (head size, data type, or no Triton)"
        if not one:
            return "the decoder does not run as one compiled graph"
        return "what it reads lies elsewhere with every token (beam search, changing shapes)"

    def _record(
        self, call: Call, go: Callable[[], Any], key: tuple[Any, ...], number: int, inputs: list[Any]
    ) -> Recorded | None:
        """Record the graph without running it; None, and everything as it was, if that fails."""
        store = self.store
        assert store.device is not None
        tails = [layer.tail for layer in store.layers]
        store.recorded = {}
        reason = ""
        try:
            step, outputs = self.recorder.record(go, store.device)
        except Exception as error:  # whatever it is, the step can run without
            reason = f"{type(error).__name__}: {error}"
        finally:
            queries, store.recorded = store.recorded, None
            for layer, tail in zip(store.layers, tails, strict=True):
                layer.tail = tail  # its kernels did not run yet
        if not reason and self._key(call) != key:
            reason = "the recorded step differed from those before it"
        if not reason and not all(isinstance(x, (Tensor, *CONSTANTS)) for x in outputs):
            reason = "the decoder's graph returns more than tensors and constants"
        if reason:
            call.entry.stop_recording(reason)
            self.recorder.free()
            return None
        self.count += 1
        weights = [x for ref in others(inputs) if (x := ref()) is not None]
        written = [x for own in store.layers for x in (own.tail_keys, own.tail_values, own.counter) if x is not None]
        return Recorded(
            key, number, inputs, step, list(outputs), queries, Places(weights), Memory(weights), Places(written)
        )


def _same(before: tuple[Any, int, list[Any]], now: tuple[Any, int, list[Any]]) -> bool:
    return before[:2] == now[:2] and alike(before[2], now[2])
