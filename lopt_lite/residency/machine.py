"""How fast this machine is: measured in well under half a second, and kept in the user's cache directory.

A few kernels stand for the work of training: matrix products, passes over memory, reading and writing files, copies to
the device. They are what :mod:`lopt_lite.residency.timing` turns shapes into seconds with.

Other work on the machine makes a measurement too slow by any factor and never too fast. So the first few uses measure
anew, and the best of each is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lopt_lite import devices, user_cache
from lopt_lite.float32_products import float32_products

FILE_NAME = "machine.json"
#: Part of the key: measurements of another kind are not comparable.
_VERSION = 3
#: Uses that measure.
_MEASUREMENTS = 3
_ENOUGH_S, _LONGEST_S, _TIMES = 0.006, 0.03, 5
_THREAD_EFFICIENCY = 0.85
_FILE_BYTES = 32 << 20
_PIECE_BYTES = 4 << 20
_LONGEST_WRITE_S = 0.12
#: What is assumed of a disk that cannot be measured: read, read again from the system's cache, write.
_SLOW_DISK = (1e8, 1e9, 1e8)
_FRESH_BYTES = 34 << 20


@dataclass(frozen=True)
class MachineSpeeds:
    """What one device and one disk can do.

    Attributes
    ----------
    bfloat16_flops, float32_flops:
        Floating-point operations per second of matrix products.
    elementwise_bytes_per_s:
        Bytes read and written per second by elementwise operations on activations, in memory that is reused.
    fresh_bytes_per_s:
        Bytes per second written to memory that was not used before (on a CPU, the system clears its pages first).
    operation_s:
        Seconds to start one operation, however small.
    read_bytes_per_s, cached_read_bytes_per_s, write_bytes_per_s:
        Files: read from the disk, read again from the system's cache, and written durably.
    to_device_bytes_per_s:
        Copies from pinned host memory; None where the device is the host.
    dequantise_bytes_per_s, quantise_bytes_per_s:
        NF4: dense bytes made, and dense bytes taken, per second. None until a run has measured them, because
        bitsandbytes takes seconds to import.
    """

    bfloat16_flops: float
    float32_flops: float
    elementwise_bytes_per_s: float
    fresh_bytes_per_s: float
    operation_s: float
    read_bytes_per_s: float
    cached_read_bytes_per_s: float
    write_bytes_per_s: float
    to_device_bytes_per_s: float | None
    dequantise_bytes_per_s: float | None = None
    quantise_bytes_per_s: float | None = None

    def flops(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of products in ``dtype``."""
        return self.float32_flops if dtype == torch.float32 else self.bfloat16_flops

    def load_bytes_per_s(self, *, cached: bool) -> float:
        """Bytes per second from a file to the device, read and copied side by side."""
        read = self.cached_read_bytes_per_s if cached else self.read_bytes_per_s
        return read if self.to_device_bytes_per_s is None else min(read, self.to_device_bytes_per_s)


def machine_speeds(device: torch.device, *, nf4: bool = False) -> MachineSpeeds:
    """This machine's speeds: measured, or remembered once that was done a few times.

    Parameters
    ----------
    nf4:
        Measure bitsandbytes' kernels too. For callers that have imported it anyway.
    """
    key = machine_key(device)
    known, count = _from_json(user_cache.recall(FILE_NAME, key))
    lacks_nf4 = nf4 and (known is None or known.dequantise_bytes_per_s is None)
    if known is not None and count >= _MEASUREMENTS and not lacks_nf4:
        return known
    measured = measure(device, nf4=nf4)
    speeds = measured if known is None else _best_of(known, measured)
    value = {"measurements": count + 1, "speeds": dataclasses.asdict(speeds)}
    user_cache.remember(FILE_NAME, key, value)
    return speeds


def machine_key(device: torch.device) -> str:
    """What a measurement holds for: device, threads, release of torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.machine()} {platform.processor() or platform.node()}"
    return f"{_VERSION} | {name} | {os.cpu_count()} CPUs, {torch.get_num_threads()} threads | torch {torch.__version__}"


def measure(device: torch.device, *, nf4: bool = False) -> MachineSpeeds:
    """Measure everything now; NF4 only if asked for."""
    with torch.inference_mode(), float32_products(device):
        dequantise, quantise = _nf4(device) if nf4 else (None, None)
        read, cached, write = _file_speeds(user_cache.user_cache_directory())
        return MachineSpeeds(
            bfloat16_flops=_with_threads(device, lambda: _matmul_flops(device, torch.bfloat16)),
            float32_flops=_with_threads(device, lambda: _matmul_flops(device, torch.float32)),
            elementwise_bytes_per_s=_with_threads(device, lambda: _elementwise(device), most=4),
            fresh_bytes_per_s=_with_threads(device, lambda: _fresh(device), most=4),
            operation_s=_operation(device),
            read_bytes_per_s=read,
            cached_read_bytes_per_s=cached,
            write_bytes_per_s=write,
            to_device_bytes_per_s=None if device.type == "cpu" else _to_device(device),
            dequantise_bytes_per_s=dequantise,
            quantise_bytes_per_s=quantise,
        )


def _from_json(value: Any) -> tuple[MachineSpeeds | None, int]:
    """What was remembered, and from how many measurements; nothing when it makes no sense."""
    if not isinstance(value, dict) or not isinstance(value.get("measurements"), int):
        return None, 0
    fields, speeds = dataclasses.fields(MachineSpeeds), value.get("speeds")
    if not isinstance(speeds, dict) or set(speeds) != {field.name for field in fields}:
        return None, 0
    for field in fields:
        found = speeds[field.name]
        may_lack = found is None and "None" in str(field.type)
        if not may_lack and not (isinstance(found, float) and 0 < found < float("inf")):
            return None, 0
    return MachineSpeeds(**speeds), value["measurements"]


def _best_of(a: MachineSpeeds, b: MachineSpeeds) -> MachineSpeeds:
    best: dict[str, Any] = {}
    for field in dataclasses.fields(MachineSpeeds):
        found = [v for v in (getattr(a, field.name), getattr(b, field.name)) if v is not None]
        choose = min if field.name.endswith("operation_s") else max
        best[field.name] = choose(found) if found else None
    return MachineSpeeds(**best)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work`` at its best of several times; the first time, which sets things up, does not count."""
    work()
    devices.synchronize(device)
    best, begun, times = float("inf"), time.perf_counter(), 0
    while True:
        started = time.perf_counter()
        work()
        devices.synchronize(device)
        now = time.perf_counter()
        best, times = min(best, now - started), times + 1
        if now - begun >= (_ENOUGH_S if times >= _TIMES else _LONGEST_S):
            return max(best, 1e-9)


