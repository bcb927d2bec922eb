"""All cases as a page of the documentation: ``python -m tests.bad_inputs.table > docs/bad_inputs.md``."""

from __future__ import annotations

import re

from tests.bad_inputs import data_and_options, model_contents, model_files, reading_runs, run_directories
from tests.bad_inputs.place import CASES, DOES_NOT_FIT, INPUT, RUN_DIRECTORY, SETTINGS

CODE_NAMES = {
    SETTINGS: "settings",
    INPUT: "model or data",
    DOES_NOT_FIT: "does not fit",
    RUN_DIRECTORY: "run directory",
}

#: Importing these has registered their cases.
_MODULES = (model_files, model_contents, data_and_options, run_directories, reading_runs)

_HEAD = """# Broken and hostile inputs

What people get wrong, and what strangers' files may try. Each of these is a test (`tests/bad_inputs/`): it gives the
exit code shown, an error that says among other things the words shown, what was expected and what to change; and it
changes nothing that was there before. This page is made from the tests.

The readers of safetensors headers, JSON Lines and journals are also fuzzed: `python -m benchmarks.fuzz`.
"""


def document() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for module in _MODULES:
        cases = {name: case for name, case in CASES.items() if case.prepare.__module__ == module.__name__}
        title = (module.__doc__ or "").splitlines()[0].rstrip(".")
        parts.append(f"\n## {title}\n\n| input | exit code | what the error says, in part |\n|---|---|---|\n")
        for name, case in cases.items():
            words = "; ".join(_cell(word) for word in case.words)
            parts.append(f"| {name.replace('_', ' ')} | {case.code} ({CODE_NAMES[case.code]}) | {words} |\n")
    parts.append(f"\n{len(CASES)} inputs.\n")
    return "".join(parts)


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_`\\])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    print(document(), end="")
