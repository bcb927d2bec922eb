"""From the user's checkpoint to a layer store, tensor by tensor.

Only one tensor of the source is in memory at a time (for fused experts: the tensors that make one model tensor).
Each finished shard is a durable fact in the store's journal, so an interrupted build goes on with the next shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lopt_lite import files
from lopt_lite.checkpoints.integrity import DamagedFileError, sha256_of
from lopt_lite.checkpoints.locate import CONFIG_NAME, ModelFiles
from lopt_lite.checkpoints.matrices import matrices_besides, told_by_layers
from lopt_lite.checkpoints.names import plan_names, unused_names
from lopt_lite.checkpoints.shard_writer import write_shard
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store_index import INDEX_NAME, STORE_VERSION, StoreInfo, standing_store, store_info
from lopt_lite.checkpoints.store_plan import ShardPlan, StoreSource, check_tensors, plan_shards
from lopt_lite.checkpoints.store_tensors import StoreTensors, Transform
from lopt_lite.checkpoints.tied_head import check_tie, embed_with_head
from lopt_lite.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from lopt_lite.errors import ModelError, RunDirectoryError
from lopt_lite.events import Notice, OnEvent, Progress, ignore
from lopt_lite.journal import Journal, read_facts
from lopt_lite.locks import locked

JOURNAL_NAME = "journal.jsonl"

#: Files that only building needs, not part of what is handed out.
BUILD_FILES = (JOURNAL_NAME, "lock", "lock.pid")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class StoreBuilder:
    """Writes the store of one model.

    Parameters
    ----------
    files_:
        The model's files.
    directory:
        Where the store goes; made if missing.
    quantize:
        ``"nf4"`` or ``"none"``.
    dtype:
        Type of what stays unquantised, and of dequantised weights.
    device:
        Where to quantise.
    transform:
        Applied to each tensor (by the model's name) before it is quantised or stored, to merge an adapter, say.
    transform_fingerprint:
        Tells transforms apart, so that a build is never continued with another one.
    layers:
        Store only these layers, and nothing around them; None for the whole model.
    untie:
        Store the LM head of a model that ties it to its embedding as a tensor of its own: ``transform`` gets it by its
        own name, as a copy of the embedding.
    anew:
        What is in ``directory`` now will be deleted before :meth:`build`.
    tokenizer:
        The model's, where it is loaded already; None to load it when it is written.
    check:
        Called between shards; may raise to stop.

    Raises
    ------
    ModelError
        Tensors are missing, have other shapes than the config says, or are not finite numbers; or the LM head is tied
        in the config and differs from the embedding.
    RunDirectoryError
        The directory holds the store of another model or of other settings.
    """

    def __init__(
        self,
        files_: ModelFiles,
        directory: Path,
        *,
        quantize: str,
        dtype: str,
        device: torch.device,
        transform: Transform | None = None,
        transform_fingerprint: str = "",
        layers: range | None = None,
        untie: bool = False,
        anew: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        check: Callable[[], None] = lambda: None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._files = files_
        self._tokenizer = tokenizer
        self._directory = directory
        self._transform_fingerprint = transform_fingerprint
        self._check = check
        self._on_event = on_event
        skeleton = Skeleton(files_, dtype=DTYPES[dtype])
        self._skeleton = skeleton
        self._partial = layers is not None
        self._layers = range(skeleton.layer_count) if layers is None else layers
        recipes = plan_names(files_.weights.names(), skeleton.model, skeleton.state_shapes)
        embed_with_head(skeleton, recipes)
        # Weights that were 4-bit before, and norms beside them, are kept in bfloat16 whatever is computed in.
        stored_dtype = torch.bfloat16 if quantize == "nf4" else DTYPES[dtype]
        self._source = StoreSource(files_, skeleton, recipes, quantize, stored_dtype, untie and skeleton.tied)
        linear = skeleton.linear_names
        self._unquantized = matrices_besides(skeleton, self._layers, linear) if self._source.nf4 else {}
        check_tensors(self._source)
        # Of some layers alone, neither embedding nor head is stored.
        self._tie_checked = self._partial or not skeleton.tied
        if not self._tie_checked and (anew or not self._stands()):
            self._check_tie()
        self._plans = plan_shards(self._source, layers)
        self._tensors = StoreTensors(self._source, device, transform)

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Names (within their layers) of matrices that NF4 leaves as they are."""
        return tuple(self._unquantized)

    def build(self) -> bool:
        """Write what is missing; returns False when the store was complete before."""
        if self._directory.exists() and not self._directory.is_dir():
            raise RunDirectoryError(f"{self._directory} is not a directory", fix="name a new or empty directory")
        # The index is written last. A complete store is not locked, as it may be of someone else, and read-only.
        complete = self._already_complete()
        if complete and self._has_config():
            return False
        files.make_directory(self._directory)
        with locked(self._directory, what="the store", wait=True, check=self._check, on_event=self._on_event):
            if self._already_complete():
                if not self._has_config():
                    path = self._directory / CONFIG_NAME
                    self._on_event(
                        Notice(text=f"{path} is missing or damaged: what goes with the store is written again")
                    )
                    self._write_side_files()
                return False
            self._refuse_strangers()
            files.remove_stray_temporaries(self._directory)
            journal = Journal(self._directory / JOURNAL_NAME)
            try:
                self._write(journal)
            finally:
                journal.close()
        return True

    def rebuild(self, name: str) -> None:
        """Write one damaged or missing shard of the complete store again, with the bytes that it had.

        Raises
        ------
        ModelError
            What came out is not what was there: made by other versions of the libraries, or on another device.
        RunDirectoryError, DoesNotFitError
            The store is of another model or of other settings, or the shard cannot be written.
        """
        path = self._directory / name
        plan = next(plan for plan in self._plans if plan.name == name)
        with locked(self._directory, what="the store", wait=True, check=self._check, on_event=self._on_event):
            info = store_info(self._directory)
            if info is None or not self._already_complete():
                raise RunDirectoryError(f"{self._directory} holds no complete store", fix="run the same command again")
            expected = info.shards[name]["sha256"]
            try:
                if sha256_of(path) == expected:
                    return  # another process has done it
                damage = "damaged"
            except DamagedFileError:
                damage = "missing"
            text = f"the store's shard {path} is {damage}: it is made again from {self._files.origin}"
            self._on_event(Notice(text=text))
            needed = sum(spec.nbytes for spec in plan.specs) + files.BESIDE_BYTES
            files.require_free_space(self._directory, needed, what=f"the shard {name}")
            made = write_shard(path, plan.specs, self._tensors.of(plan), metadata={"format": "pt"})
            if made.sha256 != expected:
                raise ModelError(
                    f"the store's shard {path} was damaged, and what is made from the model now has the "
                    f"sha256 {made.sha256}",
                    expected=f"{expected}, as the store's index says",
                    fix="use the device and the versions that made the store, restore the file from a backup, or make "
                    f"the store anew: delete {self._directory}, and start runs that use it with --fresh",
                )

    def _stands(self) -> bool:
        """Whether a complete store of this model is there. What is wrong with what is there, :meth:`build` tells."""
        try:
            info = standing_store(self._directory)
        except (RunDirectoryError, OSError):
            return False
        return info is not None and info.model_fingerprint == self._files.fingerprint()

    def _check_tie(self) -> None:
        """Compare a tied head with the embedding, once: it may take reading gigabytes."""
        if not self._tie_checked:
            check_tie(self._files, self._skeleton, self._source.recipes, self._source.dtype)
        self._tie_checked = True

    def _already_complete(self) -> bool:
        # What a damaged index said is known once more when the shards are gone through.
        info = standing_store(self._directory)
        if info is None:
            return False
        self._compare(
            {"quantize": info.quantize, "dtype": info.dtype, "model": info.model_fingerprint, "transform": ""}
        )
        # An index that lists other shards than this model has is damaged too, and is written again.
        return set(info.shards) == self._shard_names()

    def _has_config(self) -> bool:
        """Whether a complete store has its configuration. It has no checksum: people may put it right by hand."""
        try:
            found = files.read_json(self._directory / CONFIG_NAME, what="the configuration", error=ModelError)
        except ModelError:
            return False
        return isinstance(found, dict) and bool(found)

    def _shard_names(self) -> set[str]:
        return {plan.name for plan in self._plans}

    def _identity(self) -> dict[str, str]:
        return {
            "quantize": self._source.quantize,
            "dtype": self._source.dtype_name,
            "model": self._files.fingerprint(),
            "transform": self._transform_fingerprint,
        }

    def _compare(self, found: dict[str, str]) -> None:
        wanted = self._identity()
        for key, value in wanted.items():
            if found.get(key) != value:
                raise RunDirectoryError(
                    f"the store {self._directory} was made with {key} {found.get(key)}",
                    expected=f"{key} {value}",
                    fix="use another directory (train: another --store), start a run anew with --fresh, or go back to "
                    "the old model or value",
                )

    def _refuse_strangers(self) -> None:
        """Do not write into a directory that holds something else."""
        journal = self._directory / JOURNAL_NAME
        facts, _ = read_facts(journal)
        if facts and facts[0]["fact"] == "store":
            return
        # A crash may leave an empty journal; one with other facts is a run's.
        others = sorted(
            p.name
            for p in self._directory.iterdir()
            if not p.name.startswith(("lock", ".")) and (facts or p != journal)
        )
        if others:
            raise RunDirectoryError(
                f"{self._directory} is not empty and is no store (it holds {others[0]})",
                fix="name a new or empty directory",
            )

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, journal: Journal) -> None:
        self._check_tie()  # a store that stood when this was made, of an earlier version perhaps, may be gone by now
        made = journal.last("store")
        if made is None:
            journal.add("store", **self._identity())
        else:
            self._compare({k: made.get(k, "") for k in self._identity()})
        done = {f["name"]: f for f in journal.all("shard")}
        remaining = [p for p in self._plans if not self._shard_stands(p, done)]
        needed = sum(spec.nbytes for plan in remaining for spec in plan.specs) + files.BESIDE_BYTES
        files.require_free_space(self._directory, needed, what="the store")
        self._tell_what_is_left_out()
        task = "quantising" if self._source.nf4 else "preparing"
        total = len(self._plans)
        for number, plan in enumerate(remaining, start=total - len(remaining) + 1):
            self._check()
            record = write_shard(
                self._directory / plan.name, plan.specs, self._tensors.of(plan), metadata={"format": "pt"}
            )
            journal.add("shard", name=plan.name, bytes=record.bytes, sha256=record.sha256)
            self._on_event(Progress(task=task, done=number, total=total, unit="shards"))
        self._write_side_files()
        made_shards = [fact for fact in journal.all("shard") if fact["name"] in self._shard_names()]
        self._write_index({f["name"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in made_shards})

    def _tell_what_is_left_out(self) -> None:
        """Name what is not quantised, and tensors of the model's files that are not used."""
        if self._unquantized:
            self._on_event(
                Notice(
                    text=f"{told_by_layers(self._unquantized, len(self._layers))} cannot be quantised "
                    f"(not a plain linear layer) and stay in {self._source.dtype_name}"
                )
            )
        unused = unused_names(self._files.weights.names(), self._source.recipes, self._skeleton.model)
        # A store of some layers is made beside one of the whole model, which has told it.
        if unused and not self._partial:
            self._on_event(
                Notice(
                    text=f"tensors of the model's files that are not used: {len(unused)}, such as {unused[0]}; "
                    f"{self._skeleton.architecture}, as config.json describes it, has no such tensors"
                )
            )

    def _shard_stands(self, plan: ShardPlan, done: dict[str, dict[str, object]]) -> bool:
        path = self._directory / plan.name
        return plan.name in done and path.is_file() and path.stat().st_size == done[plan.name]["bytes"]

    def _write_side_files(self) -> None:
        config = {k: v for k, v in self._files.config.items() if k not in ("auto_map", "torch_dtype")}
        config["dtype"] = self._source.dtype_name
        config["tie_word_embeddings"] = self._skeleton.tied and not self._source.unties
        config.pop("quantization_config", None)
        if self._source.nf4:
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": self._source.dtype_name,
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": self._skeleton.root_linear_names() + self._skeleton.unquantizable_names(),
            }
        files.write_json(self._directory / CONFIG_NAME, config)
        if self._files.generation_config_path is not None:
            files.copy_file(self._files.generation_config_path, self._directory / "generation_config.json")
        try:
            # A second one of 262,144 tokens would take the process above its budget.
            tokenizer = self._tokenizer or load_tokenizer(self._files)
        except ModelError as error:
            self._on_event(Notice(text=f"the store gets no tokenizer: {error.found}"))
        else:
            save_tokenizer(tokenizer, self._directory)

    def _write_index(self, shards: dict[str, dict[str, object]]) -> None:
        info = StoreInfo(
            version=STORE_VERSION,
            quantize=self._source.quantize,
            dtype=self._source.dtype_name,
            # Transformed weights are no longer that model's, and must not be taken for its store.
            model_fingerprint="+".join(filter(None, (self._files.fingerprint(), self._transform_fingerprint))),
            source=self._files.origin,
            layers=self._skeleton.layer_count,
            unquantized=self.unquantized,
            shards=shards,
        )
        weight_map = {spec.name: plan.name for plan in self._plans for spec in plan.specs}
        total = sum(spec.nbytes for plan in self._plans for spec in plan.specs)
        index = {"metadata": {"total_size": total, "lopt_lite": asdict(info)}, "weight_map": weight_map}
        files.write_json(self._directory / INDEX_NAME, index)
