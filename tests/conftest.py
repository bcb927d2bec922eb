"""For all tests: a user's cache of their own, one thread for those that compare bits, and long files first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's cache directory of this session's own, for subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOPT_LITE_CACHE", str(tmp_path_factory.mktemp("user-cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of floating-point numbers in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: beside other files, the longest one should not be the last to begin."""
    slow = {item.path for item in items if {mark.name for mark in item.iter_markers()} & {"slow", "real_model"}}
    items.sort(key=lambda item: item.path not in slow)
