"""The two ways this library fails: by the user's mistake, or by ours."""


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
