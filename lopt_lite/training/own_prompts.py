"""Which of the training prompts the untouched model answers, to be anchored on (``--retain-answers``)."""

from __future__ import annotations

import numpy as np
import torch

from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.seeding import permutation
from lopt_lite.errors import SettingsError

#: Prompts that are answered, and the tokens that are kept of the end of each.
MOST_PROMPTS, LONGEST_PROMPT = 64, 256
#: How many are answered at once, where memory allows: a streamed model is read for each of their tokens.
ANSWERED_AT_ONCE = 32


def prompt_room(tokens: int, most_tokens: int) -> int:
    """Tokens of the longest prompt that is answered with ``tokens``, in examples of ``most_tokens`` at most.

    Raises
    ------
    SettingsError
        Answers of that length leave no room for a prompt.
    """
    room = min(LONGEST_PROMPT, most_tokens - tokens)
    if room < 2:
        raise SettingsError(
            f"--retain-answers is {tokens}, and examples have at most {most_tokens} tokens",
            expected=f"at most {max(0, most_tokens - 2)}",
        )
    return room


def answered_prompts(
    train: TokenizedDataset, *, most: int, tokens: int, most_tokens: int, seed: int
) -> TokenizedDataset:
    """A sample of the prompts, short ones first, each with a place for an answer of ``tokens`` tokens.

    Parameters
    ----------
    train:
        The training examples. What is before the first token to be learnt is a prompt; a single token is none.
    most:
        How many prompts.
    most_tokens:
        Longest example. Of longer prompts the end is taken.
    seed:
        Decides the sample.

    Raises
    ------
    SettingsError
        Answers of that length leave no room for a prompt.
    """
    room = prompt_room(tokens, most_tokens)
    prompts = []
    for example in permutation(len(train), (seed, "own answers")).tolist():
        ids, is_target = train.example(example)
        targets = np.flatnonzero(is_target.numpy())
        end = int(targets[0]) if len(targets) else len(ids)
        if end > 1:
            prompts.append(ids[max(0, end - room) : end])
        if len(prompts) == most:
            break
    prompts.sort(key=len)
    place = torch.zeros(tokens, dtype=torch.int32)
    parts = [torch.cat([prompt, place]) for prompt in prompts]
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    lengths = torch.tensor([0, *map(len, parts)], dtype=torch.int64)
    return TokenizedDataset(ids, torch.zeros(len(ids), dtype=torch.bool), lengths.cumsum(0))