def _with_threads(device: torch.device, rate: Callable[[], float], *, most: int | None = None) -> float:
    """A rate with all threads. On a busy CPU threads wait for each other, so what one alone does is scaled as well.

    Parameters
    ----------
    most:
        Threads beyond which more are no faster: a few cores use all of the memory's bandwidth.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return rate()
    torch.set_num_threads(1)
    try:
        one = rate()
    finally:
        torch.set_num_threads(threads)
    return max(rate(), _THREAD_EFFICIENCY * min(threads, most or threads) * one)


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    rate = 0.0
    for width in (512, 1024, 4096):
        tokens = width // 2
        hidden = torch.ones(tokens, width, dtype=dtype, device=device)
        weight = torch.ones(width, width, dtype=dtype, device=device)
        rate = 2 * tokens * width * width / _fastest(partial(functional.linear, hidden, weight), device)
        # A small product does not fill a large device; a large one takes long on a small device.
        if device.type == "cpu" or (width > 512 and rate < 1e12):
            break
    return rate


def _elementwise(device: torch.device) -> float:
    elements = 1 << 20 if device.type == "cpu" else 1 << 24
    x = torch.ones(elements, dtype=torch.bfloat16, device=device)
    wide, narrow = x.float(), torch.empty_like(x)

    def work() -> None:
        # To float32, scaled, back to bfloat16, added: the traffic of a norm or an adapter, in memory that is there.
        wide.copy_(x)
        wide.mul_(2)
        narrow.copy_(wide)
        narrow.add_(x)

    return (6 + 8 + 6 + 6) * elements / _fastest(work, device)


def _fresh(device: torch.device) -> float:
    if device.type != "cpu":
        x = torch.ones(_FRESH_BYTES, dtype=torch.uint8, device=device)
        return _FRESH_BYTES / _fastest(lambda: x.fill_(1), device)
    # Larger than glibc ever keeps for reuse.
    return _FRESH_BYTES / _fastest(lambda: torch.ones(_FRESH_BYTES, dtype=torch.uint8), device)


def _operation(device: torch.device) -> float:
    x = torch.ones(16, device=device)
    count = 20

    def chain() -> None:
        for _ in range(count):
            x.add(1)

    return _fastest(chain, device) / count


def _to_device(device: torch.device) -> float:
    host = torch.ones(_FILE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)
    return _FILE_BYTES / _fastest(lambda: target.copy_(host, non_blocking=True), device)


def _file_speeds(directory: Path | None) -> tuple[float, float, float]:
    """(read from disk, read from the system's cache, write) in bytes per second.

    In ``directory``, else where the system has temporary files; of a slow disk where no file can be written.
    """
    for place in (directory, None):
        if place is None or place.is_dir():
            with contextlib.suppress(OSError):
                return _measured_file_speeds(place)
    return _SLOW_DISK


def _measured_file_speeds(directory: Path | None) -> tuple[float, float, float]:
    """Raises OSError where no file can be made, written and read; ``directory`` None: the system's choice."""
    with tempfile.TemporaryFile(buffering=0, dir=directory) as file:
        # Bytes that no file system can leave out or compress.
        piece = os.urandom(_PIECE_BYTES)
        started, written = time.perf_counter(), 0
        while written < _FILE_BYTES and time.perf_counter() - started < _LONGEST_WRITE_S:
            written += file.write(piece) or 0
        os.fsync(file.fileno())
        write = written / (time.perf_counter() - started)
        buffer = memoryview(bytearray(_PIECE_BYTES))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _read_rate(file, buffer), _read_rate(file, buffer), write


def _read_rate(file: Any, buffer: memoryview) -> float:
    file.seek(0)
    started, done = time.perf_counter(), 0
    while count := file.readinto(buffer):
        done += count
    return done / max(time.perf_counter() - started, 1e-9)


def _nf4(device: torch.device) -> tuple[float, float]:
    """(dequantise, quantise): dense bytes per second."""
    import bitsandbytes.functional as bnb  # only here: it takes seconds

    dense = torch.randn(1024, 1024, device=device).bfloat16()
    size = dense.numel() * dense.element_size()

    def quantise() -> tuple[torch.Tensor, Any]:
        return bnb.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")

    packed, state = quantise()
    return (
        _with_threads(device, lambda: size / _fastest(lambda: bnb.dequantize_4bit(packed, state), device)),
        _with_threads(device, lambda: size / _fastest(quantise, device)),
    )
