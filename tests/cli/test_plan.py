"""What ``lopt-lite plan`` prints, and the plan in the first lines of a run."""

from __future__ import annotations

import dataclasses
import gc
import io

import pytest
from lopt_lite_cli.display import Display
from lopt_lite_cli.progress_state import plan_texts

import lopt_lite
from lopt_lite import outcomes
from lopt_lite.errors import DoesNotFitError
from lopt_lite.events import Planned
from lopt_lite.settings import PlanSettings, TrainSettings

GIB = 2**30

PLAN = outcomes.PlanOutcome(
    command="lopt-lite train big data.jsonl --memory 4GiB",
    run="runs/big-data",
    model="big",
    architecture="LlamaForCausalLM",
    parameters=70_550_000_000,
    layers=80,
    weights_found=False,
    data="data.jsonl",
    data_how="from bytes",
    examples=1000,
    held_out_examples=50,
    tokens=200_000,
    answer_tokens=100_000,
    longest_tokens=900,
    device="cuda",
    steps_per_epoch=125,
    steps=125,
    batch_size=8,
    step_tokens=1600,
    hiding_tokens=2500,
    memory=outcomes.PlanMemory(
        mode="partly streamed",
        layers=40,
        resident_layers=3,
        recompute=True,
        offload_state=True,
        head_sliced=True,
        micro_batch_tokens=512,
        boundary_bytes=3 * GIB,
        boundary_device_bytes=GIB,
        boundary_host_bytes=GIB // 2,
        budget_bytes=4 * GIB,
        smallest_budget_bytes=3 * GIB,
        predicted_bytes=int(3.9 * GIB),
        predicted_host_bytes=2 * GIB,
    ),
    disk=outcomes.PlanDisk(
        store="runs/big-data/store",
        store_exists=False,
        store_bytes=37 * GIB,
        caches_bytes=3 * GIB,
        checkpoints_bytes=GIB,
        scratch_bytes=0,
        blocks_bytes=GIB // 4,
        result="adapter",
        result_bytes=GIB // 2,
        total_bytes=int(41.25 * GIB),
        free_bytes=500 * GIB,
    ),
    store_s=600.0,
    anchor_s=0.0,
    held_out_before_s=60.0,
    blocks=(
        outcomes.PlanBlock(
            block=0,
            objective="reconstruct",
            first_layer=0,
            end_layer=40,
            load_s=1.0,
            targets_s=0.0,
            head_fit_s=100.0,
            train_s=400.0,
            held_out_s=0.0,
            cache_s=50.0,
            total_s=551.0,
            waiting_share=0.2,
        ),
    ),
    total_s=3661.0,
    advice=("Loading layers will be the limit.",),
    alternatives=(
        outcomes.PlanAlternative(
            options="--memory 4GiB",
            chosen=True,
            fits=True,
            mode="partly streamed",
            smallest_budget_bytes=3 * GIB,
            predicted_bytes=int(3.9 * GIB),
            disk_bytes=41 * GIB,
            seconds=3661.0,
        ),
        outcomes.PlanAlternative(
            options="--blocks 1",
            chosen=False,
            fits=False,
            mode="does not fit",
            smallest_budget_bytes=5 * GIB,
            predicted_bytes=None,
            disk_bytes=None,
            seconds=None,
        ),
    ),
)

PLANNED = Planned(
    mode="streamed",
    layers=40,
    resident_layers=0,
    recompute=True,
    micro_batch_tokens=512,
    step_tokens=1600,
    budget_bytes=4 * GIB,
    predicted_bytes=int(3.9 * GIB),
    predicted_host_bytes=2 * GIB,
    disk_bytes=41 * GIB,
    seconds=3661.0,
    device="cpu",
    advice=("Loading layers will be the limit.",),
)


def test_the_plan_is_told_in_groups(lopt, fake):
    fake("plan", PLAN)
    result = lopt("plan", "big", "data.jsonl", "--memory", "4GiB")
    assert result.code == 0
    groups = result.out.split("\n\n")
    assert [group.split("\n")[0].split(" (")[0] for group in groups[1:4]] == ["Memory", "Disk", "Time"]
    for said in (
        "70.55 billion parameters",
        "its weights are not here yet",
        "guessed from the file's size",
        "3 of a block's 40 layers stay in memory, the others are streamed from disk",
        "activations, 1.00 GiB on the device, 512 MiB in host memory, 1.50 GiB in a scratch file",
        "predicted peak   3.90 GiB on the device",
        "host             2.00 GiB of the process",
        "the smallest that works is 3.00 GiB (--memory 3072MiB)",
        "block adapters   256 MiB",
        "  adapter          512 MiB, put together from these",
        "at most          41.25 GiB more at one time, 500.00 GiB are free",
        "fitting the head 1m 40s, training 6m 40s",
        "total            1h 01m",
        "Loading layers will be the limit.",
        "* --memory 4GiB",
        "does not fit: needs --memory 5120MiB",
        "lopt-lite train big data.jsonl --memory 4GiB",
    ):
        assert said in result.out
    assert "scratch  " not in groups[2]


