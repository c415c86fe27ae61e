"""What a prefill with an OmniSparseCache takes on a real device."""

from __future__ import annotations

import gc

import pytest
import torch

from omnisparse_flex import OmniSparseCache
from tests.helpers.slim import changed, half_lazy
from tests.helpers.tiny import VIDEO, cached

pytestmark = pytest.mark.gpu

#: Two tensors of 32 MiB in each layer, beside weights and activations of a narrow model.
LAYERS, TOKENS, HEADS, DIM = 8, 16384, 8, 128
LAYER_BYTES = 2 * TOKENS * HEADS * DIM * 2
#: What reading a pattern takes beside them, and the copies to the host that are under way.
ROOM = LAYER_BYTES // 8
WIDE = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": DIM, "max_position_embeddings": 32768}
NARROW = {"hidden_size": 256, "intermediate_size": 256}


def peak_of(act):
    """Bytes that a call needs at most beyond what was there, and what it returned; the second call, compiled."""
    act()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = act()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("offload", [True, False])
def test_a_prefill_peaks_below_slim_cache_and_one_full_layer(offload):
    """The issue's bound, in a real compiled prefill. What the model needs by itself: a full cache's peak without it."""
    from transformers import DynamicCache

    model = changed("llama", "cuda", "inductor", num_hidden_layers=LAYERS, **WIDE, **NARROW).to(torch.bfloat16)
    ids = torch.randint(10, 180, (1, TOKENS), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    ids[:, 64:-64] = VIDEO

    def prefill(cache):
        with torch.no_grad():
            model(input_ids=ids, **cached(cache), logits_to_keep=1)
        return cache

    def slimmed():
        cache = OmniSparseCache(model, offload=offload)
        cache.store.chooser = half_lazy
        return prefill(cache)

    whole, full = peak_of(lambda: prefill(DynamicCache(config=model.config)))
    alone = whole - LAYERS * LAYER_BYTES
    assert alone > 0 and full.layers[0].keys.shape == (1, HEADS, TOKENS, DIM)
    del full
    peak, cache = peak_of(slimmed)
    report = cache.memory_report()
    assert report.full == LAYERS * LAYER_BYTES and report.ratio > 4 and (report.host > 0) == offload
    bound = alone + report.device + LAYER_BYTES + ROOM
    assert peak <= bound < whole, (peak, bound, whole)
