"""A barrier that Inductor forgets: between a store in one loop of a kernel and the load in the next that reads it back.

Where the residual stream is float32 and the layers compute in bfloat16 (autocast), a norm's
kernel stores the sum in its first loop and reads it back in its second, and Triton gives other
threads to the load than to the store. Threads then read what others have not written yet
(pytorch/pytorch#190517): some tokens of a compiled decoder are wrong, others in every run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

BARRIER = "tl.debug_barrier()"


@functools.cache
def patch_inductor() -> bool:
    """Let Inductor write the barrier, in this process and from now on, unless this torch does so by itself.

    Returns:
        Whether anything had to be mended.
    """
    from torch._inductor.codegen import common, triton

    # Torch's own mend looks at the same set, in the Triton kernels' own ``load``.
    with contextlib.suppress(OSError):  # a torch without its sources: two barriers do no harm
        if "invalidated_stores" in inspect.getsource(triton.TritonKernel.load):
            return False
    plain = common.CSEProxy.load

    def load(self: Any, name: str, index: Any) -> Any:
        kernel = self.kernel
        if isinstance(kernel, triton.TritonKernel) and name in kernel.cse.invalidated_stores:
            # The loop that stored is written into the body already, the one that loads is not.
            kernel.body.writeline(BARRIER)
        return plain(self, name, index)

    common.CSEProxy.load = load  # type: ignore[method-assign]
    return True
