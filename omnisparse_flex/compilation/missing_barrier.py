"""Adds a barrier that Inductor omits between a store in one loop of a kernel and the load in the next loop.

With a float32 residual stream and layers in bfloat16 (autocast), the kernel of a norm stores a sum in its first loop
and loads it in its second. Triton assigns the load to other threads than the store, which read values that are not
written yet (pytorch/pytorch#190517): some tokens of a compiled decoder are wrong, different ones in each run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

BARRIER = "tl.debug_barrier()"


@functools.cache
def patch_inductor() -> bool:
    """Let Inductor write the barrier from now on in this process, unless this torch writes it.

    Returns:
        Whether Inductor was changed.
    """
    from torch._inductor.codegen import common, triton

    # Torch's fix reads the same set, in ``TritonKernel.load``.
    with contextlib.suppress(OSError):  # a torch without its sources: two barriers do no harm
        if "invalidated_stores" in inspect.getsource(triton.TritonKernel.load):
            return False
    plain = common.CSEProxy.load

    def load(self: Any, name: str, index: Any) -> Any:
        kernel = self.kernel
        if isinstance(kernel, triton.TritonKernel) and name in kernel.cse.invalidated_stores:
            # The storing loop is in the body already, the loading loop is not.
            kernel.body.writeline(BARRIER)
        return plain(self, name, index)

    common.CSEProxy.load = load  # type: ignore[method-assign]
    return True
