"""What each fact of a journal says, so that a damaged line is found where the journal is read and not where it is used.

Facts of a run: what was decided (``residence`` and its like, ``out-of-memory``, ``anchor-weight``, ``learning-rate``),
what is on disk (``store-ready``, ``cache-shard``, ``anchor-shard``, ``target-shard``, ``cache``, ``anchors``,
``answers``, ``checkpoint``, ``block``, ``adapter``, ``model``) and what was measured (``validation``). Facts of a
store: ``store`` and ``shard``. A fact that is not named here has nothing beside its name that is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Kind:
    words: str
    holds: Callable[[Any], bool]
    needed: bool = True

    def where_written(self) -> _Kind:
        """The same, where there is any: other versions write none."""
        return _Kind(self.words, self.holds, needed=False)

    def or_nothing(self) -> _Kind:
        """The same, or null, or none."""
        return _Kind(f"{self.words}, or null", lambda value: value is None or self.holds(value), needed=False)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_COUNT = _Kind("a whole number, 0 or more", _is_count)
_AMOUNT = _Kind("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
#: Adam moves a parameter by about its rate in each step: more than 1 is none that anyone has meant.
_RATE = _Kind("a number above 0, and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
#: Mean loss in nats; null where it was not a finite number (earlier versions wrote NaN, which is not JSON).
_LOSS = _Kind("a number, or null", lambda value: value is None or isinstance(value, float) or _is_number(value))
_ANSWERS = _Kind(
    "lists of whole numbers",
    lambda value: isinstance(value, list) and all(isinstance(v, list) and all(map(_is_count, v)) for v in value),
)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))

_CACHE_SHARD = {"shard": _COUNT, "name": _TEXT, "sha256": _TEXT.or_nothing()}
# Which of these there are is a question of the release that wrote them, and asked where they are used.
_RESIDENCE = {
    **dict.fromkeys(("layers", "resident_layers", "micro_batch_tokens", "forward_tokens"), _COUNT.where_written()),
    **dict.fromkeys(("group_tokens", "logit_elements", "boundary_bytes"), _COUNT.where_written()),
    **dict.fromkeys(("boundary_host_bytes", "cache_keep_bytes", "state_host_bytes"), _COUNT.where_written()),
    **dict.fromkeys(("predicted_bytes", "predicted_host_bytes"), _COUNT.where_written()),
    **dict.fromkeys(("dequantised", "recompute", "offload_state"), _FLAG.where_written()),
    "head_slice_rows": _COUNT.or_nothing(),
    "device": _TEXT.where_written(),
    "mode": _TEXT.where_written(),
}
_FACTS: dict[str, dict[str, _Kind]] = {
    "store": dict.fromkeys(("quantize", "dtype", "model", "transform"), _TEXT.or_nothing()),
    "shard": {"name": _TEXT, "bytes": _COUNT, "sha256": _TEXT},
    "started": {"examples": _COUNT.or_nothing()},
    "residence": _RESIDENCE,
    "matching-residence": _RESIDENCE,
    "answering-residence": {**_RESIDENCE, "rows": _COUNT},
    "out-of-memory": {"block": _COUNT, "phase": _TEXT, "step": _COUNT, "micro_batch_tokens": _COUNT},
    "answers": {"tokens": _ANSWERS},
    "anchor-shard": _CACHE_SHARD,
    "target-shard": _CACHE_SHARD,
    "cache-shard": {
        **_CACHE_SHARD,
        "block": _COUNT,
        "relative_squares": _AMOUNT.or_nothing(),
        "tokens": _COUNT.or_nothing(),
    },
    "cache": {"block": _COUNT, "relative_error": _AMOUNT.or_nothing()},
    "anchor-weight": {"weight": _AMOUNT, "loss": _AMOUNT, "answer_tokens": _COUNT},
    "learning-rate": {"lr": _RATE, "loss": _AMOUNT.or_nothing(), "answer_tokens": _COUNT.or_nothing()},
    "checkpoint": {"block": _COUNT, "name": _TEXT, "sha256": _TEXT.or_nothing()},
    "validation": {"epoch": _COUNT, "loss": _LOSS, "answer_tokens": _COUNT.or_nothing()},
    "block": {"block": _COUNT, "sha256": _TEXT.or_nothing()},
    "peak": {"device_bytes": _COUNT},
    "adapter": {"sha256": _TEXT.or_nothing(), "config_sha256": _TEXT.or_nothing()},
    "model": {"sha256": _TEXT.or_nothing()},
}


def damage(fact: dict[str, Any]) -> str | None:
    """What is wrong with ``fact``, in words; None when it says what facts of its name say."""
    for name, kind in _FACTS.get(fact["fact"], {}).items():
        if name not in fact:
            if kind.needed:
                return f"{fact['fact']!r} does not say {name!r}"
        elif not kind.holds(fact[name]):
            said = json.dumps(fact[name])[:40]
            return f"{fact['fact']!r} says that {name!r} is {said}, where {kind.words} is expected"
    return None


def as_read(fact: dict[str, Any]) -> dict[str, Any]:
    """``fact`` as it was before it became JSON (:func:`lopt_lite.files.as_json`)."""
    if fact["fact"] == "validation" and fact["loss"] is None:
        return {**fact, "loss": math.nan}
    return fact
