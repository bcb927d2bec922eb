"""What the baselines share: the job, tokens by lopt-lite's loader, the 4-bit model, the adapter, the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lopt_lite import float32_products
from lopt_lite.data.dataset import TokenizedDataset

LORA_R, LORA_ALPHA = 16, 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of a baseline.

    Attributes
    ----------
    model:
        A Hugging Face checkpoint's directory.
    tokens:
        The examples, as :func:`write_tokens` wrote them.
    output:
        Directory for the adapters.
    lr:
        Peak learning rate.
    points:
        How often per epoch the adapter is put aside, to measure its held-out loss later.
    """

    model: str
    tokens: str
    output: str
    lr: float
    epochs: int
    batch_size: int
    max_length: int
    seed: int
    points: int


def write_tokens(path: Path, dataset: TokenizedDataset) -> str:
    """Write a data set's token ids and targets; returns the path."""
    tensors = {"tokens": dataset.tokens, "is_target": dataset.is_target, "offsets": dataset.offsets}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def read_tokens(path: str) -> TokenizedDataset:
    """What :func:`write_tokens` wrote."""
    return TokenizedDataset(**load_file(path))


def compute_dtype() -> torch.dtype:
    """bfloat16, as QLoRA has it; float32 on a CPU for which PyTorch would multiply bfloat16 matrices by plain loops."""
    return torch.float32 if float32_products.needed(torch.device("cpu")) else torch.bfloat16


def load_nf4(model: str) -> Any:
    """The model with NF4 weights (double quantisation) on the CPU, everything else in :func:`compute_dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    return AutoModelForCausalLM.from_pretrained(
        model,
        quantization_config=quantization,
        dtype=compute_dtype(),
        device_map={"": "cpu"},
        local_files_only=True,
    )


def lora() -> Any:
    """The adapter that lopt-lite trains by default."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )


class Clock:
    """The time of a training without that of putting adapters aside, and where they are.

    Parameters
    ----------
    job:
        Names the directory and how often per epoch.
    steps_per_epoch:
        Optimiser steps of one epoch.
    """

    def __init__(self, job: Job, steps_per_epoch: int) -> None:
        self._job = job
        self._steps = job.epochs * steps_per_epoch
        count = job.epochs * job.points
        self._due = {max(1, round(self._steps * point / count)) for point in range(1, count + 1)}
        self._started = time.monotonic()
        self._paused_s = 0.0
        self.points: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._started - self._paused_s

    def after_step(self, step: int, save: Callable[[str], None]) -> None:
        """Put the adapter aside with ``save`` if it is time to, after ``step`` optimiser steps."""
        if step not in self._due:
            return
        seconds, began = self.seconds, time.monotonic()
        directory = str(Path(self._job.output) / f"step-{step:06d}")
        save(directory)
        self.points.append({"step": step, "seconds": seconds, "adapter": directory})
        self._paused_s += time.monotonic() - began
