"""Characters to tokens: against slow oracles, at borders where tokens merge."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lopt_lite.data.templates import common_prefix_length
from lopt_lite.data.tokenization import default_bos, encode_batch, token_range, token_range_by_prefix
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer()
TRIMMING = make_tokenizer(trim_offsets=True)
TEXTS = st.text(st.sampled_from("ab two.\n  The🙂é汉"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(0, 30), st.integers(0, 30))
def test_a_range_is_the_tokens_that_overlap_the_characters(text: str, a: int, b: int) -> None:
    start, end = sorted((min(a, len(text)), min(b, len(text))))
    (encoded,) = encode_batch(TOKENIZER, [text])
    assert encoded.starts is not None and encoded.ends is not None
    expected = [i for i in range(len(encoded.ids)) if encoded.starts[i] < end and encoded.ends[i] > start]
    first, last = token_range(TOKENIZER, encoded, start, end)
    assert list(range(first, last)) == (expected if start < end else [])


@settings(max_examples=150, deadline=None)
@given(TEXTS.filter(bool), TEXTS)
def test_an_answer_is_what_follows_the_tokens_of_the_prompt(prompt: str, answer: str) -> None:
    for tokenizer in (TOKENIZER, TRIMMING):
        whole, before = encode_batch(tokenizer, [prompt + answer, prompt])
        found = token_range(tokenizer, whole, len(prompt), len(whole.text))
        slow = token_range_by_prefix(tokenizer, whole, len(prompt), len(whole.text))
        assert found[1] == slow[1] == len(whole.ids)
        if whole.ids[: len(before.ids)] == before.ids:
            assert found == slow == (len(before.ids), len(whole.ids))
        else:
            # The border is inside a token, or the merge changed what lies before it: never later than that.
            assert slow[0] <= found[0]
            assert tokenizer.decode(whole.ids[found[0] :]).endswith(answer)


def test_a_merge_across_the_border_is_in_the_range() -> None:
    text = "is: Two plus"
    (encoded,) = encode_batch(TOKENIZER, [text])
    first, last = token_range(TOKENIZER, encoded, 4, len(text))
    assert TOKENIZER.decode(encoded.ids[first:last]) == " Two plus"
    assert TOKENIZER.decode(encoded.ids[:first]) == "is:"
    assert (first, last) == token_range_by_prefix(TOKENIZER, encoded, 4, len(text))


class WithoutOffsets(PreTrainedTokenizerFast):
    """Pretends to be a tokenizer written in Python."""

    @property
    def is_fast(self) -> bool:
        return False


@pytest.mark.parametrize("template", [tt.CHATML, tt.CHATML_MARKED_SHORT, tt.GEMMA, None])
def test_tokenizers_without_offsets_give_the_same_labels(template: str | None, tmp_path: Path) -> None:
    fast = make_tokenizer(template)
    slow = WithoutOffsets(
        tokenizer_object=fast.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(tt.CONTROL_TOKENS),
        chat_template=template,
    )
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["a", "🙂 b", "", ""], strict=True)]
    path = write_lines(tmp_path, {"messages": turns}, {"messages": turns[2:]})
    assert load(path, slow)[0].fingerprint() == load(path, fast)[0].fingerprint()


def test_the_default_bos_is_what_the_tokenizer_adds_by_itself() -> None:
    assert default_bos(make_tokenizer(adds_bos=True)) == [TOKENIZER.bos_token_id]
    assert default_bos(TOKENIZER) == []
    assert default_bos(make_tokenizer(bos_token=None)) == []


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_common_prefix_length_by_bisection(a: str, b: str) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix_length(a, b) == expected
