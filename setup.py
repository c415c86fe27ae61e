"""Refuses to build where ``omnisparse_flex/masks`` and ``passes`` are not folders; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

for name in ("masks", "passes"):
    if not (Path(__file__).parent / "omnisparse_flex" / name).is_dir():
        raise SystemExit(
            f"omnisparse_flex/{name} must be a link to the folder {name}/, got a file or nothing: this file system or "
            "this git makes no symbolic links (git config core.symlinks true, then git checkout -- omnisparse_flex)"
        )

setup()
