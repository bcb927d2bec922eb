"""Planning: from shapes alone, quickly, leaving nothing behind, and true to what training does."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lopt_lite
from lopt_lite import files
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.locate import describe_model, locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.errors import DataError, DoesNotFitError, ModelError, SettingsError
from lopt_lite.freed_memory import FreedMemory
from lopt_lite.journal import read_facts
from lopt_lite.option_fields import flag
from lopt_lite.recipe import ModelKind
from lopt_lite.residency import machine
from lopt_lite.residency.choices import Memory, Residence
from lopt_lite.settings import PlanSettings, TrainSettings
from lopt_lite.training import disk_plan, plan
from lopt_lite.training.model_facts import facts_of, model_facts
from tests.residency.test_machine import SPEEDS
from tests.tiny_models import make_config, make_data, make_model

MIB = 2**20
STREAMED = ("streamed", "partly streamed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory with just a config.json, of a model of some size."""
    directory = tmp_path / "bare"
    make_config("llama", 32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12).save_pretrained(
        directory
    )
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data.jsonl")


@pytest.fixture(autouse=True)
def fixed_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure", lambda device, nf4=False: SPEEDS)


def run_plan(model: Path, data: Path, **options):
    return lopt_lite.plan(PlanSettings(model=str(model), data=str(data), device="cpu", **options))


def content(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_config_alone_is_enough(bare, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    told = []
    outcome = lopt_lite.plan(PlanSettings(model=str(bare), data=str(data), device="cpu"), on_event=told.append)
    assert (outcome.architecture, outcome.layers, outcome.weights_found) == ("LlamaForCausalLM", 12, False)
    assert outcome.data_how == "from bytes" and "bytes" in told[0].text
    # Embedding and LM head; per layer q and o, k and v (of half the heads), three MLP matrices, two norms; a norm.
    layer = 1024 * 1024 * (2 + 1) + 3 * 1024 * 2816 + 2 * 1024
    assert outcome.parameters == 2 * 32_000 * 1024 + 12 * layer + 1024
    assert outcome.total_s > 0 and outcome.memory.predicted_bytes > 0
    assert content(tmp_path) == before


def test_planning_needs_neither_peft_nor_bitsandbytes_and_the_second_time_no_transformers(
    bare, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "cache"))
    code = (
        "import sys, lopt_lite\n"
        "lopt_lite.plan(lopt_lite.PlanSettings(model=sys.argv[1], data=sys.argv[2], device='cpu'))\n"
        "print(*sorted({'peft', 'bitsandbytes', 'transformers'} & set(sys.modules)))\n"
    )

    def loaded() -> str:
        command = [sys.executable, "-c", code, str(bare), str(data)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()

    assert loaded() == "transformers"
    assert loaded() == ""


def test_what_is_remembered_of_a_model_is_what_was_found_out(bare, monkeypatch):
    settings = TrainSettings(model=str(bare), data="d")
    first = model_facts(describe_model(str(bare)), settings)
    monkeypatch.setattr("lopt_lite.checkpoints.skeleton.Skeleton", None)
    assert model_facts(describe_model(str(bare)), settings) == first
    with pytest.raises(TypeError):
        # Another rank is another question.
        model_facts(describe_model(str(bare)), dataclasses.replace(settings, lora_r=8))


def test_damaged_memories_are_found_out_anew(bare, data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "cache"))
    first = run_plan(bare, data, memory="4GiB")
    for path in (tmp_path / "cache").iterdir():
        path.write_text(path.read_text().replace("shapes", "shades").replace("lengths", "widths"))
    again = run_plan(bare, data, memory="4GiB")
    assert (again.memory, again.blocks) == (first.memory, first.blocks)


def test_a_budget_that_cannot_work_is_refused_with_the_smallest_that_can(bare, data):
    with pytest.raises(DoesNotFitError) as caught:
        run_plan(bare, data, memory="100MiB")
    assert caught.value.exit_code == 4
    smallest = run_plan(bare, data).memory.smallest_budget_bytes // MIB
    assert f"--memory {smallest}MiB" in str(caught.value)
    assert run_plan(bare, data, memory=f"{smallest}MiB").memory.mode in STREAMED
    with pytest.raises(DoesNotFitError):
        run_plan(bare, data, memory=f"{smallest - 20}MiB")


def test_a_larger_budget_is_never_slower(bare, data):
    smallest = run_plan(bare, data).memory.smallest_budget_bytes // MIB
    plans = [run_plan(bare, data, memory=f"{smallest + more}MiB") for more in (0, 50, 200, 1000, 4000)]
    seconds = [outcome.total_s for outcome in plans]
    # Micro-batches and the shares of what is resident come in steps, which differ by a little.
    assert all(later <= earlier * 1.05 for earlier, later in itertools.pairwise(seconds))
    assert seconds[-1] < seconds[0]
    for outcome in plans:
        assert outcome.memory.predicted_bytes <= outcome.memory.budget_bytes


def test_the_plan_says_what_training_then_does(model, data, tmp_path):
    options = {"output": str(tmp_path / "run"), "validation": "0.25", "lora_r": 4, "batch_size": 4, "max_length": 64}
    outcome = run_plan(model, data, **options)
    assert (outcome.examples, outcome.held_out_examples, outcome.data_how) == (18, 6, "counted")
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), device="cpu", **options))
    run = tmp_path / "run"
    facts, _ = read_facts(run / "journal.jsonl")
    (residence,) = [Residence.from_json(fact) for fact in facts if fact["fact"] == "residence"]
    assert outcome.memory.mode == residence.mode
    assert outcome.memory.micro_batch_tokens == residence.micro_batch_tokens
    # Apart from headers and side files, which are small even here.
    stored = sum(path.stat().st_size for path in (run / "store").glob("*.safetensors"))
    assert outcome.disk.store_bytes <= stored <= outcome.disk.store_bytes + 6 * 8192
    adapters = [*run.glob("blocks/*/adapter.safetensors"), run / "adapter" / "adapter_model.safetensors"]
    written = sum(path.stat().st_size for path in adapters)
    assert outcome.disk.result == "adapter"
    predicted = outcome.disk.blocks_bytes + outcome.disk.result_bytes
    assert predicted <= written <= predicted + 3 * 16_384


