"""Whole runs that tune the model in full: the result is an ordinary checkpoint, and every command can use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_lite
from lopt_lite import EvaluateSettings, ExportSettings, GenerateSettings, TrainSettings
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import layer_shard
from lopt_lite.errors import RunDirectoryError, SettingsError
from lopt_lite.events import Event, Notice, Step
from lopt_lite.journal import read_facts
from lopt_lite.residency.head import place_head
from lopt_lite.residency.pool import MicroBatch, ResidentLayers
from lopt_lite.results.open_run import open_run
from lopt_lite.training import memory_choice
from tests.damage import flip_a_byte
from tests.rig import CPU, residence
from tests.tiny_models import EVERY_BLOCK_LEARNS, make_data, make_model


def _train(tmp_path: Path, model: Path, **changes: Any) -> Path:
    data = make_data(tmp_path / "data.jsonl")
    values = {"tune": "full", "epochs": 2, "batch_size": 4, "lr": 1e-3, "dtype": "float32"}
    values |= {**EVERY_BLOCK_LEARNS, **changes}
    run = tmp_path / "run"
    outcome = lopt_lite.train(TrainSettings(model=str(model), data=str(data), output=str(run), **values))
    assert outcome.adapter is None
    assert outcome.tuned_model == str(run / "model")
    return run


def _ids() -> torch.Tensor:
    return torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _own_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tuned model by lopt-lite's own pass."""
    opened = open_run(str(run), CPU)
    skeleton, store = opened.skeleton, opened.tuned_store
    place_head(skeleton, store, CPU)
    recording = skeleton.record(ids, embed=True)
    with ResidentLayers(store, skeleton, 0, skeleton.layer_count, device=CPU, dequantize=False) as pool:
        hidden = pool.forward(MicroBatch(recording.hidden, recording.calls))
    opened.close()
    return torch.stack([skeleton.logits(row) for row in hidden])


def _weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}


def _validation_losses(run: Path) -> list[float]:
    return [f["loss"] for f in read_facts(run / "journal.jsonl")[0] if f["fact"] == "validation"]


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt_neox", "gpt2", "phi3", "gemma3_text", "mixtral", "opt"])
def test_the_result_in_plain_transformers_gives_our_logits(architecture, tmp_path):
    model = make_model(tmp_path / "model", architecture)
    run = _train(tmp_path, model, epochs=1)
    plain = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    assert plain.dtype == torch.float32
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(_ids()).logits
        expected = plain(_ids()).logits
    assert not torch.allclose(untouched, expected, atol=1e-3), "training must have changed something"
    torch.testing.assert_close(_own_logits(run, _ids()), expected, rtol=0, atol=1e-5)
    template = AutoTokenizer.from_pretrained(model).chat_template
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == template
    assert not {"journal.jsonl", "lock", "lock.pid"} & {path.name for path in (run / "model").iterdir()}
    assert not (run / "adapter").exists()


def test_blocks_that_learn_nothing_keep_their_weights(tmp_path):
    model = make_model(tmp_path / "model", "llama")
    run = _train(tmp_path, model, objective="none", epochs=1)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1", "2", "3"}


