"""The whole way on SmolLM2-135M-Instruct and real GSM8K examples, as 'make demo' goes it, in short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.tokenizer import load_tokenizer
from lopt_lite.data.dataset import collate
from lopt_lite.data.load import load_dataset
from lopt_lite.float32_products import float32_products
from lopt_lite.residency.head import place_head
from lopt_lite.residency.pool import MicroBatch, ResidentLayers
from lopt_lite.results.open_run import open_run
from tests.rig import CPU, plain_kernels

ROOT = Path(__file__).parent.parent
MODEL = ROOT / ".demo" / "SmolLM2-135M-Instruct" / "model.safetensors"

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(540),
    pytest.mark.skipif(not MODEL.is_file(), reason="'make demo-model' has not been run"),
]


def _lopt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lopt-lite"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], Path]:
    """A short run through the command line: (run directory, its JSON outcome, held-out file)."""
    directory = tmp_path_factory.mktemp("real")
    data, held_out = directory / "train.jsonl", directory / "held_out.jsonl"
    examples = ROOT / "examples"
    data.write_text("".join((examples / "gsm8k_train.jsonl").open(encoding="utf-8").readlines()[:32]), encoding="utf-8")
    held_out.write_text(
        "".join((examples / "gsm8k_heldout.jsonl").open(encoding="utf-8").readlines()[:12]), encoding="utf-8"
    )
    done = _lopt(
        "train", str(MODEL), str(data), "--validation", str(held_out), "--output", "run", "--json", cwd=directory
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "kernels" not in done.stderr
    return directory / "run", json.loads(done.stdout), held_out


def test_held_out_loss_falls(trained: tuple[Path, dict[str, object], Path]) -> None:
    _, outcome, _ = trained
    assert isinstance(outcome["loss_before"], float) and isinstance(outcome["loss_after"], float)
    assert outcome["loss_after"] < outcome["loss_before"] - 0.15


def test_plain_peft_on_bitsandbytes_picks_the_same_tokens(trained: tuple[Path, dict[str, object], Path]) -> None:
    run, _, held_out = trained
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(MODEL.parent, dtype=torch.bfloat16, quantization_config=config)
    plain = plain_kernels(PeftModel.from_pretrained(base, run / "adapter").eval())
    # lopt-lite keeps adapters in float32 and computes with them in the model's dtype; PEFT by itself turns inputs into
    # float32 for them, which rounds elsewhere and changes a few tokens in a hundred.
    for name, parameter in plain.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    dataset, _ = load_dataset(
        held_out,
        load_tokenizer(locate_model(str(MODEL))),
        max_length=1024,
        skip_bad_lines=False,
        on_event=lambda event: None,
    )
    opened = open_run(str(run), CPU)
    place_head(opened.skeleton, opened.store, CPU)
    same = near = total = 0
    with (
        torch.no_grad(),
        float32_products(CPU),
        ResidentLayers(
            opened.store,
            opened.skeleton,
            0,
            opened.skeleton.layer_count,
            device=CPU,
            dequantize=True,
            on_layer=opened.on_layer,
        ) as pool,
    ):
        for indices in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
            batch = collate(dataset, indices, 0)
            expected = plain(input_ids=batch.input_ids, attention_mask=batch.real.long()).logits
            recording = opened.skeleton.record(batch.input_ids, embed=True)
            hidden = pool.forward(MicroBatch(recording.hidden, recording.calls))
            answers = batch.targets != -100
            got = opened.skeleton.logits(hidden[answers]).argmax(-1, keepdim=True)
            highest, likeliest = expected[answers].max(-1, keepdim=True)
            same += int((got == likeliest).sum())
            # Logits about 20 are 1/8 apart in bfloat16: of two as likely, sums in another order make another the first.
            near += int((highest - expected[answers].gather(-1, got) <= 0.25).sum())
            total += int(answers.sum())
    assert total > 1000
    assert same / total >= 0.97
    assert near / total >= 0.995


def test_every_other_command_works_on_the_run(trained: tuple[Path, dict[str, object], Path]) -> None:
    run, outcome, held_out = trained
    where = run.parent
    status = json.loads(_lopt("status", "run", "--json", cwd=where).stdout)
    assert status["state"] == "done"
    evaluated = json.loads(_lopt("evaluate", "run", str(held_out), "--json", cwd=where).stdout)
    assert evaluated["tuned_loss"] == pytest.approx(outcome["loss_after"], rel=5e-3)
    assert evaluated["base_loss"] == pytest.approx(outcome["loss_before"], rel=5e-3)
    answer = json.loads(
        _lopt("generate", "run", "--prompt", "What is 2 + 3?", "--max-new-tokens", "24", "--json", cwd=where).stdout
    )
    assert answer["text"] and answer["tokens"] > 0
    exported = _lopt("export", "run", "merged", "--format", "merged", "--json", cwd=where)
    assert exported.returncode == 0, exported.stderr
    merged = AutoModelForCausalLM.from_pretrained(where / "merged")
    assert merged.dtype == torch.bfloat16
    again = _lopt(
        "train", str(MODEL), "train.jsonl", "--validation", str(held_out), "--output", "run", "--json", cwd=where
    )
    assert again.returncode == 0 and json.loads(again.stdout)["already_done"]
