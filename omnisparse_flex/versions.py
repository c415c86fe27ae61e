"""The releases of torch and transformers that this library was tested with, and what it says of others."""

from __future__ import annotations

import importlib
import re
from typing import NamedTuple

from omnisparse_flex.errors import require


class Tested(NamedTuple):
    """A range of releases; the whole test suite passed on both ends.

    Attributes:
        oldest: The oldest that is supported.
        newest: The newest that was tested. Later ones may work.
    """

    oldest: str
    newest: str

    def __str__(self) -> str:
        """As in ``2.11.0 to 2.13.0``."""
        return f"{self.oldest} to {self.newest}"


#: By library. Lower bounds of the package's own requirements say the same; ``make lock`` reads those.
TESTED = {
    "torch": Tested("2.11.0", "2.13.0"),
    "transformers": Tested("5.17.0", "5.24.0"),
}


def release_of(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 11, 0) for ``2.11.0+cu130``; () for one that begins with none."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def installed(library: str) -> str:
    """The version of a library, which is imported if it was not."""
    return str(importlib.import_module(library).__version__)


def refuse_older(library: str) -> None:
    """Refuse a library that is older than the oldest supported release.

    Args:
        library: A key of ``TESTED``, imported already.

    Raises:
        ConfigError: If it is older. A version without numbers is let pass.
    """
    version, oldest = installed(library), TESTED[library].oldest
    release = release_of(version)
    require(not release or release >= release_of(oldest), library, f"be {oldest} or newer", version)


def newer_than_tested(*libraries: str) -> tuple[str, ...]:
    """Lines for the report: which of these libraries are newer than any release that was tested.

    Args:
        *libraries: Keys of ``TESTED``, imported already.
    """
    return tuple(
        f"{library} {installed(library)} is newer than {TESTED[library].newest}, the newest release that was tested"
        for library in libraries
        if release_of(installed(library)) > release_of(TESTED[library].newest)
    )
