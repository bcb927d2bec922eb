"""Options: every value that cannot be used is refused by the name of its option, and YAML means what it seems to."""

from __future__ import annotations

import dataclasses
import datetime
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_lite import EvaluateSettings, ExportSettings, GenerateSettings, QuantizeSettings, TrainSettings
from lopt_lite.errors import SettingsError
from lopt_lite.recipe import ModelKind
from lopt_lite.settings_file import load_yaml
from lopt_lite.units import parse_duration_s, parse_time_of_day

_ALL = {
    TrainSettings: {"model": "m", "data": "d"},
    QuantizeSettings: {"model": "m", "store": "s"},
    EvaluateSettings: {"run": "r", "data": "d"},
    GenerateSettings: {"run": "r", "prompt": "p"},
    ExportSettings: {"run": "r", "out": "o"},
}


def _train(**changes: object) -> TrainSettings:
    return TrainSettings(model="m", data="d", **changes)


# -- values that cannot be used ---------------------------------------------------------------------------------------

_BAD = [
    *[(TrainSettings, name, value) for name in ("blocks", "epochs", "batch_size", "lora_r") for value in (0, -1)],
    *[(TrainSettings, "last_layers", value) for value in (0, -1)],
    *[(TrainSettings, name, -1) for name in ("head_fit_epochs", "seed", "retain_answers")],
    *[(TrainSettings, "max_length", value) for value in (1, 0, -5)],
    *[
        (TrainSettings, name, value)
        for name in ("lr", "lr_early", "lora_alpha", "max_hours")
        for value in (0, -1e-4, float("inf"), float("nan"))
    ],
    *[(TrainSettings, "lora_dropout", value) for value in (-0.1, 1, 1.5, float("nan"))],
    (TrainSettings, "seed", 2**63),
    *[(TrainSettings, "lora_targets", value) for value in ("", ",", "  ")],
    *[(TrainSettings, "validation", value) for value in ("", "  ", "0", "1", "1.5", "-0.1", "nan", "inf", "20")],
    *[(TrainSettings, "checkpoint_every", value) for value in ("", "soon", "5 minutes", "-1s", "1h30m", "1e3", "nan")],
    *[(TrainSettings, "deadline", value) for value in ("", "24:00", "7", "7:60", "07:30:00", "7pm", "noon")],
    *[(TrainSettings, "objective", value) for value in ("", "retain", "task,", "none,none", "distil")],
    *[(TrainSettings, "quantize", value) for value in ("int8", "", "NF4")],
    *[(TrainSettings, "dtype", value) for value in ("float16", "bf16")],
    (TrainSettings, "schedule", "sideways"),
    (TrainSettings, "tune", "prefix"),
    *[(TrainSettings, "cache", value) for value in ("int4", "bfloat16", "")],
    (TrainSettings, "device", "tpu"),
    (QuantizeSettings, "quantize", "int4"),
    (QuantizeSettings, "dtype", "float8"),
    (EvaluateSettings, "batch_size", 0),
    (EvaluateSettings, "max_length", 1),
    (GenerateSettings, "max_new_tokens", 0),
    (GenerateSettings, "prompt", ""),
    *[(GenerateSettings, "temperature", value) for value in (-1, float("nan"), float("inf"))],
    *[(GenerateSettings, "top_p", value) for value in (0, 1.1, float("nan"))],
    (ExportSettings, "format", "gguf"),
    (ExportSettings, "onto", "base"),
]


@pytest.mark.parametrize(("settings", "name", "value"), _BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_a_value_that_cannot_be_used_is_refused_by_its_option(settings, name, value):
    with pytest.raises(SettingsError) as caught:
        settings(**{**_ALL[settings], name: value})
    assert caught.value.found.startswith(f"--{name.replace('_', '-')} ")
    assert caught.value.expected
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [{"onto": "quantized"}, {"model": "m"}, {"format": "merged", "onto": "quantized", "model": "m"}],
)
def test_an_export_option_that_would_do_nothing_is_refused(changes):
    with pytest.raises(SettingsError) as caught:
        ExportSettings(run="r", out="o", **changes)
    assert caught.value.fix


