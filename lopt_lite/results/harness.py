"""Tasks of lm-eval, the field's own harness, answered by the base and by the tuned model of a run.

lm-eval is an optional dependency and takes a second to import, so it is imported when tasks are asked for. Its own
tasks are data; a task file that the user names may name Python functions, which lm-eval then imports from beside it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import yaml

from lopt_lite import devices
from lopt_lite.errors import DataError, SettingsError
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import TaskScore
from lopt_lite.results.open_run import OpenRun
from lopt_lite.settings import EvaluateSettings

_INSTALL = "pip install 'lopt-lite[eval]'"
#: For standard errors that have no formula. lm-eval's own 100,000 take longer than many a task.
_RESAMPLES = 1000
#: What a task's file, its functions, or the loader of its data may raise; lack of a network among it.
_RAISED_BY_TASKS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    yaml.YAMLError,
    jinja2.TemplateError,
)


def task_scores(
    run: OpenRun, settings: EvaluateSettings, *, peak: devices.PeakMemory | None, on_event: OnEvent
) -> tuple[TaskScore, ...]:
    """What both models score on the tasks that ``settings`` name.

    Raises
    ------
    SettingsError
        lm-eval is not installed, or a task is not known.
    DataError
        A task, or its data, cannot be loaded.
    """
    lm_eval = _import("lm_eval")
    loaded = _load(settings.task_names())
    model = _import("lopt_lite.results.harness_model").LayerStreamedLM(run, settings, peak=peak, on_event=on_event)
    results = []
    for tuned in (False, True):
        model.tuned = tuned
        _seed(loaded["tasks"].values(), settings.num_fewshot)
        with _kept_in_house(), _templates_tried():
            found = lm_eval.evaluate(
                lm=model,
                task_dict=loaded,
                limit=settings.limit,
                log_samples=False,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
                bootstrap_iters=_RESAMPLES,
                confirm_run_unsafe_code=False,
            )
        results.append(found)
        devices.release_everything(run.device)
    return _scores(*results, groups=_groups(loaded["groups"].values()))


def _seed(tasks: Iterable[Any], num_fewshot: int | None) -> None:
    """What lm-eval's ``simple_evaluate`` does before it evaluates; that also runs git, and describes the machine."""
    seeds = _import("lm_eval.defaults")
    random.seed(seeds.DEFAULT_RANDOM_SEED)
    np.random.seed(seeds.DEFAULT_OTHER_SEED)
    torch.manual_seed(seeds.DEFAULT_OTHER_SEED)
    for task in tasks:
        own = task.get_config("num_fewshot")
        # A task that says 0 itself cannot be asked otherwise.
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seeds.DEFAULT_OTHER_SEED)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(
            f"--tasks needs lm-eval, which cannot be imported: {error}",
            expected="lm-eval 0.4.13 or later",
            fix=_INSTALL,
        ) from error


def _load(names: list[str]) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks and groups of tasks, by name, as it evaluates them."""
    manager, specs = _manager(names)
    try:
        with _kept_in_house():
            loaded: dict[str, dict[str, Any]] = manager.load(specs)
    except _RAISED_BY_TASKS as error:
        raise DataError(
            f"the tasks {', '.join(specs)} cannot be loaded: {_first_line(error)}",
            fix="check the tasks' files and their data; data that is not local is fetched from the Hugging Face hub",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SettingsError(
                f"the task {name} runs code that the model writes, which lopt-lite does not", fix="leave it out"
            )
    return loaded


def _groups(groups: Iterable[Any]) -> dict[str, str]:
    """For each task and group that is part of a group, the name of that group."""
    within: dict[str, str] = {}
    for group in groups:
        within.update(dict.fromkeys(group.child_names, group.name))
    return within


def _manager(names: list[str]) -> tuple[Any, list[str]]:
    """lm-eval's manager of tasks, and what to ask it for: paths of task files, and names."""
    manager_class = _import("lm_eval.tasks").TaskManager
    directories = [name for name in names if Path(name).is_dir()]
    local = manager_class(include_path=directories, include_defaults=False)
    specs: list[str] = []
    needed: list[str] = []
    for name in names:
        if Path(name).is_dir():
            inside, members = _inside(manager_class(include_path=name, include_defaults=False))
            if not inside:
                raise SettingsError(f"--tasks names {name}, which has no tasks in it", expected="task files, *.yaml")
            specs += inside
            needed += members
        elif _is_file_name(name) and not Path(name).is_file():
            raise SettingsError(f"--tasks names {name}, and there is no such file", fix="check the path")
        else:
            specs.append(name)
    specs = list(dict.fromkeys(specs))
    if all(_is_file_name(name) or name in local.all_tasks for name in [*specs, *needed]):
        return local, specs
    # lm-eval has ten thousand task files of its own, which take seconds to look through.
    manager = manager_class(include_path=directories)
    for name in specs:
        if not _is_file_name(name) and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise SettingsError(
                f"--tasks names {name}, which lm-eval does not know",
                expected="a task or group of lm-eval, a task file (*.yaml), or a directory of them",
                fix=f"did you mean {' or '.join(near)}?" if near else "see 'lm-eval ls tasks' for all names",
            )
    return manager, specs


def _inside(manager: Any) -> tuple[list[str], list[str]]:
    """What there is to evaluate in a directory (its groups, and its tasks that are in none), and what groups name."""
    members = []
    for group in manager.all_groups:
        for member in manager.task_index[group].cfg["task"]:
            members.append(member if isinstance(member, str) else member.get("task") or member.get("group"))
    return [name for name in [*manager.all_groups, *manager.all_subtasks] if name not in members], members


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _scores(base: dict[str, Any], tuned: dict[str, Any], *, groups: dict[str, str]) -> tuple[TaskScore, ...]:
    """One record per task and metric, in lm-eval's order."""
    scores = []
    for task, values in base["results"].items():
        for key, value in values.items():
            metric, comma, choice = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            others = tuned["results"][task]
            error = f"{metric}_stderr,{choice}"
            scores.append(
                TaskScore(
                    task=task,
                    group=groups.get(task),
                    metric=metric,
                    filter=None if choice == "none" else choice,
                    higher_is_better=base["higher_is_better"].get(task, {}).get(metric),
                    examples=int(values.get("sample_len", 0)),
                    base=float(value),
                    base_stderr=_number(values.get(error)),
                    tuned=float(others[key]),
                    tuned_stderr=_number(others.get(error)),
                )
            )
    return tuple(scores)


def _number(value: Any) -> float | None:
    """lm-eval writes N/A where there is no standard error."""
    return float(value) if isinstance(value, (int, float)) else None


@contextlib.contextmanager
def _templates_tried() -> Iterator[None]:
    """What a task's own templates raise within the context is a fault of the task."""
    try:
        yield
    except (jinja2.TemplateError, ZeroDivisionError) as error:
        raise DataError(
            f"a template of the tasks cannot be filled in: {_first_line(error)}", fix="correct the task's file"
        ) from error


@contextlib.contextmanager
def _kept_in_house() -> Iterator[None]:
    """Standard output belongs to the result: what the harness and its tasks print goes to standard error.

    And it is not to fork the process, which holds a model and threads, to resample faster.
    """
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
