"""A device that does nothing until it must, in an order that a seed chooses, and keeps book of what was ordered.

Two proofs at once. *Bytes*: copies and computing are queued on streams and run late and interleaved at random, as a
real device may; computing then finds wrong bytes where an order is missing and the dice fell badly. *Happens-before*:
every access to a buffer, by a thread of the host or by a stream, carries a vector clock, and two accesses of which one
writes must be ordered, however the dice fell. The second finds every missing order; the first shows that it matters.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from lopt_lite.backends import DeviceBackend

Clock = dict[str, int]


@dataclass
class FakeEvent:
    """A mark in a stream of the fake."""

    device: FakeDevice
    stream: FakeStream
    clock: Clock
    done: bool = False

    def synchronize(self) -> None:
        self.device.join_host(self.clock)
        while not self.done:
            self.stream.run_one()


class FakeStream:
    """A queue of operations, run one by one when the device's dice say so or somebody waits for them."""

    def __init__(self, device: FakeDevice, name: str) -> None:
        self.device, self.name = device, name
        self.clock: Clock = {name: 0}
        self.queue: deque[Callable[[], bool]] = deque()

    def wait_event(self, event: FakeEvent) -> None:
        self.device.note(self)
        join(self.clock, event.clock)
        self.push(lambda: event.done)

    def record_event(self) -> FakeEvent:
        self.device.note(self)
        event = FakeEvent(self.device, self, dict(self.clock))

        def mark() -> bool:
            event.done = True
            return True

        self.push(mark)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def push(self, operation: Callable[[], bool]) -> None:
        """Queue an operation, which says False if it has to wait and be tried again."""
        self.queue.append(operation)
        self.device.play()

    def try_one(self) -> bool:
        """Run the next operation if there is one that need not wait."""
        if self.queue and self.queue[0]():
            self.queue.popleft()
            return True
        return False

    def run_one(self) -> None:
        """Run the next operation, and before it what it waits for on other streams."""
        while not self.try_one():
            others = [stream for stream in self.device.streams if stream is not self and stream.queue]
            assert any(stream.try_one() for stream in others), "the streams wait for each other"


@dataclass
class Access:
    """Who touched a buffer, when by its own clock, and whether it wrote."""

    who: str
    time: int
    writes: bool
    what: str