def _wrong_types() -> list[tuple[type, str, object]]:
    """For every option of every command, values of all types that it is not."""
    cases = []
    for settings in _ALL:
        hints = typing.get_type_hints(settings)
        for f in dataclasses.fields(settings):
            hint = hints[f.name]
            members = typing.get_args(hint)
            accepts = set(members) if type(None) in members else {hint}
            if float in accepts:
                accepts.add(int)
            cases += [(settings, f.name, v) for v in (1, 0.5, True, b"x", [], {}) if type(v) not in accepts]
            # A default of None stands for one that depends on other options.
            if type(None) not in accepts and f.default is not None:
                cases.append((settings, f.name, None))
            if str not in accepts and typing.get_origin(hint) is not typing.Literal:
                cases.append((settings, f.name, "7"))
    return cases


@pytest.mark.parametrize(("settings", "name", "value"), _wrong_types(), ids=lambda v: getattr(v, "__name__", repr(v)))
def test_a_value_of_another_type_is_refused_by_its_name(settings, name, value):
    field = next(f for f in dataclasses.fields(settings) if f.name == name)
    shown = name.upper() if field.metadata.get("positional") else f"--{name.replace('_', '-')}"
    with pytest.raises(SettingsError) as caught:
        settings(**{**_ALL[settings], name: value})
    assert caught.value.found == f"{shown} is {value!r}"
    assert caught.value.expected


@pytest.mark.parametrize("settings", _ALL)
def test_defaults_are_usable_and_every_option_explains_itself(settings):
    settings(**_ALL[settings])
    for f in dataclasses.fields(settings):
        assert f.metadata["help"].endswith((".", ")")), f.name


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _train().lr = 1.0


# -- what values mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "objective", "expected"),
    [
        (1, "reconstruct", ("task",)),
        (2, "reconstruct", ("reconstruct", "task")),
        (4, "none", ("none", "none", "none", "task")),
        (2, "task", ("task", "task")),
        (3, "none,reconstruct", ("none", "reconstruct", "task")),
        (3, " none , task ", ("none", "task", "task")),
    ],
)
def test_one_objective_is_for_all_early_blocks_and_a_list_for_each(blocks, objective, expected):
    assert _train(blocks=blocks, objective=objective).objectives() == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("none", "task")),
        ({"blocks": 3, "tune": "full"}, ("none", "none", "task")),
        ({"schedule": "joint"}, ("reconstruct", "task")),
        ({"preset": "paper"}, ("reconstruct", "task")),
        ({"preset": "paper", "schedule": "sequential"}, ("reconstruct", "task")),
        ({"schedule": "joint", "objective": "none"}, ("none", "task")),
    ],
)
def test_early_blocks_are_left_as_they_are_unless_blocks_are_trained_together(changes, expected):
    assert _train(**changes).objectives() == expected


@pytest.mark.parametrize(("blocks", "objective"), [(1, "none,none"), (2, "none,none"), (4, "none,reconstruct")])
def test_a_list_of_another_length_than_there_are_early_blocks_is_refused(blocks, objective):
    with pytest.raises(SettingsError, match=f"there are {blocks - 1} blocks before the last"):
        _train(blocks=blocks, objective=objective)


def test_validation_is_a_fraction_unless_a_file_has_that_name(tmp_path, monkeypatch):
    assert _train().validation_fraction() is None
    assert _train(validation="0.05").validation_fraction() == 0.05
    assert _train(validation="held_out.jsonl").validation_fraction() is None
    monkeypatch.chdir(tmp_path)
    Path("0.05").write_text("{}")
    Path("7").write_text("{}")
    assert _train(validation="0.05").validation_fraction() is None
    assert _train(validation="7").validation_fraction() is None


