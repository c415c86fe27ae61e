"""What every layer kept of what it promised, told without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks.promise import RECORD
from omnisparse_flex.report import LayerRecall


class Teller:
    """Finds out once whether a call of a model kept less than it promised.

    A table on a GPU is copied to pinned memory beside the model's own work and read when a later call finds the copy
    done: the news comes a call late, and nobody waits for it.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._told = False
        self._host: Tensor | None = None
        self._done: torch.cuda.Event | None = None

    def news(self, table: Tensor) -> LayerRecall | None:
        """The layer that broke its promise worst, the first time that one did; else None.

        Args:
            table: float32 (layers, len(RECORD)).
        """
        if self._told:
            return None
        seen = table if table.device.type == "cpu" else self._arrived(table)
        broken = [] if seen is None else [x for x in layer_recalls(seen) if x.broken > 0]
        self._told = len(broken) > 0
        return min(broken, key=lambda x: x.worst_head, default=None)

    def _arrived(self, table: Tensor) -> Tensor | None:
        """The copy that an earlier call started, if it is done; starts the next one."""
        if table.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        if self._host is None or self._done is None:
            self._host, self._done = torch.zeros(table.shape, pin_memory=True), torch.cuda.Event()
        elif not self._done.query():
            return None
        seen = self._host.clone()
        self._host.copy_(table, non_blocking=True)
        self._done.record(torch.cuda.current_stream(table.device))
        return seen


def adds_one_token(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a decoder's call is a decode step: its ids or embeddings hold one token."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next((x for x in given if isinstance(x, Tensor)), None)
    return tokens is not None and tokens.dim() >= 2 and tokens.shape[1] == 1


def layer_recalls(table: Tensor) -> tuple[LayerRecall, ...]:
    """The table's rows as a report lists them; layers that recorded nothing are absent."""
    rows = [dict(zip(RECORD, row, strict=True)) for row in table.tolist()]
    return tuple(
        LayerRecall(i, row["mean"], row["worst_head"], int(row["calls"]), int(row["broken"]))
        for i, row in enumerate(rows)
        if row["calls"] > 0
    )
