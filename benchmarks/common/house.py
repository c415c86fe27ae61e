"""The house in figures: files a folder, lengths, import arrows, names, fields and lines.

``make house`` prints them; ``python -m benchmarks.common.house --record`` writes them into the summary, ``--long``
lists every file and function over its limit.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import statistics
from pathlib import Path

import omnisparse_flex
from benchmarks.common.summary import record
from omnisparse_flex.config import OmniSparseConfig
from tests.test_layering import circles, violations

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("omnisparse_flex", "masks", "passes")
LABS = ("tests", "benchmarks")
#: Most lines of a function, of a file, and of a file of tests.
FUNCTION, FILE, TEST = 40, 250, 400


def sources(folders: tuple[str, ...]) -> list[Path]:
    """Python files below these folders of the checkout, each once: links are not followed."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in files if not any(parent.is_symlink() for parent in file.parents))


def functions(file: Path, bare: bool = False) -> list[tuple[int, str]]:
    """(lines, place) of every function in a file but Triton kernels, which are one function by nature.

    Args:
        file: The file.
        bare: Count from the first statement after the docstring on.
    """
    lengths = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            lines = body_lines(node) if bare else (node.end_lineno or node.lineno) - node.lineno + 1
            lengths.append((lines, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return lengths


def body_lines(place: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its first statement on, docstring apart."""
    first = place.body[1:] if ast.get_docstring(place) is not None else place.body
    return (place.end_lineno or 0) - first[0].lineno + 1 if first else 0


def over_the_limits() -> list[tuple[int, str]]:
    """(lines, place) of functions over ``FUNCTION`` lines and files over ``FILE`` (tests: ``TEST``), longest first."""
    files = [*sources(PACKAGES), *sources(LABS)]
    long = [function for file in files for function in functions(file) if function[0] > FUNCTION]
    for file in files:
        lines, place = length(file), str(file.relative_to(ROOT))
        if lines > (TEST if place.startswith("tests/") else FILE):
            long.append((lines, place))
    return sorted(long, reverse=True)


def length(file: Path) -> int:
    """Lines of a file."""
    return file.read_text("utf-8").count("\n")


def widest(files: list[Path]) -> tuple[int, str]:
    """Python files in the fullest folder, and its name."""
    folder, count = collections.Counter(file.parent for file in files).most_common(1)[0]
    return count, str(folder.relative_to(ROOT))


def table() -> list[tuple[str, float, str]]:
    """(what, number, where) of the house as it is."""
    package, labs = sources(PACKAGES), sources(LABS)
    bodies = sorted(function for file in package for function in functions(file))
    bare = [lines for file in package for lines, _ in functions(file, bare=True)]
    lengths = sorted((length(file), str(file.relative_to(ROOT))) for file in package)
    return [
        ("files in the fullest folder of the packages", *widest(package)),
        ("files in the fullest folder of tests and benchmarks", *widest(labs)),
        ("files of the packages", len(package), ""),
        ("lines of the packages", sum(lines for lines, _ in lengths), ""),
        ("median file, lines", statistics.median(lines for lines, _ in lengths), ""),
        ("longest file, lines", *lengths[-1]),
        ("files over 250 lines", sum(lines > FILE for lines, _ in lengths), ""),
        ("median function, lines", statistics.median(lines for lines, _ in bodies), ""),
        ("longest function, lines", *bodies[-1]),
        ("functions over 40 lines", sum(lines > FUNCTION for lines, _ in bodies), ""),
        ("functions over 40 lines, docstrings apart", sum(lines > FUNCTION for lines in bare), ""),
        ("import arrows that go back", len(violations(ROOT)), ""),
        ("import circles", len(circles(ROOT)), ""),
        ("public names", len(omnisparse_flex.__all__), ""),
        ("config fields", len(dataclasses.fields(OmniSparseConfig)), ""),
        ("README, KB", round((ROOT / "README.md").stat().st_size / 1024, 1), ""),
    ]


#: Figure -> (row of the table, unit).
FIGURES = {
    "house.widest_folder": ("files in the fullest folder of the packages", "files"),
    "house.package_lines": ("lines of the packages", "lines"),
    "house.longest_function": ("longest function, lines", "lines"),
    "house.back_arrows": ("import arrows that go back", "imports"),
    "house.readme_kb": ("README, KB", "KB"),
}


def main() -> None:
    """Print the table; with ``--record``, write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="list every file and function over its limit")
    parser.add_argument("--record", action="store_true", help="write the figures into the summary")
    options = parser.parse_args()
    rows = table()
    for what, number, where in rows:
        print(f"{what:<54} {number:>8g}  {where}")
    for lines, place in over_the_limits() if options.long else ():
        print(f"{lines:>5}  {place}")
    if options.record:
        values = {what: number for what, number, _ in rows}
        for name, (what, unit) in FIGURES.items():
            record(name, values[what], unit=unit, baseline="", script=__file__)


if __name__ == "__main__":
    main()
