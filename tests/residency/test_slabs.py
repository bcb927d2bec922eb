"""No slab is overwritten while in use, and computing finds the bytes it asked for, in whatever order things run."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch

from lopt_lite.backends import CpuBackend
from lopt_lite.checkpoints.store import Place, ShardView
from lopt_lite.devices import CopyStream
from lopt_lite.errors import ModelError
from lopt_lite.residency import slabs
from lopt_lite.residency.slabs import ShardStream
from tests.fake_device import FakeDevice, FakeReader

CPU = torch.device("cpu")
LAYERS = 5


def content(index: int) -> torch.Tensor:
    """A stretch's bytes; no two stretches have the same length or the same bytes."""
    return torch.full((32 + 16 * (index % 3),), 10 + index, dtype=torch.uint8)


def a_view(index: int, before_read: Callable[[torch.Tensor], None] = lambda buffer: None) -> ShardView:
    def read_into(buffer: torch.Tensor) -> None:
        before_read(buffer)
        buffer.copy_(content(index))

    size = content(index).numel()
    places = {"a": Place(0, 16, torch.uint8, (4, 4)), "b": Place(16, size, torch.int16, ((size - 16) // 2,))}
    return ShardView(nbytes=size, tensors=places, read_into=read_into)


def expected_tensors(index: int) -> list[torch.Tensor]:
    bytes_ = content(index)
    return [bytes_[:16].reshape(4, 4), bytes_[16:].view(torch.int16)]


def a_walk(seed: int) -> list[tuple[int, list[int]]]:
    """(stretch, upcoming) as training asks for them: up and down, up again; sometimes a guess ahead is wrong."""
    dice = random.Random(seed)
    walk: list[tuple[int, list[int]]] = []
    for _ in range(3):
        first, top = dice.randrange(2), dice.randrange(2, LAYERS)
        order = [*range(first, top + 1), *range(top - 1, first - 1, -1)]
        if dice.random() < 0.3:
            order = [dice.randrange(LAYERS) for _ in order]
        for position, index in enumerate(order):
            upcoming = order[position + 1 :] if dice.random() < 0.9 else [dice.randrange(LAYERS)]
            walk.append((index, upcoming))
    return walk


def run_on_fake(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    *,
    eager: str | None = None,
    prefetch: bool = True,
    kind: type[CopyStream] = CopyStream,
) -> FakeDevice:
    """A walk on the fake device; its races and wrong bytes are for the caller to look at."""
    device = FakeDevice(seed, eager)
    monkeypatch.setattr(slabs, "ThreadPoolExecutor", lambda **options: FakeReader(device))
    views = {index: a_view(index, lambda buffer: device.host_write(buffer, "reading")) for index in range(LAYERS)}
    stream = ShardStream(views, device=CPU, prefetch=prefetch, copies=kind(CPU, via=device))
    for number, (index, upcoming) in enumerate(a_walk(seed)):
        with stream.item(index, upcoming) as tensors:
            for _ in range(device.dice.randrange(3)):
                device.compute(list(tensors.values()), f"use {number} of {index}", expected=expected_tensors(index))
    if device.dice.random() < 0.5:
        # Leave with a read ahead under way.
        with stream.item(0, [1]):
            pass
    stream.close()
    device.reuse()
    device.finish()
    return device


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("eager", [None, "compute", "copy"])
def test_no_buffer_is_overwritten_while_in_use(
    eager: str | None, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(60):
        device = run_on_fake(monkeypatch, seed, eager=eager, prefetch=prefetch)
        assert not device.races, (seed, device.races)
        assert not device.wrong_bytes, (seed, device.wrong_bytes)


class NoMarkUsed(CopyStream):
    def mark_used(self, slab: int) -> None:
        pass


class NoWaitBeforeCopying(CopyStream):
    def copy(self, slab: int, host: torch.Tensor, device: torch.Tensor) -> None:
        self._used.clear()
        super().copy(slab, host, device)


class NoWaitForCopy(CopyStream):
    def wait_for_copy(self, slab: int) -> None:
        pass


class NoWaitUntilUnused(CopyStream):
    def wait_until_unused(self, slab: int) -> None:
        pass


class NoOrderAfterAllocation(CopyStream):
    def device_buffer(self, host: torch.Tensor) -> torch.Tensor:
        return self._backend.device_buffer(host.numel())


class NoWaitAtClose(CopyStream):
    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "race"),
    [
        (NoMarkUsed, "copy by copy 1 and use"),
        (NoWaitBeforeCopying, "copy by copy 1 and use"),
        (NoWaitForCopy, "and copy by copy 1"),
        (NoWaitUntilUnused, "reading by reader and copy by copy 1"),
        (NoOrderAfterAllocation, "copy by copy 1 and what was there before"),
        (NoWaitAtClose, "the next owner by compute and copy by copy 1"),
    ],
)
def test_every_single_order_is_needed(kind: type[CopyStream], race: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the happens-before model finds a race of just this kind."""
    found = [race_ for seed in range(20) for race_ in run_on_fake(monkeypatch, seed, kind=kind).races]
    assert found
    assert any(race in each for each in found), found[:5]


@pytest.mark.parametrize(
    ("kind", "eager"),
    [
        (NoMarkUsed, "copy"),
        (NoWaitBeforeCopying, "copy"),
        (NoWaitForCopy, "compute"),
        (NoWaitUntilUnused, None),
        (NoOrderAfterAllocation, "copy"),
    ],
)
def test_without_an_order_computing_finds_wrong_bytes(
    kind: type[CopyStream], eager: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(run_on_fake(monkeypatch, seed, eager=eager, kind=kind).wrong_bytes for seed in range(60))


def use(stream: ShardStream, index: int, upcoming: list[int] | None = None) -> None:
    with stream.item(index, upcoming or []) as tensors:
        found = list(tensors.values())
        assert all(torch.equal(a, b) for a, b in zip(found, expected_tensors(index), strict=True))


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_cpu_finds_the_right_bytes_with_a_real_reader(prefetch: bool) -> None:
    stream = ShardStream({index: a_view(index) for index in range(LAYERS)}, device=CPU, prefetch=prefetch)
    for seed in range(20):
        for index, upcoming in a_walk(seed):
            use(stream, index, upcoming)
    stream.close()


class OneStream(CpuBackend):
    """Like MPS: memory of its own, but no stream beside the one that computes. Notes which threads copy."""

    shares_host_memory = False

    def __init__(self) -> None:
        super().__init__(CPU)
        self.threads: set[int] = set()

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: object) -> None:
        assert stream is None
        self.threads.add(threading.get_ident())
        target.copy_(source)


@pytest.mark.parametrize("prefetch", [True, False])
def test_without_copy_streams_the_computing_thread_copies(prefetch: bool) -> None:
    device = OneStream()
    views = {index: a_view(index) for index in range(LAYERS)}
    stream = ShardStream(views, device=CPU, prefetch=prefetch, copies=CopyStream(CPU, via=device))
    for seed in range(20):
        for index, upcoming in a_walk(seed):
            use(stream, index, upcoming)
    stream.close()
    assert device.threads == {threading.get_ident()}


def failing_once(index: int, failures: int = 1) -> ShardView:
    left = [failures]

    def fail(buffer: torch.Tensor) -> None:
        if left[0]:
            left[0] -= 1
            buffer.fill_(99)
            raise ModelError(f"shard {index} cannot be read")

    return a_view(index, fail)


def test_a_failed_read_is_raised_where_the_stretch_is_asked_for_and_can_be_tried_again() -> None:
    stream = ShardStream({0: a_view(0), 1: failing_once(1), 2: a_view(2)}, device=CPU)
    use(stream, 0, [1])  # fails while it is read ahead; that is no error of stretch 0
    with pytest.raises(ModelError, match="shard 1 cannot be read"):
        use(stream, 1, [2])
    use(stream, 1, [2])
    use(stream, 2)
    stream.close()


def test_a_failed_read_does_not_disturb_the_stretch_in_the_other_slab() -> None:
    stream = ShardStream({0: a_view(0), 1: failing_once(1, failures=2)}, device=CPU, prefetch=False)
    with stream.item(0) as tensors:
        for _ in range(2):
            with pytest.raises(ModelError, match="shard 1"):
                use(stream, 1)
        assert torch.equal(tensors["a"], expected_tensors(0)[0])
        use(stream, 1)
        assert torch.equal(tensors["a"], expected_tensors(0)[0])
    stream.close()


def test_a_failed_read_ahead_that_nobody_asks_for_is_forgotten() -> None:
    stream = ShardStream({0: a_view(0), 1: failing_once(1), 2: a_view(2)}, device=CPU)
    use(stream, 0, [1])
    use(stream, 2, [0])
    use(stream, 0, [1])
    use(stream, 1)
    stream.close()


def test_a_third_stretch_at_once_is_refused_and_overwrites_nothing() -> None:
    stream = ShardStream({index: a_view(index) for index in range(3)}, device=CPU)
    with stream.item(0, [1]) as zero, stream.item(1, [2]) as one:
        with pytest.raises(RuntimeError, match="stretch 2 was asked for while 2 others are in use"), stream.item(2):
            pass
        assert torch.equal(zero["a"], expected_tensors(0)[0])
        assert torch.equal(one["a"], expected_tensors(1)[0])
    use(stream, 2)
    stream.close()


def test_the_turning_stretch_is_not_read_twice() -> None:
    stream = ShardStream({index: a_view(index) for index in range(3)}, device=CPU)
    order = [0, 1, 2, 2, 1, 0]
    for position, index in enumerate(order):
        use(stream, index, order[position + 1 :])
    assert stream.loads == 4
    stream.close()


@pytest.mark.timeout(20)
def test_close_waits_for_the_read_under_way_and_drops_its_error() -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(buffer: torch.Tensor) -> None:
        started.set()
        assert go_on.wait(10)
        raise ModelError("nobody asked for this")

    stream = ShardStream({0: a_view(0), 1: a_view(1, slow)}, device=CPU)
    use(stream, 0, [1])
    assert started.wait(10)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive(), "the reader still writes into a slab"
    go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(RuntimeError):
        use(stream, 0)
    stream.close()  # a second time does nothing


def test_waiting_for_the_reader_is_counted_whether_it_fails_or_not() -> None:
    def slow(buffer: torch.Tensor) -> None:
        threading.Event().wait(0.05)

    def slow_failure(buffer: torch.Tensor) -> None:
        slow(buffer)
        raise ModelError("cannot be read")

    stream = ShardStream({0: a_view(0, slow), 1: a_view(1, slow_failure)}, device=CPU)
    use(stream, 0)
    assert stream.waited_s >= 0.04
    with pytest.raises(ModelError):
        use(stream, 1)
    assert stream.waited_s >= 0.08
    stream.close()
