"""The tokenizer: broken ones are told apart, good ones are written whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    load_tokenizer_from,
    pad_token_id,
    save_tokenizer,
)
from lopt_lite.errors import DoesNotFitError, ModelError, RunDirectoryError
from lopt_lite.events import Event, Notice
from lopt_lite.files import remove_stray_temporaries

WORDS = ["<unk>", "<s>", "</s>", "hello", "world"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"unk_token": "<unk>", **special})


def model_directory(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.embed_tokens.weight": torch.zeros(5, 2)}, directory / "model.safetensors")
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def test_a_tokenizer_is_loaded_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(locate_model(str(model_directory(tmp_path / "model"))))
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    save_tokenizer(tokenizer, tmp_path / "result" / "adapter")
    model_directory(tmp_path / "second")
    for path in (tmp_path / "second").glob("*token*"):
        path.unlink()
    again = load_tokenizer(locate_model(str(tmp_path / "second"), config_dirs=[str(tmp_path / "result" / "adapter")]))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.eos_token == "</s>"
    assert again.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(messages, tokenize=False) == "user: hello\n"


def test_it_is_written_where_it_goes_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is no such directory"))
    save_tokenizer(make_tokenizer(), tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert load_tokenizer_from(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # What the tokenizers library raises on a full disk: its class is Exception itself.
        (Exception("No space left on device (os error 28)"), DoesNotFitError),
        (Exception("Read-only file system (os error 30)"), RunDirectoryError),
        (OSError(28, "No space left on device"), DoesNotFitError),
        (Exception("something else"), Exception),
    ],
)
def test_a_disk_that_is_full_is_said_to_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(Exception) as caught:
        save_tokenizer(tokenizer, tmp_path / "out")
    assert type(caught.value) is expected
    assert not list((tmp_path / "out").iterdir())
    assert expected is Exception or str(tmp_path / "out") in str(caught.value)


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    stray = tmp_path / "out" / ".by-libraries.tmp"
    stray.mkdir(parents=True)
    (stray / "tokenizer.json").write_text("{")
    (tmp_path / "out" / ".mine.tmp").mkdir()
    assert remove_stray_temporaries(tmp_path) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".mine.tmp"]
    # And where no start comes before, by itself.
    stray.mkdir()
    (stray / "strange.json").write_text("{")
    save_tokenizer(make_tokenizer(), tmp_path / "out")
    assert not stray.exists()
    assert not (tmp_path / "out" / "strange.json").exists()


def test_saving_twice_gives_the_same_bytes_and_no_strays(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(locate_model(str(model_directory(tmp_path / "model"))))
    for name in ("one", "two"):
        save_tokenizer(tokenizer, tmp_path / name)
    save_tokenizer(tokenizer, tmp_path / "two")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(contents[0])


def test_a_directory_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError):
        save_tokenizer(make_tokenizer(), tmp_path / "file" / "below")


def test_no_tokenizer_is_an_error_that_names_the_files_looked_for(tmp_path: Path) -> None:
    directory = model_directory(tmp_path)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer beside the model(.|\n)*tokenizer\.json(.|\n)*--config DIR"):
        load_tokenizer(locate_model(str(directory)))


BROKEN_VOCABULARY = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{bad"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", json.dumps(BROKEN_VOCABULARY).encode()),
        ("tokenizer_config.json", b"{bad"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 5}'),
    ],
)
def test_a_broken_tokenizer_is_an_error_that_names_its_directory(tmp_path: Path, name: str, content: bytes) -> None:
    directory = model_directory(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_tokenizer(locate_model(str(directory)))
    assert str(directory) in caught.value.found


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    directory = model_directory(tmp_path)
    (directory / "tok.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Foo: pass")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Foo", "auto_map": {"AutoTokenizer": ["tok.Foo", None]}})
    )
    with pytest.raises(ModelError, match="needs remote code"):
        load_tokenizer(locate_model(str(directory)))
    assert not (directory / "ran").exists()


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = locate_model(str(model_directory(tmp_path)))
    capfd.readouterr()
    save_tokenizer(load_tokenizer(files), tmp_path / "out")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_the_pad_token_falls_back_to_the_end_and_then_to_zero() -> None:
    assert pad_token_id(make_tokenizer(pad_token="<s>", eos_token="</s>")) == 1
    assert pad_token_id(make_tokenizer(eos_token="</s>")) == 2
    assert pad_token_id(make_tokenizer()) == 0


def test_ids_outside_the_embedding_are_refused() -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    check_vocabulary(tokenizer, 5)
    check_vocabulary(tokenizer, 64)
    with pytest.raises(ModelError, match=r"'world' has the id 4, and the embedding has 4 rows"):
        check_vocabulary(tokenizer, 4)


def test_an_added_token_outside_is_a_notice_unless_it_is_needed() -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.add_tokens(["<image>"])
    events: list[Event] = []
    check_vocabulary(tokenizer, 5, on_event=events.append)
    assert [isinstance(event, Notice) and "<image>" in event.text for event in events] == [True]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ModelError, match=r"\[PAD\]"):
        check_vocabulary(tokenizer, 5)
