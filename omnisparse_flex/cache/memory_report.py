"""The memory that a slim cache occupies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.report import table


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMemory:
    """One layer's bytes.

    Attributes:
        layer: Decoder layer, 0-based.
        lazy: KV heads without visual keys.
        heads: Device bytes of each KV head's keys and values, room for new tokens included.
        tokens: Tokens that each KV head holds on the device (of the longest row).
        device: Device bytes, positions included.
        host: Host bytes of the tensors; torch's pinned allocator may round each size up.
        full: Bytes that the keys and values of a full cache need.
    """

    layer: int
    lazy: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: tuple[int, ...]
    device: int
    host: int
    full: int


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of a cache, from the storages of its tensors.

    Attributes:
        layers: One entry per layer.
        length: Tokens in the cache.
        batch: Rows.
        recorded: Device bytes that a recorded decode step took for its intermediate results.
    """

    layers: tuple[LayerMemory, ...]
    length: int
    batch: int
    recorded: int = 0

    @property
    def device(self) -> int:
        """Device bytes of all layers, and of the recorded step."""
        return sum(layer.device for layer in self.layers) + self.recorded

    @property
    def host(self) -> int:
        """Host bytes of all layers."""
        return sum(layer.host for layer in self.layers)

    @property
    def full(self) -> int:
        """Bytes that a full cache needs."""
        return sum(layer.full for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Full bytes over device bytes; 1 while empty."""
        return self.full / self.device if self.device else 1.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        names = ("length", "batch", "recorded", "device", "host", "full", "ratio")
        totals = {name: getattr(self, name) for name in names}
        return totals | {"layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        """A table: one line per layer, and the sum."""
        head = f"{self.batch} x {self.length} tokens: {self.ratio:.2f}x less device memory than a full cache"
        rows = [["layer", "lazy heads", "tokens per head", "device", "host", "full cache"]]
        for layer in self.layers:
            tokens = " ".join(str(n) for n in layer.tokens)
            lazy = f"{len(layer.lazy)} of {len(layer.heads)}"
            rows.append([str(layer.layer), lazy, tokens, *(_mib(n) for n in (layer.device, layer.host, layer.full))])
        if self.recorded:
            rows.append(["recorded step", "", "", _mib(self.recorded), _mib(0), _mib(0)])
        rows.append(["all", "", "", *(_mib(n) for n in (self.device, self.host, self.full))])
        return "\n".join([head, *table(rows)])


def memory_report(layers: Sequence[SlimLayer], batch: int, length: int, recorded: int = 0) -> MemoryReport:
    """Measure the layers of a cache; ``recorded``: bytes of its recorded step."""
    measured = tuple(_measure(layer) for layer in layers if layer.kept)
    return MemoryReport(measured, length, max(batch, 0), recorded)


def _measure(layer: SlimLayer) -> LayerMemory:
    tail = [x for x in (layer.tail_keys, layer.tail_values) if x is not None]
    tail_bytes = sum(x.untyped_storage().nbytes() for x in tail)
    count = sum(len(part.heads) for part in layer.kept)
    heads, tokens, full = [tail_bytes // count] * count, [layer.tail] * count, 0
    for part in layer.kept:
        rows = part.keys.shape[0]
        width = (part.keys.shape[3] + part.values.shape[3]) * part.keys.element_size()
        for head in part.heads:
            heads[head] += rows * part.keys.shape[2] * width
            tokens[head] += part.keys.shape[2]
            full += rows * layer.length * width
    device = tail_bytes + sum(part.bytes for part in layer.kept)
    return LayerMemory(layer.index, layer.lazy, tuple(heads), tuple(tokens), device, layer.host.bytes, full)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