def test_early_blocks_learn_at_a_tenth_unless_told():
    model = ModelKind("LlamaForCausalLM", 576, 4)
    assert _train(lr=1e-3).early_lr(model) == 1e-4
    assert _train(lr=1e-3, lr_early=5e-4).early_lr(model) == 5e-4
    assert _train(lr_early=1e-5).early_lr(model) == 1e-5


@pytest.mark.parametrize(
    ("options", "expected", "early"),
    [
        ({}, None, 0.1),
        ({"blocks": 1}, None, 0.1),
        ({"preset": "paper", "tune": "lora", "schedule": "sequential"}, None, 1.0),
        ({"schedule": "joint"}, 4e-4, 0.1),
        ({"preset": "paper", "tune": "lora"}, 4e-4, 1.0),
        ({"tune": "full"}, 2e-5, 0.1),
        ({"preset": "paper"}, 2e-5, 1.0),
        ({"lr": 1e-3}, 1e-3, 0.1),
    ],
)
def test_the_rate_follows_from_the_recipe_and_the_models_width(options, expected, early):
    """``expected``: None for the law of widths."""
    for width, by_width in ((64, 1.4e-3), (512, 1.4e-3), (576, 1.3e-3), (2000, 5e-4), (4096, 2.9e-4)):
        model = ModelKind("LlamaForCausalLM", width, 4)
        settings = _train(**options).settle(has_prompts=True, model=model)
        assert settings.model_lr(model) == (by_width if expected is None else expected)
        assert settings.early_lr(model) == pytest.approx(early * settings.model_lr(model))


def test_a_rate_that_nobody_gave_is_none_of_the_settings():
    settled = _train().settle(has_prompts=True, model=ModelKind("LlamaForCausalLM", 576, 4)).result_settings()
    assert (settled["lr"], settled["lr_early"]) == (None, None)


def test_a_rate_that_follows_from_a_preset_is_one_of_the_settings():
    """The preset itself is not: a run may go on with its options typed out."""
    settings = _train(preset="paper", tune="lora", schedule="sequential")
    settled = settings.settle(has_prompts=True, model=ModelKind("LlamaForCausalLM", 576, 4)).result_settings()
    assert (settled["lr"], settled["lr_early"]) == (1.3e-3, 1.3e-3)


def test_targets_are_names_or_everything():
    assert _train().target_names == ()
    assert _train(lora_targets="q_proj, v_proj,").target_names == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("30", 30), ("0.05s", 0.05), ("5m", 300), ("5min", 300), ("1.5h", 5400), (" 2 h ", 7200), ("0s", 0)],
)
def test_durations(text, seconds):
    assert parse_duration_s(text, "--checkpoint-every") == pytest.approx(seconds)
    assert _train(checkpoint_every=text).checkpoint_every_s == pytest.approx(seconds)


@given(st.integers(0, 23), st.integers(0, 59))
def test_times_of_day(hour, minute):
    assert parse_time_of_day(f"{hour:02d}:{minute:02d}", "--deadline") == datetime.time(hour, minute)


def test_what_changes_the_result_is_compared_on_resume_and_what_does_not_is_not():
    values = _train(lr=1e-3).result_settings()
    free = {"model", "data", "validation", "output", "fresh", "config", "store", "device", "quiet"}
    free |= {"checkpoint_every", "max_hours", "deadline", "preset", "retain_data"}
    assert set(values) == {f.name for f in dataclasses.fields(TrainSettings)} - free
    moved = _train(
        lr=1e-3, output="elsewhere", max_hours=1.0, deadline="07:00", checkpoint_every="1s", quiet=True, fresh=True
    )
    assert moved.result_settings() == values


def test_a_default_and_the_same_value_typed_out_are_the_same_run():
    assert _train(lr=1e-3).result_settings() == _train(lr=1e-3, lr_early=1e-4).result_settings()


# -- YAML -------------------------------------------------------------------------------------------------------------


