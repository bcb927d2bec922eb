"""Options come from the settings dataclasses; the command line wins over YAML, and YAML over the defaults."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from lopt_lite_cli.main import COMMANDS

from lopt_lite import TrainSettings
from lopt_lite.option_fields import flag


def test_defaults_apply_when_nothing_is_given(lopt, fake, trained):
    calls = fake("train", trained)
    assert lopt("train", "m", "d").code == 0
    assert calls == [TrainSettings(model="m", data="d")]


def test_every_kind_of_option_reaches_the_settings(lopt, fake, trained):
    calls = fake("train", trained)
    result = lopt(
        *("train", "m", "d", "--lora-r", "4", "--lr", "1e-3", "--fresh", "--skip-bad-lines", "--device", "cpu"),
        *("--validation", "0.1", "--max-hours", "2.5", "--output", "out"),
    )
    assert result.code == 0, result.err
    assert calls == [
        TrainSettings(
            model="m",
            data="d",
            lora_r=4,
            lr=1e-3,
            fresh=True,
            skip_bad_lines=True,
            device="cpu",
            validation="0.1",
            max_hours=2.5,
            output="out",
        )
    ]


def test_command_line_wins_over_yaml_and_yaml_over_default(lopt, fake, trained, tmp_path):
    calls = fake("train", trained)
    file = tmp_path / "options.yaml"
    file.write_text("model: from-yaml\ndata: d\nlora-r: 4\nbatch_size: 2\nlr: 4e-4\nquiet: true\n")
    assert lopt("train", "--config", str(file), "--lora-r", "32").code == 0
    assert calls == [TrainSettings(model="from-yaml", data="d", lora_r=32, batch_size=2, lr=4e-4, quiet=True)]


def test_the_environment_stands_for_options_that_are_not_given(lopt, fake, trained, tmp_path, monkeypatch):
    calls = fake("train", trained)
    file = tmp_path / "options.yaml"
    file.write_text("memory: 1GiB\ndevice: mps\nmax_hours: 9\n")
    for name, value in (("MEMORY", "6GiB"), ("DEVICE", "cpu"), ("QUIET", "1"), ("MAX_HOURS", "2.5")):
        monkeypatch.setenv(f"LOPT_LITE_{name}", value)
    assert lopt("train", "m", "d", "--config", str(file), "--memory", "8GiB").code == 0
    assert calls == [TrainSettings(model="m", data="d", memory="8GiB", device="cpu", quiet=True, max_hours=2.5)]


@pytest.mark.parametrize(("name", "value"), [("DEVICE", "tpu"), ("MAX_HOURS", "many"), ("MEMORY", "much")])
def test_a_value_in_the_environment_that_cannot_be_used_is_refused_by_name(lopt, fake, monkeypatch, name, value):
    calls = fake("train")
    monkeypatch.setenv(f"LOPT_LITE_{name}", value)
    result = lopt("train", "m", "d")
    assert (result.code, calls) == (2, [])
    assert f"LOPT_LITE_{name}" in result.err or f"--memory is '{value}'" in result.err


def test_other_options_are_not_read_from_the_environment(lopt, fake, trained, monkeypatch):
    calls = fake("train", trained)
    monkeypatch.setenv("LOPT_LITE_FRESH", "1")
    monkeypatch.setenv("LOPT_LITE_OUTPUT", "elsewhere")
    assert lopt("train", "m", "d").code == 0
    assert calls == [TrainSettings(model="m", data="d")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("lopt-lite ex", "export"), ("lopt-lite train --mem", "--memory")],
    ids=["command", "option"],
)
def test_the_shell_can_ask_how_a_word_goes_on(words, expected):
    asked = {"_LOPT_LITE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    answer = subprocess.run(
        [sys.executable, "-c", "from lopt_lite_cli.main import run; run()"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.split() == [expected]


def test_an_option_given_with_its_default_value_still_wins_over_yaml(lopt, fake, trained, tmp_path):
    calls = fake("train", trained)
    (tmp_path / "o.yaml").write_text("lora_r: 4\nseed: 7\n")
    assert lopt("train", "m", "d", "--config", str(tmp_path / "o.yaml"), "--lora-r", "16", "--seed", "0").code == 0
    assert (calls[0].lora_r, calls[0].seed) == (16, 0)


def test_config_takes_a_yaml_file_and_a_directory_in_either_order(lopt, fake, trained, tmp_path):
    calls = fake("train", trained)
    file, directory = tmp_path / "o.yaml", tmp_path / "tokenizer"
    file.write_text("lora_r: 4\n")
    directory.mkdir()
    for first, second in ((file, directory), (directory, file)):
        assert lopt("train", "m", "d", "--config", str(first), "--config", str(second)).code == 0
    assert calls == [TrainSettings(model="m", data="d", config=(str(directory),), lora_r=4)] * 2


@pytest.mark.parametrize("kind", ["files", "directories"])
def test_two_configs_of_one_kind_are_refused(lopt, fake, tmp_path, kind):
    calls = fake("train")
    for name in ("a", "b"):
        (tmp_path / name).write_text("") if kind == "files" else (tmp_path / name).mkdir()
    result = lopt("train", "m", "d", "--config", str(tmp_path / "a"), "--config", str(tmp_path / "b"))
    assert result.code == 2
    assert f"2 {kind}" in result.err
    assert calls == []


def test_config_json_given_as_a_file_names_its_directory(lopt, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = lopt("train", "m", "d", "--config", str(tmp_path / "config.json"))
    assert result.code == 2
    assert f"--config {tmp_path}" in result.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("lora_rank: 4\n", "lora_rank"),
        ("- a\n", "list"),
        ("a: [\n", "not YAML"),
        ("lora_r: four\n", "--lora-r"),
        ("fresh: 1\n", "--fresh"),
    ],
)
def test_a_bad_yaml_file_is_exit_code_2_and_says_what_is_wrong(lopt, tmp_path, content, says):
    (tmp_path / "o.yaml").write_text(content)
    result = lopt("train", "m", "d", "--config", str(tmp_path / "o.yaml"))
    assert result.code == 2
    assert says in result.err
    assert "Traceback" not in result.err


def test_a_config_that_is_not_there_is_exit_code_2(lopt, tmp_path):
    result = lopt("train", "m", "d", "--config", str(tmp_path / "nowhere.yaml"))
    assert result.code == 2
    assert "nowhere.yaml" in result.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "MODEL and DATA are missing"),
        (["train", "m"], "DATA is missing"),
        (["quantize", "m"], "STORE is missing"),
        (["status"], "RUN is missing"),
        (["generate", "run"], "--prompt is empty"),
    ],
)
def test_what_is_missing_is_named(lopt, arguments, says):
    result = lopt(*arguments)
    assert result.code == 2
    assert says in result.err
    assert result.out == ""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_every_option_once_with_its_text_and_its_default_once(lopt, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 2000)
    result = lopt(command.name, "--help")
    assert result.code == 0
    lines = result.out.splitlines()
    for field in dataclasses.fields(command.settings):
        name = field.name.upper() if field.metadata.get("positional") else flag(field.name)
        about = [
            line
            for line in lines
            if re.search(rf"(?<!\S){re.escape(name)} .*{re.escape(field.metadata['help'])}", line)
        ]
        assert len(about) == 1, name
        assert len(re.findall("default: ", about[0], re.IGNORECASE)) <= 1
        if field.default not in (dataclasses.MISSING, None, False, (), ""):
            assert re.search(rf"\[default: {re.escape(f'{field.default}'.removesuffix('.0'))}\]", about[0]), about[0]
