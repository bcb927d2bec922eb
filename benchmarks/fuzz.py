"""Random and mutated bytes for everything that reads what strangers or a crash have written.

Readers of safetensors headers, of indexes of shards, of JSON Lines (up to tokens, with a tiny tokenizer) and of
journals get inputs made by atheris (libFuzzer), which looks for new paths through their code; without it (pip install
'lopt-lite[fuzz]'), by simple mutations of sound inputs. A reader may refuse an input in lopt-lite's own way; any other
error, an input that takes 10 seconds, or 500 MiB more than the imported libraries, ends the fuzzing as a failure.

    python -m benchmarks.fuzz --minutes 30     # for all readers together
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Bench, parser

NAME = "fuzz"
TARGETS = ("header", "index", "json_lines", "journal")
MOST_SECONDS, MOST_MIB = 10, 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a reader failed."""
    made = parser(NAME, __doc__)
    made.add_argument("--minutes", type=float, default=30, help="for all readers together (30)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    seconds = 1 if bench.quick else max(1, int(60 * options.minutes / len(TARGETS)))
    how = "atheris" if importlib.util.find_spec("atheris") is not None and not bench.quick else "mutations"
    rows = []
    for target in TARGETS:
        found = bench.measure(f"{target} for {seconds} s by {how}", partial(_fuzz, bench, target, seconds, how))
        bench.expect(found["exit_code"] == 0, f"{target} failed: {found['said']}")
        outcome = "sound" if found["exit_code"] == 0 else "failed"
        rows.append((target, how, found["inputs"], seconds, found["slowest_s"], found["growth_mib"], outcome))
    bench.table(("reader", "inputs made by", "inputs", "seconds", "slowest s", "growth MiB", "outcome"), rows)
    return bench.finish()


def _fuzz(bench: Bench, target: str, seconds: int, how: str) -> dict[str, Any]:
    corpus = (bench.directory / f"corpus-{target}").absolute()
    corpus.mkdir(exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-timeout={MOST_SECONDS}", "-max_len=4096"]
    command = [sys.executable, "-m", "benchmarks.fuzz_targets", target, how, str(MOST_MIB), str(corpus), *limits]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    said = process.stdout + process.stderr
    measured = re.findall(r"^MEASURED (\d+) inputs, slowest ([\d.]+) s, growth (\d+) MiB$", said, re.MULTILINE)
    inputs, slowest_s, growth_mib = measured[-1] if measured else (0, 0.0, 0)
    return {
        "exit_code": process.returncode,
        "inputs": int(inputs),
        "slowest_s": float(slowest_s),
        "growth_mib": int(growth_mib),
        "said": "" if process.returncode == 0 else said[-2000:],
    }


def corpus_files(directory: Path) -> list[bytes]:
    """What earlier starts kept."""
    return [path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()]


if __name__ == "__main__":
    sys.exit(main())