def test_a_process_is_kept_at_what_its_run_was_predicted_to_need(model, data, tmp_path, monkeypatch):
    lines: list[int] = []
    monkeypatch.setattr(FreedMemory, "keep_below", lambda freed, most_bytes: lines.append(most_bytes))
    run = tmp_path / "run"
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), device="cpu", output=str(run)))
    facts, _ = read_facts(run / "journal.jsonl")
    assert lines == [fact["predicted_bytes"] for fact in facts if fact["fact"] == "residence"]


def _layers(outcome):
    return [(block.first_layer, block.end_layer) for block in outcome.blocks]


def test_the_last_of_two_blocks_is_larger_where_the_first_learns_nothing(bare, data):
    outcome = run_plan(bare, data)
    assert _layers(outcome) == [(0, 3), (3, 12)]
    assert outcome.memory.layers == 9
    assert "--last-layers" not in outcome.command
    assert "--last-layers" not in run_plan(bare, data, last_layers=9).command
    for options in ({"objective": "reconstruct"}, {"objective": "match"}, {"schedule": "joint"}):
        assert _layers(run_plan(bare, data, **options)) == [(0, 6), (6, 12)]
    assert _layers(run_plan(bare, data, blocks=3)) == [(0, 4), (4, 8), (8, 12)]


def test_a_last_block_of_another_size_is_planned_beside_the_usual_ones(bare, data):
    outcome = run_plan(bare, data, last_layers=6)
    assert _layers(outcome) == [(0, 6), (6, 12)]
    assert "--last-layers 6" in outcome.command
    usual = run_plan(bare, data)
    assert outcome.memory.predicted_bytes < usual.memory.predicted_bytes
    (halves,) = (row for row in usual.alternatives if row.options == "--last-layers 6")
    assert (halves.predicted_bytes, halves.disk_bytes) == (outcome.memory.predicted_bytes, outcome.disk.total_bytes)
    others = {row.options: row for row in outcome.alternatives if row.options.startswith("--blocks")}
    assert others == {row.options: row for row in usual.alternatives if row.options in others}
    assert "--blocks 1" in others
    of_four = {row.options: row for row in run_plan(bare, data, blocks=4).alternatives}
    chosen = next(row for row in usual.alternatives if row.chosen)
    assert of_four["--blocks 2"].predicted_bytes == chosen.predicted_bytes


