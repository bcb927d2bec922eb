"""GSM8K's questions: taking the first ones, their final numbers, and tiny ones to try a script with."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from lopt_lite import files

DEMO_MODEL = Path(".demo/SmolLM2-135M-Instruct")
_EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN, HELD_OUT = _EXAMPLES / "gsm8k_train.jsonl", _EXAMPLES / "gsm8k_heldout.jsonl"
INSTRUCTIONS = _EXAMPLES / "instructions.jsonl"

_NUMBER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def first_lines(source: str | Path, count: int, target: Path) -> Path:
    """Copy the first ``count`` lines (0: all) of a data file; returns the copy's path."""
    with open(source, "rb") as lines:
        wanted = itertools.islice(lines, count or None)
        files.write_bytes(target, b"".join(line.rstrip(b"\r\n") + b"\n" for line in wanted))
    return target


def final_number(text: str) -> Decimal | None:
    """The number after the first ``####``, None if there is none."""
    found = _NUMBER.search(text)
    return None if found is None else Decimal(found[1].replace(",", ""))


def bare_numbers(source: Path, target: Path) -> Path:
    """Write the questions of ``source`` with nothing but the final number as answer; returns ``target``.

    Raises
    ------
    ValueError
        An answer has no final number.
    """
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        number = final_number(item["answer"])
        if number is None:
            raise ValueError(f"this answer in {source} has no number after '####': {item['answer']!r}")
        lines.append(json.dumps({"question": item["question"], "answer": str(number)}))
    files.write_bytes(target, ("\n".join(lines) + "\n").encode())
    return target


def rewritten(source: Path, write: Callable[[str], str], target: Path) -> Path:
    """Write the questions of ``source`` with what ``write`` makes of their answers; returns ``target``."""
    items = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({"question": item["question"], "answer": write(item["answer"])}) for item in items]
    files.write_bytes(target, ("\n".join(lines) + "\n").encode())
    return target


def require_model(model: str) -> None:
    """End the script where the model is not there."""
    if not Path(model).exists():
        raise SystemExit(f"there is no model in {model}; 'make demo-model' makes the demo's")


def tiny_model(directory: Path) -> str:
    """A tiny random model, made if it is not there; returns its path."""
    import torch

    from tests.tiny_models import even_widths, make_model

    if not (directory / "config.json").is_file():
        make_model(directory, "llama", dtype=torch.bfloat16, **even_widths("llama"))
    return str(directory)


def tiny_questions(path: Path) -> str:
    """Eight questions of GSM8K's form; returns the file's path."""
    lines = [json.dumps({"question": f"What is {n} + {n}?", "answer": f"It is\n#### {2 * n}"}) for n in range(8)]
    files.write_bytes(path, ("\n".join(lines) + "\n").encode())
    return str(path)
