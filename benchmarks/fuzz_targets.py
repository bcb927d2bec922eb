"""Readers that ``fuzz.py`` gives bytes to: ``python -m benchmarks.fuzz_targets TARGET HOW MOST_MIB CORPUS [OPTIONS]``.

A process of its own, since atheris must see the readers being imported and ends the process itself.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.fuzz import corpus_files

Reader = Callable[[bytes], None]


def reader(target: str, work: Path) -> tuple[Reader, list[bytes]]:
    """The function that reads bytes as ``target``, raising only what is a fault, and sound inputs to begin with."""
    from lopt_lite.errors import LoptError

    def refusing(read: Reader) -> Reader:
        def refuse_or_read(data: bytes) -> None:
            with contextlib.suppress(LoptError):
                read(data)

        return refuse_or_read

    make = {"header": _header, "index": _index, "json_lines": _json_lines, "journal": _journal}[target]
    read, seeds = make(work)
    return refusing(read), seeds


def _header(work: Path) -> tuple[Reader, list[bytes]]:
    from lopt_lite.checkpoints.header import read_header

    path = work / "model.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        header = read_header(path)
        for info in header.tensors.values():
            assert 0 <= info.start <= info.end <= len(data), info
            assert info.nbytes <= len(data), info

    def sound(tensors: dict[str, object], size: int) -> bytes:
        text = json.dumps(tensors).encode()
        return len(text).to_bytes(8, "little") + text + bytes(size)

    return read, [
        sound({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8),
        sound({"__metadata__": {"format": "pt"}, "b": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}, 2),
        sound({}, 0),
        (2**60).to_bytes(8, "little") + b"{}",
    ]


def _index(work: Path) -> tuple[Reader, list[bytes]]:
    from lopt_lite.checkpoints.weight_files import open_weights
    from lopt_lite.events import ignore

    path = work / "model.safetensors.index.json"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (work / "shard.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        weights = open_weights(path, ignore)
        for name in weights.names():
            assert weights.file_of(name).parent == work

    return read, [
        json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "shard.safetensors"}}).encode(),
        json.dumps({"weight_map": {"a": "../shard.safetensors"}}).encode(),
        json.dumps({"weight_map": {}}).encode(),
    ]


def _json_lines(work: Path) -> tuple[Reader, list[bytes]]:
    from lopt_lite.data.load import load_dataset
    from lopt_lite.events import ignore
    from tests.data.tiny_tokenizers import make_tokenizer

    path, tokenizer = work / "data.jsonl", make_tokenizer()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        dataset, report = load_dataset(path, tokenizer, max_length=32, skip_bad_lines=True, on_event=ignore)
        assert len(dataset) == report.examples
        assert int(dataset.lengths.max()) <= 32

    examples = [
        {"question": "a", "answer": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"text": "a b c"},
        {"prompt": "a", "completion": "b"},
    ]
    return read, [json.dumps(example).encode() + b"\n" for example in examples] + [b"\xef\xbb\xbf{}\r\n\n[1]\n"]


def _journal(work: Path) -> tuple[Reader, list[bytes]]:
    from lopt_lite.journal import Journal, read_facts

    path = work / "journal.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        facts, whole_bytes = read_facts(path)
        assert data[:whole_bytes].count(b"\n") == len(facts)
        journal = Journal(path)
        journal.add("block", block=1)
        journal.close()
        assert read_facts(path)[0] == [*facts, {"fact": "block", "block": 1}]

    return read, [b'{"fact": "store-ready"}\n{"fact": "block", "block": 0, "sha256": "ab"}\n', b'{"fact": "a"}\n{"fa']


class Measured:
    """Calls a reader, and prints the counts that ``fuzz.py`` reads now and then."""

    def __init__(self, read: Reader, most_mib: int) -> None:
        self._read, self._most_mib = read, most_mib
        self._inputs, self._slowest_s = 0, 0.0
        self._before_mib = self._peak_mib()
        self._said_s = time.monotonic()

    def __call__(self, data: bytes) -> None:
        started = time.monotonic()
        self._read(data)
        now = time.monotonic()
        self._inputs += 1
        self._slowest_s = max(self._slowest_s, now - started)
        if now - self._said_s > 0.5:
            self._said_s = now
            self.say()

    def say(self) -> None:
        """Print the counts; an error where memory has grown too much."""
        growth_mib = self._peak_mib() - self._before_mib
        print(f"MEASURED {self._inputs} inputs, slowest {self._slowest_s:.2f} s, growth {growth_mib} MiB", flush=True)
        if growth_mib > self._most_mib:
            raise MemoryError(f"{growth_mib} MiB more than at the start")

    @staticmethod
    def _peak_mib() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def mutate(read: Callable[[bytes], None], seeds: list[bytes], seconds: float) -> None:
    """Give ``read`` mutations of ``seeds`` for so long: bytes changed, cut out, doubled, mixed, numbers exchanged."""
    rng = random.Random(0)
    end = time.monotonic() + seconds
    numbers = [b"0", b"-1", b"1e999", b"18446744073709551616", b"9" * 400, b"null", b'""', b"[[", b"NaN", b"\\ud800"]
    while time.monotonic() < end:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(5)
            if kind == 0 and data:
                data[at % len(data)] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 16)]
            elif kind == 2:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            elif kind == 3:
                other = rng.choice(seeds)
                data[at:at] = other[rng.randrange(len(other) + 1) :]
            else:
                found = re.search(rb"\d+", bytes(data[at:]))
                if found:
                    data[at + found.start() : at + found.end()] = rng.choice(numbers)
        read(bytes(data))


def fuzz(target: str, how: str, most_mib: int, corpus: Path, options: list[str]) -> None:
    """Fuzz until the time in ``options`` (libFuzzer's) is over, or a fault is found."""
    with tempfile.TemporaryDirectory() as work:
        if how == "mutations":
            read, seeds = reader(target, Path(work))
            measured = Measured(read, most_mib)
            seconds = next(float(option.split("=")[1]) for option in options if "max_total_time" in option)
            mutate(measured, [*seeds, *corpus_files(corpus)], seconds)
            measured.say()
            return
        import atheris

        with atheris.instrument_imports(include=["lopt_lite"]):
            read, seeds = reader(target, Path(work))
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        atheris.Setup(
            [sys.argv[0], str(corpus), f"-artifact_prefix={corpus.parent}/", *options], Measured(read, most_mib)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    _, target, how, most_mib, corpus, *options = sys.argv
    fuzz(target, how, int(most_mib), Path(corpus), options)
