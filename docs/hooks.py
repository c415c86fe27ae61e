"""MkDocs hooks: the README, CONTRIBUTING and CHANGELOG are pages, and links to files of the repository are checked.

Links in those pages are written for a reader of the repository. In the site a link into ``docs/`` becomes a link to the
page, a picture is copied in, and a link to any other file becomes its path as text, or a link below ``repo_url`` where
``mkdocs.yml`` has one. A link to a file that does not exist is a warning, and warnings fail a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.hooks.repository")
ROOT = Path(__file__).resolve().parent.parent
#: Pages made of files outside ``docs/``: page -> file.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
PICTURES = (".png", ".svg", ".jpg")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside ``docs/``."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in files.documentation_pages():
        for mark, _, target, _ in LINK.findall(page.content_string):
            place = _place(page.src_uri, target)
            if mark and place and place.endswith(PICTURES) and not place.startswith("docs/") and (ROOT / place).is_file():
                if files.get_file_from_path(f"pictures/{place}") is None:
                    files.append(File.generated(config, f"pictures/{place}", abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site, outside code blocks."""

    def link(match: re.Match[str]) -> str:
        return _rewritten(match, page.file.src_uri, config)

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def _rewritten(match: re.Match[str], page: str, config: Any) -> str:
    mark, text, target, anchor = match.groups(default="")
    place = _place(page, target)
    if place is None:
        return match[0]
    here = posixpath.dirname(page) or "."
    if place.startswith("docs/"):
        return f"{mark}[{text}]({posixpath.relpath(place.removeprefix('docs/'), here)}{anchor})"
    made = next((made for made, source in PAGES.items() if source == place), None)
    if made is not None:
        return f"[{text}]({posixpath.relpath(made, here)}{anchor})"
    if not (ROOT / place).exists():
        LOG.warning("%s links to %s, which is not in the repository", page, place)
        return match[0]
    if mark and place.endswith(PICTURES):
        return f"![{text}]({posixpath.relpath(f'pictures/{place}', here)})"
    return f"[{text}]({config.repo_url}/blob/main/{place})" if config.repo_url else f"{text} (`{place}`)"


def _place(page: str, target: str) -> str | None:
    """Where a link of a page leads, as a path in the repository; None: to the web, or to the page itself."""
    if re.match(r"[a-z]+:|/|#", target):
        return None
    home = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(home, target))
