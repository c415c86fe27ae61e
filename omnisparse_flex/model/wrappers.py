"""What stands around a model (PEFT, DDP, DeepSpeed, a compiled wrapper): seen through, or refused by name."""

from __future__ import annotations

from torch import nn

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.model import hf

#: Wrappers that hold the model as ``module``; the names spare us the import of what may not be installed.
MODULE_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
#: Why ``torch.nn.DataParallel`` is refused.
REPLICAS = "replicas lose their compiled decoder (start one process for each GPU, or show this one a single GPU)"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hand their call on.

    Args:
        model: PEFT's, or one with the model as ``module`` or ``_orig_mod``, or the model itself.

    Returns:
        A transformers model where there is one to be found this way.
    """
    inner = _inside(model)
    return model if inner is None else unwrap(inner)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a module around a transformers model: taken for a plain one, its vision tower would become sparse.

    Args:
        model: What ``unwrap`` returned.

    Raises:
        ConfigError: It names the part to apply to.
    """
    if _is_named(model, "DataParallel"):
        raise ConfigError(f"model must not be a DataParallel, got {type(model).__name__}: {REPLICAS}")
    if hf.is_transformers_model(model):
        return
    for path, module in model.named_modules():
        if path and hf.is_transformers_model(module) and _has_decoder(module):
            name = type(model).__name__
            raise ConfigError(
                f"model must be the transformers model itself, got {name} around {type(module).__name__}: "
                f"call apply_omnisparse on its part {path!r}"
            )


def refuse_replica(module: nn.Module) -> None:
    """Refuse to run in a copy that ``torch.nn.DataParallel`` made for another device.

    Raises:
        ConfigError: If ``module`` is one.
    """
    if getattr(module, "_is_replica", False):
        raise ConfigError(f"model must not run in a DataParallel, got a replica: {REPLICAS}")


def _inside(model: nn.Module) -> nn.Module | None:
    """What the outermost wrapper holds, None if ``model`` is not a wrapper."""
    if hf.is_transformers_model(model):
        return None
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return compiled
    if callable(get_base := getattr(model, "get_base_model", None)):
        base = get_base()
        return base if isinstance(base, nn.Module) and base is not model else None
    held = getattr(model, "module", None)
    if not isinstance(held, nn.Module) or _is_named(model, "DataParallel"):
        return None
    return held if _is_named(model, *MODULE_WRAPPERS) or hf.is_transformers_model(unwrap(held)) else None


def _is_named(model: nn.Module, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(model).__mro__)


def _has_decoder(model: nn.Module) -> bool:
    try:
        hf.find_decoder(model)
    except (ConfigError, AttributeError, NotImplementedError):
        return False
    return True
