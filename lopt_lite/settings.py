"""Every option, once: its name, default, unit and meaning.

The command line and the YAML file are both generated from and checked against these dataclasses. A field made with
:func:`option` becomes ``--its-name``; its ``help`` text is what ``--help`` shows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lopt_lite import recipe
from lopt_lite.errors import SettingsError
from lopt_lite.option_fields import argument, check_at_least, check_positive, check_types, expand_home, flag, option
from lopt_lite.step_counts import StepCounts, step_counts
from lopt_lite.units import parse_duration_s, parse_memory, parse_time_of_day

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["bfloat16", "float32"]
Quantize = Literal["nf4", "none"]
Schedule = Literal["sequential", "joint"]
Preset = Literal["paper"]
Tune = Literal["lora", "full"]
Cache = Literal["exact", "int8"]
ExportFormat = Literal["adapter", "merged"]
Onto = Literal["original", "quantized"]

OBJECTIVES = ("reconstruct", "task", "match", "none")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything ``lopt-lite train`` can be told."""

    model: str = argument(
        "The model: a .safetensors file (config.json and tokenizer beside it), an index file, a directory, "
        "a store made by 'lopt-lite quantize', or a hub id."
    )
    data: str = argument("Training examples: a JSON Lines file.")
    output: str | None = option(None, "Run directory. Default: runs/MODEL-DATA.", path=True)
    fresh: bool = option(False, "Delete what an earlier run left in the run directory and start anew.")
    config: tuple[str, ...] = option(
        (),
        "A YAML file with any of these options (the command line wins), or the directory with config.json and "
        "tokenizer when they are not beside MODEL. May be given twice, for one of each.",
        repeat=True,
        path=True,
    )
    validation: str | None = option(
        None,
        "Held-out examples: a JSON Lines file, or the fraction of DATA to hold out (e.g. 0.05). Their loss is shown "
        "before training, after each epoch of the last block, and at the end. Default: none.",
        path=True,
    )
    preset: Preset | None = option(
        None,
        "Other defaults. paper: LoPT as its authors ran it (--schedule joint --objective reconstruct --tune full "
        "--head-fit-epochs 0 --batch-size 32 --retain 0, all blocks at the same --lr 2e-5). Options given beside it "
        "win.",
    )
    blocks: int = option(
        2, "Number of blocks between gradient boundaries. 1 is ordinary end-to-end tuning; more need less memory."
    )
    last_layers: int | None = option(
        None,
        "Layers of the last block, the one that learns the task; the blocks before it share the others. More of them "
        "learn more and forget less, in more memory and time. Default: three quarters with --blocks 2 when the first "
        "block is left as it is (why: docs/recipe.md); otherwise as many as in any other block.",
    )
    schedule: Schedule = option(
        None,
        "sequential: train block after block on cached activations. joint: every block steps on every batch, as in the "
        "paper; no caches, but each step passes through the whole model. Default: sequential.",
    )
    objective: str = option(
        None,
        "What the blocks before the last one learn: none (left as they are; fastest), reconstruct (predict the "
        "block's input from its output, as in the paper), task (the training task itself, read out early through the "
        "model's own head) or match (what the unquantised layers make of the same inputs: takes back what 4 bits have "
        "cost). One word, or one per block separated by commas. The last block always learns the task. Default: none "
        "(why: docs/recipe.md); reconstruct with --schedule joint or --preset paper.",
    )
    reconstruction_weight: float = option(
        10.0,
        "Weight of the mean reconstruction loss beside the task's with --schedule joint, where it decides how all "
        "gradients are clipped together. A block trained alone does not feel it, since Adam divides by the gradient's "
        "size, so the sequential schedule has no use for it.",
    )
    tune: Tune = option(
        None,
        "What is trained: lora (a PEFT adapter on the linear layers) or full (all weights of the layers, in --dtype; "
        "by Adam with 8-bit moments when --dtype is bfloat16). Default: lora. With full, sequentially, gradients are "
        "clipped and applied one layer at a time, and embedding and LM head stay frozen; with --schedule joint all are "
        "clipped together, and embedding, final norm and LM head are trained too (a tied head is untied).",
    )
    quantize: Quantize = option(
        None,
        "Storage of the frozen weights: nf4 (4 bits) or none (in --dtype). Default: nf4; none with --tune full, whose "
        "weights cannot have 4 bits.",
    )
    dtype: Dtype = option("bfloat16", "Type to compute in; with --quantize none also the type of stored weights.")
    cache: Cache = option(
        "exact",
        "Storage of the activations between blocks: exact (in --dtype) or int8 (8 bits per value, a scale per token: "
        "half the disk space and reading, with a small error that is measured and shown).",
    )
    store: str | None = option(
        None,
        "Directory of the prepared weights; runs may share one. Default: RUN/store, or MODEL if it is a store.",
        path=True,
    )
    epochs: int = option(1, "Passes over the data for each block.")
    max_steps: int | None = option(
        None,
        "Optimiser steps of each block, in place of --epochs: the data is passed over as often as they take, the last "
        "time perhaps in part. The learning rate falls to 0 by then. Default: all steps of --epochs.",
    )
    lr: float | None = option(
        None,
        "Peak learning rate of the last block (cosine to 0 after 3 % linear warm-up). Default: by width and kind of "
        "model, 1.4e-3 up to 512, 8.4e-4 at 1,024, 4.9e-4 at 2,048, 2.9e-4 at 4,096 for Llama, about 5e-4 for Qwen, "
        "for others 4e-4 or what a Llama has; times 2 to 0.6 in runs of up to 100 steps, the more the likelier the "
        "answers are before, less so in longer ones, and not at all from 1,000 steps on (why: docs/recipe.md). 4e-4 "
        "with --schedule joint, 2e-5 with --tune full.",
    )
    lr_early: float | None = option(
        None,
        "Peak learning rate of the blocks before the last. Default: a tenth of --lr, or of what it is by the model, "
        "whatever is tuned (with --preset paper, which fits no reconstruction head first, the same as --lr).",
    )
    head_fit_epochs: int = option(
        None,
        "Epochs for which the reconstruction head is first fitted on the untouched block, so that training starts "
        "from a useful signal. 0 starts from a random head, as in the paper. Default: 1.",
    )
    batch_size: int = option(None, "Examples per optimiser step. Default: 8.")
    retain: float | None = option(
        None,
        "Weight of an anchor that holds the model to what it knew: the divergence of its predictions at a sample of "
        "prompt tokens from those of the untouched model is added to the loss of the last block. 0: no anchor. "
        "Default: from 0.3 to 3, the more the less likely the model finds the answers so far (why: docs/recipe.md); "
        "0 with --blocks 1, --schedule joint or --preset paper, and where there are no prompts and no --retain-data.",
    )
    retain_tokens: int = option(32, "Most anchored tokens of one example.")
    retain_answers: int = option(
        0,
        "Anchor on the untouched model's own answers instead of on the prompts of DATA: it first writes so many tokens "
        "in answer to up to 64 of them, and each step takes one of these for every four examples. Forgets less, takes "
        "more time (docs/recipe.md). 0: anchor on the prompts.",
    )
    retain_data: str | None = option(
        None,
        "Other text to anchor on as well: a JSON Lines file in any form that DATA may have; answers in it are not "
        "learnt. Each step takes one of its examples for every four of DATA.",
        path=True,
    )
    max_length: int = option(1024, "Longest example, in tokens; longer ones are cut at the front of the prompt.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: float = option(32.0, "Scale of the adapter (its output is multiplied by alpha / rank).")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input while training, 0 to below 1.")
    lora_targets: str = option(
        "all-linear",
        "Modules of a layer that get an adapter: all-linear, or names separated by commas (e.g. q_proj,v_proj).",
    )
    memory: str = option(
        "auto",
        "Budget of device memory, e.g. 6GiB (2**30 bytes) or 8GB (10**9 bytes); on the CPU that of the whole process. "
        "Layers that do not fit are streamed. auto takes most of what is free.",
        environment=True,
    )
    device: Device = option("auto", "Where to compute: auto takes cuda, then mps, then cpu.", environment=True)
    seed: int = option(
        0, "Seed of everything that is drawn: shuffling, splitting, adapter start, dropout, anchored tokens, rounding."
    )
    skip_bad_lines: bool = option(
        False,
        "Drop lines of DATA (and of --validation and --retain-data) that cannot be used, and count them, instead of "
        "stopping.",
    )
    checkpoint_every: str = option(
        "5m",
        "Longest time between checkpoints within a block: e.g. 30s, 5m, 1h; a bare number is seconds.",
        environment=True,
    )
    max_hours: float | None = option(
        None, "Stop after this many hours with a checkpoint (exit code 75).", environment=True
    )
    deadline: str | None = option(
        None, "Stop before this time of day, HH:MM, with a checkpoint (exit code 75).", environment=True
    )
    quiet: bool = option(False, "Only warnings, errors and the final summary.", environment=True)

    def __post_init__(self) -> None:
        # Defaults that depend on another option. Some depend on data and model too: see settle.
        _fill(self, _PRESETS.get(str(self.preset), {}))
        _fill(self, _DEFAULTS)
        _fill(self, _DEFAULTS_OF_TUNE["full" if self.tune == "full" else "lora"])
        _fill(self, _DEFAULTS_OF_SCHEDULE["joint" if self.schedule == "joint" else "sequential"])
        if self.blocks == 1:
            _fill(self, {"retain": 0.0})
        check_types(self)
        expand_home(self)
        if self.tune == "full":
            _check_full_tuning(self)
        _check_schedule(self)
        _check_anchor(self)
        check_at_least(self, 1, "blocks", "epochs", "max_steps", "batch_size", "lora_r", "retain_tokens", "last_layers")
        if self.last_layers is not None and self.blocks == 1:
            raise SettingsError(
                "--last-layers cuts off the last block, and with --blocks 1 there is no other",
                fix="leave one of them out",
            )
        check_at_least(self, 0, "head_fit_epochs", "retain_answers")
        check_at_least(self, 2, "max_length")
        check_positive(self, "lr", "lr_early", "lora_alpha", "max_hours")
        if not 0 <= self.lora_dropout < 1:
            raise SettingsError(f"--lora-dropout is {self.lora_dropout}", expected="at least 0 and below 1")
        _check_seed(self.seed)
        if not self.target_names and self.lora_targets != "all-linear":
            raise SettingsError(f"--lora-targets is {self.lora_targets!r}", expected="all-linear, or module names")
        if self.validation is not None and not self.validation.strip():
            raise SettingsError("--validation is empty", expected="a file, or a fraction such as 0.05")
        parse_duration_s(self.checkpoint_every, "--checkpoint-every")
        if self.deadline is not None:
            parse_time_of_day(self.deadline, "--deadline")
        self.memory_bytes()
        _check_matching(self)
        self.validation_fraction()

    def memory_bytes(self) -> int | None:
        """The memory budget in bytes, None for ``auto``."""
        return parse_memory(self.memory)

    def objectives(self) -> tuple[str, ...]:
        """The objective of each block, first to last; the last is always ``task``.

        Raises
        ------
        SettingsError
            An unknown objective, or a list that does not have one name for each early block.
        """
        names = [name.strip() for name in self.objective.split(",")]
        for name in names:
            if name not in OBJECTIVES:
                raise SettingsError(f"--objective names {name!r}", expected=f"one of {', '.join(OBJECTIVES)}")
        early = self.blocks - 1
        if len(names) == 1:
            names = names * early
        if len(names) != early:
            raise SettingsError(
                f"--objective names {len(names)} objectives, and there are {early} blocks before the last",
                expected="one name for all of them, or one for each",
            )
        return (*names, "task")

    def validation_fraction(self) -> float | None:
        """The fraction of DATA to hold out, or None when ``validation`` is absent or names a file."""
        if self.validation is None:
            return None
        try:
            fraction = float(self.validation)
        except ValueError:
            return None
        if Path(self.validation).is_file():
            return None
        if not 0 < fraction < 1:
            raise SettingsError(f"--validation is {self.validation}", expected="a file, or a fraction between 0 and 1")
        return fraction

    def last_block_layers(self, layers: int) -> int | None:
        """Layers of the last block of a model with ``layers`` of them; None: the blocks are alike.

        Where the only other block learns nothing, the last one is larger than it, a choice of docs/recipe.md.
        """
        if self.last_layers is None and self.objectives() == ("none", "task"):
            return recipe.larger_last_block(layers)
        return self.last_layers

    def settle(self, *, has_prompts: bool, model: recipe.ModelKind) -> TrainSettings:
        """These settings with the defaults that depend on data and model, where nothing was asked for.

        Parameters
        ----------
        has_prompts:
            There is something to anchor on: tokens that are not to be learnt.
        model:
            What is to be trained.
        """
        return dataclasses.replace(
            self,
            retain=0.0 if self.retain is None and not has_prompts else self.retain,
            # A preset is no setting of the run: what follows from it has to be one.
            lr=self.lr if self.preset is None else self.model_lr(model),
            last_layers=self.last_block_layers(model.layers),
        )

    @property
    def anchored(self) -> bool:
        """Whether the last block is held to the untouched model, once that is settled (see :meth:`settle`).

        The weight is still to be found out where ``retain`` is None.
        """
        return self.retain is None or self.retain > 0

    def without_effect(self) -> list[str]:
        """What was asked for and changes nothing, in words for the user."""
        found = []
        if self.max_steps is not None and self.epochs != TrainSettings.epochs:
            found.append("--epochs has no effect: --max-steps says how long each block is trained")
        preset = _PRESETS.get(str(self.preset), {})
        usual = {**_DEFAULTS, **_DEFAULTS_OF_SCHEDULE[self.schedule], **preset}
        if self.blocks == 1 and self.objective != usual["objective"]:
            found.append(f"--objective {self.objective} has no effect: there is one block, and it learns the task")
        if self.head_fit_epochs != usual["head_fit_epochs"] and "reconstruct" not in self.objectives():
            found.append("--head-fit-epochs has no effect: no block learns by reconstruction (--objective)")
        if self.lr_early is not None and set(self.objectives()[:-1]) <= {"none"}:
            found.append("--lr-early has no effect: no block before the last learns anything (--objective)")
        if self.cache != "exact" and self.blocks == 1:
            found.append(f"--cache {self.cache} has no effect: there is one block, and nothing between blocks")
        if self.retain_tokens != TrainSettings.retain_tokens and self.retain == 0:
            found.append("--retain-tokens has no effect: there is no anchor (--retain)")
        elif self.retain_tokens != TrainSettings.retain_tokens and self.retain_answers and self.retain_data is None:
            found.append("--retain-tokens has no effect: the anchor is on the model's answers (--retain-answers)")
        if self.reconstruction_weight != TrainSettings.reconstruction_weight and (
            "reconstruct" not in self.objectives()
        ):
            found.append("--reconstruction-weight has no effect: no block learns by reconstruction (--objective)")
        return found

    def step_counts(self, train_examples: int) -> StepCounts:
        """Optimiser steps of each block."""
        return step_counts(
            train_examples,
            batch_size=self.batch_size,
            epochs=self.epochs,
            head_fit_epochs=self.head_fit_epochs,
            max_steps=self.max_steps,
        )

    @property
    def trains_around(self) -> bool:
        """Whether embedding, final norm and LM head are trained too, as in the paper."""
        return self.tune == "full" and self.schedule == "joint"

    def model_lr(self, model: recipe.ModelKind) -> float:
        """``lr``, or what it is by the model where nobody gave it. (A short run may have another in its last block.)"""
        return recipe.lora_rate(model) if self.lr is None else self.lr

    def early_lr(self, model: recipe.ModelKind) -> float:
        """Peak learning rate of the blocks before the last."""
        return self._early_lr(self.model_lr(model))

    def _early_lr(self, lr: float) -> float:
        if self.lr_early is not None:
            return self.lr_early
        return lr if self.preset == "paper" else lr / 10

    @property
    def target_names(self) -> tuple[str, ...]:
        """The module names of ``lora_targets``, empty for ``all-linear``."""
        if self.lora_targets == "all-linear":
            return ()
        return tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())

    @property
    def checkpoint_every_s(self) -> float:
        """Seconds between checkpoints within a block."""
        return parse_duration_s(self.checkpoint_every, "--checkpoint-every")

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide the result's bytes: what a resumed run must share with the one it continues."""
        values = dataclasses.asdict(self)
        for name in _FREE_TO_CHANGE:
            del values[name]
        if self.lr is not None:
            values["lr_early"] = self._early_lr(self.lr)
        return values


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "schedule": "joint",
        "tune": "full",
        "objective": "reconstruct",
        "head_fit_epochs": 0,
        "batch_size": 32,
        "retain": 0.0,
    },
}
_DEFAULTS: dict[str, Any] = {"schedule": "sequential", "tune": "lora", "head_fit_epochs": 1, "batch_size": 8}
_DEFAULTS_OF_TUNE: dict[str, dict[str, Any]] = {
    "lora": {"quantize": "nf4"},
    "full": {"quantize": "none", "lr": 2e-5},
}
_DEFAULTS_OF_SCHEDULE: dict[str, dict[str, Any]] = {
    "sequential": {"objective": "none"},
    "joint": {"objective": "reconstruct", "retain": 0.0, "lr": 4e-4},
}