def _yaml(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path, TrainSettings)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr: 4e-4", "lr", 4e-4),
        ("lr: 0.0004", "lr", 4e-4),
        ("lr: 1", "lr", 1.0),
        ("max_hours: 8", "max_hours", 8.0),
        ("max-hours: 7.5", "max_hours", 7.5),
        ("--batch-size: 4", "batch_size", 4),
        ("validation: 0.05", "validation", "0.05"),
        ("validation: held_out.jsonl", "validation", "held_out.jsonl"),
        ("checkpoint_every: 30", "checkpoint_every", "30"),
        ("checkpoint_every: 5m", "checkpoint_every", "5m"),
        ("deadline: 07:30", "deadline", "07:30"),
        ("deadline: 22:30", "deadline", "22:30"),
        ("deadline: '22:30'", "deadline", "22:30"),
        ("model: 7", "model", "7"),
        ("quiet: yes", "quiet", True),
        ("objective: none", "objective", "none"),
        ("objective: none,reconstruct", "objective", "none,reconstruct"),
        ("quantize: none", "quantize", "none"),
        ("lr_early: null", "lr_early", None),
        ("lr: null", "lr", None),
        ("seed: 0x10", "seed", 16),
        ("blocks: 1", "blocks", 1),
    ],
)
def test_yaml_values_get_the_type_of_their_option(tmp_path, line, name, value):
    values = _yaml(tmp_path, line)
    assert values == {name: value}
    assert type(values[name]) is type(value)


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("epochs: 1.5", "--epochs"),
        ("epochs: two", "--epochs"),
        ("epochs: true", "--epochs"),
        ("lr: fast", "--lr"),
        ("lr: true", "--lr"),
        ("epochs: null", "--epochs"),
        ("lr: [1e-3]", "--lr"),
        ("quiet: 1", "--quiet"),
        ("quiet: 'yes'", "--quiet"),
        ("lora_targets: [q_proj, v_proj]", "--lora-targets"),
        ("output: false", "--output"),
        ("deadline: 1350", "--deadline"),
        ("checkpoint_every: 1:30", "--checkpoint-every"),
        ("dtype: 16", "--dtype"),
    ],
)
def test_a_yaml_value_that_does_not_fit_is_refused_by_its_option(tmp_path, line, option):
    with pytest.raises(SettingsError) as caught:
        TrainSettings(**{"model": "m", "data": "d", **_yaml(tmp_path, line)})
    assert caught.value.found.startswith(f"{option} is ")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_yaml_file_sets_nothing(tmp_path, text):
    assert _yaml(tmp_path, text) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1e-3", "sets 'learning_rate', which is no option"),
        ("config: other.yaml", "sets 'config', which is no option"),
        ("1: 2", "sets '1', which is no option"),
        ("- lr", "holds a list"),
        ("lr", "holds a str"),
        ("lr: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("!!map [lr]", "is not YAML"),
        ("lora_r: 8\nlora-r: 16", "sets 'lora_r' and 'lora-r', which are the same option"),
        ("lora-r: 8\nlr: 1e-3\nlora_r: 8", "sets 'lora-r' and 'lora_r', which are the same option"),
        ("lr: 1e-3\n--lr: 1e-4", "sets 'lr' and '--lr', which are the same option"),
        ("lr: 1e-3\nlr: 1e-4", "'lr' is there twice"),
    ],
)
def test_yaml_that_is_not_options_is_refused(tmp_path, text, said):
    with pytest.raises(SettingsError) as caught:
        _yaml(tmp_path, text)
    assert said in caught.value.found
    assert "\n" not in caught.value.found
    assert caught.value.expected


def test_a_yaml_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot read --config"):
        load_yaml(tmp_path / "none.yaml", TrainSettings)
    (tmp_path / "latin1.yaml").write_bytes("output: größe".encode("latin-1"))
    with pytest.raises(SettingsError, match="is not YAML"):
        load_yaml(tmp_path / "latin1.yaml", TrainSettings)


