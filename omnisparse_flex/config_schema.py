"""Rules that an earlier version wrote: how they are read, and what stands in place of what was removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from omnisparse_flex.errors import require

#: Version of what ``OmniSparseConfig.to_dict`` writes; rules without one are of schema 1 (omnisparse-flex 0.1).
SCHEMA = 3
#: What fields meant that rules of schema 1 and 2 leave out: since schema 3 blocks are chosen by peaks unless told.
UNTOLD = {"budget": "per_head", "target_recall": 0.98, "key_block": 128, "window_size": 256}


class Removed(NamedTuple):
    """A field that there is no more.

    Attributes:
        same: Its values that meant what rules without the field mean: saved rules with one of them are still read.
        successor: What to do instead.
    """

    same: tuple[Any, ...]
    successor: str


REMOVED_FIELDS = {
    "lazy_mode": Removed(("local",), "lazy queries attend sinks, window and text"),
    "share_layers": Removed((1,), "every layer chooses its own blocks"),
}
#: Estimators that there are no more, and what to ask for instead.
REMOVED_SCORINGS = {
    "antidiagonal": "tile_pool",
    "probe": "sampled_rows",
    "column_mass": "one_pass",
}


def refuse_removed(fields: Mapping[str, Any]) -> None:
    """Refuse the fields of an earlier version.

    Raises:
        ConfigError: On the first one, with what stands in its place.
    """
    for name in REMOVED_FIELDS.keys() & fields.keys():
        rule = f"be left out, as version 0.2 removed it ({REMOVED_FIELDS[name].successor})"
        require(False, name, rule, fields[name])


def refuse_removed_scoring(scoring: object) -> None:
    """Refuse an estimator of an earlier version.

    Raises:
        ConfigError: With the one that stands in its place.
    """
    if isinstance(scoring, str) and scoring in REMOVED_SCORINGS:
        rule = f'be "{REMOVED_SCORINGS[scoring]}" in its place, as version 0.2 removed this estimator'
        require(False, "scoring", rule, scoring)


def migrated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Saved rules in today's schema.

    Args:
        fields: What ``to_dict`` of this or an earlier version wrote, or a user in its manner.

    Returns:
        Fields of ``OmniSparseConfig``, and whatever else was there except the schema's number.

    Raises:
        ConfigError: On a schema that this version does not know.
    """
    schema = fields.get("schema", 1)
    known = isinstance(schema, int) and not isinstance(schema, bool) and 1 <= schema <= SCHEMA
    require(known, "schema", f"be an int from 1 to {SCHEMA} (a later version of omnisparse-flex writes others)", schema)
    rest = {name: value for name, value in fields.items() if name != "schema"}
    if schema == 1:
        for name, (same, _) in REMOVED_FIELDS.items():
            if name in rest and rest[name] in same and not isinstance(rest[name], bool):
                del rest[name]
    if schema == SCHEMA:
        return rest
    if rest.get("budget") == "peak":
        rest.pop("lazy_threshold", None)  # it was read by no one
    return {**UNTOLD, **rest}
