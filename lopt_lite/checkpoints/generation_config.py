"""generation_config.json as users bring it: what is taken from it, and what must be refused before training."""

from __future__ import annotations

from pathlib import Path

from lopt_lite.errors import ModelError
from lopt_lite.files import read_json

GENERATION_CONFIG_NAME = "generation_config.json"

_GET_FILE = "get the file from where the model came from, or take it away: a model need not have one"


def end_tokens(path: Path) -> list[int]:
    """Tokens that end a text, as the model's makers list them in the file ``path``; none if there is no such file.

    Raises
    ------
    ModelError
        The file is no JSON object, or names something else than tokens.
    """
    if not path.is_file():
        return []
    content = read_json(path, what="the model's settings for generation", error=ModelError, fix=_GET_FILE)
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object", expected="settings as transformers writes them", fix=_GET_FILE)
    listed = content.get("eos_token_id")
    tokens = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ModelError(
            f"{path} has the eos_token_id {listed!r}",
            expected="the number of a token, or a list of such numbers",
            fix=_GET_FILE,
        )
    return [token for token in tokens if token >= 0]  # -1 stands for none
