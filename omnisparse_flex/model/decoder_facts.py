"""What a decoder is like, as its config and its parameters say."""

from __future__ import annotations

from typing import Any

from torch import nn

from omnisparse_flex.cost_model import Shape, shape_of_config
from omnisparse_flex.errors import ConfigError


def refuse_several_devices(decoder: nn.Module) -> None:
    """Refuse a decoder whose layers lie on several devices, or partly on a disk: one graph runs on one.

    Raises:
        ConfigError: It names the devices.
    """
    devices = sorted({str(x.device) for x in decoder.parameters()})
    if len(devices) > 1:
        found = ", ".join(devices)
        raise ConfigError(f"model must have its decoder on one device, got {found} (device_map={{'': 0}} loads it so)")


def layer_configs(config: Any) -> list[Any]:
    """The configs of the layers, for one like Gemma 4's whose heads differ; of others the config itself."""
    if not getattr(config, "is_heterogeneous", False):
        return [config]
    return list(config.per_layer_config)


def head_shapes(config: Any) -> list[Shape]:
    """The distinct heads of a decoder's layers that its config states, the last layer's last; maybe none."""
    shapes = [shape_of_config(layer) for layer in layer_configs(config)]
    return list(dict.fromkeys(shape for shape in reversed(shapes) if shape is not None))[::-1]
