"""``weight`` 0 makes an assistant's turn context: the tokens stay, and what was learnt of that turn is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopt_lite.errors import DataError
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, trained_runs, whole_text, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Second answer."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "Third answer."},
]
SHAREGPT = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in TURNS]

#: Marks the answer of the last turn alone.
MARKED_AT_THE_END = tt.CHATML_MARKED.replace(
    "{% if message['role'] == 'assistant' %}", "{% if message['role'] == 'assistant' and loop.last %}"
)
#: Marks every answer, and reasoning, which it drops from all turns but the last, as QWEN3 does.
QWEN3_MARKED = tt.QWEN3.replace(
    "{% if m['role'] == 'assistant' %}", "{% if m['role'] == 'assistant' %}{% generation %}"
).replace("{{ '<|im_end|>\n' }}{% else %}", "{{ '<|im_end|>\n' }}{% endgeneration %}{% else %}")

TEMPLATES = {
    "marked": tt.CHATML_MARKED,
    "marked without the end of turn": tt.CHATML_MARKED_SHORT,
    "plain": None,
    "chatml": tt.CHATML,
    "llama 2": tt.LLAMA2,
    "llama 3": tt.LLAMA3,
    "gemma": tt.GEMMA,
    "bare": tt.BARE,
    "qwen 3 marked": QWEN3_MARKED,
    "qwen 3": tt.QWEN3,
    "qwen 3 thinking": tt.QWEN3_THINKING,
}


def weighted(turns: list[dict[str, Any]], *context: int, weight: Any = 0) -> list[dict[str, Any]]:
    """The turns, with a weight on some of them."""
    return [{**turn, "weight": weight} if i in context else turn for i, turn in enumerate(turns)]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("context", [(1,), (3,), (1, 3)])
def test_the_turn_stays_in_the_text_and_leaves_the_loss(
    template: str | None, context: tuple[int, ...], tmp_path: Path
) -> None:
    """In all ways in which answers are found: by marks, by prefixes, and by the range of the content."""
    tokenizer = make_tokenizer(template)
    lines = [{"messages": TURNS}, {"messages": weighted(TURNS, *context)}]
    dataset, report, _ = load(write_lines(tmp_path, *lines), tokenizer)
    assert whole_text(dataset, tokenizer, 1) == whole_text(dataset, tokenizer, 0)
    learnt = trained_runs(dataset, tokenizer, 0)
    assert len(learnt) == 3 and report.unlocated_turns == 0
    kept = [run for turn, run in zip((1, 3, 5), learnt, strict=True) if turn not in context]
    assert trained_runs(dataset, tokenizer, 1) == kept


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_last_turn_that_is_context_is_cut_off(template: str | None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template)
    lines = [{"messages": TURNS}, {"messages": weighted(TURNS, 3, 5)}]
    dataset, _, _ = load(write_lines(tmp_path, *lines), tokenizer)
    assert trained_runs(dataset, tokenizer, 1) == trained_runs(dataset, tokenizer, 0)[:1]
    assert "Second answer." not in whole_text(dataset, tokenizer, 1)


@pytest.mark.parametrize("template", [tt.CHATML_MARKED, tt.CHATML_MARKED_SHORT, tt.CHATML, tt.QWEN3_THINKING])
def test_an_empty_turn_teaches_to_end_at_once_unless_it_is_context(template: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template)
    turns = [*TURNS[:1], {"role": "assistant", "content": ""}, *TURNS[2:3], {"role": "assistant", "content": ""}]
    lines = [{"messages": [*turns, *TURNS[4:]]}, {"messages": weighted([*turns, *TURNS[4:]], 1)}]
    dataset, _, _ = load(write_lines(tmp_path, *lines), tokenizer)
    learnt = trained_runs(dataset, tokenizer, 0)
    assert len(learnt) == 3 and learnt[0] == "<|im_end|>"
    assert trained_runs(dataset, tokenizer, 1) == learnt[1:]


def test_what_is_learnt_of_the_other_turns_is_what_is_marked(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(MARKED_AT_THE_END)
    for context, learnt in (((1,), ["Third answer.<|im_end|>"]), ((5,), None)):
        lines = [{"messages": TURNS}, {"messages": weighted(TURNS, *context)}]
        dataset, report, _ = load(write_lines(tmp_path, *lines), tokenizer)
        assert trained_runs(dataset, tokenizer, 0) == ["Third answer.<|im_end|>"]
        assert report.dropped == (learnt is None)
        assert learnt is None or trained_runs(dataset, tokenizer, 1) == learnt


def test_marks_are_told_apart_where_a_template_rewrites_earlier_turns(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(QWEN3_MARKED)
    turns = [*TURNS[:1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFirst answer."}, *TURNS[2:]]
    lines = [{"messages": turns}, {"messages": weighted(turns, 1)}]
    dataset, _, _ = load(write_lines(tmp_path, *lines), tokenizer)
    assert trained_runs(dataset, tokenizer, 1) == trained_runs(dataset, tokenizer, 0)[1:]


def test_every_format_with_messages_takes_weights(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for line in (
        {"conversations": weighted(SHAREGPT, 1, 3)},
        {"conversations": weighted(SHAREGPT, 1, 3), "system": "Be brief."},
        {"messages": weighted(TURNS, 1, 3), "system": "Be brief."},
        {"prompt": TURNS[:1], "completion": weighted(TURNS[1:], 0, 2)},
        {"prompt": weighted(TURNS[:3], 1), "completion": weighted(TURNS[3:], 0)},
    ):
        dataset, _, _ = load(write_lines(tmp_path, line), tokenizer)
        assert trained_runs(dataset, tokenizer) == ["Third answer.<|im_end|>"]


def test_weights_stay_with_their_turns_where_the_system_message_is_merged(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.GEMMA)
    line = {"messages": [{"role": "system", "content": "Be brief."}, *weighted(TURNS, 1, 5)]}
    dataset, report, _ = load(write_lines(tmp_path, line), tokenizer)
    assert trained_runs(dataset, tokenizer) == ["Second answer.<end_of_turn>"] and report.system_merged == 1


@pytest.mark.parametrize("weight", [1, 1.0, None])
def test_weight_1_is_the_default_and_the_template_sees_no_weight(weight: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{% for m in messages if m['weight'] is defined %}WEIGHT{% endfor %}" + tt.CHATML)
    lines = [{"messages": TURNS}, {"messages": weighted(TURNS, *range(6), weight=weight)}]
    lines += [{"messages": weighted(TURNS, 0, 2, weight=0.0)}]  # questions are not learnt anyway
    dataset, _, _ = load(write_lines(tmp_path, *lines), tokenizer)
    for i in (1, 2):
        assert [part.tolist() for part in dataset.example(i)] == [part.tolist() for part in dataset.example(0)]


def test_an_example_of_which_no_turn_is_learnt_is_one_without_answers(tmp_path: Path) -> None:
    for template in (tt.CHATML_MARKED, tt.CHATML, None):
        tokenizer = make_tokenizer(template)
        nothing = {"messages": weighted(TURNS, 1, 3, 5)}
        _, report, notices = load(write_lines(tmp_path, nothing, {"messages": TURNS}), tokenizer)
        assert (report.dropped, report.examples, report.unlocated_turns) == (1, 1, 0)
        assert any("1 examples were dropped, because no token of them can be trained on" in text for text in notices)
        with pytest.raises(DataError, match=r"none of the 1 examples .* has a token to train on") as caught:
            load(write_lines(tmp_path, nothing), tokenizer)
        assert "not all of weight 0" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (0.5, "is 0.5;"),
        (2, "is 2;"),
        (-1, "is -1;"),
        (float("nan"), "is nan;"),
        (10**400, "is 10000000000000000000;"),
        (True, "is a JSON boolean;"),
        ("0", "is a JSON string;"),
        ([], "is a JSON array;"),
    ],
)
def test_any_other_weight_is_refused_with_the_line(weight: Any, said: str, tmp_path: Path) -> None:
    good, bad = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes.", "weight": weight}
    for lines, where in (
        ([{"messages": TURNS}, {"messages": [good, bad]}], r"messages\[1\]"),
        ([{"messages": TURNS}, {"messages": [{**good, "weight": weight}, *TURNS[1:]]}], r"messages\[0\]"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": [good], "completion": [bad]}], r"completion\[0\]"),
    ):
        path = write_lines(tmp_path, *lines)
        with pytest.raises(DataError, match=rf"line 2: {where}\.weight {said} it may be 0 \(.*\) or 1"):
            load(path, make_tokenizer())
        assert load(path, make_tokenizer(), skip_bad_lines=True)[1].bad_lines == 1
