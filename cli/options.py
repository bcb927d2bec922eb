"""Typer parameters made from the settings dataclasses, and settings made from what the user gave.

The defaults of the command line are None: what the user did not type comes from the environment (for some options),
then from the YAML file, and what is not there from the dataclass. So no option is declared, and no default written,
twice.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any, Optional

import typer
from rich.markup import escape

from lopt_lite.errors import SettingsError
from lopt_lite.option_fields import flag
from lopt_lite.settings_file import load_yaml

#: Begins the names of environment variables that stand for options.
_ENVIRONMENT = "LOPT_LITE_"


def parameters(settings: type[Any]) -> list[inspect.Parameter]:
    """One keyword parameter for each field of ``settings``, as typer reads them from a function's signature."""
    hints = typing.get_type_hints(settings)
    return [_parameter(field, hints[field.name]) for field in dataclasses.fields(settings)]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    text = escape(_help(field))
    if field.metadata.get("positional"):
        how = typer.Argument(None, metavar=field.name.upper(), help=text, show_default=False)
    else:
        metavar = "PATH" if field.metadata.get("repeat") else None
        variable = _ENVIRONMENT + field.name.upper() if field.metadata.get("environment") else None
        # The other way round, for what a file of options or the environment has set.
        names = f"{flag(field.name)}/{flag('no_' + field.name)}" if hint is bool else flag(field.name)
        how = typer.Option(None, names, metavar=metavar, help=text, show_default=False, envvar=variable)
    kind = list[str] if field.metadata.get("repeat") else hint
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=how, annotation=Optional[kind])  # noqa: UP045


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"])
    default = field.default
    if default is dataclasses.MISSING or default is None or default is False or default in ("", ()):
        return text
    return f"{text} [default: {default:g}]" if isinstance(default, float) else f"{text} [default: {default}]"


def resolve(settings: type[Any], given: dict[str, Any], *, command: str) -> Any:
    """The settings of a command: the command line and the environment win over ``--config`` FILE, it over the defaults.

    Parameters
    ----------
    settings:
        The dataclass to make.
    given:
        What typer parsed, by field name; None for what is neither on the command line nor in the environment.
    command:
        The command's name, for messages.

    Raises
    ------
    SettingsError
        Something is missing or cannot be used.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    values: dict[str, Any] = {}
    if "config" in fields:
        file, directory = _split_config(given.get("config") or [])
        if file is not None:
            values.update(load_yaml(file, settings))
        values["config"] = (directory,) if directory is not None else ()
    values.update({name: value for name, value in given.items() if value is not None and name != "config"})
    required = [
        name
        for name, field in fields.items()
        if field.metadata.get("positional") and field.default is dataclasses.MISSING
    ]
    missing = [name.upper() for name in required if not values.get(name)]
    if missing:
        usage = " ".join(["lopt-lite", command, *(name.upper() for name in required)])
        raise SettingsError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            expected=usage,
            fix=f"see lopt-lite {command} --help",
        )
    return settings(**values)


def _split_config(paths: list[str]) -> tuple[Path | None, str | None]:
    """Tell the YAML file of options from the directory with config.json."""
    files = [path for path in paths if not Path(path).is_dir()]
    directories = [path for path in paths if Path(path).is_dir()]
    if len(files) > 1 or len(directories) > 1:
        what = "files" if len(files) > 1 else "directories"
        raise SettingsError(
            f"--config names {max(len(files), len(directories))} {what}",
            expected="at most one YAML file and one directory",
        )
    if files and files[0].endswith(".json"):
        raise SettingsError(
            f"--config {files[0]} is a JSON file",
            expected="a YAML file of options, or the directory with config.json",
            fix=f"give the directory: --config {Path(files[0]).parent}",
        )
    return (Path(files[0]) if files else None), (directories[0] if directories else None)
