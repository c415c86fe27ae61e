"""The page that tells what is rewritten says what is found now."""

import importlib.util
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "rewritten.md"


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("make_rewritten", PAGE.with_name("make_rewritten.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PAGE.read_text("utf-8") == module.page(), "run docs/make_rewritten.py"
