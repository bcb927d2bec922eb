"""The anchor: which tokens are held, and that training holds to them."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_lite
from lopt_lite import TrainSettings, recipe
from lopt_lite.data.dataset import Batch, TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import DataError, SettingsError, StoppedError
from lopt_lite.events import Event, Progress, Step, ignore
from lopt_lite.journal import last_fact, read_facts
from lopt_lite.recipe import ModelKind
from lopt_lite.residency import head_cost
from lopt_lite.residency.anchors import Anchors
from lopt_lite.seeds import derive_seed
from lopt_lite.training import memory_choice, stopping
from lopt_lite.training.anchors import AnchorReader, AnchorSample
from lopt_lite.training.job import other_rows
from tests.rig import residence
from tests.tiny_models import make_data, make_model


def _dataset(*examples: tuple[int, int]) -> TokenizedDataset:
    """Examples of (prompt tokens, answer tokens)."""
    parts, offsets = [], [0]
    for prompt, answer in examples:
        parts.append(torch.tensor([False] * prompt + [True] * answer))
        offsets.append(offsets[-1] + prompt + answer)
    is_target = torch.cat(parts)
    return TokenizedDataset(torch.arange(len(is_target), dtype=torch.int32), is_target, torch.tensor(offsets))


def _sample(dataset: TokenizedDataset, train: int, others: range = range(0), most: int = 4) -> AnchorSample:
    return AnchorSample(dataset, train, others, most=most, seed=7)


def test_only_positions_that_predict_prompt_tokens_are_held():
    sample = _sample(_dataset((5, 3), (1, 4), (2, 6)), 3, most=10)
    assert sample.positions(0).tolist() == [0, 1, 2, 3]
    assert sample.positions(1).tolist() == []
    assert sample.positions(2).tolist() == [0]
    assert sample.counts.tolist() == [4, 0, 1]


def test_a_sample_is_drawn_once_and_for_all():
    dataset = _dataset((50, 3), (60, 2))
    one, two = _sample(dataset, 2), _sample(dataset, 2)
    for example in range(2):
        positions = one.positions(example)
        assert len(set(positions.tolist())) == 4
        assert positions.tolist() == sorted(positions.tolist()) == two.positions(example).tolist()
    assert AnchorSample(dataset, 2, range(0), most=4, seed=8).positions(0).tolist() != one.positions(0).tolist()


def test_held_out_examples_are_not_anchored():
    dataset = _dataset((5, 3), (5, 3), (9, 0))
    sample = _sample(dataset, 1, range(2, 3), most=100)
    assert sample.counts.tolist() == [4, 0, 8]
    batch = collate(dataset, [2, 0, 1], 0)
    assert sample.mask(batch).sum(1).tolist() == [8, 4, 0]


def test_an_example_reaches_to_its_last_anchored_token():
    dataset = _dataset((5, 3), (1, 4), (40, 6), (9, 0))
    sample = _sample(dataset, 3, range(3, 4), most=4)
    assert sample.reach[:2].tolist() == [4, 0]
    for example in (2, 3):
        assert sample.reach[example] == sample.positions(example).max() + 1


def test_other_text_comes_round_again_and_again():
    sample = _sample(_dataset((5, 3), (9, 0), (9, 0), (9, 0)), 1, range(1, 4))
    seen = [example for step in range(6) for example in sample.others_of_step(step, 2)]
    assert all(sorted(seen[begin : begin + 3]) == [1, 2, 3] for begin in range(0, 12, 3))
    assert other_rows(8, 3) == 2
    assert other_rows(8, 1) == 1
    assert other_rows(1, 5) == 1
    assert other_rows(8, 0) == 0


def test_all_tokens_are_compared_while_they_are_few():
    assert _sample(_dataset((3, 2)), 1).compared(8192).tolist() == [*range(8192)]
    assert len(_sample(_dataset((3, 2)), 1).compared(8193)) == 8192


def test_of_many_tokens_those_of_the_examples_are_compared_and_the_first(monkeypatch):
    monkeypatch.setattr(head_cost, "COMPARED_TOKENS", 6)
    lengths = [4, 3, 3, 2]
    tokens = torch.tensor([90, 90, 90, 70, 80, 80, 70, 60, 60, 60, 50, 50], dtype=torch.int32)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    dataset = TokenizedDataset(tokens, torch.zeros(12, dtype=torch.bool), offsets)
    # Held-out examples (here the one with token 60) do not count.
    sample = _sample(dataset, 2, range(3, 4))
    assert sample.compared(100).tolist() == [0, 1, 2, 50, 70, 90]
    assert _sample(dataset, 1).compared(100).tolist() == [0, 1, 2, 3, 70, 90]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama"), make_data(directory / "data.jsonl", 12)


def _train(tmp_path: Path, inputs: tuple[Path, Path], name: str = "run", **changes: Any) -> tuple[Path, list[Step]]:
    values: dict[str, Any] = {
        "dtype": "float32",
        "quantize": "none",
        "epochs": 4,
        "batch_size": 4,
        "lr": 5e-3,
        "retain_tokens": 6,
        **changes,
    }
    steps: list[Step] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Step) and event.phase == "train":
            steps.append(event)

    model, data = inputs
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), output=str(tmp_path / name), **values), on_event)
    return tmp_path / name, steps


def _weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@torch.no_grad()
def _divergence(run: Path, inputs: tuple[Path, Path], most: int) -> float:
    """Mean KL(base || tuned) at the anchored tokens, by plain transformers and PEFT."""
    model, data = inputs
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset, _ = load_dataset(str(data), tokenizer, max_length=1024, skip_bad_lines=False, on_event=ignore)
    sample = AnchorSample(dataset, len(dataset), range(0), most=most, seed=derive_seed(0, "anchor"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), run / "adapter")
    total, tokens = 0.0, 0
    for example in range(len(dataset)):
        ids = dataset.example(example)[0][None].long()
        at = sample.positions(example)
        compared = sample.compared(base.config.vocab_size)
        before, after = (model(ids).logits[0, at][:, compared] for model in (base, tuned.eval()))
        total += float(
            functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        )
        tokens += len(at)
    return total / tokens


@pytest.mark.parametrize("changes", [{"blocks": 1}, {"objective": "none"}, {"schedule": "joint"}, {}])
def test_an_anchored_run_stays_nearer_to_what_it_was(tmp_path, inputs, changes):
    free, _ = _train(tmp_path, inputs, "free", retain=0.0, **changes)
    held, steps = _train(tmp_path, inputs, "held", retain=3.0, **changes)
    if changes in ({"blocks": 1}, {"objective": "none"}):
        assert steps[0].retain_kl == pytest.approx(0.0, abs=1e-6), "nothing has changed before the first step"
    assert _divergence(held, inputs, 6) < 0.5 * _divergence(free, inputs, 6)
    assert not (held / "cache" / "anchors").exists()


@pytest.mark.parametrize("compared", [8192, 40])
def test_what_a_run_says_of_its_divergence_is_so(tmp_path, inputs, compared, monkeypatch):
    monkeypatch.setattr(head_cost, "COMPARED_TOKENS", compared)
    run, steps = _train(tmp_path, inputs, retain=0.5, blocks=1, batch_size=12, epochs=12)
    assert steps[-1].lr < 0.05 * steps[1].lr
    # The last step hardly changes anything any more.
    assert steps[-1].retain_kl == pytest.approx(_divergence(run, inputs, 6), rel=0.03)


@pytest.mark.parametrize("changes", [{"blocks": 1}, {"objective": "none"}, {"objective": "reconstruct"}])
def test_what_is_anchored_on_is_what_the_untouched_model_makes_of_whole_examples(
    tmp_path, inputs, changes, monkeypatch
):
    """Answers come after what is anchored on: the pass that leaves them out must not be felt."""
    cached: dict[int, torch.Tensor] = {}
    counts: list[int] = []
    reader = AnchorReader.anchors

    def anchors(self: AnchorReader, batch: Batch, *, tokens: int) -> Anchors:
        found = reader(self, batch, tokens=tokens)
        sizes = [int(self.sample.counts[example]) for example in batch.examples]
        cached.update(zip(batch.examples.tolist(), found.base.split(sizes), strict=True))
        counts.extend(sizes)
        return found

    monkeypatch.setattr(AnchorReader, "anchors", anchors)
    _train(tmp_path, inputs, retain=1.0, epochs=1, **changes)
    assert len(cached) == 12 and min(counts) > 0
    model, data = inputs
    dataset, _ = load_dataset(
        str(data), AutoTokenizer.from_pretrained(model), max_length=1024, skip_bad_lines=False, on_event=ignore
    )
    sample = AnchorSample(dataset, len(dataset), range(0), most=6, seed=derive_seed(0, "anchor"))
    assert (sample.reach < dataset.lengths).all()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    final: list[torch.Tensor] = []
    base.model.layers[-1].register_forward_hook(lambda module, given, output: final.append(output))
    for example, found in cached.items():
        with torch.no_grad():
            base(dataset.example(example)[0][None].long())
        torch.testing.assert_close(found, final.pop()[0, sample.positions(example)], rtol=1e-4, atol=1e-5)


def test_an_anchor_without_weight_changes_nothing(tmp_path, inputs):
    plain, _ = _train(tmp_path, inputs, "plain", epochs=1, retain=0.0)
    tiny, _ = _train(tmp_path, inputs, "tiny", epochs=1, retain=1e-30)
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (plain, tiny))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["none", "reconstruct"])
@pytest.mark.parametrize("mode", ["streamed", "offloaded"])
def test_every_way_of_working_holds_alike(tmp_path, inputs, objective, mode, monkeypatch):
    other = make_data(tmp_path / "other.jsonl", 5, seed=4)
    found = []
    for chosen in ("resident", mode):
        monkeypatch.setattr(
            memory_choice,
            "choose_residence",
            lambda *args, chosen=chosen, **kwargs: residence(chosen, micro_batch_tokens=96, dequantised=False),
        )
        run, _ = _train(
            tmp_path, inputs, chosen, epochs=2, retain=1.0, objective=objective, retain_data=str(other), quantize="nf4"
        )
        found.append(_weights(run))
    assert found[0] == found[1]


def test_other_text_is_held_and_not_learnt(tmp_path, inputs):
    other = make_data(tmp_path / "other.jsonl", 5, seed=4)
    run, steps = _train(tmp_path, inputs, retain=1.0, retain_data=str(other), epochs=1)
    without, fewer = _train(tmp_path, inputs, "without", retain=1.0, epochs=1)
    last = [step for step in steps if step.block == 1]
    assert all(a.tokens > b.tokens for a, b in zip(last, [s for s in fewer if s.block == 1], strict=True))
    assert _weights(run) != _weights(without)
    settings = json.loads((run / "settings.json").read_text())
    assert settings["retain"]["fingerprint"]


def test_what_an_earlier_version_cached_in_another_order_is_made_again(tmp_path, inputs):
    changes = {"retain": 1.0, "epochs": 2, "checkpoint_every": "0s"}
    whole, _ = _train(tmp_path, inputs, "whole", **changes)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.block == 1 and event.step == 1:
            raise stopping.stopped("the test")

    model, data = inputs
    values = {"dtype": "float32", "quantize": "none", "batch_size": 4, "lr": 5e-3, "retain_tokens": 6}
    cut = tmp_path / "cut"
    settings = TrainSettings(model=str(model), data=str(data), output=str(cut), **values, **changes)
    with pytest.raises(StoppedError):
        lopt_lite.train(settings, stop)
    (shard,) = (cut / "cache" / "anchors").iterdir()
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(shard).items()}, shard)
    facts = [json.loads(line) for line in (cut / "journal.jsonl").read_text().splitlines()]
    changed = 0
    for fact in facts:
        del fact["crc32"]  # which earlier versions had not
        if fact["fact"] in ("anchors", "anchor-shard"):
            changed += fact.pop("of") == "prompts"
            if "sha256" in fact:
                fact["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert changed == 2
    (cut / "journal.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    lopt_lite.train(settings)
    assert _weights(cut) == _weights(whole)


@pytest.mark.parametrize("stop_in", ["what the untouched model says", "train"])
def test_stopped_and_started_again_it_ends_with_the_same_bytes(tmp_path, inputs, stop_in, monkeypatch):
    changes = {"retain": 1.0, "epochs": 2, "checkpoint_every": "0s"}
    whole, _ = _train(tmp_path, inputs, "whole", **changes)
    model, data = inputs
    settings = TrainSettings(
        model=str(model),
        data=str(data),
        output=str(tmp_path / "cut"),
        dtype="float32",
        quantize="none",
        batch_size=4,
        lr=5e-3,
        retain_tokens=6,
        **changes,
    )
    seen = 0

    def stop_there(event: Event) -> None:
        nonlocal seen
        here = isinstance(event, Progress) and event.task == stop_in
        here = here or (stop_in == "train" and isinstance(event, Step) and event.block == 1 and event.step == 3)
        if here:
            seen += 1
            raise stopping.stopped("the test")

    with pytest.raises(StoppedError):
        lopt_lite.train(settings, stop_there)
    assert seen == 1
    lopt_lite.train(settings)
    assert _weights(tmp_path / "cut") == _weights(whole)


def test_an_anchor_needs_something_to_hold_on_to(tmp_path, inputs):
    model, _ = inputs
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(4)))
    settings = {"model": str(model), "data": str(text), "output": str(tmp_path / "run"), "retain": 1.0}
    for command in (lopt_lite.train, lopt_lite.plan):
        with pytest.raises(DataError, match="retain has nothing to hold on to"):
            command(TrainSettings(**settings))
    lopt_lite.train(TrainSettings(**settings, retain_data=str(text)))


@pytest.mark.parametrize(
    ("prompts", "changes", "weight"),
    [
        (True, {}, None),
        (True, {"retain": 0.25}, 0.25),
        (True, {"retain": 0.0}, 0.0),
        (True, {"blocks": 1}, 0.0),
        (True, {"schedule": "joint"}, 0.0),
        (True, {"preset": "paper", "schedule": "sequential", "tune": "lora"}, 0.0),
        (False, {}, 0.0),
        (False, {"with": "other text"}, None),
    ],
)
def test_there_is_an_anchor_by_default_where_there_is_something_to_hold_on_to(
    tmp_path, inputs, prompts, changes, weight
):
    """In the recipe that is our own, that is; ``plan`` says the same of memory. ``weight``: None for one found out."""
    model, data = inputs
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(4)))
    changes = {name: value for name, value in changes.items() if name != "with"} | (
        {"retain_data": str(data)} if "with" in changes else {}
    )
    run, steps = _train(tmp_path, (model, data if prompts else text), epochs=1, **changes)

    assert json.loads((run / "settings.json").read_text())["settings"]["retain"] == weight
    found_out = last_fact(read_facts(run / "journal.jsonl")[0], "anchor-weight")
    assert (found_out is not None) == (weight is None)
    weight = found_out["weight"] if weight is None else weight
    assert all((step.retain_kl is not None) == (weight > 0) for step in steps)
    given = {"model": str(model), "data": str(data if prompts else text), "output": str(tmp_path / "new"), **changes}
    by_default = lopt_lite.plan(TrainSettings(**given))
    settled = lopt_lite.plan(TrainSettings(**{**given, "retain": weight}))
    assert by_default.memory.predicted_bytes == settled.memory.predicted_bytes
    assert (by_default.anchor_s > 0) == (weight > 0)


def test_where_nobody_gives_a_weight_there_is_an_anchor_if_there_are_prompts():
    settings, asked = TrainSettings(model="m", data="d"), TrainSettings(model="m", data="d", retain=0.5)
    for unsettled, has_prompts, retain in (
        (settings, True, None),
        (settings, False, 0.0),
        (asked, True, 0.5),
        (asked, False, 0.5),
    ):
        settled = unsettled.settle(has_prompts=has_prompts, model=ModelKind("LlamaForCausalLM", 64, 4))
        assert settled.retain == retain
        assert settled.anchored == (retain != 0)


def test_the_weight_follows_from_the_answers_loss_before_training_and_stays(tmp_path, inputs, monkeypatch):
    """The loss is that of transformers' own model, of all examples as there are no more than 32."""
    model, data = inputs
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset, _ = load_dataset(str(data), tokenizer, max_length=1024, skip_bad_lines=False, on_event=ignore)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = []
    for index in range(len(dataset)):
        ids, is_target = dataset.example(index)
        with torch.no_grad():
            logits = plain(input_ids=ids.long()[None], use_cache=False).logits[0, :-1]
        losses.append(functional.cross_entropy(logits[is_target[1:]], ids.long()[1:][is_target[1:]], reduction="sum"))
    expected = float(sum(losses)) / int(dataset.target_counts.sum())

    whole, _ = _train(tmp_path, inputs, "whole")
    fact = last_fact(read_facts(whole / "journal.jsonl")[0], "anchor-weight")
    assert fact["loss"] == pytest.approx(expected, rel=1e-5)
    assert fact["weight"] == recipe.anchor_weight(fact["loss"])
    assert fact["answer_tokens"] == int(dataset.target_counts.sum())
    assert json.loads((whole / "settings.json").read_text())["settings"]["retain"] is None
    # Given as an option, the same weight gives the same result.
    given, _ = _train(tmp_path, inputs, "given", retain=fact["weight"])
    assert _weights(given) == _weights(whole)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.block == 1 and event.step == 1:
            raise stopping.stopped("the test")

    cut = tmp_path / "cut"
    values = json.loads((whole / "settings.json").read_text())["settings"]
    values = {name: values[name] for name in ("dtype", "quantize", "epochs", "batch_size", "lr", "retain_tokens")}
    settings = TrainSettings(model=str(model), data=str(data), output=str(cut), **values)
    with pytest.raises(StoppedError):
        lopt_lite.train(settings, stop)
    monkeypatch.setattr(recipe, "anchor_weight", lambda loss: pytest.fail("it is a fact"))
    lopt_lite.train(settings)
    assert _weights(cut) == _weights(whole)


def test_what_makes_no_sense_is_refused():
    for wrong in (
        {"retain": -1.0},
        {"retain": float("nan")},
        {"retain_data": "x", "retain": 0.0},
        {"retain_data": "x", "blocks": 1},
        {"retain_tokens": 0},
        {"retain": 1.0, "preset": "paper"},
        {"reconstruction_weight": 3.0},
        {"schedule": "joint", "cache": "int8"},
    ):
        with pytest.raises(SettingsError):
            TrainSettings(model="m", data="d", **wrong)
