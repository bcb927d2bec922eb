"""A run directory: where its parts lie, and whether it belongs to the settings it is asked to continue with."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lopt_lite import files
from lopt_lite.errors import RunDirectoryError, SettingsError
from lopt_lite.journal import last_fact, read_facts
from lopt_lite.option_fields import flag, wrong_type
from lopt_lite.recipe import ModelKind
from lopt_lite.settings import TrainSettings

RUNS_DIRECTORY = "runs"
_SUM = "crc32"

_RECORDS = ("settings.json", "journal.jsonl", "metrics.jsonl", "report.html", "loss.png")
_OWNED = (*_RECORDS, "store", "cache", "blocks", "adapter", "model")
#: Journal facts that say that the result is there: of LoRA and of full tuning.
RESULT_FACTS = ("adapter", "model")

#: Journal facts that say where layers are while a run trains, makes targets, or lets the untouched model answer.
RESIDENCE_FACTS = ("residence", "matching-residence", "answering-residence")

#: A store is complete when this is there. (The module that makes stores takes a second to import.)
_STORE_INDEX = "model.safetensors.index.json"
#: Options that decide which tokens and examples are taken from a file.
_SHAPE_DATA = ("max_length", "skip_bad_lines", "seed", "epochs", "max_steps", "batch_size")
#: What a run reads, and how the user names it.
_READ = (("model", "MODEL"), ("data", "DATA"), ("validation", "--validation"), ("retain", "--retain-data"))

#: Options whose defaults follow from others: where those have changed, they are what there is to tell.
_FOLLOWS = {
    "lr": ("tune", "schedule"),
    "lr_early": ("lr", "tune", "schedule"),
    "quantize": ("tune",),
    "objective": ("schedule",),
    "last_layers": ("blocks", "objective", "schedule"),
    "retain": ("blocks", "schedule"),
}

#: What to say beside an option that a run keeps for a reason which is not to be seen.
_WHY = {"memory": "in which parts sums are made follows from it, and so does the result"}

_START_ANEW = "restore it from a backup, start anew with --fresh, or choose another directory"
_PACKAGES = ("lopt-lite", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class RunPaths:
    """The parts of a run directory."""

    root: Path

    @property
    def settings(self) -> Path:
        """Resolved settings, fingerprints and versions."""
        return self.root / "settings.json"

    @property
    def journal(self) -> Path:
        """Durable facts."""
        return self.root / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        """One line per optimiser step."""
        return self.root / "metrics.jsonl"

    @property
    def store(self) -> Path:
        """The default place of the layer store."""
        return self.root / "store"

    @property
    def adapter(self) -> Path:
        """The result of LoRA tuning."""
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        """The result of full tuning."""
        return self.root / "model"

    def cache(self, block: int) -> Path:
        """Inputs of block ``block``."""
        return self.root / "cache" / f"block-{block:02d}"

    @property
    def anchors(self) -> Path:
        """What the untouched model made of anchored tokens."""
        return self.root / "cache" / "anchors"

    def targets(self, block: int) -> Path:
        """What the unquantised layers of block ``block`` make of its inputs."""
        return self.root / "cache" / f"targets-{block:02d}"

    def unquantised(self, block: int) -> Path:
        """The unquantised layers of block ``block``, while its targets are written."""
        return self.root / "cache" / f"unquantised-{block:02d}"

    def block(self, block: int) -> Path:
        """What belongs to block ``block``: its adapter or layers, and checkpoints while it trains."""
        return self.root / "blocks" / f"block-{block:02d}"

    def checkpoint(self, block: int) -> Path:
        """The checkpoint of a block in mid-training."""
        return self.block(block) / "checkpoint"

    def block_adapter(self, block: int) -> Path:
        """The trained adapter of a block."""
        return self.block(block) / "adapter.safetensors"

    def around(self, block: int) -> Path:
        """Embedding, final norm and LM head where they were trained, with the last block."""
        return self.block(block) / "around.safetensors"

    def block_layers(self, block: int, layers: Iterable[int]) -> dict[int, Path]:
        """The fully tuned layers of a block, by their numbers."""
        return {index: self.block(block) / f"layer-{index:05d}.safetensors" for index in layers}


def run_directory(settings: TrainSettings, model_name: str) -> Path:
    """``--output``, or ``runs/MODEL-DATA``."""
    if settings.output is not None:
        return Path(settings.output)
    return Path(RUNS_DIRECTORY) / f"{files.safe_name(model_name)}-{files.safe_name(Path(settings.data).stem)}"


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@dataclass(frozen=True)
class RunIdentity:
    """What a run is: settings that decide its result, and fingerprints of what it reads."""

    settings: TrainSettings
    model_origin: str
    model_fingerprint: str
    model_kind: ModelKind
    data_fingerprint: str
    validation_fingerprint: str | None
    store: str
    device: str
    retain_fingerprint: str | None = None
    model_snapshot: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of settings.json."""
        return {
            "settings": self.settings.result_settings(),
            "model": {
                "given": self.settings.model,
                "origin": self.model_origin,
                "fingerprint": self.model_fingerprint,
                **({} if self.model_snapshot is None else {"snapshot": self.model_snapshot}),
                **dataclasses.asdict(self.model_kind),
            },
            "data": {"given": self.settings.data, "fingerprint": self.data_fingerprint},
            "validation": {"given": self.settings.validation, "fingerprint": self.validation_fingerprint},
            "retain": {"given": self.settings.retain_data, "fingerprint": self.retain_fingerprint},
            "config": list(self.settings.config),
            "store": self.store,
            "device": self.device,
            "versions": versions(),
        }


