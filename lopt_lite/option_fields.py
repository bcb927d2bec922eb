"""Fields of dataclasses that are options: how they are declared, and the checks that hold for all of them."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from dataclasses import field
from typing import Any, Literal

from lopt_lite.errors import SettingsError


def option(default: Any, help: str, *, repeat: bool = False, environment: bool = False, path: bool = False) -> Any:
    """A dataclass field that is also a command-line option with this help text.

    ``environment``: on the command line, LOPT_LITE_ITS_NAME stands for the option where it is not given. ``path``: a
    ``~`` it begins with stands for the user's directory, also in YAML and from Python, where no shell has seen it.
    """
    metadata = {"help": help, "repeat": repeat, "environment": environment, "path": path}
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """How a field's option is written: ``lora_r`` is ``--lora-r``."""
    return "--" + name.replace("_", "-")


def argument(help: str, *, default: Any = dataclasses.MISSING, path: bool = True) -> Any:
    """A dataclass field that is a positional argument of the command; ``path`` as for :func:`option`."""
    metadata = {"help": help, "positional": True, "path": path}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def check_types(settings: Any) -> None:
    """Check every field against its annotation, since values may come from YAML or from Python callers."""
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value, hint = getattr(settings, f.name), hints[f.name]
        if not _matches(value, hint):
            what = f.name.upper() if f.metadata.get("positional") else flag(f.name)
            raise SettingsError(f"{what} is {value!r}", expected=_describe(hint))


def wrong_type(kind: type, values: dict[str, Any]) -> str | None:
    """The name of a value that its field of the dataclass ``kind`` cannot have, None if there is none.

    Names that are no field's are left to others: a later release may know them.
    """
    hints = typing.get_type_hints(kind)
    return next((n for n, value in values.items() if n in hints and not _matches(value, hints[n])), None)


def expand_home(settings: Any) -> None:
    """Put the user's directory in the place of a ``~`` that paths begin with."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if not f.metadata.get("path") or value is None:
            continue
        expanded = tuple(map(_at_home, value)) if isinstance(value, tuple) else _at_home(value)
        object.__setattr__(settings, f.name, expanded)


def _at_home(path: str) -> str:
    # Of an unknown user, it stays as it is.
    return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111


def _matches(value: Any, hint: Any) -> bool:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in members
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(v, members[0]) for v in value)
    if members:
        return any(_matches(value, member) for member in members)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, members))
    if members:
        return " or ".join(_describe(member) for member in members if member is not type(None))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, str(hint))


def check_at_least(settings: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise SettingsError(f"{flag(name)} is {value}", expected=f"at least {least}")


def check_positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise SettingsError(f"{flag(name)} is {value}", expected="a finite number above 0")
