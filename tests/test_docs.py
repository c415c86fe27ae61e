"""The pages say what is so: their paths exist, their snippets parse, their table of rules is the config's."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnisparse_flex import OmniSparseConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "omnisparse_flex|masks|passes|tests|benchmarks|docs|examples|models"
#: A path or module in code font; <name> and * stand for what is not a file.
PATH = re.compile(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]*[\w/])(?![\w<*{{])")
MODULE = re.compile(r"python -m\s+(benchmarks[\w.]+)")
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
CONFIG = re.compile(r"OmniSparseConfig\(([^()]*)\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def missing_paths(text: str) -> list[str]:
    """Paths and modules that a page names and the repository has not."""
    paths = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    modules = [name for name in MODULE.findall(text) if not (ROOT / f"{name.replace('.', '/')}.py").exists()]
    return paths + modules


def snippets(text: str) -> Iterator[ast.Module]:
    for code in FENCE.findall(text):
        yield ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    assert missing_paths(page.read_text()) == []


def test_a_missing_file_is_found() -> None:
    text = "see `masks/nowhere.py`, `masks/<name>.py`, `docs/` and `python -m benchmarks.nothing.at_all`"
    assert missing_paths(text) == ["masks/nowhere.py", "benchmarks.nothing.at_all"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_parse_and_import_what_exists(page: Path) -> None:
    for tree in snippets(page.read_text()):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("omnisparse_flex"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rules_in_the_text_are_rules(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("it names rules that were removed")
    for fields in CONFIG.findall(page.read_text()):
        call = ast.parse(f"f({fields.replace('..., ', '').replace(', ...', '')})", mode="eval").body
        assert isinstance(call, ast.Call)
        OmniSparseConfig(**{word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg})


def test_the_table_of_rules_is_the_config() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page.partition("<!-- rules:start")[2].partition("<!-- rules:end -->")[0]
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:3]] for line in table.splitlines() if "| `" in line]
    fields = [[field.name, field.default] for field in dataclasses.fields(OmniSparseConfig)]
    assert [[name, ast.literal_eval(default)] for name, default in rows] == fields


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192