@pytest.mark.parametrize("changes", [{}, {"objective": "none"}, {"dtype": "float32"}])
def test_the_tuned_layers_and_the_whole_model_are_planned_as_they_are_written(model, data, tmp_path, changes):
    options = {"output": str(tmp_path / "run"), "tune": "full", "max_length": 64, "batch_size": 12, **changes}
    disk = run_plan(model, data, **options).disk
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), device="cpu", **options))

    def written(pattern: str) -> int:
        headers = map(read_header, (tmp_path / "run").glob(pattern))
        return sum(info.nbytes for header in headers for info in header.tensors.values())

    assert disk.result == "model"
    assert disk.blocks_bytes == pytest.approx(written("blocks/*/layer-*.safetensors"), rel=0.01)
    assert disk.result_bytes == pytest.approx(written("model/*.safetensors"), rel=0.01)
    assert disk.store_bytes == pytest.approx(written("store/*.safetensors"), rel=0.01)
    # All of these are there when the run is done.
    assert disk.total_bytes >= disk.store_bytes + disk.blocks_bytes + disk.result_bytes


def test_a_run_that_exists_is_left_alone_and_its_store_counted(model, data, tmp_path):
    options = {"output": str(tmp_path / "run"), "lora_r": 4, "max_length": 64}
    fresh = run_plan(model, data, **options)
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), device="cpu", **options))
    before = content(tmp_path)
    outcome = run_plan(model, data, **options)
    assert content(tmp_path) == before
    assert (fresh.disk.store_exists, outcome.disk.store_exists) == (False, True)
    assert outcome.store_s == 0 < fresh.store_s
    assert outcome.disk.total_bytes == fresh.disk.total_bytes - fresh.disk.store_bytes
    assert not run_plan(model, data, fresh=True, **options).disk.store_exists


def test_a_disk_that_is_too_small_is_refused(bare, data, monkeypatch):
    needed = run_plan(bare, data).disk.total_bytes + files.BESIDE_BYTES
    usage = shutil.disk_usage(bare)

    def with_free(free: int) -> None:
        monkeypatch.setattr(disk_plan.shutil, "disk_usage", lambda path: usage._replace(free=free))

    with_free(needed)
    run_plan(bare, data)
    with_free(needed - 1)
    with pytest.raises(DoesNotFitError, match=f"{needed:,} bytes"):
        run_plan(bare, data)


def test_a_store_that_is_there_does_not_count_as_space_for_the_rest(model, data, tmp_path, monkeypatch):
    options = {"output": str(tmp_path / "run"), "lora_r": 4, "max_length": 64}
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), device="cpu", **options))
    run = tmp_path / "run"
    for name in ("blocks", "adapter", "cache"):
        shutil.rmtree(run / name, ignore_errors=True)
    disk = run_plan(model, data, **options).disk
    present = sum(path.stat().st_size for path in run.iterdir() if path.is_file())
    assert disk.store_exists
    needed = disk.total_bytes - present + files.BESIDE_BYTES
    free = iter((needed, needed - 1))
    require = disk_plan.require_disk
    monkeypatch.setattr(
        plan, "require_disk", lambda disk, run: require(dataclasses.replace(disk, free_bytes=next(free)), run)
    )
    run_plan(model, data, **options)
    with pytest.raises(DoesNotFitError):
        run_plan(model, data, **options)


def test_activations_in_8_bits_halve_the_caches(bare, data):
    plain = {"objective": "reconstruct", "retain": 0.0}
    exact, small = (run_plan(bare, data, **plain, cache=cache).disk.caches_bytes for cache in ("exact", "int8"))
    assert 0.5 * exact < small < 0.51 * exact
    assert run_plan(bare, data, **plain, blocks=1).disk.caches_bytes == 0
    assert run_plan(bare, data, **plain, blocks=4).disk.caches_bytes == 2 * exact


def test_the_data_is_counted_as_a_run_holds_it_in_memory(bare, data, monkeypatch):
    """Ten million tokens: a run has an int32 and a bool of each, and was refused the budget that was planned."""
    one_block = {"blocks": 1, "retain": 0.0}
    few = run_plan(bare, data, **one_block).memory.smallest_budget_bytes
    estimate, more = plan.known_estimate, 10_000_000

    def of_much(*arguments, **options):
        found = estimate(*arguments, **options)
        return dataclasses.replace(found, tokens=found.tokens + more)

    monkeypatch.setattr(plan, "known_estimate", of_much)
    assert run_plan(bare, data, **one_block).memory.smallest_budget_bytes - few >= 5 * more


