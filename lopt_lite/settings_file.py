"""Option values from a YAML file."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from lopt_lite.errors import SettingsError


def load_yaml(path: Path, settings: type[Any]) -> dict[str, Any]:
    """Read option values from a YAML file; names may use ``-`` or ``_``.

    Returns
    -------
    dict
        Values by field name of the dataclass ``settings``, not yet checked for type.

    Raises
    ------
    SettingsError
        The file cannot be read, is not a mapping, or names an unknown option or one option twice.
    """
    import yaml  # only needed with --config

    try:
        # Its own SafeLoader.
        content = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader())  # noqa: S506  # nosec B506
    except OSError as error:
        raise SettingsError(
            f"cannot read --config {path}: {error.strerror or error}",
            expected="a YAML file of options, or the directory with config.json",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last of what is nested too deeply
        raise SettingsError(
            f"--config {path} is not YAML: {' '.join(str(error).split())}", expected="option: value lines"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path} holds a {type(content).__name__}", expected="option: value lines")
    known = {f.name: f for f in dataclasses.fields(settings) if f.name != "config"}
    hints = typing.get_type_hints(settings)
    values = {}
    written: dict[str, str] = {}
    for key, value in content.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in known:
            raise SettingsError(
                f"--config {path} sets {str(key)!r}, which is no option", expected=f"one of {', '.join(sorted(known))}"
            )
        if name in written:
            raise SettingsError(
                f"--config {path} sets {written[name]!r} and {str(key)!r}, which are the same option",
                expected="each option once",
                fix="leave one of them out",
            )
        written[name] = str(key)
        values[name] = _from_yaml(value, hints[name])
    return values


def _yaml_loader() -> Any:
    """PyYAML's SafeLoader without numbers to the base of 60 (``22:30`` is a time of day and not 1350), and dates.

    A key that a mapping has twice, of which PyYAML takes the last, is an error, as YAML has it.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_yaml_int(self, node: Any) -> Any:
            return node.value if ":" in node.value else super().construct_yaml_int(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            seen: set[str] = set()
            for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    # A directory may be called 2026-11-25.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _from_yaml(value: Any, hint: Any) -> Any:
    """Adapt what YAML parses (``4e-4`` is text to it, ``0.05`` a number) to the field's type where that is exact."""
    members = typing.get_args(hint)
    if isinstance(value, bool):
        return value
    if (hint is float or float in members) and isinstance(value, (int, str)):
        try:
            return float(value)
        except ValueError:
            return value
    if (hint is str or str in members) and isinstance(value, (int, float)):
        return str(value)
    return value
