"""Tasks of lm-eval: our layer-streamed model answers like lm-eval's own class for Hugging Face models."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_lite
from lopt_lite import EvaluateSettings, TrainSettings, devices
from lopt_lite.errors import DataError, DoesNotFitError, SettingsError
from lopt_lite.events import Event, Progress
from lopt_lite.outcomes import EvaluateOutcome, TaskScore, TrainOutcome
from lopt_lite.residency import answer_places
from lopt_lite.results import harness_generate, harness_scores
from lopt_lite.results.harness_head import ScoringHead
from lopt_lite.results.open_run import open_run
from tests.cuda.paper_gpu import paper_gpu
from tests.data.tiny_tokenizers import make_tokenizer
from tests.rig import CPU, open_rig, residence
from tests.tiny_models import make_data, make_model

lm_eval = pytest.importorskip("lm_eval")

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ANSWERS = """\
task: tiny_answers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TEXTS = """\
task: tiny_texts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: bits_per_byte}}
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and a cache of the tests' own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model, and a LoRA run on it in float32."""
    root = tmp_path_factory.mktemp("trained")
    # The tokenizer's end of a text and the model's are the same, as in any real model.
    _train(root, make_model(root / "model", "llama", eos_token_id=1, pad_token_id=2))
    return root


def _train(root: Path, model: Path, **changes: Any) -> TrainOutcome:
    values = {"epochs": 1, "batch_size": 4, "lr": 5e-3, "quantize": "none", "dtype": "float32", **changes}
    data = make_data(root / "data.jsonl")
    return lopt_lite.train(TrainSettings(model=str(model), data=str(data), output=str(root / "run"), **values))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """See :func:`_write_tasks`."""
    return _write_tasks(tmp_path / "tasks")


def _write_tasks(folder: Path) -> Path:
    """A directory of task files: choices (single tokens and longer ones), answers to be written, whole texts."""
    folder.mkdir()
    lines = []
    for a in range(9):
        choices = [" 4", " 7", " yes", f" {a} or so"] if a % 2 else [" four eggs", " seven", f" {a}"]
        question = f"What is {a} + {a + 3}?" + " Please." * (a % 4)
        lines.append(json.dumps({"question": question, "choices": choices, "label": a % 3, "answer": str(a)}))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (("choices", CHOICES), ("answers", ANSWERS), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(content.format(data=data), encoding="utf-8")
    return folder


def _evaluate(run: Path, tasks: Path | str, events: list[Event] | None = None, **changes: Any) -> EvaluateOutcome:
    return lopt_lite.evaluate(
        EvaluateSettings(run=str(run), tasks=str(tasks), **{"batch_size": 3, **changes}),
        on_event=events.append if events is not None else lambda event: None,
    )


def _by_name(outcome: EvaluateOutcome) -> dict[tuple[str, str], tuple[float, float]]:
    return {(score.task, score.metric): (score.base, score.tuned) for score in outcome.tasks}


def _plain(model: Any, tokenizer: Any, tasks: Path) -> dict[str, Any]:
    """The results of lm-eval's own class, samples among them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=2, device="cpu"),
        tasks=manager.all_subtasks,
        task_manager=manager,
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def expected(trained: Path) -> list[dict[str, Any]]:
    """What lm-eval's own class makes of the base and of the tuned model."""
    tasks = _write_tasks(trained / "tasks")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    base, below = (AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32) for _ in range(2))
    tuned = PeftModel.from_pretrained(below, trained / "run" / "adapter")
    return [_plain(model, tokenizer, tasks) for model in (base, tuned)]


def test_scores_are_those_of_lm_evals_own_class(trained: Path, tasks: Path, expected: list[dict[str, Any]]) -> None:
    outcome = _evaluate(trained / "run", tasks)
    found = _by_name(outcome)
    for (task, metric), values in found.items():
        plain = [results["results"][task][f"{metric},none"] for results in expected]
        assert values == pytest.approx(plain, abs=1e-6)
    assert {task for task, _ in found} == {"tiny_choices", "tiny_answers", "tiny_texts"}
    assert found["tiny_texts", "bits_per_byte"][0] != pytest.approx(found["tiny_texts", "bits_per_byte"][1], abs=1e-4)
    assert outcome.device_peak_bytes > 0
    assert outcome.base_loss is None
    accuracy = next(score for score in outcome.tasks if score.metric == "acc")
    assert (accuracy.examples, accuracy.higher_is_better, accuracy.filter, accuracy.group) == (9, True, None, None)
    assert accuracy.base_stderr is not None
    assert accuracy.base_stderr > 0


