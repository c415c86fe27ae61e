"""Rules beside a model: written once, restored with one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError, require

#: The file's name in a model's directory.
NAME = "omnisparse.json"


def save_rules(config: OmniSparseConfig, path: str | os.PathLike[str]) -> Path:
    """Write rules where ``apply_omnisparse(model, path)`` finds them.

    Args:
        config: The rules.
        path: A directory, for a file ``omnisparse.json`` in it, or the file itself.

    Returns:
        The file.

    Raises:
        ConfigError: If ``config`` is none, or the directory does not exist.
    """
    require(isinstance(config, OmniSparseConfig), "config", "be an OmniSparseConfig", type(config).__name__)
    file = _file(path)
    require(file.parent.is_dir(), "path", "be an existing directory or a file in one", str(path))
    file.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return file


def load_rules(path: str | os.PathLike[str]) -> OmniSparseConfig:
    """Read what ``save_rules`` or ``omnisparse-flex calibrate`` wrote, of this version or an earlier one.

    Args:
        path: A directory with ``omnisparse.json``, or the file itself.

    Raises:
        ConfigError: If there is no such file, it is no JSON, or it holds rules of a later version or none.
    """
    file = _file(path)
    require(file.is_file(), "config", f"be a file of rules or a directory with {NAME}", str(path))
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"config must be valid JSON, got {str(file)!r} ({error})") from error
    require(isinstance(fields, dict), "config", "hold the fields of an OmniSparseConfig", str(file))
    return OmniSparseConfig.from_dict(fields)


def _file(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    return given / NAME if given.is_dir() else given
