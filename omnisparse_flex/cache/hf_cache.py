"""``OmniSparseCache``: a transformers cache that is physically smaller."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from omnisparse_flex.cache.choose_keys import choose_keys
from omnisparse_flex.cache.cuda_graph import CudaGraphs
from omnisparse_flex.cache.decode_call import DecodeCall, tokens_of
from omnisparse_flex.cache.hf_answers import CacheAnswers, full_attention_layers, with_transformers_base
from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.cache.memory_report import MemoryReport, memory_report
from omnisparse_flex.cache.step_replay import Replay
from omnisparse_flex.cache.store import TURN, SlimStore
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.compiled_module import CompiledDecoder, compiled_decoder_of


class OmniSparseCache(CacheAnswers):
    """A key-value cache whose heads hold only the visual keys that they use.

    ``model.generate(**inputs, cache=OmniSparseCache(model))``; before transformers 5.24 the argument is
    called ``past_key_values``, which later versions convert until 6.0. A prompt is computed with all its keys. As
    soon as a layer is done, its *lazy* heads keep text, sinks and recent tokens; its *fetching* heads also keep k*
    visual keys each. Logical positions and lengths are those of a full cache. Greedy search, sampling, beam search,
    assisted decoding, batches with padding and continued conversations work as with a ``DynamicCache``.

    ``sink_size``, ``window_size`` and ``max_kv_budget`` of the model's ``OmniSparseConfig`` set the number of sinks,
    of recent tokens, and the upper bound of k*.

    Args:
        model: A transformers model that ``apply_omnisparse`` changed.
        visual_recall: Share of its attention mass that each head keeps, in (0, 1]. It is measured on the last text
            queries of each turn, and again every ``REFRESH`` decoded tokens. 1 drops nothing.
        offload: Keep all droppable keys in (pinned) host memory: every turn then computes its question over the whole
            conversation and chooses anew. False drops them for good: a later question is answered from what the first
            one kept, and visual tokens of later turns are kept whole.
        cuda_graphs: On a GPU, record a decode step of the decoder as a CUDA graph after three equal steps, and replay
            it for the next tokens; no effect elsewhere. It costs the memory of one step's intermediate results
            (``memory_report``). Dynamo still checks its guards for each token: a change of weights, hooks or modes ends
            the recording. Steps that cannot be recorded (beams, drafts, padded batches, no ``position_ids``, several
            devices) run as compiled code, and ``rewrite_report`` says why. Set it to False if a custom operator of the
            model works on the host, or if weights are freed by resizing their memory in place (FSDP).

    Raises:
        ConfigError: If the model was not changed by ``apply_omnisparse``, has layers without full
            attention, or an argument is out of range. In use: another model, batch or device, no
            visual mask, gradients, an earlier call that failed.

    The ``attention_mask`` of cached tokens must not change. A prompt without visual tokens, or whose last token is
    visual (no question yet), is kept in full. A layer for which the host has no memory keeps a full cache and warns.
    Assisted decoding sends its first draft along with the prompt, and in a later turn computes all the tokens that it
    gets: pass only the new ones (before transformers 5.23, ``reset`` the cache). After beam search, ``reorder_cache``
    chooses the beams to go on with.

    Source: PAPER "KV-cache slimming". Our choice: the mass is of exact softmax rows, and ``visual_recall`` decides both
    which heads are lazy and how many keys the others fetch. Logit sinks join the softmax of every decoded token, but
    not the mass.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> OmniSparseCache:
        """Make an instance that is a transformers ``Cache`` too, which is imported only now."""
        return object.__new__(with_transformers_base(cast(Any, cls)) if cls is OmniSparseCache else cls)

    def __init__(
        self, model: nn.Module, *, visual_recall: float = 0.95, offload: bool = True, cuda_graphs: bool = True
    ) -> None:
        """Check the arguments; nothing is allocated before the first call."""
        require(isinstance(model, nn.Module), "model", "be an nn.Module", type(model).__name__)
        decoder = compiled_decoder_of(model)
        require(decoder is not None, "model", "be changed by apply_omnisparse", type(model).__name__)
        real = isinstance(visual_recall, (int, float)) and not isinstance(visual_recall, bool)
        require(real and 0 < visual_recall <= 1, "visual_recall", "be in (0, 1]", visual_recall)
        for name, value in (("offload", offload), ("cuda_graphs", cuda_graphs)):
            require(isinstance(value, bool), name, "be True or False", value)
        assert decoder is not None
        layers = [SlimLayer(i) for i in range(full_attention_layers(decoder.module))]
        super().__init__(layers=layers)  # type: ignore[call-arg]
        config = decoder.backend.config
        rule = functools.partial(choose_keys, recall=visual_recall, max_keys=config.max_kv_budget)
        self.store = SlimStore(layers, lambda mass, layer: rule(mass), offload, config.sink_size, config.window_size)
        self.replay = Replay(self.store, CudaGraphs()) if cuda_graphs else None
        # What a call still has to do after its recorded step was launched; see ``CompiledDecoder.prepare``.
        self.omnisparse_later: list[Callable[[], None]] = []
        self.owner = -1
        self.decoder = weakref.ref(decoder.module)
        self.reset()

    def omnisparse_call(self, decoder: CompiledDecoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder with this cache; the compiled decoder asks for it."""
        try:
            return DecodeCall(decoder, self, kwargs).run(args, kwargs)
        finally:
            self.omnisparse_later.clear()  # of a call that was refused

    def omnisparse_defer(self, kwargs: dict[str, Any], act: Callable[[], None]) -> bool:
        """Let ``act`` wait until a recorded step runs, if a call with these arguments may be one more of them."""
        tokens = tokens_of(kwargs)
        may_replay = self.replay is not None and self.replay.recorded is not None
        if not (may_replay and isinstance(tokens, Tensor) and tokens.shape[1] == 1):
            return False
        self.omnisparse_later.append(act)
        return True

    def set_length(self) -> None:
        """Update the tensor from whose size a compiled graph reads the cache's length."""
        self._length_tensor = torch.empty(self.store.length, 0)
        torch._dynamo.maybe_mark_dynamic(self._length_tensor, 0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """New keys and values of a layer; in a later turn, all of them.

        Raises:
            ConfigError: Outside a call of the model that the cache was made for.
        """
        if self.mode is None:
            raise ConfigError("cache must be used by the model it was made for, got a call that it was not told of")
        if self.mode == TURN:
            past = self.get_seq_length()
            return torch.ops.omnisparse.cache_restore(key_states, value_states, past, self.owner, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache, dropped ones included."""
        # The size of a tensor without elements: a compiled graph sees a dynamic size, not a constant.
        return self._length_tensor.shape[0]

    def activate_past_recording(self) -> None:
        """Assisted decoding announces that it will crop."""
        self.store.is_assisted = True

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # ``generate`` sets this when it begins: a turn follows, not a draft to verify.
        self.store.is_assisted = self.store.cropped = False
        if self.replay is not None:
            self.replay.forget()  # the next answer may run in other modes

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 while empty."""
        return self.store.batch

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds tokens."""
        return self.store.length > 0

    layers: list[SlimLayer]
    #: How the call in progress uses the cache; None between calls.
    mode: str | None
    _omnisparse_visual: Tensor | None  # the name is ``model.cache_history.HISTORY``

    def reset(self) -> None:
        """Forget everything and free it; the cache can be used anew."""
        self.store.clear()
        if self.replay is not None:
            self.replay.drop()
        self.mode = None
        self._omnisparse_visual = None
        self.set_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        Args:
            tokens_to_remove: Their number, negated. A positive number is the length that remains.
        """
        length, change = self.store.length, int(tokens_to_remove)  # transformers 5.17 passes a tensor
        remaining = change if change > 0 else length + change
        self.store.cropped = True
        if remaining >= length:
            return
        if remaining <= 0:
            self.reset()
            return
        self.store.crop(remaining)
        if self._omnisparse_visual is not None:
            self._omnisparse_visual = self._omnisparse_visual[:, :remaining]
        self.set_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the keys of row ``beam_idx[i]``, int64 (B,)."""
        if self.store.length:
            self.store.select(beam_idx)
            self._select_history(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, int64 or bool (B,)."""
        rows = torch.arange(self.store.batch, device=indices.device)[indices] if self.store.length else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        if self.store.length:
            self.reorder_cache(torch.arange(self.store.batch).repeat_interleave(repeats))

    def _select_history(self, rows: Tensor) -> None:
        if self._omnisparse_visual is not None:
            self._omnisparse_visual = self._omnisparse_visual[rows.to(self._omnisparse_visual.device)]

    def memory_report(self) -> MemoryReport:
        """Bytes of each layer and head on the device and the host, against a full cache."""
        recorded = self.replay.recorder.bytes if self.replay is not None else 0
        return memory_report(self.layers, self.store.batch, self.store.length, recorded)
