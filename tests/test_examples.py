"""The files in examples/ are valid, and say what lopt-lite understands."""

from __future__ import annotations

import configparser
import plistlib
import shlex
from pathlib import Path

import pytest

from lopt_lite import TrainSettings
from lopt_lite.option_fields import flag
from lopt_lite.settings_file import load_yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
FIELDS = TrainSettings.__dataclass_fields__


def _check_command(words: list[str]) -> None:
    assert words[0].endswith("/lopt-lite")
    assert words[1] == "train"
    options = {word for word in words[2:] if word.startswith("--")}
    assert options <= {flag(name) for name in FIELDS}
    assert "--output" in options, "the same command must find the same run"


def _check_environment(names: list[str]) -> None:
    for name in names:
        field = FIELDS[name.removeprefix("LOPT_LITE_").lower()]
        assert name.startswith("LOPT_LITE_") and field.metadata["environment"]


def test_the_systemd_unit_continues_what_was_stopped_on_time():
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(EXAMPLES / "lopt-lite.service")
    service = unit["Service"]
    _check_command(shlex.split(service["ExecStart"]))
    _check_environment([word.split("=")[0] for word in service["Environment"].split()])
    assert (service["SuccessExitStatus"], service["KillSignal"]) == ("75", "SIGTERM")
    timer = configparser.RawConfigParser()
    timer.read(EXAMPLES / "lopt-lite.timer")
    assert timer["Timer"]["Persistent"] == "true"


def test_the_launchd_file_starts_the_training_and_keeps_the_machine_awake():
    content = plistlib.loads((EXAMPLES / "lopt-lite.plist").read_bytes())
    shell, option, script = content["ProgramArguments"]
    assert (shell, option) == ("/bin/sh", "-c")
    awake, command = script.split(" & exec ")
    assert awake == "caffeinate -i -w $$"
    _check_command(shlex.split(command))
    _check_environment(list(content["EnvironmentVariables"]))
    assert content["ExitTimeOut"] >= 600


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_options_in_files_are_options(path):
    TrainSettings(**{"model": "m", "data": "d", **load_yaml(path, TrainSettings)})
