"""Hub ids: without a network (none of these tests uses one) the cache or a clear error."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

import lopt_lite
from lopt_lite import ExportSettings, TrainSettings
from lopt_lite.checkpoints import hub
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.errors import ModelError, RunDirectoryError, StoppedError
from lopt_lite.events import Event, Step, ignore
from lopt_lite.training.run_directory import RunPaths, read_settings
from tests.tiny_models import make_data, make_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_model_in_the_cache_works_offline(cache: Path) -> None:
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    for directory in (snapshot, repository / "refs", repository / "blobs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    save_file({"model.norm.weight": torch.ones(4)}, repository / "blobs" / "0")
    (repository / "blobs" / "1").write_text(json.dumps({"model_type": "llama"}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    files = locate_model("org/tiny")
    assert (files.origin, files.name) == ("org/tiny", "tiny")
    assert torch.equal(files.weights.read("model.norm.weight"), torch.ones(4))


def test_a_model_that_is_not_in_the_cache_is_a_clear_error_offline() -> None:
    with pytest.raises(ModelError, match=r"org/absent is not .* cache, and the hub cannot be reached(.|\n)*network"):
        locate_model("org/absent")


def test_a_hub_that_never_answers_does_not_hold_the_user_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hub, "_ANSWER_WITHIN_S", 1)
        before_s = time.monotonic()
        with pytest.raises(ModelError, match="cannot be reached"):
            hub.fetch("org/name", ignore)
        assert time.monotonic() - before_s < 30


def _answers() -> Iterator[tuple[Exception, str]]:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    yield hub_errors.GatedRepoError("gated", response=response), "login(.|\n)*terms"
    yield hub_errors.RepositoryNotFoundError("none", response=response), "no public model"
    yield hub_errors.HfHubHTTPError("500 Server Error", response=response), "500 Server Error"
    yield hub_errors.HTTPError("connection reset"), "connection reset"
    yield OSError(28, "No space left on device"), "No space left"


@pytest.mark.parametrize(("answer", "match"), list(_answers()))
def test_what_the_hub_answers_becomes_an_error_a_user_can_act_on(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, match: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=match):
        hub.fetch("org/name", ignore)


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("chat_template.jinja", True),
        ("modeling_x.py", False),
        ("pytorch_model.bin", False),
        ("model.gguf", False),
        ("original/consolidated.00.pth", False),
        ("original/params.json", False),
        ("onnx/config.json", False),
        ("consolidated.safetensors", False),
    ],
)
def test_code_and_pickles_are_not_fetched(name: str, fetched: bool) -> None:
    allowed = any(fnmatch.fnmatch(name, pattern) for pattern in hub.ALLOWED_PATTERNS)
    ignored = any(fnmatch.fnmatch(name, pattern) for pattern in hub.IGNORED_PATTERNS)
    assert (allowed and not ignored) == fetched


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("Qwen/Qwen3-0.6B", True),
        ("a/b/c", False),
        ("name", False),
        ("../name", False),
        ("/name", False),
        ("./name", False),
        ("org/..", False),
        ("org/na me", False),
        ("", False),
    ],
)
def test_what_looks_like_a_hub_id(text: str, expected: bool) -> None:
    assert hub.looks_like_hub_id(text) == expected


def test_a_run_goes_on_with_the_revision_that_it_began_with(cache: Path, tmp_path: Path) -> None:
    """The hub may have another one by the morning."""
    repository = cache / "models--org--tiny"
    old, new = (make_model(repository / "snapshots" / (letter * 40)) for letter in "ab")
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    data = str(make_data(tmp_path / "data.jsonl", 8))

    def settings(**changes: Any) -> TrainSettings:
        return TrainSettings(model="org/tiny", data=data, output="run", dtype="float32", batch_size=4, **changes)

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        lopt_lite.train(settings(), on_event=stop)
    (repository / "refs" / "main").write_text("b" * 40)
    lopt_lite.train(settings())
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"
    lopt_lite.export(ExportSettings(run="run", out="merged", format="merged"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rms_norm_eps"] == config["rms_norm_eps"]
    # Without the old revision it is another model.
    shutil.rmtree(old)
    with pytest.raises(RunDirectoryError, match="with other content than it has now"):
        lopt_lite.train(settings())
    # Begun anew, it takes the newest one.
    lopt_lite.train(settings(fresh=True))
    assert read_settings(RunPaths(tmp_path / "run"))["model"]["snapshot"] == str(new)
