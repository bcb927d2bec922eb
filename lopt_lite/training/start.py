"""The door of a training run: ``lopt_lite.train``.

A second start of a run that is at work is turned away here, before torch is loaded and data read, which takes seconds:
scripts and timers try often.
"""

from __future__ import annotations

from pathlib import Path

from lopt_lite.events import OnEvent, ignore
from lopt_lite.locks import holder_pid, refusal
from lopt_lite.outcomes import TrainOutcome
from lopt_lite.settings import TrainSettings
from lopt_lite.training.run_directory import run_directory


def train(settings: TrainSettings, on_event: OnEvent = ignore) -> TrainOutcome:
    """Train, or continue: the same settings again go on after the last durable fact.

    Parameters
    ----------
    settings:
        What to do.
    on_event:
        Told what happens, see :mod:`lopt_lite.events`.

    Raises
    ------
    SettingsError, ModelError, DataError
        Something given cannot be used, and nothing was written (except that weights that are not finite numbers are
        found only while they are prepared).
    RunDirectoryError
        The run directory is in use, not writable, or belongs to other settings.
    DoesNotFitError, DivergedError, StoppedError
        See their classes. Finished work is kept.
    """
    directory = run_directory(settings, _likely_name(Path(settings.model)))
    pid = holder_pid(directory)
    if pid is not None:
        raise refusal(directory, "the run directory", pid)
    from lopt_lite.training.run import run  # a second or more, which a refusal must not take

    return run(settings, on_event)


def _likely_name(model: Path) -> str:
    """The model's name as far as the path says it; where it says another one, the run's own lock refuses later."""
    if model.name in ("model.safetensors", "model.safetensors.index.json"):
        return model.parent.name
    return model.name.removesuffix(".index.json").removesuffix(".safetensors")