def test_alternatives_hold_the_smallest_budget_and_other_blocks(bare, data):
    outcome = run_plan(bare, data)
    rows = {row.options: row for row in outcome.alternatives}
    smallest = rows[f"--memory {outcome.memory.smallest_budget_bytes // MIB}MiB"]
    assert smallest.mode in STREAMED and not smallest.chosen
    assert [row.options for row in outcome.alternatives if row.chosen] == ["--memory auto"]
    assert {"--blocks 1", "--blocks 4", "--blocks 8"} <= set(rows)
    assert "--blocks 2" not in rows and "--blocks 16" not in rows
    for row in outcome.alternatives:
        # A budget is named to be used.
        if row.options.startswith("--memory") and not row.chosen:
            budget = int(row.options.split()[1].removesuffix("MiB")) * MIB
            assert budget * 0.8 < row.predicted_bytes <= budget
            assert run_plan(bare, data, memory=row.options.split()[1]).memory.predicted_bytes == row.predicted_bytes
    tight = run_plan(bare, data, memory=f"{outcome.memory.smallest_budget_bytes // MIB}MiB", blocks=2)
    for row in tight.alternatives:
        assert row.fits == (row.seconds is not None)


def test_slow_loading_is_told_with_the_batch_size_that_would_hide_it(bare, tmp_path, monkeypatch):
    data = make_data(tmp_path / "more.jsonl", 4000)
    slow = dataclasses.replace(SPEEDS, read_bytes_per_s=2e7, cached_read_bytes_per_s=2e7, fresh_bytes_per_s=1e11)
    monkeypatch.setattr(plan, "machine_speeds", lambda device, nf4=False: slow)

    def tight(path: Path):
        smallest = run_plan(bare, path).memory.smallest_budget_bytes // MIB
        return run_plan(bare, path, memory=f"{smallest}MiB")

    outcome = tight(data)
    assert outcome.memory.mode in STREAMED
    assert outcome.hiding_tokens > outcome.step_tokens
    (advice,) = outcome.advice
    assert "--batch-size" in advice and f"{outcome.hiding_tokens:,}" in advice
    (advice,) = tight(make_data(tmp_path / "few.jsonl", 4)).advice
    assert "no --batch-size" in advice
    resident = run_plan(bare, data, blocks=1)
    assert resident.hiding_tokens is None and resident.advice == ()


def test_whoever_has_room_for_the_whole_model_hears_of_it(bare, data):
    def advice(**options) -> tuple[str, ...]:
        return run_plan(bare, data, **options).advice

    (sentence,) = advice()
    assert "--blocks 1" in sentence and "docs/recipe.md" in sentence
    assert (sentence,) == advice(objective="reconstruct") == advice(blocks=4)
    assert advice(blocks=1) == advice(schedule="joint") == advice(tune="full") == ()
    # Half of the model still stays dequantised, the whole of it would not.
    half_bytes = run_plan(bare, data).memory.predicted_bytes
    tight = run_plan(bare, data, memory=f"{half_bytes // MIB + 16}MiB")
    assert tight.memory.mode == "dequantised" and tight.advice == ()


def test_the_command_shown_asks_for_the_same(bare, data):
    settings = PlanSettings(
        model=str(bare), data=str(data), device="cpu", memory="3GiB", lora_r=8, fresh=True, config=(str(bare),)
    )
    words = shlex.split(lopt_lite.plan(settings).command)
    assert words[:4] == ["lopt-lite", "train", str(bare), str(data)]
    asked = ("fresh", "config", "lora_r", "memory", "device")
    assert [word for word in words if word.startswith("--")] == [flag(name) for name in asked]


def test_the_command_shown_leaves_out_what_a_preset_says(bare, data):
    def words(**options) -> list[str]:
        settings = PlanSettings(model=str(bare), data=str(data), device="cpu", preset="paper", **options)
        return [word for word in shlex.split(lopt_lite.plan(settings).command) if word.startswith("--")]

    assert words() == ["--preset", "--device"]
    assert words(batch_size=8, tune="lora") == ["--preset", "--tune", "--batch-size", "--device"]


