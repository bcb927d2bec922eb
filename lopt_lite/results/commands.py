"""The commands with which a run goes on, or its result is used, with the run's own paths in them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_lite.option_fields import flag
from lopt_lite.outcomes import StatusOutcome
from lopt_lite.recipe import ModelKind
from lopt_lite.results.given_paths import GivenPaths
from lopt_lite.settings import TrainSettings
from lopt_lite.training.run_directory import RunPaths


def changed_settings(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """(option, value, default) of a run's settings that are not what they are by default."""
    settings: dict[str, Any] = content["settings"]
    defaults = default_settings(settings, recorded_kind(content["model"]))
    return [
        (flag(name), str(value), str(defaults[name]))
        for name, value in settings.items()
        if name in defaults and value != defaults[name]
    ]


def recorded_kind(model: dict[str, Any]) -> ModelKind:
    """What settings.json says of a run's model; of a run of an earlier version, as far as it does."""
    return ModelKind(
        architecture=str(model.get("architecture", "")),
        hidden_size=int(model.get("hidden_size", 0)),
        layers=int(model.get("layers", 0)),
    )


def default_settings(settings: dict[str, Any], model: ModelKind) -> dict[str, Any]:
    """What the run's settings would be by default, those that follow from others given the ones that the run has."""
    own = _by_default(model)
    decisive = {name: settings.get(name, own[name]) for name in ("tune", "schedule", "blocks")}
    defaults = _by_default(model, **decisive)
    defaults.update({name: own[name] for name in decisive})
    # Runs that do not say how deep their model is have blocks of the same size.
    if settings.get("objective") != "none" or not model.layers:
        defaults["last_layers"] = None
    if isinstance(settings.get("lr"), float):
        defaults["lr_early"] = settings["lr"] / 10
    return defaults


def _by_default(model: ModelKind, **decisive: Any) -> dict[str, Any]:
    settings = TrainSettings(model="", data="", **decisive)
    return settings.settle(has_prompts=True, model=model).result_settings()


@dataclass(frozen=True)
class Commands:
    """The commands of one run; ``content`` is that of its settings.json."""

    paths: RunPaths
    content: dict[str, Any]
    status: StatusOutcome

    @property
    def _given(self) -> GivenPaths:
        return GivenPaths(self.content)

    def rows(self) -> list[tuple[str, ...]]:
        """(what for, command)."""
        run = str(self.paths.root.absolute())
        look = ("What is done, and what is next", _line("status", run))
        again = ("Bring this page up to date", _line("report", run))
        if self.status.state == "running":
            return [look, again]
        if self.status.state == "stopped":
            return [("Go on (with the options that it was started with)", self.train()), look, again]
        validation = self._given.file(str((self.content.get("validation") or {}).get("given") or ""))
        data = validation if Path(validation).is_file() else "heldout.jsonl"
        return [
            (
                "Ask the tuned model (with --base: the untouched one)",
                _line("generate", run, "--prompt", "your question"),
            ),
            ("Compare the two on other examples", _line("evaluate", run, str(data))),
            ("A whole checkpoint", _line("export", run, "my-model", "--format", "merged")),
        ]

    def train(self) -> str:
        """The command that continues the run, from any directory.

        Options that only say when to stop are not in it; nobody noted them.
        """
        content, given = self.content, self._given
        parts = [given.model(), given.file(str(content["data"]["given"]))]
        for key, name in (("validation", "--validation"), ("retain", "--retain-data")):
            value = (content.get(key) or {}).get("given")
            parts += [] if value is None else [name, given.file(str(value))]
        for name, value, _ in changed_settings(content):
            parts += [name] if value == "True" else [name, value]
        for directory in content.get("config", ()):
            parts += ["--config", given.directory(str(directory))]
        parts += self._store_option()
        return _line("train", *parts, "--output", str(self.paths.root.absolute()))

    def _store_option(self) -> list[str]:
        """``--store``, where the weights are neither in the run directory nor the model itself."""
        store = Path(str(self.content["store"]))
        model = Path(self._given.model()).absolute()
        return [] if store in (self.paths.store.absolute(), model, model.parent) else ["--store", str(store)]

    def python(self) -> str | None:
        """The result in plain transformers (and PEFT), once it is there."""
        if self.status.state != "done":
            return None
        if self.content["settings"].get("tune") == "full":
            return (
                "from transformers import AutoModelForCausalLM\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({str(self.paths.model.absolute())!r})"
            )
        model = self.content["model"]
        return (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({str(model.get('origin', model['given']))!r})\n"
            f"model = PeftModel.from_pretrained(base, {str(self.paths.adapter.absolute())!r})"
        )


def _line(command: str, *parts: str) -> str:
    return shlex.join(["lopt-lite", command, *parts])
