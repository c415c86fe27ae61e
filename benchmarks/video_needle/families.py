"""The ways of inference that are compared: one compiled graph each, whatever its target recall."""

from __future__ import annotations

import dataclasses
from typing import Any

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.config import SCORINGS

#: A target that keeps every key of whoever looks far.
ALL_KEYS = 1 - 1e-6


@dataclasses.dataclass(frozen=True)
class Family:
    """One configuration of the selection.

    Attributes:
        name: In the rows.
        fields: What differs from the base config.
        control: A scorer of ``controls.SCORERS`` in the place of the real one, run at the plain family's densities.
        recalls: Its only target recalls; None: those that are asked for.
    """

    name: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    control: str | None = None
    recalls: tuple[float, ...] | None = None

    def config(self, base: dict[str, Any], layers: int, dense_layers: int) -> OmniSparseConfig:
        """The config, its sparse layers' target still to be set at run time.

        Args:
            base: Fields that hold for every family.
            layers: Of the model.
            dense_layers: First layers that stay dense.
        """
        target = [1.0] * dense_layers + [0.5] * (layers - dense_layers)
        return OmniSparseConfig.from_dict({**base, **self.fields, "target_recall": target})


_WINDOW = {"lazy_threshold": None, "max_kv_budget": None, "budget": "per_head", "scoring": "auto"}
_CONTROL = {**_WINDOW, "last_rows": 0}
#: ``OmniSparse`` is both selections together; the third mechanism, the slim cache, has rows of its own.
FAMILIES = {
    family.name: family
    for family in (
        Family("OmniSparse"),
        Family("window only", _CONTROL, control="window only"),
        Family("random", _CONTROL, control="random"),
        Family("question rows alone", _WINDOW, control="window only"),
        Family("estimate alone", {"last_rows": 0}),
        Family("query selection alone", recalls=(ALL_KEYS,)),
        Family("KV selection alone", {"lazy_threshold": None}),
        Family("tokens", {"granularity": "token", "scoring": SCORINGS["token"][0], "lazy_threshold": 0.05}),
    )
}
