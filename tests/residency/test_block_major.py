"""The held-out loss, one block at a time, is that of the whole model, wherever hidden states wait."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.tokenizer import load_tokenizer, pad_token_id
from lopt_lite.data.dataset import TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.residency import block_major
from lopt_lite.residency.block_major import groups, held_out_losses
from lopt_lite.residency.spill import Spill, SpillLimits
from tests.rig import CPU, Rig, open_rig
from tests.tiny_models import make_data, make_model

_BLOCKS = [(0, 1), (1, 3), (3, 4)]


@dataclass
class _Opened:
    rig: Rig
    dataset: TokenizedDataset
    pad: int
    directory: Path

    def losses(self, blocks: list[tuple[int, int]] = _BLOCKS, **changes: Any) -> list[float]:
        values = {
            "device": CPU,
            "residence": _SmallBatches(),
            "pad_token_id": self.pad,
            "max_rows": 3,
            "spill_limits": SpillLimits(0, 0),
            "spill_directory": self.directory,
            **changes,
        }
        return held_out_losses(self.rig.store, self.rig.skeleton, self.dataset, blocks, **values)


class _SmallBatches:
    """The part of a residence that decides batches."""

    forward_tokens = 120
    group_tokens = 240
    logit_elements = 2**20
    head_slice_rows = None


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Opened:
    model = make_model(tmp_path / "model")
    rig = open_rig(model, tmp_path / "store", quantize="none", dtype="float32")
    tokenizer = load_tokenizer(locate_model(str(model)))
    dataset, _ = load_dataset(
        make_data(tmp_path / "data.jsonl", 12), tokenizer, max_length=256, skip_bad_lines=False, on_event=lambda e: None
    )
    # Resident layers; how a residence would have them is not what is tested here.
    monkeypatch.setattr(
        block_major,
        "open_layers",
        lambda residence, store, skeleton, first, end, *, on_layer=None, **rest: rig.layers(
            first, end, on_layer=on_layer
        ),
    )
    directory = tmp_path / "scratch"
    directory.mkdir()
    return _Opened(rig, dataset, pad_token_id(tokenizer), directory)


def test_it_is_the_mean_loss_of_the_whole_model(opened):
    total, count = 0.0, 0
    for example in range(len(opened.dataset)):
        batch = collate(opened.dataset, [example], opened.pad)
        logits = opened.rig.logits(batch.input_ids)[0]
        total += float(torch.nn.functional.cross_entropy(logits, batch.targets[0], reduction="sum"))
        count += batch.answer_tokens
    (loss,) = opened.losses()
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("limits", [SpillLimits(0, 0), SpillLimits(20_000, 0), SpillLimits(1 << 30, 0)])
def test_wherever_hidden_states_wait_the_bits_are_the_same_and_nothing_is_left(opened, limits, monkeypatch):
    spills: list[Spill] = []

    class Watched(Spill):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.most_bytes = 0
            spills.append(self)

        def put(self, key: Any, tensor: torch.Tensor) -> None:
            super().put(key, tensor)
            kept = [t for t in self._kept.values() if isinstance(t, torch.Tensor)]
            self.most_bytes = max(self.most_bytes, sum(t.nbytes for t in kept))

    (whole,) = opened.losses([(0, 4)])
    monkeypatch.setattr(block_major, "Spill", Watched)
    assert opened.losses(spill_limits=limits) == [whole]
    (spill,) = spills
    assert spill.most_bytes <= limits.device_bytes
    assert (spill.written_bytes > 0) == (limits.device_bytes < 1 << 30)
    assert spill.is_empty
    assert not list(opened.directory.iterdir())


def test_variants_run_side_by_side_and_do_not_mix(opened):
    """The second variant is the model with its layers' outputs doubled."""
    factors: dict[int, int] = {}

    def on_layer(index: int, layer: torch.nn.Module) -> None:
        layer.register_forward_hook(lambda module, args, output: output * factors["variant"])

    def select(layers: list[torch.nn.Module], variant: int) -> None:
        factors["variant"] = variant + 1

    both = opened.losses(variants=2, on_layer=on_layer, select=select)
    alone = opened.losses(on_layer=on_layer, select=lambda layers, variant: select(layers, 1))
    assert both == [opened.losses()[0], alone[0]]
    assert both[0] != both[1]


def test_a_stop_between_batches_leaves_nothing_behind(opened):
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.losses(check=check)
    assert not list(opened.directory.iterdir())


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=12), st.integers(1, 60))
def test_groups_hold_all_batches_in_order_and_no_more_tokens_than_may_be(batches, max_tokens):
    lengths = torch.arange(1, 11)

    def tokens(number: int) -> int:
        return len(batches[number]) * max(int(lengths[i]) for i in batches[number])

    found = groups(batches, lengths, max_tokens)
    assert [number for group in found for number in group] == list(range(len(batches)))
    for group in found:
        assert len(group) == 1 or sum(tokens(number) for number in group) <= max_tokens
    for group, following in itertools.pairwise(found):
        assert sum(map(tokens, group)) + tokens(following[0]) > max_tokens, "groups must not be smaller than they may"
