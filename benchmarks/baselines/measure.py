"""The figures of merit, measured for everyone by the same functions: an NF4 base model of transformers, PEFT adapters.

Run in a process of their own, after training; their time and memory count for nobody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch

from benchmarks.baselines.common import load_nf4, read_tokens
from benchmarks.questions import final_number
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.data.dataset import IGNORED, TokenizedDataset, collate


def losses(*, model: str, adapters: Sequence[str | None], tokens: dict[str, str]) -> dict[str, Any]:
    """Mean loss per answer token, in nats.

    Parameters
    ----------
    adapters:
        Directories of adapters; None is the untouched model.
    tokens:
        Name of each data set, and its file (:func:`benchmarks.baselines.common.write_tokens`).

    Returns
    -------
    dict
        ``losses``: for each adapter, the loss on each data set.
    """
    datasets = {name: read_tokens(path) for name, path in tokens.items()}
    found = [
        {name: mean_loss(tuned, dataset) for name, dataset in datasets.items()} for tuned in _tuned(model, adapters)
    ]
    return {"losses": found}


@torch.no_grad()
def mean_loss(model: Any, dataset: TokenizedDataset) -> float:
    """Mean cross-entropy at the answer tokens of ``dataset``, float32."""
    total, count = 0.0, 0
    for indices in length_sorted_batches(dataset.lengths, max_tokens=4096, max_rows=8):
        batch = collate(dataset, indices, 0)
        # Rows are padded on the right: under causal attention no mask is needed.
        hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        wanted = batch.targets != IGNORED
        logits = model.get_output_embeddings()(hidden[wanted]).float()
        total += float(torch.nn.functional.cross_entropy(logits, batch.targets[wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count


@torch.no_grad()
def exact_matches(
    *, model: str, adapter: str | None, data: str, questions: int, max_new_tokens: int = 256, rows: int = 20
) -> dict[str, Any]:
    """Answer the first ``questions`` of a GSM8K file greedily; compare the number after ``####``.

    Returns
    -------
    dict
        ``questions``, ``correct``, ``answered`` (with a number after ``####``), and the ``texts``.
    """
    from transformers import AutoTokenizer, GenerationConfig

    from lopt_lite.data.templates import load_prompt, stop_token_ids

    lines = Path(data).read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines if line.strip()][:questions]
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ends = stop_token_ids(tokenizer)
    choices = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
    )
    (tuned,) = _tuned(model, [adapter])
    texts: list[str] = []
    for begin in range(0, len(asked), rows):
        prompts = [load_prompt(tokenizer, item["question"]) for item in asked[begin : begin + rows]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[ends[0]] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        written = tuned.generate(input_ids=ids, attention_mask=mask, generation_config=choices)
        texts += tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    given, right = [final_number(text) for text in texts], [final_number(item["answer"]) for item in asked]
    return {
        "questions": len(asked),
        "correct": sum(g is not None and g == r for g, r in zip(given, right, strict=True)),
        "answered": sum(g is not None for g in given),
        "texts": texts,
    }


def _tuned(model: str, adapters: Sequence[str | None]) -> Iterator[Any]:
    """The model with each of the adapters in turn, for evaluation."""
    from peft import PeftModel

    base = load_nf4(model)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On some CPUs bitsandbytes would repack weights for a second kernel, with other rounding than in training.
            module.support_avx512bf16_for_cpu = False
    for adapter in adapters:
        if adapter is None:
            yield base.eval()
            continue
        tuned = PeftModel.from_pretrained(base, adapter, local_files_only=True)
        yield tuned.eval().get_base_model()
        tuned.unload()