def test_what_is_wrong_in_a_tasks_file_is_no_fault_of_ours(trained: Path, tasks: Path) -> None:
    file = tasks / "choices.yaml"
    sound = file.read_text()
    file.write_text("task: [1")
    with pytest.raises(DataError, match="cannot be loaded"):
        _evaluate(trained / "run", str(file))
    file.write_text(sound.replace("{{question}}", "{{nobody.knows}}"))
    with pytest.raises(DataError, match="'nobody' is undefined"):
        _evaluate(trained / "run", str(file))
    # Only the first example is looked at when a task is loaded.
    file.write_text(sound.replace("{{question}}", "{{1 / (label - 1)}}"))
    with pytest.raises(DataError, match="a template of the tasks cannot be filled in: division by zero"):
        _evaluate(trained / "run", str(file))


def test_a_budget_that_reading_has_exceeded_already_is_refused(
    trained: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by lm-eval with large tasks. What is done within the budget afterwards is no reason to refuse it."""
    monkeypatch.setattr(devices.PeakMemory, "read", lambda peak: 9 << 30)
    for kind in ("choices", "answers"):
        file = str(tasks / f"{kind}.yaml")
        with pytest.raises(DoesNotFitError, match=r"reading .* took 9,216 MiB\n.*at least --memory 9224MiB"):
            _evaluate(trained / "run", file, memory="8GiB", device="cpu")
        assert _evaluate(trained / "run", file, memory="9224MiB", device="cpu").tasks
    data = str(trained / "data.jsonl")
    with pytest.raises(DoesNotFitError, match=r"reading .* took 9,216 MiB"):
        _evaluate(trained / "run", file, data=data, memory="8GiB", device="cpu")


def test_scores_on_a_gpu_on_paper_are_the_cpus(trained: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _by_name(_evaluate(trained / "run", tasks))
    with paper_gpu(monkeypatch):
        found = _by_name(_evaluate(trained / "run", tasks, device="cuda"))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "slice_rows"),
    [("dequantised", None), ("dequantised", 37), ("partly streamed", None), ("streamed", 37), ("offloaded", 37)],
)
def test_every_sample_is_answered_as_by_lm_evals_own_class(
    trained: Path,
    tasks: Path,
    expected: list[dict[str, Any]],
    mode: str,
    slice_rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log-likelihoods, greediness and written answers, one by one, wherever the layers and the head are."""

    def chosen(shapes: Any, ranges: list[tuple[int, int]], *args: Any, **kwargs: Any) -> Any:
        layers = max(end - first for first, end in ranges)
        return residence(mode, layers=layers, micro_batch_tokens=32, head_slice_rows=slice_rows, logit_elements=2000)

    monkeypatch.setattr(harness_scores, "choose_residence", chosen)
    monkeypatch.setattr(answer_places, "choose_residence", chosen)
    samples = []
    original = lm_eval.evaluate

    def with_samples(**kwargs: Any) -> Any:
        samples.append(original(**{**kwargs, "log_samples": True}))
        return samples[-1]

    monkeypatch.setattr(lm_eval, "evaluate", with_samples)
    _evaluate(trained / "run", tasks)
    for ours, theirs in zip(samples, expected, strict=True):
        for task, plain in theirs["samples"].items():
            for mine, sample in zip(ours["samples"][task], plain, strict=True):
                assert mine["arguments"] == sample["arguments"]
                if task == "tiny_choices":
                    # (log-probability, greedy) of each choice.
                    for (value, greedy), (other, other_greedy) in zip(
                        mine["filtered_resps"], sample["filtered_resps"], strict=True
                    ):
                        assert float(value) == pytest.approx(float(other), abs=1e-4)
                        assert str(greedy) == str(other_greedy)
                elif task == "tiny_texts":
                    assert float(mine["filtered_resps"][0]) == pytest.approx(
                        float(sample["filtered_resps"][0]), abs=1e-3
                    )
                else:
                    assert mine["filtered_resps"] == sample["filtered_resps"]


def test_both_models_are_rated_while_each_layer_is_loaded_once(trained: Path, tasks: Path) -> None:
    events: list[Event] = []
    _evaluate(trained / "run", tasks / "choices.yaml", events, batch_size=100)
    passes = [event for event in events if isinstance(event, Progress)]
    # One batch, two blocks, two models; the tuned model's pass of the harness finds everything known.
    assert [event.done for event in passes] == [1, 2, 3, 4]


def test_choices_of_one_token_share_a_row() -> None:
    rows = harness_scores._Rows([([1, 2], [7]), ([1, 2], [8]), ([1, 2], [7, 9])], max_tokens=8, pad_token_id=0)
    rows.make_batches(max_tokens=64, max_rows=8)
    assert rows[0].input_ids.tolist() == [[1, 2, 0], [1, 2, 7]]
    asked = rows.asked(0)
    assert asked.places.tolist() == [0, 0, 1, 2]
    assert asked.tokens.tolist() == [7, 8, 7, 9]
    assert asked.questions == [0, 1, 2, 2]


def test_a_long_question_is_cut_at_its_beginning_and_a_long_answer_is_refused() -> None:
    rows = harness_scores._Rows([([1, 2, 3, 4], [5, 6])], max_tokens=3, pad_token_id=0)
    rows.make_batches(max_tokens=64, max_rows=8)
    assert rows[0].input_ids.tolist() == [[3, 4, 5]]
    with pytest.raises(DataError, match="an answer of 4 tokens"):
        harness_scores._Rows([([1], [2, 3, 4, 5])], max_tokens=3, pad_token_id=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "phi"])
