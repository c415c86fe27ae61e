"""One decode step of the decoder, recorded and replayed for the tokens that follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omnisparse_flex.cache import step_reasons
from omnisparse_flex.cache.recorded_step import RecordedStep, Recorder, StorageWatch, TensorAddresses
from omnisparse_flex.cache.step_inputs import FlatCall, same_inputs, storage_key, weights_of

if TYPE_CHECKING:
    from omnisparse_flex.cache.store import SlimStore
    from omnisparse_flex.model.compiled_module import CompiledDecoder

#: Consecutive steps that could not be recorded, after which the report says why.
MAX_UNLIKE_STEPS = 8


class Replay:
    """Records the decode steps of one cache and replays them.

    Two consecutive steps with the same inputs are followed by a recorded one, and that by replays.

    The compiled graph is recorded, not the call around it. For every token Dynamo checks its guards (weights, hooks,
    attributes of modules, configs, autocast, ...) and the decoder's Python code runs; only the graph's kernels come
    from the recording. They are launched before the guards are checked, because the check takes the host long. If the
    guards then choose another graph, the replayed token is void.

    A recorded step holds addresses, sizes and numbers. Before each launch, the replay compares the versions of the
    layers and the addresses of all tensors that the step writes, and checks that the weights' memory was not freed.
    The addresses of the weights are compared together with the guards.

    The compiled graph may compute with a number that grows with the tokens (positions from a length). Therefore two
    consecutive steps are compared first: each input of the graph must be an argument of the call, which is copied to a
    fixed address, or the same object in both steps. A graph with any other input is never recorded.

    Attributes:
        store: The cache's layers.
        recorder: Records steps.
        recorded: The recorded step, or None.
        count: Steps recorded so far.
    """

    def __init__(self, store: SlimStore, recorder: Recorder) -> None:
        """Start with nothing recorded."""
        self.store, self.recorder, self.count = store, recorder, 0
        self.forget()

    def forget(self) -> None:
        """Drop the recorded step; the next one reuses its memory."""
        self.recorded: RecordedStep | None = None
        self._buffers: list[Tensor | None] = []
        self._fits: tuple[Any, ...] | None = None
        self._before: tuple[tuple[Any, ...], int, list[Any]] | None = None
        self._steady = False
        self._unlike = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        """A copied cache has other addresses, so it records its own steps."""
        return type(self)(copy.deepcopy(self.store, memo), copy.deepcopy(self.recorder, memo))

    def drop(self) -> None:
        """Drop the recorded step and its memory."""
        self.forget()
        self.recorder.free()

    def run(self, decoder: CompiledDecoder, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the decoder, inside the cache's call.

        Args:
            decoder: The compiled decoder.
            cache: The cache, as it appears among the arguments.
            args: The decoder's arguments.
            kwargs: The decoder's keyword arguments.

        Returns:
            The decoder's result, from a replay if the recorded step matches. The caller owns its tensors.
        """
        store, device = self.store, self.store.device
        if not (decoder.records_steps and store.is_step and device and self.recorder.serves(device)):
            self.forget()
            if store.is_assisted and store.cropped and device and self.recorder.serves(device):
                step_reasons.note(decoder, step_reasons.DRAFTS)
            return decoder.run(args, kwargs)
        call = FlatCall(decoder, cache, args, kwargs)
        if reason := step_reasons.reason_of_call(call, kwargs, device):
            self.forget()
            step_reasons.note(decoder, reason)
            return decoder.run(args, kwargs)
        self._copy_to_static_inputs(call)
        key: tuple[Any, ...] | None = self._key(call)
        recorded = self.recorded
        if recorded is not None and not (recorded.key == key and recorded.is_safe()):
            recorded = self.recorded = self._before = None
        if recorded is None and not self.recorder.takes(store.layers):
            key = None
        if key is None or store.changes:
            return self._run_and_compare(call, key)
        if recorded is not None:
            return self._replay(call, recorded)
        return self._run_and_compare(call, key, record=self._steady)

    def _copy_to_static_inputs(self, call: FlatCall) -> None:
        """Copy the call's tensors to the fixed addresses from which recorded steps read them.

        Steps that run read them there too. Compiled code therefore sees the same tensors in every step, also if the
        caller passes slices at growing offsets, and nothing is left to compile while a step is recorded.
        """
        if self._fits != call.signature:
            self._fits = call.signature
            self._buffers = [
                torch.empty_like(x, memory_format=torch.contiguous_format) if isinstance(x, Tensor) else None
                for x in call.leaves
            ]
        for buffer, leaf in zip(self._buffers, call.leaves, strict=True):
            if buffer is not None:
                buffer.copy_(leaf)
        call.leaves = [x if buffer is None else buffer for x, buffer in zip(call.leaves, self._buffers, strict=True)]

    def _key(self, call: FlatCall) -> tuple[Any, ...]:
        """What a recorded step holds and the next step may change."""
        store = self.store
        marks = None if store.tokens.marks is None else storage_key(store.tokens.marks)
        return (call.signature, marks, *[layer.version for layer in store.layers])

    def _replay(self, call: FlatCall, recorded: RecordedStep) -> Any:
        """Launch the recorded step, and use its result if the decoder calls the same graph."""
        recorded.step.replay()
        self.store.ahead = True
        replayed = False

        def run_hook(number: int, inputs: list[Any], run_graph: Callable[[], Any]) -> Any:
            nonlocal replayed
            same = (
                number == recorded.number
                and recorded.weights.hold()
                and same_inputs(recorded.inputs, call.read(inputs))
            )
            if self.store.ahead and same:
                replayed = True
                return self._outputs(recorded)
            return run_graph()  # the first layer finds the store ahead and discards the replayed token

        result = call.run(run_hook)
        if not replayed:
            self.recorded = self._before = None
        return result

    def _outputs(self, recorded: RecordedStep) -> list[Any]:
        self.store.replayed(recorded.queries)
        return [x.clone() if isinstance(x, Tensor) else x for x in recorded.outputs]

    def _run_and_compare(self, call: FlatCall, key: tuple[Any, ...] | None, record: bool = False) -> Any:
        """Run the step and compare it with the one before; with ``record``, record and replay it if both are equal."""
        before, self._before, self._steady = self._before, None, False
        log, ran = call.decoder.backend.log, list[tuple[int, list[Any]]]()
        graphs = log.graphs

        def run_hook(number: int, inputs: list[Any], run_graph: Callable[[], Any]) -> Any:
            read = call.read(inputs)
            ran.append((number, read))
            if record and before is not None and _same(before, (key, number, read)):
                self.recorded = self._record(call, run_graph, *before)
                if self.recorded is not None:
                    self.recorded.step.replay()
                    return self._outputs(self.recorded)
            return run_graph()

        result = call.run(run_hook)
        one, reason = len(ran) == 1 and log.graphs == graphs, ""
        if one and key is not None and self._key(call) == key:
            self._before = key, *ran[0]
            if before is not None and before[:2] == self._before[:2]:
                reason = step_reasons.reason_of_inputs(before[2], ran[0][1], self.store.device)
                self._steady = not reason
        self._unlike = 0 if self._steady else self._unlike + 1
        if self._unlike == MAX_UNLIKE_STEPS:
            step_reasons.note(call.decoder, reason or self._why_unlike(one))
        return pytree.tree_map_only(Tensor, self._without_buffers, result)

    def _why_unlike(self, one_graph: bool) -> str:
        """Why many consecutive steps had different inputs."""
        if not self.recorder.takes(self.store.layers):
            return step_reasons.NO_KERNEL
        return step_reasons.MOVING_INPUTS if one_graph else step_reasons.SEVERAL_GRAPHS

    def _without_buffers(self, x: Tensor) -> Tensor:
        """The tensor, or a copy of it if it lies in a buffer that the next token overwrites."""
        if is_traceable_wrapper_subclass(x):  # computed from a weight of that kind
            return x
        address = x.untyped_storage().data_ptr()
        shared = any(address == y.untyped_storage().data_ptr() for y in self._buffers if y is not None)
        return x.clone() if shared else x

    def _record(
        self, call: FlatCall, run_graph: Callable[[], Any], key: tuple[Any, ...], number: int, inputs: list[Any]
    ) -> RecordedStep | None:
        """Record the graph without running it; None, with the layers unchanged, if that fails."""
        store = self.store
        assert store.device is not None
        tails = [layer.tail for layer in store.layers]
        store.captured_queries = {}
        reason = ""
        try:
            step, outputs = self.recorder.record(run_graph, store.device)
        except Exception as error:  # the step runs without a recording
            reason = f"{type(error).__name__}: {error}"
        finally:
            queries, store.captured_queries = store.captured_queries, None
            for layer, tail in zip(store.layers, tails, strict=True):
                layer.tail = tail  # the kernels did not run yet
        if not reason and self._key(call) != key:
            reason = "the recorded step differed from those before it"
        reason = reason or step_reasons.reason_of_result(outputs)
        if reason:
            call.decoder.stop_recording(reason)
            self.recorder.free()
            return None
        self.count += 1
        weights = [x for ref in weights_of(inputs) if (x := ref()) is not None]
        tails_of = ((layer.tail_keys, layer.tail_values, layer.counter) for layer in store.layers)
        written = [x for tensors in tails_of for x in tensors if x is not None]
        return RecordedStep(
            key,
            number,
            inputs,
            step,
            list(outputs),
            queries,
            TensorAddresses(weights),
            StorageWatch(weights),
            TensorAddresses(written),
        )


def _same(before: tuple[Any, int, list[Any]], now: tuple[Any, int, list[Any]]) -> bool:
    return before[:2] == now[:2] and same_inputs(before[2], now[2])
