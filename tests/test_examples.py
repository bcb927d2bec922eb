"""The files in examples/ are valid, and say what lopt-lite understands."""

from __future__ import annotations

import configparser
import os
import plistlib
import shlex
import subprocess
from collections.abc import Callable
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


def _starts_at(condition: str) -> list[int]:
    """The hours, from the evening on, at which a shell's condition on the clock holds."""
    hours = [*range(12, 24), *range(12)]
    clock = "date() {{ echo {:02d}; }}; "
    return [h for h in hours if subprocess.run(["/bin/sh", "-c", clock.format(h) + condition]).returncode == 0]


@pytest.fixture
def queue(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs overnight.sh with a stand-in for lopt-lite that exits with codes in turn; returns its code and the runs."""
    stub, log = tmp_path / "lopt-lite", tmp_path / "log"
    stub.write_text(
        '#!/bin/sh\necho "${5#runs/}" >> "$LOG"\nset -- $CODES\n'
        'shift "$(( $(wc -l < "$LOG") - 1 ))" 2>/dev/null\nexit "${1:-0}"\n'
    )
    stub.chmod(0o755)

    def run(codes: str, *, script: Path = EXAMPLES / "overnight.sh", **environment: str) -> tuple[int, list[str]]:
        log.write_text("")
        named = {"LOPT_LITE": str(stub), "LOG": str(log), "CODES": codes, "PATH": os.environ["PATH"], **environment}
        done = subprocess.run(["bash", script], env=named, capture_output=True, timeout=60)
        return done.returncode, log.read_text().split()

    return run


_QUEUED = ["rank-16", "rank-64", "end-to-end", "slow-and-long"]


def test_a_queue_gives_again_what_was_stopped_and_goes_on_after_what_failed(queue):
    assert queue("0 0 0 0") == (0, _QUEUED)
    assert queue("75 75 0 0 0 0") == (0, ["rank-16", "rank-16", *_QUEUED])
    assert queue("0 3 0 0") == (1, _QUEUED)


@pytest.mark.parametrize("limit", ["LOPT_LITE_DEADLINE", "LOPT_LITE_MAX_HOURS"])
def test_a_queue_ends_with_the_night(queue, limit):
    """Given again, a run would take the next morning's deadline."""
    assert queue("0 75 0 0 0", **{limit: "07:00"}) == (75, _QUEUED[:2])
    assert queue("0 3 0 0", **{limit: "07:00"}) == (1, _QUEUED)


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ("--deadline 07:00", True),
        ("--max-hours=8", True),
        ("--config OPTIONS", True),
        ("--epochs 2 --config=OPTIONS", True),
        ("--config NONE", False),
        ("--config NULL", False),
        ("--config QUOTED", True),
        ("--config FLOW", True),
        ("--lora-r 8", False),
    ],
)
def test_a_time_limit_is_found_where_a_line_of_the_queue_has_it(queue, tmp_path, options, ends):
    contents = {
        "OPTIONS": "epochs: 2\nmax-hours: 8\n",
        "NONE": "epochs: 2\n# deadline: 07:00\n",
        "NULL": "deadline: null\nmax_hours:\n",
        "QUOTED": "epochs: 2\n'deadline': \"07:00\"\n",
        "FLOW": "{deadline: '07:00'}\n",
    }
    line, script = f"train rank-64 {options}", tmp_path / "overnight.sh"
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        line = line.replace(name, str(tmp_path / name))
    written = (EXAMPLES / "overnight.sh").read_text()
    script.write_text(written.replace("train rank-64 --lora-r 64", line))
    assert script.read_text() != written
    found = queue("0 75 0 0 0", script=script)
    assert found == ((75, _QUEUED[:2]) if ends else (0, [_QUEUED[0], *_QUEUED[1:2], *_QUEUED[1:]]))


def test_the_systemd_unit_continues_what_was_stopped_on_time():
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(EXAMPLES / "lopt-lite.service")
    service = unit["Service"]
    _check_command(shlex.split(service["ExecStart"]))
    _check_environment([word.split("=")[0] for word in service["Environment"].split()])
    shell, option, condition = shlex.split(service["ExecCondition"].replace("%%", "%"))
    assert (shell, option) == ("/bin/sh", "-c")
    assert _starts_at(condition) == [20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6]
    assert (service["SuccessExitStatus"], service["KillSignal"]) == ("75", "SIGTERM")
    timer = configparser.RawConfigParser()
    timer.read(EXAMPLES / "lopt-lite.timer")
    assert "Persistent" not in timer["Timer"], "made up for in the morning, it would train through the day"


def test_the_launchd_file_starts_the_training_and_keeps_the_machine_awake():
    content = plistlib.loads((EXAMPLES / "lopt-lite.plist").read_bytes())
    shell, option, script = content["ProgramArguments"]
    assert (shell, option) == ("/bin/sh", "-c")
    by_night, rest = script.split("; caffeinate ")
    assert _starts_at(by_night.removesuffix(" || exit 0")) == [20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6]
    awake, command = rest.split(" & exec ")
    assert awake == "-i -w $$"
    _check_command(shlex.split(command))
    _check_environment(list(content["EnvironmentVariables"]))
    assert content["ExitTimeOut"] >= 600


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_options_in_files_are_options(path):
    TrainSettings(**{"model": "m", "data": "d", **load_yaml(path, TrainSettings)})
