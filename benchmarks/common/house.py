"""The house in figures: files a folder, lengths, import arrows, names, fields and lines.

``make house`` prints them; ``python -m benchmarks.common.house --record`` writes them into the summary.
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


def sources(folders: tuple[str, ...]) -> list[Path]:
    """Python files below these folders of the checkout, each once: links are not followed."""
    found = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in found if not any(parent.is_symlink() for parent in file.parents))


def functions(file: Path) -> list[tuple[int, str]]:
    """(lines, place) of every function in a file; Triton kernels, which are one function by nature, apart."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            found.append((lines, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return found


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
    bodies = sorted(found for file in package for found in functions(file))
    lengths = sorted((length(file), str(file.relative_to(ROOT))) for file in package)
    return [
        ("files in the fullest folder of the packages", *widest(package)),
        ("files in the fullest folder of tests and benchmarks", *widest(labs)),
        ("files of the packages", len(package), ""),
        ("lines of the packages", sum(lines for lines, _ in lengths), ""),
        ("median file, lines", statistics.median(lines for lines, _ in lengths), ""),
        ("longest file, lines", *lengths[-1]),
        ("files over 250 lines", sum(lines > 250 for lines, _ in lengths), ""),
        ("median function, lines", statistics.median(lines for lines, _ in bodies), ""),
        ("longest function, lines", *bodies[-1]),
        ("functions over 40 lines", sum(lines > 40 for lines, _ in bodies), ""),
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
    parser.add_argument("--record", action="store_true", help="write the figures into the summary")
    rows = table()
    for what, number, where in rows:
        print(f"{what:<54} {number:>8g}  {where}")
    if parser.parse_args().record:
        values = {what: number for what, number, _ in rows}
        for name, (what, unit) in FIGURES.items():
            record(name, values[what], unit=unit, baseline="", script=__file__)


if __name__ == "__main__":
    main()
