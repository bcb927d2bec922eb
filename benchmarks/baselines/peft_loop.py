"""A plain loop around a PEFT adapter on NF4 weights, tuned for speed where memory is no object.

Batches and their parts of similar length are lopt-lite's, nothing is recomputed, there is no attention mask (rows are
padded on the right, so that no real token sees padding and attention keeps its fast path), LM head and loss at answer
tokens only, adapter in float32 with bfloat16 products (where the CPU has them), fused AdamW.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.common import Clock, Job, compute_dtype, load_nf4, lora, read_tokens
from lopt_lite import host_memory
from lopt_lite.data.batches import epoch_batches, micro_batches
from lopt_lite.data.dataset import IGNORED, Batch, collate
from lopt_lite.training.micro_batch_size import group_cost_tokens

#: Memory is no object.
_ENOUGH_TOKENS = 1 << 30


def train(job: Job) -> dict[str, Any]:
    """Train, in this process.

    Returns
    -------
    dict
        As :func:`benchmarks.baselines.trl_sft.train`.
    """
    from peft import get_peft_model

    from lopt_lite.training.optimisation import CLIP_NORM, learning_rate

    began = time.monotonic()
    dataset = read_tokens(job.tokens)
    torch.manual_seed(job.seed)
    model = get_peft_model(load_nf4(job.model), lora())
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    cost_tokens = group_cost_tokens(torch.device("cpu"))
    steps_per_epoch = math.ceil(len(dataset) / job.batch_size)
    steps, step = job.epochs * steps_per_epoch, 0
    loaded_s = time.monotonic() - began
    clock = Clock(job, steps_per_epoch)
    Path(job.output).mkdir(parents=True, exist_ok=True)
    for epoch in range(job.epochs):
        seed = (job.seed, "block", 0, "train", epoch)
        for indices in epoch_batches(dataset.lengths, batch_size=job.batch_size, seed=seed):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, job.lr)
            parts = micro_batches(indices, dataset.lengths, max_tokens=_ENOUGH_TOKENS, cost_tokens=cost_tokens)
            batches = [collate(dataset, part, 0) for part in parts]
            answer_tokens = sum(batch.answer_tokens for batch in batches)
            for batch in batches:
                (answer_loss(model.get_base_model(), batch) / answer_tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            clock.after_step(step, lambda directory: model.save_pretrained(directory, save_embedding_layers=False))
    return {
        "seconds": clock.seconds,
        "total_s": loaded_s + clock.seconds,
        "peak_bytes": host_memory.peak_rss_bytes(),
        "steps": step,
        "points": clock.points,
    }


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy at the answer tokens of a batch, float32 [].

    Parameters
    ----------
    model:
        A causal language model of transformers, adapters already in its layers.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() == torch.bfloat16):
        hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        wanted = batch.targets != IGNORED
        logits = model.get_output_embeddings()(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets[wanted], reduction="sum")