def kept_snapshot(content: dict[str, Any]) -> Path | None:
    """Where a model of the hub was read from when the run began, if it still is there: the hub may have another by now.

    Parameters
    ----------
    content:
        That of settings.json. Earlier versions noted none.
    """
    noted = content["model"].get("snapshot")
    return Path(noted) if isinstance(noted, str) and Path(noted).is_dir() else None


def read_settings(paths: RunPaths) -> dict[str, Any]:
    """The content of a run's settings.json.

    Raises
    ------
    RunDirectoryError
        The directory is no run, or the file is damaged.
    """
    if not paths.settings.is_file():
        raise RunDirectoryError(
            f"{paths.root} is not a run directory (it has no settings.json)",
            expected="a directory that 'lopt-lite train' made",
        )
    content = files.read_json(paths.settings, what="the settings file", error=RunDirectoryError, fix=_START_ANEW)
    if not _is_runs(content):
        raise RunDirectoryError(f"{paths.settings} is damaged or not a run's", fix=_START_ANEW)
    # Another scale or seed is as plausible as the right one. Runs of earlier versions have no checksum.
    if content.pop(_SUM, None) not in (None, _sum(content)):
        raise RunDirectoryError(
            f"{paths.settings} was altered: its checksum is of something else",
            expected="what the run wrote when it began",
            fix=_START_ANEW,
        )
    return content


def _is_runs(content: Any) -> bool:
    """Whether this has the form of a settings.json, whatever it says."""
    if not isinstance(content, dict):
        return False
    named = [content.get(name) for name in ("settings", "model", "data")]
    others = [content[name] for name in ("validation", "retain", "versions") if content.get(name) is not None]
    if not all(isinstance(part, dict) for part in [*named, *others]):
        return False
    texts = [content.get("store"), content.get("device"), content["model"].get("given"), content["data"].get("given")]
    directories = content.get("config", [])
    return (
        isinstance(directories, list)
        and all(isinstance(text, str) for text in [*texts, *directories])
        and wrong_type(TrainSettings, content["settings"]) is None
    )


def _write_settings(paths: RunPaths, content: dict[str, Any]) -> None:
    files.write_json(paths.settings, {**content, _SUM: _sum(content)})


def _sum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def check_store_place(paths: RunPaths, store: Path) -> None:
    """Refuse a store where something else of the run lies, or the run's own lock and journal.

    Raises
    ------
    SettingsError
        ``store`` is the run directory, or one of its parts other than RUN/store.
    """
    root, place = paths.root.resolve(), store.resolve()
    if place == paths.store.resolve() or not (place == root or _is_owned(root, place)):
        return
    raise SettingsError(
        f"--store {store} is the run directory {paths.root}, or a part of it that holds something else",
        expected="a directory of its own, such as that run's store/ (the default)",
        fix="leave --store out, or name another directory",
    )


def check_not_deleted(paths: RunPaths, read: Iterable[Path]) -> None:
    """Refuse to start anew on files that :func:`start_fresh` would delete.

    Parameters
    ----------
    read:
        Files and directories that the new run is to read.

    Raises
    ------
    RunDirectoryError
        One of them lies in a part of the run directory.
    """
    root = paths.root.resolve()
    for path in read:
        if _is_owned(root, path.resolve()):
            raise RunDirectoryError(
                f"--fresh would delete {path}, which this run is to read: it belongs to the run in {paths.root}",
                fix="choose another directory with --output",
            )


def _is_owned(root: Path, path: Path) -> bool:
    return any(path.is_relative_to(root / name) for name in _OWNED)


def start_fresh(paths: RunPaths) -> None:
    """Delete what a run owns in its directory.

    The journal goes first, so that after a crash half-way nothing deleted counts as done; the settings go last, so that
    what is left still looks like a run.

    Raises
    ------
    RunDirectoryError
        The directory holds something else; nothing was deleted.
    """
    looks_damaged = paths.settings.exists() and paths.journal.exists()
    if not looks_damaged and not _has_settings(paths):
        _refuse_strangers(paths)
    files.remove_file(paths.journal)
    # A store whose index is there counts as complete.
    if paths.model.is_dir():
        files.remove_file(paths.model / _STORE_INDEX)
    for name in reversed(_OWNED):
        files.remove_tree(paths.root / name)


