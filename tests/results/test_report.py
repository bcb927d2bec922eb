"""The report of a run: one page that tells what happened, whatever state the run is in and whatever its files hold."""

from __future__ import annotations

import base64
import json
import math
import re
import resource
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lopt_lite_cli.main import main

import lopt_lite
from lopt_lite import ReportSettings, TrainSettings, files
from lopt_lite.errors import RunDirectoryError
from lopt_lite.locks import locked
from lopt_lite.outcomes import ReportOutcome
from lopt_lite.recipe import ModelKind
from lopt_lite.results.commands import Commands, changed_settings
from lopt_lite.results.loss_plot import draw_losses
from lopt_lite.results.run_record import read_run
from tests.tiny_models import make_data, make_model

MIB = 2**20
PNG = b"\x89PNG\r\n"
#: Elements that have no end.
VOID = {"meta", "img", "br", "link", "input", "hr", "base", "embed", "source", "area", "col", "track", "wbr"}
#: Attributes by which a page can make a browser fetch something.
FETCHING = {"src", "href", "srcset", "poster", "data", "action", "formaction", "background", "ping", "xlink:href"}


class Page(HTMLParser):
    """A parsed page: its text, its elements, and what it would fetch."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.texts: list[str] = []
        self.elements: list[str] = []
        self.fetched: list[str] = []
        self.attributes: list[str] = []
        self.commands: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.fetched += [str(value) for name, value in attrs if name in FETCHING]
        if tag == "pre":
            self.commands.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)
        if "pre" in self._open:
            self.commands[-1] += data

    @property
    def text(self) -> str:
        """All that can be read, with single spaces."""
        return " ".join(" ".join(self.texts).split())


class Run:
    """A run directory with what a run has written of itself so far: 80 examples in steps of 8, two epochs."""

    def __init__(self, root: Path, *, model: str = "m", data: str = "d", validation: str | None = None, **options: Any):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        options = {"epochs": 2, "objective": "reconstruct", **options}
        settings = TrainSettings(model=model, data=data, validation=validation, **options)
        self.settings = settings.settle(has_prompts=True, model=ModelKind("LlamaForCausalLM", 64, 5))
        content = {
            "settings": self.settings.result_settings(),
            "model": {"given": model, "origin": model, "fingerprint": "m1", "hidden_size": 64, "layers": 5},
            "data": {"given": data, "fingerprint": "d1"},
            "validation": {"given": validation, "fingerprint": "v1" if validation else None},
            "retain": {"given": self.settings.retain_data, "fingerprint": None},
            "config": [],
            "store": str(root.absolute() / "store"),
            "device": "cpu",
            "versions": {"lopt-lite": "0.1.0"},
        }
        (root / "settings.json").write_text(json.dumps(content))

    def started(self, *, layers: int = 5) -> Run:
        """The store is made and the data are read."""
        (self.root / "store").mkdir()
        for index in range(layers):
            (self.root / "store" / f"layer-{index:05d}.safetensors").write_bytes(b"0" * 1024)
        residence = {"mode": "streamed", "layers": 3, "resident_layers": 0, "recompute": True}
        self.note("residence", device="cpu", predicted_bytes=600 * MIB, predicted_host_bytes=600 * MIB, **residence)
        self.note("store-ready")
        return self.note("started", examples=80)

    def note(self, fact: str, **values: Any) -> Run:
        """Add a line to the journal."""
        with open(self.root / "journal.jsonl", "a") as file:
            file.write(json.dumps({"fact": fact, **values}) + "\n")
        return self

    def steps(self, block: int, phase: str, losses: list[float], **values: Any) -> Run:
        """One optimiser step of a second and 600 tokens for each of ``losses``; the first of the phase on."""
        with open(self.root / "metrics.jsonl", "a") as file:
            for step, loss in enumerate(losses, start=1):
                line = {
                    "block": block,
                    "phase": phase,
                    "epoch": 1,
                    "step": step,
                    "steps": 10 if phase == "head-fit" else 20,
                    "loss": loss,
                    "lr": 4e-4,
                    "grad_norm": loss,
                    "tokens": 600,
                    "tokens_per_s": 600.0,
                    "device_peak_bytes": 512 * MIB,
                    "host_rss_bytes": 512 * MIB,
                    "time": 1.8e9 + step,
                    "reconstruction_loss": None,
                    "retain_kl": None,
                }
                file.write(json.dumps({**line, **values}) + "\n")
        return self

    def first_block(self) -> Run:
        """Block 1 is done."""
        self.steps(0, "head-fit", [0.5 - step / 100 for step in range(10)])
        self.steps(0, "train", [0.4 - step / 100 for step in range(20)])
        return self.note("block", block=0).note("cache", block=1)

    def finished(self, *, held_out: tuple[float, ...] = ()) -> Run:
        """Everything is done; held-out losses of the epochs, before training first."""
        self.started().first_block()
        self.steps(1, "train", [2.0] * 10 + [1.0] * 10)
        for epoch, loss in enumerate(held_out):
            self.note("validation", epoch=epoch, loss=loss, answer_tokens=100)
        (self.root / "adapter").mkdir()
        return self.note("block", block=1).note("adapter", sha256="a")

    def report(self) -> tuple[ReportOutcome, Page]:
        """Write the report and read it."""
        outcome = lopt_lite.report(ReportSettings(run=str(self.root)))
        return outcome, Page((self.root / "report.html").read_text(encoding="utf-8"))


def test_a_finished_run_tells_what_was_run_what_came_of_it_and_how_to_use_it(tmp_path):
    run = Run(tmp_path / "run", validation="0.1", memory="700MiB", lr=1e-3).finished(held_out=(1.75, 1.5, 1.25))
    outcome, page = run.report()
    for said in (
        "done Done.",
        "1.7500 → 1.2500",
        "perplexity 5.755 → 3.49",
        "block 1 of 2, head fit reconstruct 1–3 10 of 10 0.4800 → 0.4300 mean squared error",
        "block 1 of 2, training reconstruct 1–3 20 of 20",
        "block 2 of 2 task 4–5 20 of 20 2.0000 → 1.0000 nats per answer token 20 s 600 done",
        "50 s in 50 optimiser steps",
        "30,000",
        "after epoch 1 1.5000 4.482 -0.2500",
        "700MiB 600 MiB 512 MiB",
        "all 3 layers of a block are streamed from disk",
        "--lr 0.001 None",
        "--memory 700MiB auto",
        "80 (8 per step, 10 steps per epoch)",
        "a LoRA adapter, 2 blocks, sequential schedule",
        "2027-01-15",
    ):
        assert said in page.text, said
    for at_its_default in ("--blocks", "--lr-early"):
        assert at_its_default not in page.text
    assert outcome == ReportOutcome(
        run=str(run.root),
        report=str(run.root / "report.html"),
        picture=str(run.root / "loss.png"),
        state="done",
        next="nothing, the run is done",
        seconds_left=0.0,
        loss_before=1.75,
        loss_after=1.25,
        final_train_loss=1.0,
        device_peak_bytes=512 * MIB,
        predicted_bytes=600 * MIB,
        notices=(),
    )
    absolute = str(run.root.absolute())
    assert [shlex.split(command)[1:3] for command in page.commands[:3]] == [
        ["generate", absolute],
        ["evaluate", absolute],
        ["export", absolute],
    ]
    assert f"PeftModel.from_pretrained(base, {absolute + '/adapter'!r})" in page.commands[3]


def test_the_page_needs_no_other_file_and_runs_no_script(tmp_path):
    run = Run(tmp_path / "run").finished()
    _, page = run.report()
    picture = (run.root / "loss.png").read_bytes()
    assert picture.startswith(PNG)
    assert page.fetched == ["data:image/png;base64," + base64.b64encode(picture).decode()]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.elements)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", page.source))
    assert "default-src 'none'" in page.source


def test_the_python_of_the_page_is_python(tmp_path):
    for tune, needed in (("lora", "PeftModel"), ("full", "run/model")):
        _, page = Run(tmp_path / tune / "run", model='it\'s a \\ "model"', tune=tune).finished().report()
        compile(page.commands[-1], "page", "exec")
        assert needed in page.commands[-1]


def test_a_stopped_run_says_what_is_next_and_gives_the_command_that_goes_on(tmp_path):
    run = Run(tmp_path / "run").started().first_block().steps(1, "train", [2.0] * 5)
    outcome, page = run.report()
    assert (outcome.state, outcome.seconds_left) == ("stopped", pytest.approx(15.0))
    assert "stopped Stopped. Next: train block 2 of 2 (task), step 5 of 20; about 15 s left." in page.text
    assert "block 2 of 2 task 4–5 5 of 20" in page.text
    assert "Go on (with the options that it was started with)" in page.text
    assert shlex.split(page.commands[0])[:4] == ["lopt-lite", "train", "m", "d"]
    assert "PeftModel" not in page.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "my models/a$(b) 'c'", "data": "it's.jsonl", "validation": "0.25"},
        {"preset": "paper", "model": "org/name", "epochs": 1},
        {"preset": "paper", "tune": "lora", "schedule": "sequential"},
        {"tune": "full", "lr": 1e-5, "cache": "int8", "objective": "none"},
        {"retain": 0.5, "retain_data": "other.jsonl", "skip_bad_lines": True, "memory": "6GiB"},
        {"blocks": 4, "objective": "none,task,reconstruct", "lr": 1e-3, "lr_early": 3e-4, "lora_targets": "q_proj"},
    ],
)
def test_the_command_that_goes_on_gives_the_run_its_own_settings(tmp_path, monkeypatch, options):
    run = Run(tmp_path / "the run", **options)
    record = read_run(str(run.root))
    arguments = shlex.split(Commands(record.paths, record.content, record.status).train())
    calls: list[TrainSettings] = []
    monkeypatch.setitem(lopt_lite.__dict__, "train", lambda settings, on_event: calls.append(settings))
    assert arguments[0] == "lopt-lite"
    main(arguments[1:])
    (settings,) = calls
    settled = settings.settle(has_prompts=True, model=ModelKind("LlamaForCausalLM", 64, 5))
    assert settled.result_settings() == run.settings.result_settings()
    names = ("model", "data", "validation", "retain_data")
    assert [getattr(settings, n) for n in names] == [getattr(run.settings, n) for n in names]
    assert (settings.output, settings.store) == (str(run.root.absolute()), None)


@pytest.mark.parametrize("typed", ["models/m", "models/m/model.safetensors"])
def test_the_command_that_goes_on_works_from_any_directory(tmp_path, monkeypatch, typed):
    home = tmp_path / "home"
    (home / "models" / "m" / "tokenizer").mkdir(parents=True)
    for name in ("models/m/model.safetensors", "d.jsonl", "v.jsonl"):
        (home / name).write_text("")
    run = Run(home / "run", model=typed, data="d.jsonl", validation="v.jsonl", retain=0.5, retain_data="gone.jsonl")
    content = json.loads((run.root / "settings.json").read_text())
    content["model"]["origin"] = str(home / "models" / "m")
    content["config"] = ["models/m/tokenizer"]
    content["store"] = str(home / "models" / "m")
    (run.root / "settings.json").write_text(json.dumps(content))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jsonl").write_text("another one")
    commands = set()
    for directory in (home, tmp_path / "elsewhere", home / "run"):
        monkeypatch.chdir(directory)
        record = read_run(str(run.root))
        commands.add(Commands(record.paths, record.content, record.status).train())
    (command,) = commands
    arguments = shlex.split(command)
    assert arguments[2:4] == [str(home / typed), str(home / "d.jsonl")]
    assert f"--validation {home / 'v.jsonl'} --retain-data gone.jsonl" in command, "what is gone stays as it was typed"
    assert f"--config {home / 'models' / 'm' / 'tokenizer'}" in command
    assert "--store" not in command


def test_where_the_model_does_not_tell_paths_are_those_from_the_current_directory(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", model="org/name", data="d.jsonl", validation="0.25").started()
    (tmp_path / "d.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    _, page = run.report()
    assert shlex.split(page.commands[0])[2:6] == ["org/name", str(tmp_path / "d.jsonl"), "--validation", "0.25"]


def test_a_shared_store_is_part_of_the_command_and_of_the_disk(tmp_path):
    run = Run(tmp_path / "run").started()
    content = json.loads((run.root / "settings.json").read_text())
    content["store"] = str(tmp_path / "shared")
    (run.root / "settings.json").write_text(json.dumps(content))
    (run.root / "store").rename(tmp_path / "shared")
    _, page = run.report()
    assert f"--store {tmp_path / 'shared'}" in page.commands[0]
    assert f"{tmp_path / 'shared'} (may be shared) 5 KiB" in page.text


def test_a_running_run_is_left_alone(tmp_path):
    run = Run(tmp_path / "run").started().first_block()
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    with locked(run.root, what="the run directory"):
        outcome, page = run.report()
        assert outcome.state == "running"
        assert "running Training (process" in page.text
        assert "Next: train block 2 of 2 (task), step 0 of 20; about" in page.text
        assert not any("lopt-lite train" in command for command in page.commands), "it would be refused"
    assert {path: path.read_bytes() for path in before} == before


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = Run(tmp_path / "run").started().first_block().steps(1, "train", [2.0] * 3)
    whole, _ = run.report()
    for name, torn in (("metrics.jsonl", '{"block": 1, "phase": "tr'), ("journal.jsonl", '{"fact": "blo')):
        with open(run.root / name, "a") as file:
            file.write(torn)
    outcome, page = run.report()
    assert outcome == whole
    assert "3 of 20" in page.text


def test_before_the_first_step_there_are_no_curves_and_nothing_is_made_up(tmp_path):
    run = Run(tmp_path / "run", validation="held_out.jsonl")
    outcome, page = run.report()
    assert (outcome.picture, outcome.final_train_loss, outcome.device_peak_bytes) == (None, None, None)
    assert not (run.root / "loss.png").exists()
    assert "Next: prepare the weights." in page.text
    assert "There are no curves yet" in page.text
    assert "not measured yet" in page.text
    run.started().note("validation", epoch=0, loss=1.75, answer_tokens=100)
    outcome, page = run.report()
    assert outcome.loss_before == 1.75
    assert "before training (untouched model) 1.7500" in page.text
    assert "predicted; nothing measured yet" in page.text
    assert "block 1 of 2 reconstruct 1–3 0 of 30" in page.text


def test_without_held_out_data_the_page_says_how_to_have_some(tmp_path):
    _, page = Run(tmp_path / "run").finished().report()
    assert "no held-out data: see --validation" in page.text
    assert page.text.count("Held-out loss") == 1


def test_blocks_that_train_together_share_their_steps(tmp_path):
    run = Run(tmp_path / "run", schedule="joint", retain=1.0).started(layers=7)
    run.steps(0, "head-fit", [0.5] * 10)
    run.steps(0, "train", [2.0] * 10 + [1.0] * 10, reconstruction_loss=0.25, retain_kl=0.0625)
    run.note("block", block=0).note("block", block=1).note("adapter")
    _, page = run.report()
    assert "all 2 blocks, training reconstruct, task 1–7 20 of 20 2.0000 → 1.0000 nats per answer token" in page.text
    assert "all 2 blocks, head fit reconstruct, task 1–7 10 of 10 0.5000 → 0.5000 mean squared error" in page.text
    _, page = Run(tmp_path / "many", schedule="joint", blocks=5, objective="none,task,task,task").started().report()
    assert "all 5 blocks none, 4 × task 1–5 0 of 20" in page.text
    assert "joint schedule" in page.text
    (stage,) = read_run(str(run.root)).stages
    curves = {curve.name: [v for v in curve.values if math.isfinite(v)] for curve in stage.curves()}
    assert curves["task loss"] == [2.0] * 10 + [1.0] * 10
    assert curves["reconstruction loss"] == [0.5] * 10 + [0.25] * 20
    assert curves["divergence from the untouched model"] == [0.0625] * 20
    assert {len(curve.values) for curve in stage.curves()} == {30}


def test_blocks_that_are_left_as_they_are_take_no_steps(tmp_path):
    run = Run(tmp_path / "run", objective="none").started().note("block", block=0).note("cache", block=1)
    run.steps(1, "train", [1.0])
    _, page = run.report()
    assert "block 1 of 2 none 1–2 none: left as it is done" in page.text
    assert "--last-layers" not in page.text


def test_a_run_that_does_not_say_how_deep_its_model_is_has_equal_blocks(tmp_path):
    """As runs of earlier versions: a size that nobody gave is no option of the command that goes on."""
    run = Run(tmp_path / "run", objective="none").started()
    path = run.root / "settings.json"
    content = json.loads(path.read_text())
    del content["model"]["layers"]
    content["settings"]["last_layers"] = None
    path.write_text(json.dumps(content))
    assert "--last-layers" not in run.report()[1].text


def test_the_anchors_weight_is_told_once_it_is_known(tmp_path):
    asked = Run(tmp_path / "asked", retain=0.5).started()
    assert "anchor weight 0.5 device" in asked.report()[1].text
    run = Run(tmp_path / "run").started()
    assert "anchor weight" not in run.report()[1].text
    run.note("anchor-weight", weight=0.3, loss=1.7633, answer_tokens=3215)
    assert "anchor weight 0.3: answers cost the model 1.763" in run.report()[1].text
    none = Run(tmp_path / "none", retain=0.0).started()
    assert "anchor weight" not in none.report()[1].text


def test_the_peak_rate_is_told_as_it_was_found_out(tmp_path):
    assert "learning rate 0.0013 at its peak" in Run(tmp_path / "given", lr=1.3e-3).started().report()[1].text
    run = Run(tmp_path / "run").started()
    assert "at its peak" not in run.report()[1].text
    run.note("learning-rate", lr=2.6e-3, loss=1.7633, answer_tokens=3215)
    assert "learning rate 0.0026 at its peak" in run.report()[1].text


def test_full_tuning_leads_to_the_model(tmp_path):
    run = Run(tmp_path / "run", tune="full").started().first_block().steps(1, "train", [1.0] * 20)
    (run.root / "model").mkdir()
    (run.root / "model" / "x.safetensors").write_bytes(b"0" * 2048)
    run.note("block", block=1).note("model", sha256="a")
    outcome, page = run.report()
    assert (outcome.state, outcome.notices) == ("done", ())
    assert "the weights themselves" in page.text
    assert "the result model/ 2 KiB" in page.text
    assert "--tune full lora" in page.text
    assert "PeftModel" not in page.text


def test_steps_that_were_skipped_are_told_and_do_not_spoil_the_rest(tmp_path):
    losses = [2.0, math.nan, 1.5, math.inf, 1.0, 1.0]
    run = Run(tmp_path / "run").started().first_block().steps(1, "train", losses)
    outcome, page = run.report()
    (notice,) = outcome.notices
    assert notice in page.text
    assert "2 steps of block 2 of 2 (training) were skipped" in notice
    assert "(step 2, 4)" in notice
    assert outcome.final_train_loss == 1.0
    assert "nan" not in page.text


def test_a_run_that_diverged_says_so_first(tmp_path):
    run = Run(tmp_path / "run").started().steps(0, "train", [math.nan] * 5)
    outcome, page = run.report()
    assert outcome.notices[0].startswith("The last 5 steps had no finite loss or gradient: lower --lr")
    assert "not finite" in page.text
    assert (run.root / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("memory", "peak_mib", "said"),
    [
        ("700MiB", 512, None),
        ("700MiB", 650, "Memory went above the prediction of 600 MiB by 50 MiB."),
        ("700MiB", 701, "Memory went above the budget of 700 MiB by 1 MiB."),
        ("auto", 650, "Without a --memory budget, freed memory is kept for speed."),
    ],
)
def test_memory_above_what_was_promised_is_told(tmp_path, memory, peak_mib, said):
    run = Run(tmp_path / "run", memory=memory).started().steps(0, "train", [1.0], device_peak_bytes=peak_mib * MIB)
    outcome, page = run.report()
    assert f"600 MiB {peak_mib} MiB" in page.text
    assert len(outcome.notices) == (said is not None)
    assert said is None or outcome.notices[0].endswith(said)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ((2.0, 1.5, 1.0), None),
        ((2.0, 1.0, 1.5), "lowest after epoch 1 (1.0000)"),
        ((1.0, 1.5, 2.0), "The held-out loss rose: 1.0000 before, 2.0000 after epoch 2"),
    ],
)
def test_a_held_out_loss_that_rose_is_told(tmp_path, held_out, said):
    outcome, _ = Run(tmp_path / "run", validation="0.1").finished(held_out=held_out).report()
    assert len(outcome.notices) == (said is not None)
    assert said is None or said in outcome.notices[0]


def test_the_error_of_the_8_bit_cache_and_a_lost_result_are_told(tmp_path):
    run = Run(tmp_path / "run", cache="int8").finished().note("cache", block=1, relative_error=0.031)
    (run.root / "adapter").rmdir()
    outcome, _ = run.report()
    gone, inexact = outcome.notices
    assert "its result" in gone
    assert gone.endswith("is gone.")
    assert "8-bit cache of block 2 has a relative error of 3.1 %" in inexact


def test_hostile_names_and_settings_are_only_text(tmp_path):
    evil = "</td><script>alert(1)</script><img src=x onerror=a>&\"'\x1b[31m\u202e{{ 7*7 }}$\\frac{"
    root = tmp_path / '<i>run & "co"; $(touch x)'
    run = Run(root, model=evil, data=evil, validation=evil, lora_targets=evil.replace(",", ""))
    content = json.loads((root / "settings.json").read_text())
    content["settings"]["objective"] = "$\\frac{<i>$\x1b"
    content["versions"] = {evil: evil}
    content["device"] = evil
    (root / "settings.json").write_text(json.dumps(content))
    run.started().steps(0, "train", [1.0, 2.0]).steps(1, "train", [1.0, 2.0])
    run.note("residence", mode=evil, layers=2, predicted_bytes=1)
    _, page = run.report()
    assert not {"script", "i"} & set(page.elements)
    assert page.elements.count("img") == 1
    assert "</td><script>alert(1)</script><img src=x onerror=a>&\"'\\x1b[31m\\u202e{{ 7*7 }}$\\frac{" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page.source)
    assert shlex.quote(str(root.absolute())) in page.commands[0]


def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    run = Run(tmp_path / "run").finished()
    run.report()
    before = (run.root / "report.html").read_bytes()
    run.note("validation", epoch=0, loss=1.75, answer_tokens=100)

    def crash(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(lopt_lite.errors.DoesNotFitError):
        run.report()
    assert (run.root / "report.html").read_bytes() == before
    assert not list(run.root.glob(".*.tmp"))


def test_a_directory_that_is_no_run_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        lopt_lite.report(ReportSettings(run=str(tmp_path)))
    assert main(["report", str(tmp_path), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"] == "RunDirectoryError"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_json_is_one_document_even_with_losses_that_are_no_numbers(tmp_path, capsys):
    run = Run(tmp_path / "run", validation="0.1").finished(held_out=(math.nan, 1.5, math.inf))
    assert main(["report", str(run.root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["report"], document["state"]) == (str(run.root / "report.html"), "done")
    assert (document["loss_before"], document["final_train_loss"]) == (None, 1.0)


def test_the_picture_takes_any_number_of_steps_and_blocks(tmp_path):
    run = Run(tmp_path / "run", blocks=40, objective="task").started(layers=40)
    for block in range(40):
        run.steps(block, "train", [1.0 + math.sin(step) / 2 for step in range(70)])
    record = read_run(str(run.root))
    many = draw_losses(record.stages, {0: 1.0, 7: math.nan}, record.step_counts)
    assert many is not None
    width, height = (int.from_bytes(many[at : at + 4], "big") for at in (16, 20))
    assert (width, height < 2**16) == (480, True)
    assert draw_losses(record.stages[:0], {}, record.step_counts) is None


def test_the_report_is_made_without_torch_and_in_seconds(tmp_path):
    run = Run(tmp_path / "run").started()
    run.steps(0, "train", [1.0 + 1 / step for step in range(1, 5_000)])
    code = (
        "import sys\nfrom lopt_lite_cli.main import main\n"
        f"code = main(['report', {str(run.root)!r}])\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'peft', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    # Time of the processor: that of the clock is another's too on a busy machine.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_a_real_run_is_reported_and_can_still_be_trained_anew(tmp_path):
    model, data = make_model(tmp_path / "model", "llama"), make_data(tmp_path / "data.jsonl")
    settings: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output": str(tmp_path / "run"),
        "validation": "0.25",
        "quantize": "none",
        "dtype": "float32",
        "batch_size": 4,
        "device": "cpu",
        "objective": "reconstruct",
    }
    trained = lopt_lite.train(TrainSettings(**settings))
    outcome = lopt_lite.report(ReportSettings(run=str(tmp_path / "run")))
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert (outcome.loss_before, outcome.loss_after) == (trained.loss_before, trained.loss_after)
    assert (outcome.device_peak_bytes, outcome.predicted_bytes) == (trained.device_peak_bytes, trained.predicted_bytes)
    assert "block 1 of 2, training reconstruct 1–2 5 of 5" in page.text
    assert "block 2 of 2 task 3–4 5 of 5" in page.text
    assert lopt_lite.train(TrainSettings(**settings)).already_done, "a report does not make it another run"
    assert not lopt_lite.train(TrainSettings(**settings, fresh=True)).already_done
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_run_of_an_earlier_version_names_the_rate_that_was_its_default():
    model = {"hidden_size": 576, "layers": 4}
    settled = TrainSettings(model="m", data="d").settle(has_prompts=True, model=ModelKind("", 576, 4))
    content = {"settings": settled.result_settings(), "model": model}
    assert changed_settings(content) == []
    content["settings"] |= {"lr": 1.3e-3, "lr_early": 1.3e-4}
    assert changed_settings(content) == [("--lr", "0.0013", "None")]
