"""The model's tokenizer: loading it with errors a user can act on, checking it, writing it beside a result."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lopt_lite.checkpoints.locate import TOKENIZER_NAMES, ModelDescription
from lopt_lite.errors import ModelError
from lopt_lite.events import Notice, OnEvent, ignore
from lopt_lite.files import explain_os_error, make_directory, move_file, temporary_directory

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_FIX = "put the model's tokenizer files beside it, or name their directory with --config DIR"


def load_tokenizer(files: ModelDescription) -> PreTrainedTokenizerBase:
    """Load the tokenizer that came with a model, running none of its code.

    Raises
    ------
    ModelError
        There is no tokenizer, or its files are broken or need code of their own.
    """
    directory = files.tokenizer_directory
    if directory is None:
        raise ModelError(
            f"there is no tokenizer beside the model {files.name}",
            expected=f"one of {', '.join(TOKENIZER_NAMES)}",
            fix=_FIX,
        )
    return load_tokenizer_from(directory)


def holds_tokenizer(directory: Path) -> bool:
    """Whether there are a tokenizer's files."""
    return any((directory / name).is_file() for name in TOKENIZER_NAMES)


def load_tokenizer_from(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer whose files lie in a directory, running none of its code.

    Raises
    ------
    ModelError
        Its files are broken or need code of their own.
    """
    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)  # nosec B615
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise _broken(directory, error) from error
    except Exception as error:
        # The tokenizers library raises plain Exception for a broken tokenizer.json, so nothing narrower can be named.
        if type(error) is not Exception:
            raise
        raise _broken(directory, error) from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill rows with: the pad token, else the end of sequence, else 0 (padding is masked anyway)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, *, on_event: OnEvent = ignore) -> None:
    """Check that the tokenizer's ids fit an embedding of ``rows`` rows.

    Added tokens may lie outside (text-only Gemma 3 keeps an image token like that) unless they are the beginning,
    end, padding or unknown token; they are told as a notice, since text that contains one cannot be used.

    Raises
    ------
    ModelError
        An ordinary or a needed token has no row.
    """
    vocabulary = tokenizer.get_vocab()
    outside = {token: token_id for token, token_id in vocabulary.items() if token_id >= rows}
    if not outside:
        return
    added = set(tokenizer.get_added_vocab())
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    bad = sorted(token for token in outside if token not in added or token in needed)
    if bad:
        raise ModelError(
            f"the tokenizer's token {bad[0]!r} has the id {outside[bad[0]]}, and the embedding has {rows} rows",
            expected=f"ids below {rows}",
            fix="use the tokenizer that belongs to this model (--config DIR)",
        )
    some = ", ".join(sorted(outside)[:3])
    on_event(Notice(text=f"{len(outside)} added tokens have no row in the embedding and cannot be used ({some})."))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer's files, chat template included, durably into ``directory``.

    Raises
    ------
    RunDirectoryError, DoesNotFitError
        The directory cannot be written.
    """
    make_directory(directory)
    with temporary_directory(directory) as temporary:
        try:
            with _quiet_transformers():
                tokenizer.save_pretrained(temporary)
        except Exception as error:
            # The tokenizers library says in the text of a plain Exception what the system answered.
            answer = _SYSTEM_ERROR.search(str(error)) if type(error) is Exception else None
            if answer is None:
                raise
            number = int(answer[1])
            raise explain_os_error(OSError(number, os.strerror(number)), directory, "write to") from error
        for source in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = directory / source.relative_to(temporary)
            make_directory(target.parent)
            move_file(source, target)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _broken(directory: Path, error: BaseException) -> ModelError:
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text or "custom code" in text:
        return ModelError(
            f"the tokenizer in {directory} needs remote code",
            expected="a tokenizer that transformers has itself; code that comes with a model is never run",
            fix="get a tokenizer.json for this model and name its directory with --config DIR",
        )
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return ModelError(
        f"the tokenizer in {directory} cannot be loaded: {kind}{text.splitlines()[0]}",
        expected="tokenizer files as transformers writes them",
        fix=f"get them again; {_FIX}",
    )