def test_on_the_cpu_device_and_process_are_one(lopt, fake):
    fake("plan", dataclasses.replace(PLAN, device="cpu"))
    out = lopt("plan", "big", "data.jsonl").out
    assert "predicted peak   3.90 GiB of the process" in out
    assert "host             " not in out


def test_the_result_of_full_tuning_is_a_model(lopt, fake):
    fake("plan", dataclasses.replace(PLAN, disk=dataclasses.replace(PLAN.disk, result="model")))
    disk = lopt("plan", "big", "data.jsonl", "--tune", "full").out.split("\n\n")[2]
    assert "  tuned layers     256 MiB" in disk
    assert "  model            512 MiB" in disk
    assert "adapter" not in disk


def test_alternatives_that_the_disk_is_too_small_for_are_marked(lopt, fake):
    def rows(free: int) -> list[str]:
        fake("plan", dataclasses.replace(PLAN, disk=dataclasses.replace(PLAN.disk, free_bytes=free)))
        return [line for line in lopt("plan", "big", "data.jsonl").out.split("\n") if "* --memory" in line]

    assert [row.split("  ")[-1] for row in rows(41 * GIB)] == ["partly streamed"]
    assert [row.split("  ")[-1] for row in rows(41 * GIB - 1)] == ["partly streamed; needs more disk than is free"]


def test_garbage_is_collected_again_after_planning(lopt, fake, monkeypatch):
    collects = []
    fake("plan", PLAN)
    operation = lopt_lite.plan
    monkeypatch.setitem(
        lopt_lite.__dict__, "plan", lambda *args, **kw: collects.append(gc.isenabled()) or operation(*args, **kw)
    )
    assert lopt("plan", "big", "data.jsonl").code == 0
    fake("plan", error=DoesNotFitError("too small"))
    assert lopt("plan", "big", "data.jsonl").code == 4
    assert collects == [False] and gc.isenabled()


def test_json_is_one_document_with_everything(lopt, fake):
    fake("plan", PLAN)
    found = lopt("plan", "big", "data.jsonl", "--json").json()
    assert found["memory"]["mode"] == "partly streamed"
    assert found["blocks"][0]["train_s"] == 400.0
    assert found["alternatives"][1]["seconds"] is None
    assert set(found) == {field.name for field in dataclasses.fields(PLAN)}


def test_plan_takes_the_options_of_train(lopt, fake):
    calls = fake("plan", PLAN)
    assert lopt("plan", "big", "data.jsonl", "--blocks", "4", "--cache", "int8", "--quiet").code == 0
    assert isinstance(calls[0], PlanSettings)
    assert (calls[0].blocks, calls[0].cache) == (4, "int8")
    assert [f.name for f in dataclasses.fields(PlanSettings)] == [f.name for f in dataclasses.fields(TrainSettings)]


def test_what_does_not_fit_ends_with_4(lopt, fake):
    fake("plan", error=DoesNotFitError("too small", expected="at least --memory 3072MiB"))
    result = lopt("plan", "big", "data.jsonl")
    assert (result.code, result.out) == (4, "")
    assert "3072MiB" in result.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_run_begins_with_its_plan(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = stream()
    with Display(stream=out) as display:
        display.on_event(PLANNED)
    for text in plan_texts(PLANNED):
        assert text.strip() in out.getvalue()


def test_the_first_lines_are_few_and_name_what_matters():
    lines = plan_texts(PLANNED)
    assert 3 <= len(lines) <= 5
    said = "\n".join(lines)
    assert "all 40 layers of a block are streamed" in said
    assert "predicted peak 3.90 GiB of the process (budget 4.00 GiB)" in said
    assert "about 1h 01m in all" in said
    on_gpu = "\n".join(plan_texts(dataclasses.replace(PLANNED, device="cuda")))
    assert "3.90 GiB of cuda memory (budget 4.00 GiB) and 2.00 GiB of host memory" in on_gpu
