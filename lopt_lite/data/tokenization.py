"""Text to token ids, and ranges of characters to ranges of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, and their character offsets (int64 [tokens]) if the tokenizer gives them."""

    text: str
    ids: list[int]
    starts: np.ndarray | None
    ends: np.ndarray | None


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Tokenise texts as they are: no token is added, a control token written in the text becomes that token."""
    if not texts:
        return []
    fast = bool(tokenizer.is_fast)
    out = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=fast,
        verbose=False,  # lengths are our business, not that of the tokenizer's model_max_length
    )
    encoded = []
    for i, text in enumerate(texts):
        ids = list(out["input_ids"][i])
        if fast:
            offsets = np.array(out["offset_mapping"][i], dtype=np.int64).reshape(-1, 2)
            encoded.append(Encoded(text, ids, offsets[:, 0], offsets[:, 1]))
        else:
            encoded.append(Encoded(text, ids, None, None))
    return encoded


def token_range(tokenizer: Any, encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """The tokens that hold characters ``start`` to ``end`` (exclusive) of the text, as a half-open range.

    A token that lies across either border is inside: it cannot be predicted without predicting the characters asked
    for. (Byte-level tokenizers may merge the last character before an answer with the answer's first ones.)
    """
    if encoded.starts is None or encoded.ends is None:
        return token_range_by_prefix(tokenizer, encoded, start, end)
    # Starts are less reliable than ends: some tokenizers report them behind the token's leading space. Ends never
    # fall, and the bytes of one character share its end, hence side="right" on both sides.
    first = int(np.searchsorted(encoded.ends, start, side="right"))
    last = int(np.searchsorted(encoded.ends, end, side="right"))
    if start < end:
        while last < len(encoded.ids) and encoded.starts[last] < end:
            last += 1
    return first, max(first, last)


def token_range_by_prefix(tokenizer: Any, encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """:func:`token_range` for tokenizers without offsets: tokenises both prefixes and compares token by token."""
    before, through = encode_batch(tokenizer, [encoded.text[:start], encoded.text[:end]])
    first = _common_length(before.ids, encoded.ids)
    last = _common_length(through.ids, encoded.ids)
    if start < end and last < len(through.ids):
        last += 1  # the token across the end border
    return first, max(first, last)


def default_bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, as a list of one, if the tokenizer puts one in front by itself; else empty."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    with_specials = list(tokenizer("a", verbose=False)["input_ids"])
    without = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    return [bos] if with_specials[:1] == [bos] and without[:1] != [bos] else []


def token_without_row(tokenizer: Any, ids: Sequence[int] | np.ndarray, rows: int | None) -> str | None:
    """What is wrong with ``ids`` if one of them has no row in an embedding of ``rows`` rows, as a sentence."""
    largest = int(np.max(ids, initial=0))
    if rows is None or largest < rows:
        return None
    token = tokenizer.convert_ids_to_tokens(largest)
    return f"the token {token!r} has the id {largest:,}, and the model's embedding has {rows:,} rows"


def _common_length(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