def claim(paths: RunPaths, identity: RunIdentity) -> list[str]:
    """Make the directory this run's, or check that it is already.

    Returns
    -------
    list of str
        Remarks for the user about differences that do not forbid going on (device, versions).

    Raises
    ------
    RunDirectoryError
        The directory holds something else, or a run whose result would differ.
    """
    wanted = identity.to_json()
    if not paths.settings.exists():
        _refuse_strangers(paths)
        _write_settings(paths, wanted)
        return []
    found = read_settings(paths)
    done = any(last_fact(read_facts(paths.journal)[0], fact) for fact in RESULT_FACTS)
    differences = _differences(found, wanted, done=done)
    if differences:
        raise RunDirectoryError(
            f"the run in {paths.root} was started with " + "; ".join(differences),
            fix="go back to the old value to continue it, start anew with --fresh, or choose another --output",
        )
    remarks = []
    if found["device"] != wanted["device"]:
        remarks.append(
            f"the run was started on {found['device']} and continues on {wanted['device']}: bytes may differ"
        )
    old, new = found.get("versions", {}), wanted["versions"]
    changed = [f"{n} {old[n]} -> {new[n]}" for n in new if n in old and old[n] != new[n]]
    if changed:
        remarks.append(f"versions changed since the run was started ({', '.join(changed)}): bytes may differ")
    return remarks


def has_results(paths: RunPaths) -> bool:
    """Whether a run has left anything that it trained."""
    return any(path.is_dir() for path in (paths.root / "blocks", paths.adapter, paths.model))


def check_usable(paths: RunPaths) -> None:
    """Refuse a place in which no run could be, as a run itself would.

    Raises
    ------
    RunDirectoryError
        It is no directory, or holds something else.
    """
    if not paths.root.exists():
        return
    if not paths.root.is_dir():
        raise RunDirectoryError(f"{paths.root} is not a directory", fix="choose another directory with --output")
    if not paths.settings.exists():
        _refuse_strangers(paths)


def _has_settings(paths: RunPaths) -> bool:
    try:
        read_settings(paths)
    except RunDirectoryError:
        return False
    return True


def _refuse_strangers(paths: RunPaths) -> None:
    others = sorted(p.name for p in paths.root.iterdir() if not p.name.startswith((".", "lock")))
    if others:
        raise RunDirectoryError(
            f"{paths.root} is not empty and is no run directory (it holds {others[0]})",
            fix="choose another directory with --output",
        )


def note_store(paths: RunPaths, store: Path) -> None:
    """Write down where the run's weights are now, where later commands would not find them."""
    content = read_settings(paths)
    if current_store(paths, content).absolute() != store.absolute():
        _write_settings(paths, {**content, "store": str(store.absolute())})


def current_store(paths: RunPaths, content: dict[str, Any]) -> Path:
    """Where a run's weights are, given the content of its settings.json; a run that was moved takes its own along."""
    return paths.store if (paths.store / _STORE_INDEX).is_file() else Path(str(content["store"]))


def _last_layers(settings: dict[str, Any], layers: int) -> int:
    """Layers of the last block, also of a run that only says into how many blocks of the same size it cuts."""
    stated = settings.get("last_layers")
    return layers // int(settings["blocks"]) if stated is None else int(stated)


def _differences(found: dict[str, Any], wanted: dict[str, Any], *, done: bool) -> list[str]:
    """What tells a run from the one that is wanted, for the user; the budget of one that is done does not."""
    changed: dict[str, tuple[Any, Any]] = {}
    # An option that came with a later release was at its default when the run was started.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    for name, value in wanted["settings"].items():
        old = found["settings"].get(name, defaults[name])
        if name == "last_layers":
            layers = wanted["model"]["layers"]
            old, value = (_last_layers(content["settings"], layers) for content in (found, wanted))
        if isinstance(value, (tuple, list)):
            value = list(value)
        if old != value and not (done and name == "memory"):
            changed[name] = old, value
    differences = [
        _difference(name, old, value)
        for name, (old, value) in changed.items()
        if not any(leader in changed for leader in _FOLLOWS.get(name, ()))
    ]
    reshaped = any(name in _SHAPE_DATA for name in changed)
    reshaped = reshaped or found.get("validation", {}).get("given") != wanted["validation"]["given"]
    for part, name in _READ:
        old, new = found.get(part, {}), wanted[part]
        if old.get("fingerprint") != new["fingerprint"]:
            same_name = old.get("given") == new["given"]
            if same_name and reshaped:
                continue  # the same file, of which other tokens or examples are taken: that was said
            if same_name:
                which = "with other content than it has now"
            else:
                given = new["given"]
                which = "which is not given" if given is None else f"not {given} (the contents differ)"
            began = f"no {name}" if old.get("given") is None else f"{name} {old['given']}"
            differences.append(f"{began}, {which}")
    return differences


def _difference(name: str, old: Any, value: Any) -> str:
    """What an option was when the run was started, and what it is now."""
    if isinstance(value, bool):
        return f"{flag(name)}, which is not given" if old else f"no {flag(name)}, which is given now"
    began = f"no {flag(name)}" if old is None else f"{flag(name)} {old}"
    said = f"{began}, which is not given" if value is None else f"{began}, not {value}"
    return f"{said} ({_WHY[name]})" if name in _WHY else said