def _fill(settings: TrainSettings, defaults: dict[str, Any]) -> None:
    """Give the options that are None these values."""
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            object.__setattr__(settings, name, value)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise SettingsError(f"--seed is {seed}", expected="a number from 0 to below 2**63")


def _check_schedule(settings: TrainSettings) -> None:
    """Refuse what one of the schedules has no use for."""
    if settings.schedule == "joint" and settings.cache != "exact":
        raise SettingsError(
            f"--cache {settings.cache} describes the activations between blocks, and --schedule joint caches none",
            fix="leave it out, or use --schedule sequential",
        )
    if not (settings.reconstruction_weight >= 0 and math.isfinite(settings.reconstruction_weight)):
        raise SettingsError(f"--reconstruction-weight is {settings.reconstruction_weight}", expected="0 or more")
    if settings.schedule == "sequential" and settings.reconstruction_weight != 10.0:
        raise SettingsError(
            "--reconstruction-weight changes nothing for a block that is trained alone",
            fix="leave it out, or use --schedule joint; --lr-early is how fast early blocks learn",
        )


def _check_matching(settings: TrainSettings) -> None:
    """Refuse to match the unquantised layers where that means nothing, or where their outputs are not to be had."""
    if "match" not in settings.objectives():
        return
    if settings.tune == "full":
        raise SettingsError(
            "--objective match corrects what quantising has changed, and --tune full quantises nothing",
            fix="choose another objective (none leaves blocks as they are), or --tune lora",
        )
    if settings.quantize == "none":
        raise SettingsError(
            "--objective match corrects what quantising has changed, and --quantize none changes nothing",
            fix="choose another objective (none leaves blocks as they are), or --quantize nf4",
        )
    if settings.schedule == "joint":
        raise SettingsError(
            "--objective match compares outputs for inputs that stay the same, and those of --schedule joint change",
            fix="use --schedule sequential, or another objective",
        )


