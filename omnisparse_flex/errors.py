"""The two ways this library fails: by the user's mistake, or by ours."""

import os

#: Set to a non-empty value other than 0, what fails inside the backend is raised and not made a skipped site.
RAISE_VARIABLE = "OMNISPARSE_RAISE_BUGS"
#: How the reason begins of a site that stays dense because our own code failed.
BUG = "our bug, please report"


class ConfigError(ValueError):
    """A user's mistake: a wrong type, range or combination.

    Raised before anything is compiled and before anything is changed. The text
    has the form ``{name} must {rule}, got {value}``.
    """


class PassError(RuntimeError):
    """A broken invariant inside a graph pass: our bug, never the user's."""


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise ``ConfigError`` with the house wording unless ``condition`` holds.

    Args:
        condition: What must be true.
        name: The argument or field the user wrote.
        rule: What it must do, e.g. ``"be in (0, 1]"``.
        value: What was given; shown with ``repr``.

    Raises:
        ConfigError: ``{name} must {rule}, got {value}``.
    """
    if not condition:
        raise ConfigError(f"{name} must {rule}, got {value!r}")


def raises_bugs() -> bool:
    """Whether ``OMNISPARSE_RAISE_BUGS`` asks for the exception itself, as this project's own tests do."""
    return os.environ.get(RAISE_VARIABLE, "") not in ("", "0")


def bug(what: str, error: BaseException) -> str:
    """The reason of a site that stays dense because ``what`` failed: one line, the error's kind and text in it."""
    lines = str(error).strip().splitlines()
    return f"{BUG}: {what} failed with {type(error).__name__}" + (f": {lines[0][:300]}" if lines else "")