@pytest.mark.parametrize("slice_rows", [None, 7, 64])
def test_the_head_rates_tokens_like_log_softmax(architecture: str, slice_rows: int | None, tmp_path: Path) -> None:
    rig = open_rig(make_model(tmp_path / "model", architecture), tmp_path / "store", quantize="none", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, rig.skeleton.hidden_size, generator=generator)
    logits = rig.skeleton.logits(hidden).detach()
    places = torch.randint(0, 9, (40,), generator=generator)
    tokens = torch.randint(0, logits.shape[1], (40,), generator=generator)
    tokens[:9], places[:9] = logits.argmax(1), torch.arange(9)
    head = ScoringHead(rig.skeleton, rig.store, device=CPU, logit_elements=900, slice_rows=slice_rows)
    values, likeliest = head.score(hidden, places, tokens)
    head.close()
    expected = functional.log_softmax(logits, dim=1)[places, tokens]
    torch.testing.assert_close(values.float(), expected, rtol=0, atol=1e-5)
    assert likeliest.tolist() == (logits.argmax(1)[places] == tokens).tolist()
    assert likeliest[:9].all()


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_a_model_tuned_in_full_is_compared_with_its_base(tmp_path: Path, tasks: Path, schedule: str) -> None:
    # The embedding is tied to the head; the joint schedule trains both, each for itself.
    model = make_model(tmp_path / "model", "qwen3", eos_token_id=1)
    held_out = make_data(tmp_path / "held_out.jsonl", 6, seed=5)
    how = {"tune": "full", "schedule": schedule, "head_fit_epochs": 0, "lr": 1e-3, "validation": str(held_out)}
    trained = _train(tmp_path, model, **how)
    outcome = _evaluate(tmp_path / "run", tasks, data=str(held_out))
    assert (outcome.base_loss, outcome.tuned_loss) == pytest.approx((trained.loss_before, trained.loss_after), rel=1e-4)
    found = _by_name(outcome)
    assert found["tiny_texts", "bits_per_byte"][0] != found["tiny_texts", "bits_per_byte"][1]
    # The tuned model is an ordinary checkpoint, which lm-eval's own class can load.
    run = open_run(str(tmp_path / "run"), CPU)
    directory = run.tuned_store.directory
    run.close()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    results = _plain(model, AutoTokenizer.from_pretrained(tmp_path / "model"), tasks)["results"]
    for (task, metric), (_, tuned) in found.items():
        assert tuned == pytest.approx(results[task][f"{metric},none"], abs=1e-6)


def test_data_and_tasks_together_give_both(trained: Path, tasks: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "held_out.jsonl", 6, seed=5)
    alone = lopt_lite.evaluate(EvaluateSettings(run=str(trained / "run"), data=str(data), batch_size=3))
    both = _evaluate(trained / "run", tasks / "choices.yaml", data=str(data), limit=4)
    assert (both.base_loss, both.tuned_loss) == (alone.base_loss, alone.tuned_loss)
    assert {score.examples for score in both.tasks} == {4}
    assert alone.tasks == ()
    assert alone.device_peak_bytes > 0


