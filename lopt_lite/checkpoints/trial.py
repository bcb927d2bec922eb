"""Trying out code that comes with an architecture: what it raises is a fact about the model, and no fault of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lopt_lite.errors import LoptError, ModelError, is_out_of_memory


@contextlib.contextmanager
def trial(architecture: str, what: str) -> Iterator[None]:
    """Within the context, the model's own code runs before any work is done.

    Parameters
    ----------
    architecture:
        The model's class.
    what:
        What does not work if it fails, as the end of "LlamaForCausalLM ...".

    Raises
    ------
    ModelError
        The code raised something that is neither an error of ours nor a lack of memory; its message is kept.
    """
    try:
        yield
    except Exception as error:
        if not is_the_models(error):
            raise
        raise does_not_fit(architecture, what, error) from error


def is_the_models(error: Exception) -> bool:
    """Whether what a model's code raised tells of the model: it is no error of ours and no lack of memory."""
    return not isinstance(error, LoptError) and not is_out_of_memory(error)


def does_not_fit(architecture: str, what: str, error: BaseException) -> ModelError:
    """The refusal of an architecture whose own code raised ``error``."""
    return ModelError(
        f"{architecture} {what}; its own code raised {type(error).__name__}: {first_line(error)}",
        expected="a decoder whose layers can be run one by one, each on nothing but the hidden state of the one before",
        fix="check config.json; if it is right, this architecture cannot be trained here: choose another model",
    )


def first_line(error: BaseException) -> str:
    """The first line of a message, or the kind of error where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
