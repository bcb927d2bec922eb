"""A data file in numbers for planning: estimated, and remembered while the file and the tokenizer stay the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from lopt_lite import user_cache
from lopt_lite.checkpoints.locate import ModelDescription
from lopt_lite.data.estimate import DataEstimate, estimate_data
from lopt_lite.data.json_lines import check_is_data_file

FILE_NAME = "data.json"
#: Part of the key: estimates made in another way are not comparable.
_VERSION = 4


def known_estimate(path: str, model: ModelDescription, *, max_length: int) -> DataEstimate:
    """See :func:`estimate_data`; with the model's tokenizer where there is one.

    Raises
    ------
    DataError, ModelError
        The data file or the tokenizer cannot be used.
    """
    check_is_data_file(Path(path))
    directory = model.tokenizer_directory
    if directory is None:
        return estimate_data(path, None, max_length=max_length)
    # Sizes and times tell: whoever changes a file so that neither changes gets an estimate of what was there.
    key = _key([Path(path), *sorted(p for p in directory.iterdir() if p.suffix != ".safetensors")], max_length)
    found = user_cache.recall(FILE_NAME, key)
    with contextlib.suppress(TypeError, KeyError):  # nothing is there, or something else than was remembered
        return DataEstimate(**{**found, "lengths": tuple(found["lengths"])})
    from lopt_lite.checkpoints.tokenizer import load_tokenizer  # here, as its library takes a second

    estimate = estimate_data(path, load_tokenizer(model), max_length=max_length)
    user_cache.remember(FILE_NAME, key, asdict(estimate))
    return estimate


def _key(paths: list[Path], max_length: int) -> str:
    files = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return hashlib.sha256(json.dumps([_VERSION, files, max_length]).encode()).hexdigest()
