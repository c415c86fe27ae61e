"""The graph after every pass, as text files in the folder that ``OMNISPARSE_DUMP`` names."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from torch.fx import GraphModule

from omnisparse_flex.errors import ConfigError

#: Set to a folder's path, each captured graph writes there what every pass made of it.
DUMP_VARIABLE = "OMNISPARSE_DUMP"
#: Most folders of one dump: a process that recompiles without end must not fill the disk.
MOST_FOLDERS = 1000


class Dump:
    """The dump of one captured graph: a folder of its own, one file for each pass.

    ``0_captured.py`` is the graph as Dynamo made it, ``1_find_sites.py`` what the first pass left, and so on. Each
    file is the graph as Python code (``GraphModule.print_readable``) under a line that names the pass, its time in
    milliseconds and how many nodes it added or removed.

    Attributes:
        folder: Where the files lie.
    """

    def __init__(self, root: Path, graph_module: GraphModule) -> None:
        """Make the folder and write the graph as captured."""
        self.folder = _new_folder(root)
        self._graph_module = graph_module
        self._nodes = self._files = 0
        self.write("captured", None)

    def write(self, name: str, seconds: float | None) -> None:
        """Write the graph as it is now.

        Args:
            name: Of the pass that ran last.
            seconds: How long it took; None: nothing ran yet.
        """
        nodes = len(self._graph_module.graph.nodes)
        took = "" if seconds is None else f", {seconds * 1e3:.2f} ms, {nodes - self._nodes:+d} nodes"
        code = self._graph_module.print_readable(print_output=False)
        (self.folder / f"{self._files}_{name}.py").write_text(f"# {name}{took}, {nodes} nodes in all\n{code}\n")
        self._nodes, self._files = nodes, self._files + 1
        self._started = time.perf_counter()

    def passed(self, name: str) -> None:
        """Write what the pass ``name`` left, with the time since the last file; a full disk stops no compile."""
        with contextlib.suppress(OSError):
            self.write(name, time.perf_counter() - self._started)


def start_dump(graph_module: GraphModule) -> Dump | None:
    """A dump of this graph if ``OMNISPARSE_DUMP`` asks for one.

    A folder that cannot be written by now ends in no dump rather than in an error: a graph is being compiled.
    """
    root = os.environ.get(DUMP_VARIABLE)
    if not root:
        return None
    try:
        return Dump(Path(root), graph_module)
    except OSError:
        return None


def check_dump_folder() -> None:
    """Check the folder before anything is compiled.

    Raises:
        ConfigError: If ``OMNISPARSE_DUMP`` names something that is no folder and cannot become one.
    """
    root = os.environ.get(DUMP_VARIABLE)
    if not root:
        return
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{DUMP_VARIABLE} must name a folder that can be written, got {root!r}") from error
    if not os.access(root, os.W_OK):
        raise ConfigError(f"{DUMP_VARIABLE} must name a folder that can be written, got {root!r}")


def _new_folder(root: Path) -> Path:
    """The first ``graph_N`` that does not exist yet; other processes may make theirs meanwhile."""
    for number in range(MOST_FOLDERS):
        folder = root / f"graph_{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(root)
