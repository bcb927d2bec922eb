"""What a run was given, named so that it is found from any directory: its settings keep paths as they were typed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a MODEL that is a file ends in: weights, or their index.
_FILES = (".safetensors", ".json")


@dataclass(frozen=True)
class GivenPaths:
    """The paths that one run was given; ``content`` is that of its settings.json."""

    content: dict[str, Any]

    def model(self) -> str:
        """MODEL: a hub id, or the absolute path of what was trained from; as it was typed where that is gone."""
        given, origin = self._typed_model, self._origin
        if not origin.is_absolute():
            return given
        wanted = self._absolute_model()
        return str(wanted) if wanted.exists() else given

    def file(self, given: str) -> str:
        """The absolute path of a file; as it was typed where there is none (a fraction to hold out, say)."""
        return next((str(path) for path in self._candidates(given) if path.is_file()), given)

    def directory(self, given: str) -> str:
        """The absolute path of a directory; as it was typed where there is none."""
        return next((str(path) for path in self._candidates(given) if path.is_dir()), given)

    @property
    def _typed_model(self) -> str:
        return str(self.content["model"]["given"])

    @property
    def _origin(self) -> Path:
        """The absolute directory of the weights; a hub id is a relative path."""
        return Path(str(self.content["model"].get("origin", self._typed_model)))

    def _absolute_model(self) -> Path:
        given = Path(self._typed_model)
        return self._origin / given.name if given.name.endswith(_FILES) else self._origin

    def _candidates(self, given: str) -> list[Path]:
        """Where a path may lead that was typed when the run was started."""
        bases = [base for base in (self._started_in(), Path.cwd()) if base is not None]
        # Without following links, as a model's path is made absolute.
        return [Path(os.path.abspath(base / Path(given))) for base in bases]  # noqa: PTH100

    def _started_in(self) -> Path | None:
        """The directory that the run was started in, as far as the model's path tells: both of its forms are known."""
        given, model = Path(self._typed_model), self._absolute_model()
        count = len(given.parts)
        if given.is_absolute() or not self._origin.is_absolute() or model.parts[-count:] != given.parts:
            return None
        return Path(*model.parts[:-count])