def test_a_tilde_stands_for_the_users_directory_wherever_a_path_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = _train(output="~/runs/x", store="~/s", config=("~/c",), retain=1.0, retain_data="~/r.jsonl")
    assert (settings.output, settings.store) == (f"{tmp_path}/runs/x", f"{tmp_path}/s")
    assert (settings.config, settings.retain_data) == ((f"{tmp_path}/c",), f"{tmp_path}/r.jsonl")
    assert TrainSettings(model="~/m", data="~/d").data == f"{tmp_path}/d"
    assert _train(output="a~b").output == "a~b"


def test_a_date_in_yaml_is_a_name(tmp_path):
    (tmp_path / "c.yaml").write_text("output: 2026-11-25\nstore: 2026-13-45\n")
    assert load_yaml(tmp_path / "c.yaml", TrainSettings) == {"output": "2026-11-25", "store": "2026-13-45"}


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_generate_takes_the_seeds_that_train_takes(seed):
    with pytest.raises(SettingsError, match="--seed"):
        GenerateSettings(run="r", prompt="p", seed=seed)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr_early": 1e-4}, "--lr-early has no effect"),
        ({"blocks": 1, "lr_early": 1e-4}, "--lr-early has no effect"),
        ({"blocks": 1, "cache": "int8"}, "--cache int8 has no effect"),
        ({"retain": 0.0, "retain_tokens": 8}, "--retain-tokens has no effect"),
        ({"blocks": 1, "objective": "reconstruct"}, "--objective reconstruct has no effect"),
        ({"blocks": 1, "schedule": "joint", "objective": "task"}, "--objective task has no effect"),
        ({"head_fit_epochs": 3}, "--head-fit-epochs has no effect"),
        ({"preset": "paper", "objective": "none", "head_fit_epochs": 2}, "--head-fit-epochs has no effect"),
        ({"retain_answers": 4, "retain_tokens": 5}, "--retain-tokens has no effect"),
        (
            {"schedule": "joint", "objective": "task", "reconstruction_weight": 5.0},
            "--reconstruction-weight has no effect",
        ),
    ],
)
def test_what_was_asked_for_in_vain_is_told(options, says):
    (text,) = _train(**options).without_effect()
    assert text.startswith(says)


def test_what_a_likeliest_answer_does_not_heed_is_told():
    given = {"run": "r", "prompt": "p", "top_p": 0.5, "seed": 7}
    told = GenerateSettings(**given).without_effect()
    assert [text.split()[0] for text in told] == ["--top-p", "--seed"]
    assert GenerateSettings(**given, temperature=0.7).without_effect() == []
    assert GenerateSettings(run="r", prompt="p").without_effect() == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "paper"},
        {"preset": "paper", "objective": "none"},
        {"preset": "paper", "blocks": 1},
        {"blocks": 1},
        {"lr_early": 1e-4, "objective": "reconstruct"},
        {"lr_early": 1e-4, "objective": "none,task", "blocks": 3},
        {"cache": "int8"},
        {"retain_tokens": 8},
        {"blocks": 1, "schedule": "joint"},
        {"head_fit_epochs": 3, "objective": "reconstruct"},
        {"head_fit_epochs": 1},
        {"retain_answers": 4, "retain_tokens": 5, "retain_data": "more.jsonl"},
        {"schedule": "joint", "reconstruction_weight": 5.0},
    ],
)
def test_what_has_an_effect_is_not_told(options):
    assert _train(**options).without_effect() == []


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "full", "objective": "match"},
        {"schedule": "joint", "tune": "full", "retain_data": "file"},
        {"preset": "paper", "retain_answers": 64},
        {"preset": "paper", "retain": 1.0},
    ],
)
def test_what_to_change_is_not_refused_as_well(options):
    with pytest.raises(SettingsError) as refused:
        _train(**options)
    assert "--tune lora" in refused.value.fix
    _train(**{"retain": 1.0, **options, "tune": "lora"})