def _check_anchor(settings: TrainSettings) -> None:
    if settings.retain is None:
        return
    if not (settings.retain >= 0 and math.isfinite(settings.retain)):
        raise SettingsError(f"--retain is {settings.retain}", expected="0 or more")
    wanted = [name for name in ("retain", "retain_data", "retain_answers") if getattr(settings, name)]
    if wanted and settings.trains_around:
        raise SettingsError(
            f"{flag(wanted[0])} asks for an anchor, which compares with the untouched model through its LM head, and "
            "--schedule joint --tune full trains that",
            fix="leave it out, or use --schedule sequential or --tune lora",
        )
    if settings.retain_data is not None and not settings.retain:
        raise SettingsError("--retain-data names text to anchor on, and --retain is 0", fix="add --retain 1")
    if settings.retain_answers and not settings.retain:
        raise SettingsError("--retain-answers asks for an anchor, and --retain is 0", fix="add --retain 1")


def _check_full_tuning(settings: TrainSettings) -> None:
    """Refuse what means nothing when there is no adapter."""
    if settings.quantize != "none":
        raise SettingsError(
            f"--quantize {settings.quantize} is asked for with --tune full, and 4-bit weights cannot be trained",
            expected="--quantize none",
            fix="leave --quantize out, or train an adapter on 4-bit weights with --tune lora",
        )
    for field_ in dataclasses.fields(settings):
        if field_.name.startswith("lora_") and getattr(settings, field_.name) != field_.default:
            raise SettingsError(
                f"{flag(field_.name)} describes an adapter, and --tune full trains none",
                fix="leave it out, or use --tune lora",
            )