class FakeDevice(DeviceBackend):
    """A device with a stream for computing and streams for copies.

    Parameters
    ----------
    seed:
        Of the dice.
    eager:
        Name of the stream that runs first, "compute" or "copy"; None for any.

    Attributes
    ----------
    races:
        Pairs of accesses to one buffer of which one writes, with nothing that orders them.
    wrong_bytes:
        Computing that did not find what it expected.
    host:
        The host's thread that acts now: "main" or "reader".
    """

    def __init__(self, seed: int = 0, eager: str | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.dice, self.eager = random.Random(seed), eager
        self.races: list[str] = []
        self.wrong_bytes: list[str] = []
        self.host = "main"
        self.host_clocks: dict[str, Clock] = {"main": {"main": 1}, "reader": {"reader": 1}}
        self.compute_queue = FakeStream(self, "compute")
        self.streams = [self.compute_queue]
        self.buffers: list[torch.Tensor] = []  # kept, so that no address is used twice
        self._accesses: dict[int, list[Access]] = {}

    # What CopyStream asks for.

    def new_stream(self) -> FakeStream:
        self.streams.append(FakeStream(self, f"copy {len(self.streams)}"))
        return self.streams[-1]

    def compute_stream(self) -> FakeStream:
        return self.compute_queue

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        self.buffers.append(torch.zeros(size_bytes, dtype=torch.uint8))
        return self.buffers[-1]

    def device_buffer(self, size_bytes: int) -> torch.Tensor:
        """Memory of a tensor that was just freed, while computing that reads it is still queued."""
        self.buffers.append(torch.full((size_bytes,), 255, dtype=torch.uint8))
        self.compute([self.buffers[-1]], "what was there before", expected=[self.buffers[-1].clone()])
        return self.buffers[-1]

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Any) -> None:
        self.note(stream)
        self.access(source, stream.name, stream.clock, writes=False, what="copy")
        self.access(target, stream.name, stream.clock, writes=True, what="copy")

        def run() -> bool:
            target.copy_(source)
            return True

        stream.push(run)

    # What the test does.

    def compute(self, tensors: list[torch.Tensor], what: str, *, expected: list[torch.Tensor]) -> None:
        """Queue computing that reads ``tensors``, which must then hold ``expected``."""
        stream = self.compute_queue
        self.note(stream)
        for tensor in tensors:
            self.access(tensor, stream.name, stream.clock, writes=False, what=what)

        def run() -> bool:
            if not all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True)):
                self.wrong_bytes.append(what)
            return True

        stream.push(run)

    def host_write(self, buffer: torch.Tensor, what: str) -> None:
        """Note that the acting thread of the host writes ``buffer`` now."""
        clock = self.host_clocks[self.host]
        clock[self.host] += 1
        self.access(buffer, self.host, clock, writes=True, what=what)

    def reuse(self) -> None:
        """What an allocator may do with freed buffers: give their memory to computing that is queued now."""
        self.note(self.compute_queue)
        for buffer in self.buffers:
            self.access(buffer, "compute", self.compute_queue.clock, writes=True, what="the next owner")

    def finish(self) -> None:
        """Run everything that is queued."""
        for stream in self.streams:
            while stream.queue:
                stream.run_one()

    # Bookkeeping.

    def note(self, stream: FakeStream) -> None:
        """A thread of the host queues something on ``stream``: it comes after all that the thread did."""
        self.host_clocks[self.host][self.host] += 1
        join(stream.clock, self.host_clocks[self.host])
        stream.clock[stream.name] += 1

    def join_host(self, clock: Clock) -> None:
        join(self.host_clocks[self.host], clock)

    def access(self, tensor: torch.Tensor, who: str, clock: Clock, *, writes: bool, what: str) -> None:
        seen = self._accesses.setdefault(tensor.untyped_storage().data_ptr(), [])
        for earlier in seen:
            if (writes or earlier.writes) and clock.get(earlier.who, 0) < earlier.time:
                self.races.append(f"{what} by {who} and {earlier.what} by {earlier.who}")
        seen.append(Access(who, clock[who], writes, what))

    def play(self) -> None:
        """Let the streams run on as the dice say."""
        order = list(self.streams)
        self.dice.shuffle(order)
        for stream in order:
            steps = self.dice.randrange(3)
            if self.eager is not None:
                steps = len(stream.queue) if stream.name.startswith(self.eager) else 0
            while steps > 0 and stream.try_one():
                steps -= 1


def join(clock: Clock, other: Clock) -> None:
    """Make ``clock`` come after ``other``."""
    for who, time in other.items():
        clock[who] = max(clock.get(who, 0), time)


@dataclass
class FakeReader:
    """In place of a thread pool of one thread: runs its tasks in order, as early or late as the dice say."""

    device: FakeDevice
    tasks: deque[tuple[_FakeFuture, Callable[[], None], Clock]] = field(default_factory=deque)

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        future = _FakeFuture(self)
        main = self.device.host_clocks["main"]
        main["main"] += 1
        self.tasks.append((future, lambda: function(*arguments), dict(main)))
        while self.tasks and self.device.dice.random() < 0.5:
            self.run_one()
        return future

    def run_one(self) -> None:
        future, task, submitted = self.tasks.popleft()
        before, self.device.host = self.device.host, "reader"
        clock = self.device.host_clocks["reader"]
        join(clock, submitted)
        try:
            task()
        except OSError as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        finally:
            clock["reader"] += 1
            future.clock = dict(clock)
            self.device.host = before

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        assert wait
        if not cancel_futures:
            while self.tasks:
                self.run_one()
        self.tasks.clear()
        join(self.device.host_clocks["main"], self.device.host_clocks["reader"])


class _FakeFuture(Future):  # type: ignore[type-arg]
    def __init__(self, reader: FakeReader) -> None:
        super().__init__()
        self._fake_reader = reader
        self.clock: Clock = {}

    def exception(self, timeout: float | None = None) -> BaseException | None:
        while not self.done():
            self._fake_reader.run_one()
        self._fake_reader.device.join_host(self.clock)
        return super().exception(timeout)
