"""The comparison with end-to-end tuning compares like with like: same tokens, same targets, same measure."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.baselines import measure, peft_loop
from benchmarks.baselines.common import Clock, Job, read_tokens, write_tokens
from benchmarks.loss_picture import Curve, seconds_to
from benchmarks.questions import bare_numbers, final_number, first_lines, tiny_questions
from benchmarks.recipe import _PLAIN, RECIPES, _recipe
from lopt_lite import EvaluateSettings, TrainSettings, evaluate, train
from lopt_lite.data.dataset import IGNORED, TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from tests.tiny_models import even_widths, make_data, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **even_widths("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "data.jsonl", 8)


def tokenised(model: Path, data: Path) -> TokenizedDataset:
    dataset, _ = load_dataset(
        data,
        AutoTokenizer.from_pretrained(model),
        max_length=64,
        skip_bad_lines=False,
        on_event=lambda event: None,
    )
    return dataset


def job(model: Path, data: Path, directory: Path) -> Job:
    tokens = write_tokens(directory / "tokens.safetensors", tokenised(model, data))
    output = str(directory / "adapters")
    return Job(
        model=str(model), tokens=tokens, output=output, lr=1e-2, epochs=2, batch_size=4, max_length=64, seed=0, points=2
    )


def test_tokens_come_back_as_they_were(model, data, tmp_path):
    dataset = tokenised(model, data)
    assert read_tokens(write_tokens(tmp_path / "tokens", dataset)).fingerprint() == dataset.fingerprint()


def test_the_common_measure_agrees_with_lopt_lites_own(model, data, tmp_path):
    """The same NF4 weights, the same tokens, the same adapter: before and after training."""
    run = str(tmp_path / "run")
    settings = TrainSettings(
        model=str(model), data=str(data), output=run, device="cpu", lr=1e-2, epochs=3, max_length=64
    )
    adapter = train(settings).adapter
    own = evaluate(EvaluateSettings(run=run, data=str(data), device="cpu"))
    tokens = write_tokens(tmp_path / "tokens", tokenised(model, data))
    found = measure.losses(model=str(model), adapters=[None, adapter, None], tokens={"held-out": tokens})["losses"]
    before, after, again = (losses["held-out"] for losses in found)
    assert before == again
    assert before == pytest.approx(own.base_loss, abs=0.005)
    assert after == pytest.approx(own.tuned_loss, abs=0.005)
    assert abs(own.base_loss - own.tuned_loss) > 0.05


def test_the_plain_loops_loss_is_that_of_transformers(model, data):
    """No mask for right padding and a head at answer tokens only change nothing."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    batch = collate(tokenised(model, data), [0, 3, 5], 0)
    labels = torch.cat([torch.full((3, 1), IGNORED), batch.targets[:, :-1]], dim=1)
    mask = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        expected = whole(input_ids=batch.input_ids, attention_mask=mask.long(), labels=labels).loss
        total = peft_loop.answer_loss(whole, batch)
    assert float(total / batch.answer_tokens) == pytest.approx(float(expected), rel=1e-2)  # products in bfloat16


@pytest.mark.parametrize("name", ["trl", "peft"])
def test_a_baseline_learns_and_puts_adapters_aside(name, model, data, tmp_path):
    if name == "trl":
        pytest.importorskip("trl")
        from benchmarks.baselines.trl_sft import train as run
    else:
        run = peft_loop.train
    work = job(model, data, tmp_path)
    found = run(work)
    assert found["steps"] == 4 and [point["step"] for point in found["points"]] == [1, 2, 3, 4]
    assert 0 < found["points"][0]["seconds"] < found["points"][-1]["seconds"] <= found["seconds"] < found["total_s"]
    adapters = [None, *(point["adapter"] for point in found["points"])]
    losses = measure.losses(model=str(model), adapters=adapters, tokens={"it": work.tokens})["losses"]
    assert losses[-1]["it"] < losses[0]["it"] - 0.05


def test_trl_gets_labels_at_answer_tokens_only(model, data):
    pytest.importorskip("trl")
    from benchmarks.baselines.trl_sft import labelled_rows

    dataset = tokenised(model, data)
    rows = labelled_rows(dataset)
    assert sum(map(len, rows["input_ids"])) == len(dataset.tokens)
    assert sum(label != IGNORED for row in rows["labels"] for label in row) == int(dataset.is_target.sum())
    assert all(
        label in (IGNORED, token)
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
        for token, label in zip(ids, labels, strict=True)
    )


def test_putting_adapters_aside_costs_no_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.baselines.common.time.monotonic", lambda: now[0])
    clock = Clock(
        Job(model="", tokens="", output=str(tmp_path), lr=1, epochs=1, batch_size=1, max_length=8, seed=0, points=2), 4
    )

    def save(directory: str) -> None:
        now[0] += 100

    for step in range(1, 5):
        now[0] += 1
        clock.after_step(step, save)
    assert [(point["step"], point["seconds"]) for point in clock.points] == [(2, 2.0), (4, 4.0)]
    assert clock.seconds == 4.0


def test_answers_are_generated_and_counted(model, tmp_path):
    questions = tiny_questions(tmp_path / "questions.jsonl")
    found = measure.exact_matches(model=str(model), adapter=None, data=questions, questions=5, max_new_tokens=3, rows=2)
    assert found["questions"] == len(found["texts"]) == 5
    assert 0 <= found["correct"] <= found["answered"] <= 5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1+1=2\n#### 2", Decimal(2)),
        ("#### $1,234.50 dollars", Decimal("1234.5")),
        ("####-7\n#### 8", Decimal(-7)),
        ("the answer is 5", None),
        ("#### none", None),
    ],
)
def test_the_final_number_stands_after_the_marks(text, number):
    assert final_number(text) == number


def test_bare_numbers_keep_the_questions(tmp_path):
    source = first_lines(tiny_questions(tmp_path / "a"), 3, tmp_path / "b")
    written = bare_numbers(source, tmp_path / "c").read_text().splitlines()
    assert written[2] == '{"question": "What is 2 + 2?", "answer": "4"}' and len(written) == 3


def test_time_to_a_loss_is_read_off_straight_lines():
    curve = Curve("x", [(0.0, 2.0), (10.0, 2.0), (20.0, 1.0), (30.0, 0.9)])
    assert seconds_to(curve, 2.5) == 0.0
    assert seconds_to(curve, 1.5) == 15.0
    assert seconds_to(curve, 0.9) == 30.0
    assert seconds_to(curve, 0.5) is None


def test_every_recipe_that_is_run_unasked_is_there():
    assert set(_PLAIN) <= set(RECIPES)
    assert {"full-joint-longer", "frozen-8e-4-longer-retain-3"} <= set(RECIPES) - {"full-joint-retain"}
    assert "full-joint-retain" not in RECIPES, "it trains the head through which the anchor compares"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_that_train_accepts(name):
    options = dict(RECIPES[name])
    assert options.pop("passes") >= 1
    assert 0 < options.pop("last_share", 1 / 2) < 1
    TrainSettings(model="model", data="data", **options)


def test_a_recipe_may_end_with_its_steps():
    assert _recipe("default-steps-69") == {"passes": 1.0, "max_steps": 69}
    assert _recipe("end-to-end-26e-4-longer-steps-7") == {**RECIPES["end-to-end-26e-4-longer"], "max_steps": 7}
    assert _recipe("default") == {"passes": 1.0}
    for name in ("default-steps-", "default-steps-0", "default-steps-x", "nothing-steps-3", "nothing"):
        assert _recipe(name) is None, name