#: Options that may differ when a run is continued: they change when it stops, or where things lie, not its result.
#: The model and the data are compared by fingerprint instead, so that a moved file does not matter.
_FREE_TO_CHANGE = (
    "model",
    "data",
    "validation",
    "retain_data",
    "preset",
    "output",
    "fresh",
    "config",
    "store",
    "device",
    "checkpoint_every",
    "max_hours",
    "deadline",
    "quiet",
)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TrainSettings):
    """Everything ``lopt-lite plan`` can be told: the same as ``train``."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Everything ``lopt-lite quantize`` can be told."""

    model: str = argument("The model: a .safetensors file, an index file, a directory, or a hub id.")
    store: str = argument("Directory to write. It is an ordinary Hugging Face checkpoint that transformers can load.")
    config: tuple[str, ...] = option(
        (), "The directory with config.json and tokenizer when they are not beside MODEL.", repeat=True, path=True
    )
    quantize: Quantize = option("nf4", "nf4 (4 bits, double quantisation, block size 64) or none.")
    dtype: Dtype = option(
        "bfloat16", "With --quantize none: type of the weights. With nf4, what stays unquantised is in bfloat16."
    )
    device: Device = option("auto", "Where to compute: auto takes cuda, then mps, then cpu.", environment=True)

    def __post_init__(self) -> None:
        check_types(self)
        expand_home(self)

    def without_effect(self) -> list[str]:
        """What was asked for and changes nothing, in words for the user."""
        if self.quantize == "none" or self.dtype == "bfloat16":
            return []
        return [f"--dtype {self.dtype} has no effect: with --quantize nf4, what stays unquantised is in bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Everything ``lopt-lite evaluate`` can be told."""

    run: str = argument("Run directory.")
    data: str | None = argument("Held-out examples: a JSON Lines file. May be left out with --tasks.", default=None)
    tasks: str | None = option(
        None,
        "Tasks of lm-eval (pip install 'lopt-lite[eval]') for both models to answer, separated by commas: names such "
        "as gsm8k, task files (*.yaml), or directories of them. Python functions that a task file names are run, so "
        "name only files that you trust.",
    )
    limit: int | None = option(None, "Examples of each task, the first ones. Default: all.")
    num_fewshot: int | None = option(None, "Solved examples before each question of the tasks. Default: each task's.")
    apply_chat_template: bool = option(
        False, "Ask the tasks' questions as turns of a conversation, by the chat template that training used."
    )
    batch_size: int = option(8, "Examples per batch.")
    max_length: int | None = option(
        None, "Longest example, in tokens. Default: the run's; for tasks as much as the model may see."
    )
    memory: str = option("auto", "Budget of memory, as for train.", environment=True)
    device: Device = option("auto", "Where to compute: auto takes cuda, then mps, then cpu.", environment=True)
    skip_bad_lines: bool = option(False, "Drop lines that cannot be used, and count them, instead of stopping.")

    def __post_init__(self) -> None:
        check_types(self)
        expand_home(self)
        check_at_least(self, 1, "batch_size", "limit")
        check_at_least(self, 0, "num_fewshot")
        check_at_least(self, 2, "max_length")
        parse_memory(self.memory)
        if self.tasks is None:
            if self.data is None:
                raise SettingsError("there is nothing to evaluate on", expected="DATA, --tasks, or both")
            for name in ("limit", "num_fewshot", "apply_chat_template"):
                if getattr(self, name) not in (None, False):
                    raise SettingsError(
                        f"{flag(name)} is for --tasks, and there are none", fix="add --tasks, or leave it out"
                    )
        elif not self.task_names():
            raise SettingsError(f"--tasks is {self.tasks!r}", expected="names separated by commas")

    def task_names(self) -> list[str]:
        """The tasks, files and directories of ``tasks``."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Everything ``lopt-lite report`` can be told."""

    run: str = argument("Run directory. RUN/report.html and RUN/loss.png are written, or written anew.")

    def __post_init__(self) -> None:
        check_types(self)
        expand_home(self)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Everything ``lopt-lite generate`` can be told."""

    run: str = argument("Run directory.")
    prompt: str = option("", "The user's message; a chat template is applied as in training.")
    max_new_tokens: int = option(256, "Longest answer, in tokens.")
    temperature: float = option(0.0, "0 takes the likeliest token each time; higher is more varied.")
    top_p: float = option(1.0, "With a temperature: sample from the smallest set of tokens with this probability.")
    seed: int = option(0, "Seed of the sampling.")
    memory: str = option("auto", "Budget of memory, as for train.", environment=True)
    base: bool = option(False, "Answer with the untouched base model instead.")
    device: Device = option("auto", "Where to compute: auto takes cuda, then mps, then cpu.", environment=True)

    def __post_init__(self) -> None:
        check_types(self)
        expand_home(self)
        check_at_least(self, 1, "max_new_tokens")
        _check_seed(self.seed)
        parse_memory(self.memory)
        if not self.prompt:
            raise SettingsError("--prompt is empty", expected="the text to answer")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise SettingsError(f"--prompt is not text: {error.reason}", expected="text in UTF-8") from error
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SettingsError(f"--temperature is {self.temperature}", expected="0 or more")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"--top-p is {self.top_p}", expected="above 0 and at most 1")

    def without_effect(self) -> list[str]:
        """What was asked for and changes nothing, in words for the user."""
        given = [name for name in ("top_p", "seed") if getattr(self, name) != getattr(GenerateSettings, name)]
        if self.temperature > 0:
            return []
        return [f"{flag(name)} has no effect: without --temperature the likeliest token is taken" for name in given]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Everything ``lopt-lite export`` can be told."""

    run: str = argument("Run directory.")
    out: str = argument("Directory to write; it must not exist yet, or be empty.")
    format: ExportFormat = option(
        "adapter",
        "adapter: a PEFT adapter; merged: a whole Hugging Face checkpoint in bfloat16 (that of a run with --tune full: "
        "in its --dtype).",
    )
    onto: Onto = option(
        "original",
        "For merged. original: add the adapter to the weights you brought (best quality; differs a little from what "
        "was evaluated, which had 4-bit weights). quantized: add it to the dequantised 4-bit weights it was trained "
        "against (the evaluated model, up to bfloat16 rounding).",
    )
    model: str | None = option(None, "Where the original model is now, if it has moved since training.", path=True)
    device: Device = option("auto", "Where to compute: auto takes cuda, then mps, then cpu.", environment=True)

    def __post_init__(self) -> None:
        check_types(self)
        expand_home(self)
        if self.format == "adapter" and self.onto != "original":
            raise SettingsError(
                f"--onto {self.onto} says what to merge into, and --format adapter merges nothing",
                fix="add --format merged, or leave --onto out",
            )
        if self.model is not None and (self.format == "adapter" or self.onto == "quantized"):
            raise SettingsError(
                "--model names the original model, which is only needed to merge into it",
                fix="add --format merged --onto original, or leave --model out",
            )
