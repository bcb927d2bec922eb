"""The untouched model's own answers: which prompts, what it writes, and that training holds to it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import lopt_lite
from lopt_lite import PlanSettings, TrainSettings
from lopt_lite.checkpoints.locate import describe_model, locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.errors import DataError, DoesNotFitError, SettingsError, StoppedError
from lopt_lite.events import Event, Progress, Step
from lopt_lite.journal import read_facts
from lopt_lite.residency import head_cost
from lopt_lite.residency import shapes as shapes_module
from lopt_lite.residency.answer_places import place, smallest_place
from lopt_lite.residency.choices import Memory
from lopt_lite.residency.shapes import ModelShapes, model_shapes
from lopt_lite.seeds import derive_seed
from lopt_lite.training import memory_choice, own_answers
from lopt_lite.training.anchors import AnchorSample
from lopt_lite.training.job import answered_count
from lopt_lite.training.own_prompts import answered_prompts
from tests.tiny_models import make_config, make_data, make_model
from tests.training.same_runs import assert_same

CPU = torch.device("cpu")
#: The task of the events that say how far answering is.
ANSWERING = "what the untouched model answers"


def _dataset(*examples: tuple[int, int]) -> TokenizedDataset:
    """Examples of (prompt tokens, answer tokens); tokens count from 1."""
    is_target = torch.cat([torch.tensor([False] * prompt + [True] * answer) for prompt, answer in examples])
    offsets = torch.tensor([0, *(prompt + answer for prompt, answer in examples)]).cumsum(0)
    return TokenizedDataset(torch.arange(1, len(is_target) + 1, dtype=torch.int32), is_target, offsets)


def _prompts(dataset: TokenizedDataset, tokens: int = 2, most_tokens: int = 100) -> list[list[int]]:
    found = answered_prompts(dataset, most=64, tokens=tokens, most_tokens=most_tokens, seed=7)
    assert not found.is_target.any()
    return [found.example(index)[0].tolist() for index in range(len(found))]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_have_a_place_for_an_answer_and_short_ones_come_first():
    assert _prompts(_dataset((4, 3), (2, 1))) == [[8, 9, 0, 0], [1, 2, 3, 4, 0, 0]]


def test_only_what_is_before_the_first_answer_is_a_prompt_and_one_token_is_none():
    several_turns = TokenizedDataset(
        torch.arange(1, 8, dtype=torch.int32),
        torch.tensor([False, False, True, False, False, True, True]),
        torch.tensor([0, 7]),
    )
    assert _prompts(several_turns) == [[1, 2, 0, 0]]
    assert _prompts(_dataset((1, 5), (1, 2))) == []


def test_of_a_long_prompt_the_end_is_taken():
    assert _prompts(_dataset((6, 1)), most_tokens=5) == [[4, 5, 6, 0, 0]]
    assert [len(prompt) for prompt in _prompts(_dataset((400, 1)), most_tokens=1000)] == [258]
    with pytest.raises(SettingsError, match="--retain-answers is 4, and examples have at most 5 tokens") as caught:
        _prompts(_dataset((6, 1)), tokens=4, most_tokens=5)
    assert caught.value.expected == "at most 3"


def test_of_many_prompts_a_sample_is_answered_always_the_same():
    dataset = _dataset(*[(3 + number % 5, 2) for number in range(200)])
    one, other = (answered_prompts(dataset, most=64, tokens=1, most_tokens=50, seed=seed) for seed in (1, 2))
    assert len(one) == len(other) == 64
    assert one.fingerprint() == answered_prompts(dataset, most=64, tokens=1, most_tokens=50, seed=1).fingerprint()
    assert one.fingerprint() != other.fingerprint()


def test_no_more_prompts_are_answered_than_the_steps_take():
    def count(examples: int, **changes: Any) -> int:
        return answered_count(TrainSettings(model="m", data="d", retain_answers=8, **changes), examples)

    assert count(320) == 64
    assert count(24) == 6, "3 steps, and 2 in each"
    assert count(24, epochs=2, batch_size=4) == 12
    assert count(1, epochs=5) == 1
    assert answered_count(TrainSettings(model="m", data="d"), 320) == 0


def test_answers_are_anchored_whole_and_prompts_are_not():
    dataset = _dataset((5, 3), (9, 0), (8, 0))
    sample = AnchorSample(dataset, 1, range(1, 3), most=4, seed=7, answered=range(2, 3), answer_tokens=6)
    assert sample.counts.tolist() == [0, 4, 6]
    assert sample.positions(2).tolist() == [1, 2, 3, 4, 5, 6]
    assert sample.reach.tolist()[::2] == [0, 7]
    assert sample.examples == [1, 2]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama"), make_data(directory / "data.jsonl", 12)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_choice, "ANSWERED_AT_ONCE", 5)


def _settings(run: Path, inputs: tuple[Path, Path], **changes: Any) -> TrainSettings:
    model, data = inputs
    values: dict[str, Any] = {"dtype": "float32", "quantize": "none", "epochs": 4, "batch_size": 4, "lr": 5e-3}
    values = {**values, "retain_answers": 6, "device": "cpu", **changes}
    return TrainSettings(model=str(model), data=str(data), output=str(run), **values)


def _answers(run: Path) -> list[list[int]]:
    return [
        tokens
        for fact in read_facts(run / "journal.jsonl")[0]
        if fact["fact"] == "answers"
        for tokens in fact["tokens"]
    ]


def test_they_are_what_transformers_draws_from_the_untouched_model(tmp_path, inputs):
    lopt_lite.train(_settings(tmp_path / "run", inputs))
    answers = _answers(tmp_path / "run")
    assert [len(answer) for answer in answers] == [6] * 12

    model = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.float32)
    model.generation_config = GenerationConfig()
    prompts = _prompts_of(inputs)
    for first in (0, 5, 10):
        batch = prompts[first : first + 5]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        torch.manual_seed(derive_seed(0, "own answers", first))
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0
        )
        assert written[:, longest:].tolist() == answers[first : first + 5]


def _prompts_of(inputs: tuple[Path, Path]) -> list[list[int]]:
    from transformers import AutoTokenizer

    from lopt_lite.data.load import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(inputs[0])
    dataset, _ = load_dataset(inputs[1], tokenizer, max_length=1024, skip_bad_lines=False, on_event=lambda event: None)
    found = answered_prompts(dataset, most=12, tokens=6, most_tokens=1024, seed=derive_seed(0, "own answers"))
    return [found.example(index)[0][:-6].tolist() for index in range(len(found))]


def test_of_a_large_vocabulary_their_tokens_are_compared(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(head_cost, "COMPARED_TOKENS", 250)
    compared, find = [], AnchorSample.compared

    def note(sample: AnchorSample, vocabulary: int) -> torch.Tensor:
        compared.append(find(sample, vocabulary))
        return compared[-1]

    monkeypatch.setattr(AnchorSample, "compared", note)
    lopt_lite.train(_settings(tmp_path / "run", inputs, retain=1.0, epochs=2))
    (tokens,) = compared
    written = {token for answer in _answers(tmp_path / "run") for token in answer}
    assert len(written) > 10 and written <= set(tokens.tolist())


@pytest.mark.parametrize("changes", [{}, {"blocks": 1, "retain": 2.0}, {"schedule": "joint", "retain": 2.0}])
def test_the_tuned_model_is_held_to_them(tmp_path, inputs, changes):
    """What it is held to is what it says before it is trained; a heavy weight keeps it there."""
    divergences = {}
    for weight in (0.01, 30.0):
        steps: list[Step] = []
        settings = _settings(tmp_path / str(weight), inputs, **{**changes, "retain": weight, "epochs": 6})
        lopt_lite.train(settings, lambda event, steps=steps: steps.append(event) if isinstance(event, Step) else None)
        of_task = [step.retain_kl for step in steps if step.retain_kl is not None]
        assert abs(of_task[0]) < 1e-5
        divergences[weight] = sum(of_task[-4:]) / 4
    assert divergences[30.0] < 0.3 * divergences[0.01]


def test_a_run_that_is_stopped_between_batches_goes_on_with_the_next(tmp_path, inputs):
    lopt_lite.train(_settings(tmp_path / "whole", inputs))
    for batches in (0, 1, 2):
        run = tmp_path / f"stopped-{batches}"
        stop_after = 30 * batches + 3

        def stop(event: Event, stop_after: int = stop_after) -> None:
            if isinstance(event, Progress) and event.task == ANSWERING and event.done >= stop_after:
                raise StoppedError("enough")

        with pytest.raises(StoppedError):
            lopt_lite.train(_settings(run, inputs), stop)
        assert len(_answers(run)) == 5 * batches
        lopt_lite.train(_settings(run, inputs))
        assert_same(run, tmp_path / "whole")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_streamed_and_resident_layers_write_the_same(tmp_path, inputs, monkeypatch, quantize):
    lopt_lite.train(_settings(tmp_path / "resident", inputs, quantize=quantize))
    place, modes = memory_choice.place, []

    def stream(*args: Any, **options: Any) -> Any:
        residence, rows = place(*args, **options)
        modes.append(residence.mode)
        return dataclasses.replace(residence, resident_layers=0), rows

    monkeypatch.setattr(memory_choice, "place", stream)
    lopt_lite.train(_settings(tmp_path / "streamed", inputs, quantize=quantize))
    assert modes and "streamed" not in modes
    assert _answers(tmp_path / "streamed") == _answers(tmp_path / "resident")


def test_a_resumed_run_answers_as_many_at_once_as_it_began_with(tmp_path, inputs, monkeypatch):
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.task == ANSWERING and event.done > 30:
            raise StoppedError("enough")

    lopt_lite.train(_settings(tmp_path / "whole", inputs))
    with pytest.raises(StoppedError):
        lopt_lite.train(_settings(tmp_path / "run", inputs), stop)
    monkeypatch.setattr(memory_choice, "ANSWERED_AT_ONCE", 3)
    lopt_lite.train(_settings(tmp_path / "run", inputs))
    assert _answers(tmp_path / "run") == _answers(tmp_path / "whole")


def test_other_text_is_anchored_beside_them(tmp_path, inputs):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "to hold on to, for a while"}\n' * 3, encoding="utf-8")
    lopt_lite.train(_settings(tmp_path / "run", inputs, retain_data=str(text)))
    assert len(_answers(tmp_path / "run")) == 12


def test_without_prompts_there_is_nothing_to_answer(tmp_path, inputs):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "nothing but text to learn"}\n' * 6, encoding="utf-8")
    for command in (lopt_lite.train, lopt_lite.plan):
        for changes in ({}, {"retain": 1.0}, {"retain_data": str(text)}):
            with pytest.raises(DataError, match="--retain-answers has nothing to answer"):
                command(_settings(tmp_path / "run", (inputs[0], text), **changes))
    assert not (tmp_path / "run").exists()
    for changes in ({"retain": 0.0}, {"blocks": 1}, {"schedule": "joint"}):
        with pytest.raises(SettingsError, match="--retain-answers asks for an anchor"):
            _settings(tmp_path / "run", inputs, **changes)


def _shapes(inputs: tuple[Path, Path], cache_bytes_per_token: int) -> ModelShapes:
    skeleton = Skeleton(locate_model(str(inputs[0])), dtype=torch.bfloat16)
    shapes = model_shapes(skeleton, quantize="nf4", stored_dtype=torch.bfloat16)
    assert shapes.cache_bytes_per_token == 2 * 2 * 8 * 4 * 2, "keys and values, 2 heads of 8, 4 layers, 2 bytes"
    return dataclasses.replace(shapes, cache_bytes_per_token=cache_bytes_per_token)


def test_fewer_prompts_are_answered_at_once_where_keys_and_values_would_not_fit(inputs):
    memory = Memory.now(CPU, None)
    memory = dataclasses.replace(memory, budget_bytes=memory.used_bytes + 2**29)
    for kept, least, most in ((512, 64, 64), (2**29 // 1000, 1, 10)):
        residence, rows = place(_shapes(inputs, kept), longest=100, rows=64, memory=memory, device=CPU, fix="")
        assert least <= rows <= most
        assert rows * 100 * kept < residence.predicted_bytes <= memory.limit_bytes


def test_fewer_prompts_are_answered_at_once_where_they_would_not_pass_a_layer_together(inputs):
    """All of them are read at once, however few tokens pass a layer at once in other passes."""
    memory = Memory.now(CPU, None)
    memory = dataclasses.replace(memory, budget_bytes=memory.used_bytes + 2**29)
    shapes = _shapes(inputs, 512)
    costly = dataclasses.replace(shapes.layers[0].activations, transient_bytes_per_token=2**20)
    layers = tuple(dataclasses.replace(layer, activations=costly) for layer in shapes.layers)
    shapes = dataclasses.replace(shapes, layers=layers)
    where: dict[str, Any] = {"longest": 100, "rows": 64, "memory": memory, "device": CPU, "fix": ""}
    residence, rows = place(shapes, **where, prompt_at_once=90)
    assert rows == 4 and rows * 90 * 2**20 < residence.predicted_bytes - memory.used_bytes
    assert residence.predicted_bytes <= memory.limit_bytes
    assert place(shapes, **where)[1] == 64, "who makes smaller batches of them may go on with all"


def test_what_a_run_reckons_with_is_what_passes_its_layers(tmp_path, inputs, monkeypatch):
    place, reckoned, passed = memory_choice.place, [], []
    sample = own_answers._sample

    def note_place(*args: Any, **options: Any) -> Any:
        residence, rows = place(*args, **options)
        reckoned.append(rows * options["prompt_at_once"])
        return residence, rows

    def note_sample(model: Any, ids: torch.Tensor, *args: Any) -> Any:
        passed.append(ids.numel())
        return sample(model, ids, *args)

    monkeypatch.setattr(memory_choice, "place", note_place)
    monkeypatch.setattr(own_answers, "_sample", note_sample)
    lopt_lite.train(_settings(tmp_path / "run", inputs))
    longest = max(map(len, _prompts_of(inputs)))
    assert reckoned[-1] == 5 * longest >= max(passed)


@pytest.mark.parametrize("architecture", ["falcon_h1", "nemotron_h", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_kept_of_a_row_are_those_that_transformers_keeps(tmp_path, architecture, dtype):
    config = make_config(architecture, 300)
    config.save_pretrained(tmp_path)
    cache = DynamicCache(config=config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    given = "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(torch.randint(3, 250, (2, 20)), use_cache=True, **{given: cache})
    parts = [getattr(layer, name, {}) for layer in cache.layers for name in ("conv_states", "recurrent_states")]
    kept = sum(state[0].nbytes for part in parts for state in part.values() if state is not None)
    shapes = model_shapes(Skeleton(describe_model(str(tmp_path)), dtype=dtype), quantize="none", stored_dtype=dtype)
    assert shapes.cache_bytes_per_row == kept
    assert (kept > 0) == (architecture != "llama")
    assert shapes.cache_bytes(7) == 7 * shapes.cache_bytes_per_token + kept


def test_fewer_prompts_are_answered_at_once_where_states_would_not_fit(inputs):
    memory = Memory.now(CPU, None)
    memory = dataclasses.replace(memory, budget_bytes=memory.used_bytes + 2**29)
    shapes = dataclasses.replace(_shapes(inputs, 512), cache_bytes_per_row=2**26)
    residence, rows = place(shapes, longest=100, rows=64, memory=memory, device=CPU, fix="")
    assert rows == 4 and memory.used_bytes + rows * 2**26 < residence.predicted_bytes <= memory.limit_bytes


def test_where_not_even_one_prompt_fits_the_smallest_budget_is_named(inputs):
    shapes, memory = _shapes(inputs, 2**20), Memory.now(CPU, None)
    tight = dataclasses.replace(memory, budget_bytes=memory.used_bytes + 2**24)
    with pytest.raises(DoesNotFitError, match="too small to answer prompts of up to 100 tokens") as caught:
        place(shapes, longest=100, rows=64, memory=tight, device=CPU, fix="do that")
    assert caught.value.fix == "do that"
    smallest = smallest_place(shapes, longest=100, memory=tight, device=CPU)
    assert f"at least --memory {(smallest >> 20) + 1}MiB" == caught.value.expected
    enough = dataclasses.replace(memory, budget_bytes=smallest)
    assert place(shapes, longest=100, rows=64, memory=enough, device=CPU, fix="")[1] == 1


def test_a_budget_that_has_no_room_for_answering_is_refused_at_the_start(tmp_path, inputs, monkeypatch):
    find = shapes_module._cache_bytes_per_token
    monkeypatch.setattr(shapes_module, "_cache_bytes_per_token", lambda skeleton: 2**20 * find(skeleton))
    budget = (Memory.now(CPU, None).used_bytes >> 20) + 1024
    with pytest.raises(DoesNotFitError, match="too small to answer prompts") as caught:
        lopt_lite.train(_settings(tmp_path / "run", inputs, memory=f"{budget}MiB"))
    assert "--retain-answers" in (caught.value.fix or "")
    assert not (tmp_path / "run" / "store").exists()


def test_they_are_planned(inputs):
    model, data = inputs
    options = {"model": str(model), "data": str(data), "device": "cpu"}
    with_answers = lopt_lite.plan(PlanSettings(**options, retain_answers=40))
    without = lopt_lite.plan(PlanSettings(**options))
    assert "--retain-answers 40" in with_answers.command
    assert with_answers.anchor_s > without.anchor_s
    assert with_answers.disk.caches_bytes > without.disk.caches_bytes


def test_answers_that_leave_no_room_for_a_prompt_are_refused_by_both(tmp_path, inputs):
    model, data = inputs
    settings = _settings(tmp_path / "run", inputs, retain_answers=62, max_length=63)
    plan = PlanSettings(model=str(model), data=str(data), device="cpu", retain_answers=62, max_length=63)
    for work in (lambda: lopt_lite.train(settings), lambda: lopt_lite.plan(plan)):
        with pytest.raises(SettingsError, match="--retain-answers is 62, and examples have at most 63 tokens"):
            work()
    assert not (tmp_path / "run" / "store").exists()
