"""An LM head that config.json ties to the input embedding, and what the model's files hold of the two."""

from __future__ import annotations

import torch

from lopt_lite.checkpoints.locate import ModelFiles
from lopt_lite.checkpoints.names import Recipe
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import ModelError

#: How many numbers of each tensor are compared at once: either may be gigabytes large.
_COMPARED_AT_ONCE = 1 << 20


def embed_with_head(skeleton: Skeleton, recipes: dict[str, Recipe]) -> None:
    """Make the embedding of a tied matrix that the files hold under the head's name alone, as transformers does."""
    embedding, head = skeleton.embedding_name, skeleton.head_name
    if skeleton.tied and embedding not in recipes and head in recipes:
        recipes[embedding] = Recipe([embedding], recipes.pop(head).sources)


def check_tie(files_: ModelFiles, skeleton: Skeleton, recipes: dict[str, Recipe], dtype: torch.dtype) -> None:
    """Refuse a head that is tied in config.json and is another matrix than the embedding in the files.

    transformers does not tie such a head. Tied here in silence, an adapter would be trained for another model than it
    is used with.

    Parameters
    ----------
    dtype:
        What both are rounded to before they are compared: the type that they are stored in.

    Raises
    ------
    ModelError
        They differ, or cannot be read.
    """
    pair = [recipes.get(name) for name in (skeleton.embedding_name, skeleton.head_name)]
    if not skeleton.tied or any(recipe is None or recipe.converter is not None for recipe in pair):
        return
    embedding, head = (recipe.sources[0][0] for recipe in pair if recipe is not None)
    if not _are_equal(files_.weights, embedding, head, dtype):
        raise ModelError(
            f"the model's files hold {head} with other numbers than {embedding}, and {files_.config_path} ties the two",
            expected="equal ones, or a config.json that does not tie them (transformers does not tie such a head)",
            fix='set "tie_word_embeddings": false in config.json, or in a copy of it whose directory is named with '
            "--config DIR",
        )


def _are_equal(weights: TensorFiles, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two matrices hold the same numbers once rounded to ``dtype``; no number (NaN) is the same as another."""
    if any(name + STATE_SUFFIX in weights for name in (one, other)):
        return False  # one of them was quantised, and so is a matrix of its own
    shape = weights.info(one).shape
    if shape != weights.info(other).shape:
        return False
    rows = max(1, _COMPARED_AT_ONCE // max(1, torch.Size(shape[1:]).numel()))
    for first in range(0, shape[0], rows):
        end = min(first + rows, shape[0])
        a, b = (weights.read_range(name, first, end).to(dtype) for name in (one, other))
        if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            return False
    return True
