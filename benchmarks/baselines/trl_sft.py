"""TRL's SFTTrainer with QLoRA, as its documentation shows it: NF4, PEFT adapter, gradient checkpointing, bfloat16.

Everything that is not the model, the data or the shared hyperparameters is TRL's default: random batches padded to
their longest row, loss through the fused LM head, the adapter in bfloat16 (TRL casts it on 4-bit models; where the CPU
has no instructions for bfloat16 it is cast back, or its products would take most of the time), fused AdamW.
Packing and padding-free batches, which TRL also recommends, need FlashAttention and so a GPU.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from benchmarks.baselines.common import Clock, Job, compute_dtype, load_nf4, lora, read_tokens
from lopt_lite import host_memory
from lopt_lite.data.dataset import IGNORED


def train(job: Job) -> dict[str, Any]:
    """Train, in this process.

    Returns
    -------
    dict
        ``seconds`` of training, ``total_s`` with loading and quantising the model, ``peak_bytes`` of this process,
        ``steps``, and ``points`` (``step``, ``seconds``, ``adapter``), the last of which is the result.
    """
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    began = time.monotonic()
    dataset = read_tokens(job.tokens)
    read_s = time.monotonic() - began
    clock = Clock(job, math.ceil(len(dataset) / job.batch_size))

    class PutAside(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            clock.after_step(
                state.global_step, lambda directory: model.save_pretrained(directory, save_embedding_layers=False)
            )

    trainer = SFTTrainer(
        model=load_nf4(job.model),
        args=_config(SFTConfig, job),
        train_dataset=datasets.Dataset.from_dict(labelled_rows(dataset)),
        processing_class=AutoTokenizer.from_pretrained(job.model, local_files_only=True),
        peft_config=lora(),
        callbacks=[PutAside()],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(compute_dtype())
    loaded_s = clock.seconds
    trainer.train()
    total_s = clock.seconds
    for point in clock.points:
        point["seconds"] -= loaded_s
    return {
        "seconds": total_s - loaded_s,
        "total_s": read_s + total_s,
        "peak_bytes": host_memory.peak_rss_bytes(),
        "steps": trainer.state.global_step,
        "points": clock.points,
    }


def _config(kind: Any, job: Job) -> Any:
    return kind(
        output_dir=job.output,
        per_device_train_batch_size=job.batch_size,
        num_train_epochs=job.epochs,
        learning_rate=job.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # a fraction of all steps
        max_grad_norm=1.0,
        weight_decay=0.0,
        max_length=job.max_length,
        completion_only_loss=True,
        gradient_checkpointing=True,
        bf16=compute_dtype() == torch.bfloat16,
        use_cpu=True,
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def labelled_rows(dataset: Any) -> dict[str, list[list[int]]]:
    """Token ids, and labels at answer tokens only: TRL takes a column of labels as it is."""
    ids, labels = [], []
    for index in range(len(dataset)):
        tokens, is_target = dataset.example(index)
        ids.append(tokens.tolist())
        labels.append(tokens.long().masked_fill(~is_target, IGNORED).tolist())
    return {"input_ids": ids, "labels": labels}
