"""Progress lines with the elapsed time, so that a long compile can be told from a hang."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

#: Seconds between two lines of a step that prints nothing itself.
HEARTBEAT_S = 15.0


class Progress:
    """Prints one line per step, with the seconds since the start."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Start the clock.

        Args:
            stream: Where to print; None: standard output, as it is when a line is printed.
        """
        self.stream = stream
        self.start = time.perf_counter()
        self.open: list[str] = []

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def __call__(self, text: str) -> None:
        """Print one line."""
        print(f"[{self.seconds:6.1f} s] {text}", file=self.stream or sys.stdout, flush=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Print that a step starts, that it still runs, and how long it took.

        Args:
            text: What happens, e.g. ``"compiling graph 1"``.
        """
        self(f"{text} ...")
        begun, done = time.perf_counter(), threading.Event()
        self.open.append(text)

        def beat() -> None:
            while not done.wait(HEARTBEAT_S):
                if self.open[-1:] == [text]:  # only the innermost step prints
                    self(f"{text} ... still at it after {time.perf_counter() - begun:.0f} s")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.open.pop()
        self(f"{text}: {time.perf_counter() - begun:.1f} s")

    def compile_hook(self, what: str) -> Callable[[int], contextlib.AbstractContextManager[None]]:
        """A hook for ``Backend.compile_hook``: one step around each compile.

        Args:
            what: What is being compiled, e.g. ``"sparse"``.
        """
        return lambda index: self.step(f"compiling {what} graph {index + 1}")
