"""Rules measured on a model: ``calibrate``, and the speed of a device."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnisparse_flex.calibration.search import calibrate as calibrate
    from omnisparse_flex.calibration.search import run_calibration as run_calibration

# Imported on first use: modules that these names need import other modules of this folder.
_HOMES = {
    "calibrate": "omnisparse_flex.calibration.search",
    "run_calibration": "omnisparse_flex.calibration.search",
}
__all__ = ["calibrate", "run_calibration"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
