"""Everything that users get wrong: the documented exit code, a message that names what to change, and nothing lost.

The cases are in tests/bad_inputs. Each function marked with ``bad`` prepares one bad input and returns the command line
to give; the mark says which exit code and which words must come of it. All of them go through one test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lopt_lite_cli.main import main

from lopt_lite.locks import LOCK_NAME
from tests.bad_inputs import table
from tests.bad_inputs.place import CASES, INPUT, OPTIONS, SETTINGS, Place, Stock
from tests.tiny_models import make_data, make_model

CODE_NAMES = table.CODE_NAMES


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    root = tmp_path_factory.mktemp("stock")
    made = Stock(
        model=make_model(root / "model", num_hidden_layers=2),
        sharded=make_model(root / "sharded", num_hidden_layers=2, max_shard_size="50KB"),
        data=make_data(root / "data.jsonl", 10),
        run=root / "run",
    )
    assert main(["train", str(made.model), str(made.data), "--output", str(made.run), "--quiet", *OPTIONS]) == 0
    return made


@pytest.fixture
def place(tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as cleanup:
        yield Place(tmp_path, stock, monkeypatch, cleanup)


def files_below(root: Path) -> dict[Path, str]:
    """A hash of every file but locks, which a running process may hold."""

    def hashed(path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()

    locks = (LOCK_NAME, f"{LOCK_NAME}.pid")
    return {path: hashed(path) for path in root.rglob("*") if path.is_file() and path.name not in locks}


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{CODE_NAMES[CASES[name].code]}: {name}") for name in CASES])
def test_bad_input_is_explained_and_nothing_is_lost(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    arguments = case.prepare(place)
    before = files_below(place.root)
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()

    assert code == case.code, err
    assert out == ""
    assert "Traceback" not in err
    assert "\x1b" not in err
    missing = [word for word in case.words if word not in err]
    assert not missing, f"{missing} not in:\n{err}"
    (start,) = (index for index, line in enumerate(err.splitlines()) if line.startswith("error: "))
    advice = err.splitlines()[start + 1 :]
    assert advice and all(line.startswith(("  expected: ", "  to fix: ")) for line in advice), err

    after = files_below(place.root)
    assert [path for path in before if after.get(path) != before[path]] == [], "changed or lost"
    if case.code in (SETTINGS, INPUT) and not case.found_at_work:
        assert set(after) == set(before), "something was written although the input cannot be used"


@pytest.mark.parametrize(
    "name",
    [
        "yaml_with_an_unknown_option",
        "forgotten_data",
        "truncated_safetensors",
        "bad_json_at_line_7",
        "nearly_full_disk",
        "another_learning_rate_for_a_finished_run",
        "status_of_no_run",
    ],
)
def test_with_json_the_error_is_the_one_document(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = CASES[name].prepare(place)
    capsys.readouterr()
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert set(document) == {"error", "exit_code", "found", "expected", "fix"}
    assert document["exit_code"] == code == CASES[name].code
    said = " ".join(filter(None, (document["found"], document["expected"], document["fix"])))
    assert all(word in said for word in CASES[name].words)
    assert document["found"] in err


def test_there_are_many_kinds() -> None:
    assert len(CASES) >= 60
    assert {case.code for case in CASES.values()} == set(CODE_NAMES)


def test_the_documented_table_is_that_of_the_cases() -> None:
    """Made by ``python -m tests.bad_inputs.table > docs/bad_inputs.md``."""
    document = Path(__file__).parent.parent / "docs" / "bad_inputs.md"
    assert document.read_text(encoding="utf-8") == table.document()
