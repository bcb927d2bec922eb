"""What a run leaves, and whether two runs left the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lopt_lite.journal import read_facts
from lopt_lite.training.metrics import read_metrics


def left_files(run: Path) -> set[str]:
    """All files and directories of a run but its lock."""
    return {str(p.relative_to(run)) for p in run.rglob("*") if not p.name.startswith("lock")}


def steps(run: Path) -> list[tuple[Any, ...]]:
    """The steps that its metrics tell of, without what depends on the machine."""
    keys = ("block", "phase", "epoch", "step", "steps", "loss", "lr", "grad_norm", "tokens")
    return [tuple(record[key] for key in keys) for record in read_metrics(run / "metrics.jsonl")]


def facts(run: Path) -> list[dict[str, Any]]:
    """What was done; checkpoints depend on the clock, peaks and predictions on the process."""
    found = [fact for fact in read_facts(run / "journal.jsonl")[0] if fact["fact"] not in ("checkpoint", "peak")]
    return [{key: value for key, value in fact.items() if not key.startswith("predicted")} for fact in found]


def differences(run: Path, reference: Path) -> list[str]:
    """In what ``run`` is not ``reference``: bytes of adapter, model or store, losses, facts, files left over."""
    found = []
    results = [path for part in ("adapter", "model") for path in (reference / part).glob("*")]
    if not any(path.suffix == ".safetensors" for path in results):
        raise ValueError(f"{reference} has no result")
    for path in (*results, *(reference / "store").glob("*.safetensors")):
        name = path.relative_to(reference)
        if not (run / name).is_file() or (run / name).read_bytes() != path.read_bytes():
            found.append(f"other bytes: {name}")
    found += [
        f"other {what}: {read(run)} instead of {read(reference)}"
        for what, read in (("steps", steps), ("facts", facts), ("files", left_files))
        if read(run) != read(reference)  # type: ignore[operator]
    ]
    return found


def assert_same(run: Path, reference: Path) -> None:
    """There are no :func:`differences`."""
    assert not differences(run, reference)