def test_mistakes_are_told_as_training_tells_them(bare, data, tmp_path):
    with pytest.raises(SettingsError, match="--blocks is 13"):
        run_plan(bare, data, blocks=13)
    with pytest.raises(SettingsError, match="nothing_like_that"):
        run_plan(bare, data, lora_targets="nothing_like_that")
    with pytest.raises(DataError, match="does not exist"):
        run_plan(bare, tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        run_plan(tmp_path / "empty", data)
    (bare / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickles"):
        run_plan(bare, data)


def test_the_first_lines_of_a_run_say_the_same(model, data):
    settings = TrainSettings(model=str(model), data=str(data), device="cpu").settle(
        has_prompts=True, model=ModelKind("LlamaForCausalLM", 32, 4)
    )
    outcome = lopt_lite.plan(PlanSettings(model=str(model), data=str(data), device="cpu"))
    facts = facts_of(Skeleton(locate_model(str(model)), dtype=torch.bfloat16), settings)
    lengths = torch.full((24,), outcome.tokens // 24)
    memory = Memory(None, 480 * MIB, 8 << 30, 8 << 30)
    draft = plan.draft_of_run(
        settings,
        facts,
        memory,
        lengths=lengths,
        target_counts=lengths // 2,
        counts=(24, 0),
        device=torch.device("cpu"),
        run=Path("run"),
        store=Path("store"),
    )
    event = plan.planned(draft, draft.residences())
    assert event.mode == outcome.memory.mode
    assert event.layers == outcome.memory.layers
    assert event.seconds == pytest.approx(outcome.total_s, rel=0.2)
    assert event.disk_bytes == pytest.approx(outcome.disk.total_bytes, rel=0.05)


@pytest.mark.parametrize("architecture", ["gemma3_text", "mixtral", "gpt2", "phi3"])
def test_every_kind_of_architecture_can_be_planned(tmp_path, data, architecture):
    make_config(architecture, 300).save_pretrained(tmp_path / "model")
    outcome = run_plan(tmp_path / "model", data)
    assert outcome.total_s > 0 and len(outcome.blocks) == 2


def test_of_routed_experts_only_the_chosen_ones_are_computed(tmp_path):
    make_config("mixtral", 300).save_pretrained(tmp_path)
    facts = model_facts(describe_model(str(tmp_path)), TrainSettings(model="m", data="d"))
    skeleton = Skeleton(describe_model(str(tmp_path)), dtype=torch.bfloat16)
    shapes = skeleton.layer_parameters(0).values()
    experts = sum(torch.Size(shape).numel() for shape in shapes if len(shape) == 3)
    everything = sum(torch.Size(shape).numel() for shape in shapes)
    assert experts > 0
    assert facts.active_parameters[0] == everything - experts // 2


def test_of_a_model_on_the_hub_everything_but_the_weights_is_fetched(bare, data, monkeypatch):
    asked = []

    def fetch(hub_id, on_event, *, weights=True):
        asked.append((hub_id, weights))
        return bare

    monkeypatch.setattr("lopt_lite.checkpoints.hub.fetch", fetch)
    outcome = run_plan("someone/a-model", data)
    assert asked == [("someone/a-model", False)]
    assert (outcome.model, outcome.run, outcome.weights_found) == ("a-model", str(Path("runs/a-model-data")), False)


def test_full_tuning_is_planned_too(bare, data):
    outcome = run_plan(bare, data, tune="full", objective="reconstruct")
    words = shlex.split(outcome.command)
    assert words[words.index("--tune") + 1] == "full" and "--quantize" not in words and "--lr" not in words
    adapters = run_plan(bare, data)
    assert outcome.disk.checkpoints_bytes > adapters.disk.checkpoints_bytes
    # Of the whole model, embedding and all, while only layers are tuned.
    assert outcome.disk.result_bytes == 2 * outcome.parameters
    assert outcome.disk.blocks_bytes == 2 * (outcome.parameters - 2 * 32_000 * 1024 - 1024)
    left = run_plan(bare, data, tune="full", objective="none").disk
    assert left.blocks_bytes == outcome.disk.blocks_bytes * 3 // 4
    assert outcome.memory.predicted_bytes > adapters.memory.predicted_bytes


def test_one_example_cannot_be_planned_to_be_split(model, tmp_path):
    make_data(tmp_path / "one.jsonl", 1)
    with pytest.raises(DataError, match="1 example, which cannot be split"):
        run_plan(model, tmp_path / "one.jsonl", validation="0.5")


def test_one_block_is_planned_without_the_anchor_that_it_would_not_have(tmp_path):
    model, data = make_model(tmp_path / "model", "llama"), make_data(tmp_path / "data.jsonl", 12)

    def one_block(**options):
        planned = lopt_lite.plan(PlanSettings(model=str(model), data=str(data), device="cpu", **options))
        (row,) = (row for row in planned.alternatives if row.options == "--blocks 1")
        return row.disk_bytes

    assert one_block() < one_block(retain=1.0) < one_block(retain_data=str(data))
