"""How much goes through the device at once where memory is plenty, and where it is not."""

from __future__ import annotations

import pytest
import torch

from lopt_lite import TrainSettings
from lopt_lite.checkpoints.locate import describe_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.residency.choices import Memory, choose_residence, smallest_budget
from lopt_lite.training.block_plan import plan_blocks
from lopt_lite.training.job import make_job
from lopt_lite.training.model_facts import facts_of
from tests.rig import CPU
from tests.tiny_models import make_config


@pytest.mark.parametrize(("vocabulary", "most"), [(512, 2**24), (49_152, 2**24), (262_144, 2**26)])
def test_chunks_of_logits_have_many_tokens_however_large_the_vocabulary_is(tmp_path, vocabulary, most):
    """As long as memory suffices for them; products of few rows are slow."""
    config = make_config("llama", vocabulary, hidden_size=256)
    config.save_pretrained(tmp_path)
    model = describe_model(str(tmp_path))
    settings = TrainSettings(model="model", data="data")
    shapes = facts_of(Skeleton(model, dtype=torch.bfloat16), settings).shapes
    layers = len(shapes.layers)
    job = make_job(
        settings,
        shapes,
        plan_blocks(layers, settings.objectives()),
        train_examples=1000,
        all_examples=1000,
        other_examples=0,
        longest=512,
        all_tokens=300_000,
        most_answers=300,
        most_anchors=32,
    )
    memory = Memory(budget_bytes=2**36, used_bytes=2**29, free_bytes=2**36, free_host_bytes=2**36)
    stages = [(layers // 2, layers)]
    assert choose_residence(shapes, stages, job, device=CPU, memory=memory).logit_elements == most
    smallest = smallest_budget(shapes, stages, job, device=CPU, memory=memory)
    tight = Memory(smallest, memory.used_bytes, memory.free_bytes, memory.free_host_bytes)
    assert choose_residence(shapes, stages, job, device=CPU, memory=tight).logit_elements < 2**26
