"""A recorder for every device, and caches that record with it."""

from __future__ import annotations

import copy

import torch

from omnisparse_flex import OmniSparseCache, rewrite_report
from omnisparse_flex.cache.step_replay import Replay
from tests.helpers.slim import changed, half_lazy
from tests.helpers.tiny import cached

SPAN = ((10, 50),)


class Again:
    """A step that runs anew, into the results of its recording."""

    def __init__(self, step, store):
        self.step, self.store = step, store
        self.runs = 0
        self.result, self.queries = self.quietly()

    def quietly(self):
        """Run; on the device only, as a graph would: Python's books stay as they were."""
        tails = [layer.tail for layer in self.store.layers]
        kept, self.store.captured_queries = self.store.captured_queries, {}
        result = self.step()
        queries, self.store.captured_queries = self.store.captured_queries, kept
        if kept is not None:
            kept.update(queries)
        for layer, tail in zip(self.store.layers, tails, strict=True):
            layer.tail = tail
        return result, queries

    def replay(self):
        self.runs += 1
        result, queries = self.quietly()
        for old, new in zip(self.tensors(self.result), self.tensors(result), strict=True):
            old.copy_(new)
        for layer, query in queries.items():
            self.queries[layer].copy_(query)

    @staticmethod
    def tensors(result):
        return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


class StandIn:
    """A recorder for every device."""

    bytes = 0

    def __init__(self, store):
        self.store, self.made, self.freed = store, [], 0

    def serves(self, device):
        return True

    def takes(self, layers):
        return True

    def record(self, step, device):
        self.made.append(Again(step, self.store))
        return self.made[-1], self.made[-1].result

    def free(self):
        self.freed += 1

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(self.store, memo))

    @property
    def runs(self):
        return sum(one.runs for one in self.made)


def recording(model, **keywords):
    """A cache whose steps are recorded by the stand-in, and the stand-in."""
    cache = OmniSparseCache(model, **keywords)
    cache.store.chooser = half_lazy
    recorder = StandIn(cache.store)
    cache.replay = Replay(cache.store, recorder)
    return cache, recorder


def plain(model, **keywords):
    cache = OmniSparseCache(model, cuda_graphs=False, **keywords)
    cache.store.chooser = half_lazy
    return cache


def notes(model):
    return [note for note in rewrite_report(model).notes if "CUDA graph" in note]


def equal(name, device, act, monkeypatch=None):
    """``act(model, cache)`` gives the same tokens with and without replays; returns the stand-in and the model."""
    expected = act(model := changed(name, device), plain(model))
    cache, recorder = recording(model := changed(name, device))
    assert torch.equal(act(model, cache), expected)
    return recorder, model


def feed(model, cache, ids, start):
    """One token after the other, with positions as ``generate`` gives them."""
    out = []
    with torch.no_grad():
        for i in range(ids.shape[1]):
            at = torch.full((ids.shape[0], 1), start + i, device=ids.device)
            out.append(model(input_ids=ids[:, i : i + 1], position_ids=at, **cached(cache)).logits)
    return torch.cat(out, 1)


def filled(model, ids):
    cache = plain(model)
    with torch.no_grad():
        model(input_ids=ids, **cached(cache))
    return cache
