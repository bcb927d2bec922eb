"""Fetching a model from the Hugging Face hub: weights, configuration and tokenizer files only, never code."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from lopt_lite.errors import ModelError
from lopt_lite.events import Notice, OnEvent

WEIGHTS_PATTERN = "*.safetensors"

#: Files that are fetched. Python code and pickles match none of these.
ALLOWED_PATTERNS = (WEIGHTS_PATTERN, "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")

#: Folders that repositories use for other formats of the same weights.
IGNORED_PATTERNS = ("original/*", "onnx/*", "gguf/*", "coreml/*", "openvino/*", "consolidated*")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_ANSWER_WITHIN_S = 10
_BRING_FILES = "download the model elsewhere and give its directory as MODEL"


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``organisation/name``."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def fetch(hub_id: str, on_event: OnEvent, *, weights: bool = True) -> Path:
    """Download a model, or find it in the local cache; without a network the cache is used as it is.

    Parameters
    ----------
    weights:
        Whether weights are needed; without, only the small files are fetched.

    Returns
    -------
    The directory of the snapshot, whose files are symbolic links into the cache.

    Raises
    ------
    ModelError
        There is no such model, it needs a login, or it is not in the cache and the hub cannot be reached.
    """
    on_event(Notice(text=f"Looking for {hub_id} on the Hugging Face hub (files already in its cache are not fetched)."))
    bars_were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    unreachable: Exception | None = None
    try:
        unreachable = _why_unreachable(hub_id)
        # What the user named, at its newest revision; runs keep its fingerprint.
        directory = huggingface_hub.snapshot_download(  # nosec B615
            hub_id,
            allow_patterns=[p for p in ALLOWED_PATTERNS if weights or p != WEIGHTS_PATTERN],
            ignore_patterns=list(IGNORED_PATTERNS),
            etag_timeout=_ANSWER_WITHIN_S,
            local_files_only=unreachable is not None,
        )
    except hub_errors.GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: its owner asks for a login",
            fix=f"accept its terms at https://huggingface.co/{hub_id}, then run 'hf auth login'",
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no file or directory {hub_id} here, and no public model of that name on the hub",
            fix="check the spelling, or run 'hf auth login' if the model is private",
        ) from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id} is not (or not completely) in the local Hugging Face cache, and the hub cannot be reached"
            f"{_reason(unreachable or error.__cause__)}",
            fix=f"check the network (and HF_HUB_OFFLINE), or {_BRING_FILES}; a local path must exist",
        ) from error
    except hub_errors.HFValidationError as error:
        raise ModelError(
            f"{hub_id!r} is neither a file or directory here nor a valid hub id",
            fix="check the path; the id of a model on the hub is OWNER/NAME",
        ) from error
    except (hub_errors.HTTPError, hub_errors.EntryNotFoundError, OSError, RuntimeError) as error:
        raise ModelError(
            f"fetching {hub_id} from the hub failed{_reason(error)}",
            fix=f"give the same command again (what was fetched is kept), or {_BRING_FILES}",
        ) from error
    finally:
        if not bars_were_disabled:
            enable_progress_bars()
    return Path(directory)


def _why_unreachable(hub_id: str) -> Exception | None:
    """Ask the hub with a time limit, which a download's own first question does not have; None when it answers."""
    try:
        huggingface_hub.HfApi().repo_info(hub_id, timeout=_ANSWER_WITHIN_S)
    except hub_errors.HfHubHTTPError:
        return None  # an answer, if not a good one: the download meets it again and says what it means
    except (hub_errors.HTTPError, OSError) as error:
        return error
    return None


def _reason(error: BaseException | None) -> str:
    text = str(error).strip() if error is not None else ""
    return f" ({text.splitlines()[0]})" if text else ""
