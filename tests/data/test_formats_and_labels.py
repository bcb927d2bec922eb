"""Every format and template style: the labelled tokens, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopt_lite.data.templates import ChatTemplate, load_prompt, stop_token_ids
from lopt_lite.errors import DataError, ModelError
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, trained_runs, whole_text, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

QUESTION, ANSWER = "What is two plus two?", "Two plus two is four."
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Second answer."},
]

PAIR_LINES = {
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "conversations": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt+completion": {"prompt": QUESTION, "completion": ANSWER},
    "instruction+output": {"instruction": QUESTION, "output": ANSWER},
    "question+answer": {"question": QUESTION, "answer": ANSWER},
    "query+response": {"query": QUESTION, "response": ANSWER},
    "problem+solution": {"problem": QUESTION, "solution": ANSWER},
}


@pytest.mark.parametrize("name", PAIR_LINES)
def test_each_pair_format_trains_the_answer_and_its_end_of_turn_token(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML)
    path = write_lines(tmp_path, {**PAIR_LINES[name], "id": 7, "tools": None})
    dataset, report, notices = load(path, tokenizer)
    assert report.format == name
    assert whole_text(dataset, tokenizer) == (
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>"
    )
    assert trained_runs(dataset, tokenizer) == [ANSWER + "<|im_end|>"]
    assert notices == []


def test_text_trains_every_token_but_the_first_and_ends_with_eos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML, adds_bos=True)
    dataset, report, _ = load(write_lines(tmp_path, {"text": ANSWER}, {"text": f"<s>{ANSWER}</s>"}), tokenizer)
    assert report.format == "text"
    for i in range(2):
        assert whole_text(dataset, tokenizer, i) == f"<s>{ANSWER}</s>"
        assert trained_runs(dataset, tokenizer, i) == [f"{ANSWER}</s>"]


def test_text_without_a_default_bos_starts_with_the_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None)
    dataset, _, notices = load(write_lines(tmp_path, {"text": ANSWER}), tokenizer)
    assert whole_text(dataset, tokenizer) == f"{ANSWER}</s>"
    assert not dataset.is_target[0] and dataset.is_target[1:].all()
    assert notices == []


def test_an_input_follows_the_instruction_after_an_empty_line(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML)
    line = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    lines = [line, {**line, "input": ""}, {**line, "input": None}]
    dataset, _, _ = load(write_lines(tmp_path, *lines), tokenizer)
    assert "user\nAdd.\n\n2 and 2<|im_end|>" in whole_text(dataset, tokenizer, 0)
    assert "user\nAdd.<|im_end|>" in whole_text(dataset, tokenizer, 1)
    assert "user\nAdd.<|im_end|>" in whole_text(dataset, tokenizer, 2)


def test_openai_content_parts_and_role_names_are_understood(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML)
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "function", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    dataset, _, _ = load(write_lines(tmp_path, {"messages": messages}), tokenizer)
    text = whole_text(dataset, tokenizer)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\ntwo parts<|im_end|>\n")
    assert "<|im_start|>tool\n4<|im_end|>" in text
    assert trained_runs(dataset, tokenizer) == [ANSWER + "<|im_end|>", "It is 4.<|im_end|>"]


def test_tool_calls_reach_the_template(tmp_path: Path) -> None:
    template = tt.CHATML.replace(
        "message['content'] +", "message['content'] + message.tool_calls | default('') | string +"
    )
    tokenizer = make_tokenizer(template)
    calls = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    dataset, _, _ = load(write_lines(tmp_path, {"messages": messages}), tokenizer)
    (trained,) = trained_runs(dataset, tokenizer)
    assert trained == f"{calls}<|im_end|>"


def test_prompt_and_completion_may_be_messages_and_only_the_completion_is_trained(tmp_path: Path) -> None:
    for template in (tt.CHATML, tt.CHATML_MARKED, None):
        tokenizer = make_tokenizer(template)
        line = {"prompt": TURNS[:3], "completion": TURNS[3:]}
        dataset, _, _ = load(write_lines(tmp_path, line), tokenizer)
        assert "First answer." in whole_text(dataset, tokenizer)
        (trained,) = trained_runs(dataset, tokenizer)
        assert trained.startswith("Second answer.")


STYLES = [
    ("chatml", tt.CHATML, "<|im_end|>"),
    ("chatml with a default system message", tt.CHATML_WITH_DEFAULT_SYSTEM, "<|im_end|>"),
    ("marked", tt.CHATML_MARKED, "<|im_end|>"),
    ("marked without the end of turn", tt.CHATML_MARKED_SHORT, "<|im_end|>"),
    ("llama 3", tt.LLAMA3, "<|eot_id|>"),
    ("gemma", tt.GEMMA, "<end_of_turn>"),
    ("none", None, "</s>"),
]


@pytest.mark.parametrize(("template", "end"), [s[1:] for s in STYLES], ids=[s[0] for s in STYLES])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_every_assistant_turn_is_trained_with_its_end(
    template: str | None, end: str, trim_offsets: bool, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    dataset, report, _ = load(write_lines(tmp_path, {"messages": TURNS}), tokenizer)
    assert trained_runs(dataset, tokenizer) == [f"First answer.{end}", f"Second answer.{end}"]
    assert report.unlocated_turns == 0
    assert stop_token_ids(tokenizer)[0] == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize(("template", "end"), [s[1:] for s in STYLES], ids=[s[0] for s in STYLES])
def test_an_empty_answer_trains_its_end_alone(template: str | None, end: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template)
    turns = [TURNS[0], {"role": "assistant", "content": ""}, TURNS[2], {"role": "assistant", "content": ""}]
    dataset, _, _ = load(write_lines(tmp_path, {"messages": turns}), tokenizer)
    assert trained_runs(dataset, tokenizer) == [end, end]


@pytest.mark.parametrize(("template", "end"), [s[1:] for s in STYLES], ids=[s[0] for s in STYLES])
def test_a_prompt_for_generation_is_what_precedes_the_answer_in_training(
    template: str | None, end: str, tmp_path: Path
) -> None:
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(template, adds_bos=adds_bos)
        dataset, _, _ = load(write_lines(tmp_path, PAIR_LINES["question+answer"]), tokenizer)
        tokens, is_target = dataset.example(0)
        assert load_prompt(tokenizer, QUESTION) == tokens[~is_target].tolist()
        assert (tokens == tokenizer.bos_token_id).sum() <= 1


def test_reasoning_that_a_template_drops_from_earlier_turns_does_not_confuse_the_labels(tmp_path: Path) -> None:
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFirst answer."},
        TURNS[2],
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nSecond answer."},
    ]
    for template in (tt.QWEN3, tt.QWEN3_THINKING):
        tokenizer = make_tokenizer(template)
        dataset, report, _ = load(write_lines(tmp_path, {"messages": turns}), tokenizer)
        first, second = trained_runs(dataset, tokenizer)
        assert first == "First answer.<|im_end|>"
        assert second.removeprefix("<think>\n") == "well\n</think>\n\nSecond answer.<|im_end|>"
        assert report.unlocated_turns == 0
        prompt = load_prompt(tokenizer, "Hello")
        assert tokenizer.decode(prompt).endswith("<think>\n") == (template == tt.QWEN3_THINKING)


def test_reasoning_kept_between_tool_calls_and_dropped_later(tmp_path: Path) -> None:
    # Seen from the second turn, the first one has its reasoning; in the whole conversation it has not: no prefix holds.
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "<think>\na\n</think>\n\nCall."},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>\nb\n</think>\n\nFour."},
        TURNS[2],
        {"role": "assistant", "content": "Done."},
    ]
    tokenizer = make_tokenizer(tt.QWEN3)
    dataset, report, _ = load(write_lines(tmp_path, {"messages": turns}), tokenizer)
    assert trained_runs(dataset, tokenizer) == [
        "Call.<|im_end|>",
        "Four.<|im_end|>",
        "<think>\n\n</think>\n\nDone.<|im_end|>",
    ]
    assert report.unlocated_turns == 0


def test_a_first_message_from_the_assistant_is_trained_too(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML)
    turns = [{"role": "assistant", "content": "Welcome."}, *TURNS[:2]]
    dataset, _, _ = load(write_lines(tmp_path, {"messages": turns}), tokenizer)
    assert trained_runs(dataset, tokenizer) == ["Welcome.<|im_end|>", "First answer.<|im_end|>"]


def test_llama2_style_space_before_the_end_is_inside_the_answer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.LLAMA2)
    dataset, _, _ = load(write_lines(tmp_path, {"messages": TURNS}), tokenizer)
    assert [run.strip() for run in trained_runs(dataset, tokenizer)] == ["First answer. </s>", "Second answer. </s>"]


def test_a_template_that_ends_answers_with_nothing_gets_an_end_of_sequence(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.BARE)
    dataset, _, notices = load(write_lines(tmp_path, {"messages": TURNS}), tokenizer)
    assert trained_runs(dataset, tokenizer)[-1].strip() == "Second answer.</s>"
    assert any("'</s>' is added" in text for text in notices)


def test_a_token_across_the_border_of_an_answer_is_trained(tmp_path: Path) -> None:
    # "assistant: " + "Two" is one text; byte-level BPE makes " Two" one token, which lies across the border.
    tokenizer = make_tokenizer(tt.BARE)
    dataset, _, _ = load(write_lines(tmp_path, PAIR_LINES["question+answer"]), tokenizer)
    assert trained_runs(dataset, tokenizer) == [f" {ANSWER}</s>"]


@pytest.mark.parametrize("answer", ["    return x", "\n\nNew line", " leading", "trailing  ", "🙂🙃 naïve 汉字", "é́"])
@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", [tt.CHATML, tt.CHATML_MARKED, None])
def test_blank_and_unicode_borders_keep_the_whole_answer(
    answer: str, trim_offsets: bool, template: str | None, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    dataset, _, _ = load(write_lines(tmp_path, {"question": QUESTION, "answer": answer}), tokenizer)
    (trained,) = trained_runs(dataset, tokenizer)
    assert trained.lstrip() == f"{answer}{'<|im_end|>' if template else '</s>'}".lstrip()
    assert trained.endswith(answer.lstrip("\n") + ("<|im_end|>" if template else "</s>"))


def test_the_plain_template_is_the_documented_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    dataset, _, notices = load(write_lines(tmp_path, {"messages": messages}), tokenizer)
    assert whole_text(dataset, tokenizer) == (
        "<s>Be brief.\n\n### Instruction:\nHello\n\n### Response:\nFirst answer.</s>\n\n"
        "### Instruction:\nAnd?\n\n### Response:\nSecond answer.</s>"
    )
    assert any("no chat template" in text for text in notices)


def test_a_system_message_that_the_template_refuses_joins_the_first_question(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.GEMMA)
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    dataset, report, notices = load(write_lines(tmp_path, {"messages": messages}), tokenizer)
    assert "<start_of_turn>user\nBe brief.\n\nHello<end_of_turn>" in whole_text(dataset, tokenizer)
    assert report.system_merged == 1
    assert any("refuses system messages; in 1 conversations" in text for text in notices)
    assert trained_runs(dataset, tokenizer) == ["First answer.<end_of_turn>", "Second answer.<end_of_turn>"]


def test_what_the_template_refuses_names_the_line_and_the_reason(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.GEMMA)
    path = write_lines(tmp_path, {"messages": TURNS}, {"messages": [TURNS[0], TURNS[0], TURNS[1]]})
    with pytest.raises(DataError, match=r"line 2: the chat template refuses.*must alternate"):
        load(path, tokenizer)


def test_tool_calls_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    messages = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    with pytest.raises(DataError, match="cannot express tool calls"):
        load(write_lines(tmp_path, {"messages": messages}), make_tokenizer(None))


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.DATED)
    dataset, _, notices = load(write_lines(tmp_path, PAIR_LINES["question+answer"]), tokenizer)
    assert whole_text(dataset, tokenizer).startswith("<|im_start|>system\nToday is 01 January 2025<|im_end|>\n")
    assert trained_runs(dataset, tokenizer) == [ANSWER + "<|im_end|>"]
    assert any("prints the date" in text for text in notices)


def test_marks_agree_with_transformers_own_mask(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML_MARKED)
    dataset, _, _ = load(write_lines(tmp_path, {"messages": TURNS}), tokenizer)
    out: Any = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    tokens, is_target = dataset.example(0)
    length = len(tokens)  # ours ends with the last target
    assert tokens.tolist() == out["input_ids"][:length]
    assert is_target.int().tolist() == out["assistant_masks"][:length]
    assert sum(out["assistant_masks"][length:]) == 0


def test_marks_and_prefixes_agree(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"messages": TURNS})
    marked, _, _ = load(path, make_tokenizer(tt.CHATML_MARKED))
    unmarked, _, _ = load(path, make_tokenizer(tt.CHATML))
    assert marked.fingerprint() == unmarked.fingerprint()


def test_answers_that_the_template_hides_are_counted_and_when_all_are_it_is_an_error(tmp_path: Path) -> None:
    hides = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(hides)
    with pytest.raises(DataError, match=r"none of the 1 examples .* has a token to train on"):
        load(write_lines(tmp_path, {"messages": TURNS}), tokenizer)


def test_a_broken_template_is_the_models_fault(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate(make_tokenizer("{% if %}"))
    tokenizer = make_tokenizer(tt.CHATML)
    tokenizer.chat_template = {"rag": tt.CHATML, "tool_use": tt.CHATML}
    with pytest.raises(ModelError, match="cannot be chosen"):
        ChatTemplate(tokenizer)


def test_gsm8k_rows(tmp_path: Path) -> None:
    rows = [
        {
            "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
            "May. How many clips did Natalia sell altogether in April and May?",
            "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips "
            "altogether in April and May.\n#### 72",
        },
        {
            "question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. "
            "How much did she earn?",
            "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = "
            "$<<0.2*50=10>>10.\n#### 10",
        },
        {
            "question": "Janet\u2019s ducks lay 16 eggs per day. She eats three. How many are left?",
            "answer": "16 - 3 = <<16-3=13>>13 at the farmer\u2019s market.\n#### 13",
        },
    ]
    tokenizer = make_tokenizer(tt.LLAMA3)
    dataset, report, _ = load(write_lines(tmp_path, *rows), tokenizer)
    assert (report.format, report.lines, report.examples) == ("question+answer", 3, 3)
    for i, row in enumerate(rows):
        assert trained_runs(dataset, tokenizer, i) == [row["answer"] + "<|eot_id|>"]
