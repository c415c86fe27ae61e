"""What must exist inside torch and transformers, looked up before anything is changed.

Only names are looked up here, in milliseconds. How they behave is what ``tests/test_seams.py`` asks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from types import MappingProxyType

from omnisparse_flex.errors import require
from omnisparse_flex.versions import TESTED, installed, refuse_older

#: ``module:attribute`` by when it is needed: when this package is imported, when a backend is made, when one is made
#: that may use Inductor, and when a model of transformers is changed.
SEAMS = MappingProxyType(
    {
        "import": (
            "torch._higher_order_ops.flex_attention:flex_attention",
            "torch.fx.experimental.symbolic_shapes:is_concrete_int",
            "torch.nn:Module._compiled_call_impl",
            "torch.nn:Module._call_impl",
            "torch.nn.attention.flex_attention:AuxRequest",
            "torch.nn.attention.flex_attention:BlockMask.as_tuple",
            "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
        ),
        "dynamo": (
            "torch._C:_AutoDispatchBelowADInplaceOrView",
            "torch._dynamo:maybe_mark_dynamic",
            "torch._dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex",
            "torch._dynamo.backends.registry:lookup_backend",
            "torch._dynamo.config:recompile_limit",
            "torch._dynamo.config:specialize_float",
        ),
        "inductor": (
            "torch._inductor:list_mode_options",
            "torch._inductor.compile_fx:compile_fx",
            "torch._inductor.config:epilogue_fusion",
            "torch._inductor.config:unsafe_marked_cacheable_functions",
        ),
        "transformers": (
            "transformers:AttentionInterface.register",
            "transformers:PreTrainedModel._can_set_attn_implementation",
            "transformers:PreTrainedModel._supports_sdpa",
            "transformers.integrations.sdpa_attention:sdpa_attention_forward",
            "transformers.masking_utils:AttentionMaskInterface.register",
            "transformers.masking_utils:causal_mask_function",
            "transformers.masking_utils:sdpa_mask",
        ),
    }
)


def exists(seam: str) -> bool:
    """Whether a ``module:attribute`` can be imported."""
    module, _, path = seam.partition(":")
    try:
        functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


def is_written(seam: str) -> bool:
    """Whether the source of a module defines ``module:attribute``.

    For modules that are not imported yet and take seconds to import; a module without source is believed.
    """
    module, _, path = seam.partition(":")
    if module in sys.modules:
        return exists(seam)
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # not even its package is there
        spec = None
    if spec is None:
        return False
    read: Callable[[str], str | None] | None = getattr(spec.loader, "get_source", None)
    source = read(module) if read else None
    name, *methods = path.split(".")
    patterns = [rf"^(?:def |class )?{name}\b", *(rf"^ +def {method}\b" for method in methods)]
    return source is None or all(re.search(pattern, source, re.MULTILINE) for pattern in patterns)


@functools.cache
def require_seams(kind: str) -> None:
    """Refuse a library that lacks what we need of its inside.

    Args:
        kind: A key of ``SEAMS``.

    Raises:
        ConfigError: It names what is missing, and the versions that have it.
    """
    look = is_written if kind == "inductor" else exists
    library = "transformers" if kind == "transformers" else "torch"
    for seam in SEAMS[kind]:
        rule = f"have {seam.replace(':', '.')}, as {library} {TESTED[library]} has"
        require(look(seam), library, rule, f"{installed(library)} without it")


def check_torch() -> None:
    """Refuse a torch that is too old, or lacks what this package imports.

    Raises:
        ConfigError: In either case.
    """
    importlib.import_module("torch")  # ``import omnisparse_flex`` may be a program's first import
    refuse_older("torch")
    require_seams("import")


def check_transformers() -> None:
    """Refuse a transformers that is too old, or lacks what we need.

    Raises:
        ConfigError: In either case.
    """
    refuse_older("transformers")
    require_seams("transformers")
