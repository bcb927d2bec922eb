"""For all tests: what is remembered between commands is kept apart from the user's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's cache directory of this session's own, for subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOPT_LITE_CACHE", str(tmp_path_factory.mktemp("user-cache")))
        yield
