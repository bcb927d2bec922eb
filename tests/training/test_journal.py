"""The journal: whole lines are facts, a torn last line is none, and damage elsewhere is never guessed around."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_lite import files
from lopt_lite.errors import DoesNotFitError, RunDirectoryError
from lopt_lite.journal import Journal, read_facts


def _write(path: Path, *facts: dict) -> Path:
    journal = Journal(path)
    for fact in facts:
        journal.add(**fact)
    journal.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_facts_are_read_back_in_the_order_they_were_added(path):
    facts = [{"fact": "part", "number": n, "name": f"größe-{n}"} for n in (3, 1, 2)]
    _write(path, *facts)
    assert read_facts(path) == (facts, path.stat().st_size)
    assert Journal(path).facts == facts


def test_the_newest_matching_fact_wins(path):
    journal = Journal(path)
    for block, name in ((0, "a"), (1, "b"), (0, "c")):
        journal.add("checkpoint", block=block, name=name)
    assert journal.last("checkpoint")["name"] == "c"
    assert journal.last("checkpoint", block=1)["name"] == "b"
    assert journal.last("checkpoint", block=2) is None
    assert journal.last("block") is None
    assert [f["name"] for f in journal.all("checkpoint", block=0)] == ["a", "c"]


def test_a_journal_that_is_not_there_has_no_facts_and_is_made_when_opened(path):
    assert read_facts(path) == ([], 0)
    assert not path.exists()
    Journal(path).close()
    assert path.read_bytes() == b""


def test_every_cut_of_the_last_line_drops_that_line_alone(path):
    whole = _write(path, {"fact": "one"}, {"fact": "two", "text": "zwölf"}).read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert read_facts(path) == ([{"fact": "one"}], first), end
        assert path.stat().st_size == end, "reading must not change the file: status does it while training runs"
        journal = Journal(path)
        journal.add("three")
        journal.close()
        assert read_facts(path)[0] == [{"fact": "one"}, {"fact": "three"}], end


@pytest.mark.parametrize(
    "damaged",
    [b"{not json", b"", b"[1]", b'"text"', b'{"no": "fact"}', b'{"fact": 3}', b"\xff\xfe", b"\0\0\0\0", b"[" * 100_000],
)
def test_a_damaged_line_that_is_whole_is_an_error_that_names_it(path, damaged):
    content = b'{"fact": "one"}\n' + damaged + b'\n{"fact": "three"}\n'
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"damaged at line 2") as caught:
        Journal(path)
    assert str(path) in caught.value.found
    assert "--fresh" in caught.value.fix
    assert path.read_bytes() == content, "the evidence must stay"


@pytest.mark.parametrize("tail", [b"", b'{"fact": "fo', b"\0\0"])
@pytest.mark.parametrize("damaged", [b"{not json", b"", b"\xff\xfe", b"\0\0\0\0", b"[" * 100_000, "altered"])
def test_a_last_line_that_is_whole_and_damaged_is_dropped(path, damaged, tail):
    journal = Journal(path)
    journal.add("one", value=1)
    assert not journal.lost_last
    journal.add("two", value=2)
    journal.close()
    first, second = path.read_bytes().splitlines()
    line = second.replace(b'"value": 2', b'"value": 3') if damaged == "altered" else damaged
    content = first + b"\n" + line + b"\n" + tail
    path.write_bytes(content)
    assert read_facts(path) == ([{"fact": "one", "value": 1}], len(first) + 1)
    assert path.read_bytes() == content, "status reads while training runs"
    journal = Journal(path)
    assert journal.lost_last
    journal.add("two", value=2)
    journal.close()
    assert path.read_bytes().splitlines() == [first, second]


def test_a_damaged_line_that_is_all_there_is_is_an_error(path):
    path.write_bytes(b"{not json\n")
    with pytest.raises(RunDirectoryError, match="damaged at line 1"):
        read_facts(path)


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"fact": "learning-rate"}, "'learning-rate' does not say 'lr'"),
        ({"fact": "learning-rate", "lr": "fast"}, "'lr' is \"fast\", where a number above 0"),
        ({"fact": "learning-rate", "lr": None}, "'lr' is null"),
        ({"fact": "learning-rate", "lr": -1.0}, "'lr' is -1.0"),
        ({"fact": "learning-rate", "lr": 1e30}, "'lr' is 1e+30"),
        ({"fact": "learning-rate", "lr": True}, "'lr' is true"),
        ({"fact": "anchor-weight", "loss": 2.0, "answer_tokens": 3}, "does not say 'weight'"),
        ({"fact": "anchor-weight", "weight": -1, "loss": 2.0, "answer_tokens": 3}, "'weight' is -1"),
        ({"fact": "anchor-weight", "weight": 1, "answer_tokens": 3}, "does not say 'loss'"),
        ({"fact": "checkpoint", "block": 0}, "does not say 'name'"),
        ({"fact": "checkpoint", "block": -1, "name": "a"}, "'block' is -1"),
        ({"fact": "validation", "epoch": 1, "loss": "low"}, "'loss' is \"low\""),
        ({"fact": "validation", "epoch": 1}, "does not say 'loss'"),
        ({"fact": "started", "examples": "many"}, "'examples' is \"many\""),
        ({"fact": "answers", "tokens": [[1, 2], 3]}, "'tokens' is [[1, 2], 3]"),
        ({"fact": "residence", "device": "cpu", "micro_batch_tokens": None}, "'micro_batch_tokens' is null"),
        ({"fact": "residence", "device": "cpu", "recompute": 1}, "'recompute' is 1"),
    ],
    ids=str,
)
def test_a_fact_that_does_not_say_what_it_has_to_is_damage(path, fact, said):
    path.write_text(json.dumps({"fact": "one"}) + "\n" + json.dumps(fact) + "\n")
    with pytest.raises(RunDirectoryError, match="damaged at line 2") as caught:
        read_facts(path)
    assert said in caught.value.found


@pytest.mark.parametrize(
    "fact",
    [
        {"fact": "learning-rate", "lr": 1e-3},
        {"fact": "checkpoint", "block": 0, "name": "a"},
        {"fact": "residence", "device": "cpu", "micro_batch_tokens": 8, "head_slice_rows": None, "mode": "streamed"},
        {"fact": "of another version", "anything": [None]},
    ],
    ids=str,
)
def test_what_is_left_out_or_unknown_is_no_damage(path, fact):
    assert Journal(_write(path, fact)).facts == [fact]


def test_a_loss_that_is_no_finite_number_is_written_as_json_has_it(path):
    _write(path, {"fact": "validation", "epoch": 1, "loss": math.nan, "answer_tokens": 3})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(read_facts(path)[0][0]["loss"])


def test_a_fact_is_on_the_disk_before_add_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    journal = Journal(path)
    synced.clear()
    journal.add("one")
    assert synced == [path.stat().st_size]
    assert synced[0] > 0


def test_a_full_disk_is_said_and_the_fact_does_not_count(path, monkeypatch):
    journal = Journal(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DoesNotFitError, match="disk is full"):
        journal.add("one")
    assert journal.last("one") is None


def _half_a_line(monkeypatch, *, cuts_back: bool) -> None:
    """The next fact is written in half; what came of it can be taken off again, or not."""
    append, truncate = files.append_line, files.truncate

    def half(file, value, **named):
        file.write(json.dumps(value).encode()[:10])
        monkeypatch.setattr(files, "append_line", append)
        raise DoesNotFitError("the disk is full")

    def fails(*arguments):
        raise RunDirectoryError("cannot repair")

    monkeypatch.setattr(files, "append_line", half)
    monkeypatch.setattr(files, "truncate", truncate if cuts_back else fails)


def test_no_fact_follows_half_a_line(path, monkeypatch):
    journal = Journal(path)
    journal.add("one")
    _half_a_line(monkeypatch, cuts_back=True)
    with pytest.raises(DoesNotFitError):
        journal.add("two")
    journal.add("three")
    journal.close()
    assert [fact["fact"] for fact in read_facts(path)[0]] == ["one", "three"]


def test_where_half_a_line_stays_nothing_follows_it(path, monkeypatch):
    journal = Journal(path)
    journal.add("one")
    _half_a_line(monkeypatch, cuts_back=False)
    with pytest.raises(DoesNotFitError):
        journal.add("two")
    with pytest.raises(RunDirectoryError, match="cannot repair"):
        journal.add("three")
    journal.close()
    monkeypatch.undo()
    assert [fact["fact"] for fact in Journal(path).facts] == ["one"]


def test_a_journal_that_is_a_directory_is_an_error_of_the_run_directory(path):
    path.mkdir()
    with pytest.raises(RunDirectoryError, match="cannot read the journal"):
        Journal(path)


@given(
    st.lists(
        st.dictionaries(st.text(min_size=1).filter(lambda k: k != "fact"), st.text() | st.integers() | st.none()),
        max_size=8,
    )
)
def test_any_values_come_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    facts = [{"fact": f"f{n}", **value} for n, value in enumerate(values)]
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    assert read_facts(path)[0] == facts


def test_a_flipped_bit_is_damage_or_changes_no_fact(path):
    """Wherever it is: a digit of a rate that is another digit then is as plausible as the right one."""
    facts = [{"fact": "learning-rate", "lr": 8.4e-4, "loss": 6.5, "answer_tokens": 80}, {"fact": "größe", "n": "ä"}]
    whole = _write(path, *facts).read_bytes()
    silent = []
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                found, _ = read_facts(path)
            except RunDirectoryError:
                continue
            known = [{name: fact.get(name) for name in expected} for fact, expected in zip(found, facts, strict=False)]
            # A line whose end is gone is one that a crash has cut short.
            if known != facts[: len(known)]:
                silent.append((place, bit, found))
    assert silent == []


def test_a_journal_of_an_earlier_version_is_read_and_gone_on_with(path):
    path.write_text('{"fact": "started", "examples": 3}\n')
    _write(path, {"fact": "store-ready"})
    assert [fact["fact"] for fact in read_facts(path)[0]] == ["started", "store-ready"]
    first, second = path.read_text().splitlines()
    assert ("crc32" in first, "crc32" in second) == (False, True)