def test_a_chat_template_is_applied_as_in_training(trained: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = harness_generate.complete

    def complete(run: Any, prompts: list[list[int]], **kwargs: Any) -> Any:
        seen.extend(prompts)
        return original(run, prompts, **kwargs)

    from lopt_lite.data.templates import load_prompt
    from lopt_lite.results import harness_model

    monkeypatch.setattr(harness_model, "complete", complete)
    _evaluate(trained / "run", tasks / "answers.yaml", apply_chat_template=True, limit=1)
    run = open_run(str(trained / "run"), CPU)
    run.close()
    assert seen == [load_prompt(run.tokenizer, "What is 0 + 3?")] * 2


@pytest.mark.parametrize("prefix", ["The best answer is ", " Well,\n"])
def test_an_answer_begun_by_the_task_is_there_where_the_template_trims_it(tmp_path, monkeypatch, prefix) -> None:
    """As in Llama 3's template. The prompt is the one that lm-eval's own class gives."""
    from lopt_lite.results import harness_model

    model = make_model(tmp_path / "model", "llama", eos_token_id=1, pad_token_id=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(model)
    _train(tmp_path, model)
    tasks = _write_tasks(tmp_path / "tasks")
    task = tasks / "answers.yaml"
    task.write_text(task.read_text() + f"gen_prefix: {json.dumps(prefix)}\n", encoding="utf-8")
    seen: list[str] = []
    original = harness_model.complete

    def complete(run: Any, prompts: list[list[int]], **kwargs: Any) -> Any:
        seen.extend(run.tokenizer.decode(ids) for ids in prompts)
        return original(run, prompts, **kwargs)

    monkeypatch.setattr(harness_model, "complete", complete)
    _evaluate(tmp_path / "run", task, apply_chat_template=True, limit=1)
    messages = [{"role": "user", "content": "What is 0 + 3?"}, {"role": "assistant", "content": prefix}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert prefix.strip() in text
    assert seen == [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))] * 2


def test_a_group_is_reported_beside_its_tasks(trained: Path, tasks: Path) -> None:
    (tasks / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choices]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
        encoding="utf-8",
    )
    outcome = _evaluate(trained / "run", tasks, limit=3)
    groups = {(score.task, score.group) for score in outcome.tasks if score.metric == "acc"}
    assert groups == {("tiny_group", None), ("tiny_choices", "tiny_group")}


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ("no_such_task_at_all", "which lm-eval does not know"),
        ("missing.yaml", "there is no such file"),
        ("EMPTY", "which has no tasks in it"),
    ],
)
def test_a_task_that_is_not_there_is_named(trained: Path, tmp_path: Path, tasks: str, says: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(SettingsError, match=says):
        _evaluate(trained / "run", str(tmp_path / tasks) if tasks == "EMPTY" else tasks)


def test_a_task_whose_data_is_gone_is_bad_data(trained: Path, tasks: Path) -> None:
    (tasks / "data.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        _evaluate(trained / "run", tasks / "choices.yaml")


def test_without_lm_eval_the_install_command_is_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingsError) as caught:
        _evaluate(trained / "run", "gsm8k")
    assert caught.value.fix == "pip install 'lopt-lite[eval]'"


def test_what_evaluate_needs_is_said() -> None:
    with pytest.raises(SettingsError, match="nothing to evaluate on"):
        EvaluateSettings(run="r")
    with pytest.raises(SettingsError, match="--limit is for --tasks"):
        EvaluateSettings(run="r", data="d", limit=3)
    with pytest.raises(SettingsError, match="--tasks is ' , '"):
        EvaluateSettings(run="r", tasks=" , ")
    assert EvaluateSettings(run="r", tasks="a, b.yaml").task_names() == ["a", "b.yaml"]


def test_the_command_line_shows_tasks_as_a_table_without_the_parts_of_groups() -> None:
    from lopt_lite_cli.evaluate import COMMAND

    score = TaskScore(
        task="mmlu",
        group=None,
        metric="acc",
        filter=None,
        higher_is_better=True,
        examples=14042,
        base=0.25,
        base_stderr=0.0036,
        tuned=0.26,
        tuned_stderr=None,
    )
    part = dataclasses.replace(score, task="mmlu_anatomy", group="mmlu")
    read = dataclasses.replace(score, task="gsm8k", metric="exact_match", filter="strict-match")
    shown = COMMAND.render(EvaluateOutcome(run="r", tasks=(score, part, read), device_peak_bytes=3 * 2**30))
    assert shown.splitlines() == [
        "task   metric                      examples  base             tuned",
        "mmlu   acc                         14,042    0.2500 ± 0.0036  0.2600",
        "gsm8k  exact_match (strict-match)  14,042    0.2500 ± 0.0036  0.2600",
        "peak memory 3.00 GiB",
    ]


@pytest.mark.parametrize(("question", "choice"), [("What is it?", "<image>"), ("What is in <image>?", "ducks")])
def test_a_text_with_a_token_that_the_model_has_not_is_refused_and_is_not_the_best_answer(tmp_path, question, choice):
    tokenizer = make_tokenizer()
    model = make_model(tmp_path / "model", "llama", tokenizer=tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model)
    _train(tmp_path, model)
    line = {"question": question, "choices": ["none", choice], "label": 0}
    (tmp_path / "task.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (tmp_path / "task.yaml").write_text(CHOICES.format(data=tmp_path / "task.jsonl"), encoding="utf-8")
    with pytest.raises(DataError, match="a task's text cannot be used: the token '<image>'"):
        _evaluate(tmp_path / "run", tmp_path / "task.yaml")