@pytest.mark.parametrize("mode", ["recomputed", "partly streamed", "streamed", "offloaded"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_where_layers_are_does_not_change_the_result(dtype, mode, blocks, tmp_path, monkeypatch):
    """Whole graphs, recomputing, streaming and offloading end with the same bytes and held-out losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    changes = {"dtype": dtype, "blocks": blocks, "validation": "0.2", "epochs": 1}
    runs = []
    for name in ("resident", mode):
        # The head in slices rounds differently; this is about layers.
        chosen = residence(name, layers=-(-4 // blocks), micro_batch_tokens=80, head_slice_rows=None)
        monkeypatch.setattr(memory_choice, "choose_residence", lambda *a, chosen=chosen, **k: chosen)
        (tmp_path / name).mkdir()
        runs.append(_train(tmp_path / name, model, **changes))
    torch.set_num_threads(threads)
    assert _weights(runs[1]) == _weights(runs[0])
    assert _validation_losses(runs[1]) == _validation_losses(runs[0])
    assert _validation_losses(runs[0])[1] < _validation_losses(runs[0])[0]


@pytest.mark.parametrize("blocks", [1, 2])
def test_evaluate_agrees_with_training(blocks, tmp_path):
    model = make_model(tmp_path / "model", "llama")
    held_out = make_data(tmp_path / "held_out.jsonl", 8, seed=9)
    run = _train(tmp_path, model, blocks=blocks, validation=str(held_out), epochs=3)
    before, *_, after = _validation_losses(run)
    assert after < before - 0.2
    outcome = lopt_lite.evaluate(EvaluateSettings(run=str(run), data=str(held_out)))
    assert outcome.base_loss == pytest.approx(before, rel=1e-4)
    assert outcome.tuned_loss == pytest.approx(after, rel=1e-4)


def test_generation_equals_transformers(tmp_path):
    model = make_model(tmp_path / "model", "llama")
    run = _train(tmp_path, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    answers = []
    for base, where in ((False, run / "model"), (True, model)):
        plain = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        expected = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        settings = GenerateSettings(run=str(run), prompt="What is 3 + 4?", max_new_tokens=8, base=base)
        answers.append(lopt_lite.generate(settings).text)
        assert answers[-1] == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert answers[0] != answers[1]


def test_export_hands_out_the_model_and_says_that_there_is_no_adapter(tmp_path):
    run = _train(tmp_path, make_model(tmp_path / "model"), epochs=1)
    out = tmp_path / "out"
    with pytest.raises(SettingsError, match="no adapter") as caught:
        lopt_lite.export(ExportSettings(run=str(run), out=str(out)))
    assert "--format merged" in str(caught.value)
    for changes in ({"onto": "quantized"}, {"model": "m"}):
        with pytest.raises(SettingsError, match="nothing to merge"):
            lopt_lite.export(ExportSettings(run=str(run), out=str(out), format="merged", **changes))
    assert not out.exists()
    outcome = lopt_lite.export(ExportSettings(run=str(run), out=str(out), format="merged"))
    assert outcome.onto is None
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (run / "model").iterdir()
    }
    with pytest.raises(RunDirectoryError, match="not an empty directory"):
        lopt_lite.export(ExportSettings(run=str(run), out=str(out), format="merged"))


def test_the_result_is_a_model_to_train_and_no_store_of_the_original(tmp_path):
    model = make_model(tmp_path / "model")
    run = _train(tmp_path, model, epochs=1)
    (tmp_path / "second").mkdir()
    again = _train(tmp_path / "second", run / "model", epochs=1)
    assert not (again / "store").exists()
    assert _weights(again) != _weights(run)
    (tmp_path / "third").mkdir()
    with pytest.raises(RunDirectoryError, match="was made with model"):
        _train(tmp_path / "third", model, store=str(run / "model"))


def test_a_finished_run_says_so_and_a_damaged_model_is_written_again(tmp_path):
    run = _train(tmp_path, make_model(tmp_path / "model"), epochs=1)
    assert lopt_lite.status(run).state == "done"
    settings = TrainSettings(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        output=str(run),
        tune="full",
        epochs=1,
        batch_size=4,
        lr=1e-3,
        dtype="float32",
        **EVERY_BLOCK_LEARNS,
    )
    before = _weights(run)
    assert lopt_lite.train(settings).already_done
    assert _weights(run) == before
    everything = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    shard = run / "model" / layer_shard(1)
    for damage in (
        lambda: flip_a_byte(shard),
        shard.unlink,
        lambda: (run / "model" / "config.json").write_text(""),
        lambda: shutil.rmtree(run / "model"),
    ):
        damage()
        told: list[Event] = []
        assert not lopt_lite.train(settings, on_event=told.append).already_done
        assert "written again from the run's blocks" in "".join(e.text for e in told if isinstance(e, Notice))
        assert not [event for event in told if isinstance(event, Step)]
        assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == everything
    # Without its blocks, too, what can be mended is, and what is left of the weights is not deleted.
    shutil.rmtree(run / "blocks")
    (run / "model" / "tokenizer.json").write_text("{")
    assert lopt_lite.train(settings).already_done
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == everything
    flip_a_byte(shard)
    with pytest.raises(RunDirectoryError, match=r"its model is damaged \(.*layer-00001.*could be put together from"):
        lopt_lite.train(settings)
    assert {path.name for path in (run / "model").iterdir()} == set(everything)
    shutil.rmtree(run / "model")
    with pytest.raises(RunDirectoryError, match="the model of the run") as caught:
        open_run(str(run), CPU)
    assert "the command of the training again" in caught.value.fix
    journal = run / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if json.loads(line)["fact"] != "model"))
    status = lopt_lite.status(run)
    assert (status.state, status.next) == ("stopped", "write the model")
    lopt_lite.train(settings)
    assert _weights(run) == before
    assert Store(run / "model").info.quantize == "none"
