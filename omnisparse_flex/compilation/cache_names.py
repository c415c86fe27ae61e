"""Names by which AOTAutograd's cache recognises the package's functions in another process."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

from torch.fx import GraphModule

#: Functions by name; each is also an attribute of this module, because the cache key names functions by import.
_KNOWN: dict[str, FunctionType] = {}


def stable_name(function: FunctionType, *ambient: object) -> FunctionType:
    """The function that stands for these constants, importable under a name that spells them.

    AOTAutograd's cache key holds the names of the functions in a graph, not their closures:
    equal names must mean equal code and constants, in every process.

    Args:
        function: The call of one site; whatever its closure holds must have a ``repr`` that tells all.
        *ambient: What else the function's meaning depends on.

    Returns:
        ``function``, or the earlier one with the same meaning; without a new name, and then
        not cached, if its closure holds an object that only an address describes.
    """
    constants = repr([cell.cell_contents for cell in function.__closure__ or ()] + list(ambient))
    if " at 0x" in constants:
        return function
    digest = hashlib.sha256(f"{source_digest()} {constants}".encode()).hexdigest()[:16]
    name = f"{function.__name__}_{digest}"
    if name not in _KNOWN:
        function.__name__ = function.__qualname__ = name
        function.__module__ = __name__
        setattr(sys.modules[__name__], name, function)
        _KNOWN[name] = function
    return _KNOWN[name]


def cacheable_functions(graph_module: GraphModule) -> dict[str, str]:
    """Inductor's ``unsafe_marked_cacheable_functions``: ours in this graph, keyed by our source.

    Our own name is among them: a graph without any function of ours is compiled under our rules, too.
    """
    from torch._inductor import config  # not at import: it is slow to load

    names = {_name_of(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}
    ours = [__name__, *sorted(name for name in names if name.startswith(f"{__name__}."))]
    marked = dict.fromkeys(ours, source_digest())
    return {**config.unsafe_marked_cacheable_functions, **marked}


def _name_of(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"


@functools.cache
def source_digest() -> str:
    """Digest of this package's source, so that changed code never hits the cache entries of older code."""
    return digest_of(Path(sys.modules["omnisparse_flex"].__path__[0]))


def digest_of(root: Path) -> str:
    """Digest of every Python file below a folder, its sub-folders and what links lead to included.

    Args:
        root: The folder of the package.

    Returns:
        16 hexadecimal digits, from the files' contents and their paths relative to ``root``.
    """
    digest = hashlib.sha256()
    folders = (Path(folder) for folder, _, _ in os.walk(root, followlinks=True))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]
