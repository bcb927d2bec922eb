"""Every benchmark runs, with tiny shapes: a table comes out, and what was measured is kept for the next start."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.alone import Alone, FailedAlone, Killed, Refused
from benchmarks.report import RESULTS, Bench, describe, parser
from benchmarks.shapes import Shape, write_data, write_store
from lopt_lite.checkpoints.store_index import layer_shard, store_info

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if "def main(" in p.read_text(encoding="utf-8"))
TINY = Shape(64, 3, 128, 4, 2, 512)


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of the tables in ``text``, by column."""
    rows = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        rows += [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("shapes") / "store", TINY)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_start_prints_a_table_and_the_next_start_keeps_it(name, tmp_path, capsys, monkeypatch):
    main = importlib.import_module(f"benchmarks.{name}").main
    arguments = ["--quick", "--directory", str(tmp_path / "work")]
    threads = torch.get_num_threads()
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    first = capsys.readouterr()
    rows = table_rows(first.out)
    assert rows and all(all(row.values()) for row in rows)
    assert re.search(r"^Machine: .+ cores .+ GiB of memory; torch \d", first.out, re.MULTILINE)
    assert "..." in first.err

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Alone, "_start", never)
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_about_benchmarks_tells_of_each(name):
    assert f"`{name}.py`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_a_quick_start_is_never_written_down(tmp_path):
    options = parser("x", "x").parse_args(["--quick", "--write", "--directory", str(tmp_path)])
    with pytest.raises(SystemExit, match="nothing that is worth writing down"):
        Bench.start("x", "x", options, [])


def test_what_is_not_as_expected_is_told_and_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path / "results")
    arguments = ["--write", "--directory", str(tmp_path / "work")]
    bench = Bench.start("x", "What it is.", parser("x", "x").parse_args(arguments), arguments)
    bench.table(("name", "MiB"), [("a", 1234), ("b", 5)])
    bench.expect(True, "never said")
    bench.expect(False, "a took too much")
    assert bench.finish() == 1
    written = (tmp_path / "results" / "x.md").read_text()
    assert written == capsys.readouterr().out
    assert "Not as it should be: a took too much." in written and "never said" not in written
    assert "python -m benchmarks.x\n" in written and str(tmp_path) not in written
    assert table_rows(written) == [{"name": "a", "MiB": "1,234"}, {"name": "b", "MiB": "5"}]


def test_every_published_result_has_its_script():
    assert all(path.stem in SCRIPTS for path in RESULTS.glob("*.md"))


def test_a_multiplied_layer_is_a_whole_store(store):
    info = store_info(store)
    assert info is not None and info.layers == TINY.layers
    index = json.loads((store / "model.safetensors.index.json").read_text())
    first = load_file(store / layer_shard(0))
    for number in range(TINY.layers):
        path = store / layer_shard(number)
        assert info.shards[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        for name, tensor in first.items():
            assert torch.equal(tensors[name.replace("layers.0.", f"layers.{number}.")], tensor)
    total = sum(t.numel() * t.element_size() for p in store.glob("*.safetensors") for t in load_file(p).values())
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == sum(len(load_file(p)) for p in store.glob("*.safetensors"))


def test_parameters_of_a_shape_are_counted(tmp_path):
    dense = write_store(tmp_path / "dense", TINY, "none")
    held = [t for p in dense.glob("*.safetensors") for t in load_file(p).values()]
    assert sum(t.numel() for t in held) == TINY.parameters


def test_a_process_of_its_own_tells_its_peak_its_refusal_and_its_end(store, tmp_path):
    alone = Alone(threads=1, warm=True)
    settings = {
        "model": str(store),
        "data": str(write_data(tmp_path / "data.jsonl", 4, 32)),
        "output": str(tmp_path / "run"),
        "batch_size": 2,
        "max_length": 32,
        "checkpoint_every": "0s",
        "device": "cpu",
    }
    with pytest.raises(Refused) as refused:
        alone.run("train", **settings, memory="1MiB")
    assert refused.value.needs_mib > 100
    with pytest.raises(FailedAlone, match="not-there"):
        alone.run("train", **{**settings, "data": str(tmp_path / "not-there")})
    with pytest.raises(Killed):
        alone.run("train", **settings, fresh=True, kill_after_step=1)
    found = alone.run("train", **settings)
    assert 0 < found["start_bytes"] < found["peak_bytes"] < 2**31
    assert [step["block"] for step in found["steps"]] == [1]
    assert describe(found["residence"]).startswith(("dequantised", "resident", "recomputed", "streamed"))
