"""A GPU on paper: tensors that lie in the host's memory and pass for tensors of a GPU.

Whole runs can be made on it where there is no GPU. Each tensor's device is kept by its storage; an operation on tensors
of both devices fails as on a GPU, and so does reading one of a GPU as if it were the host's. What it does not show:
kernels that only a GPU has, their rounding, streams, and what memory they take.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lopt_lite import devices
from lopt_lite.backends import DeviceBackend

_ATEN = torch.ops.aten
#: Operations that may have tensors of two devices.
_BETWEEN_DEVICES = {_ATEN.copy_.default, _ATEN._copy_from.default, _ATEN.set_.source_Tensor}
#: Operations whose integer tensors may lie on the host.
_INDEXED_FROM_HOST = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default}
_ABOUT_DEVICES = {torch.device, torch._C._nn._parse_to}
_READS = {torch.Tensor.numpy, torch.Tensor.__array__}


class WrongDeviceError(RuntimeError):
    """What a GPU would have refused."""


class _Storages:
    """Which storages lie on the GPU."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self._lock = threading.Lock()

    def on_gpu(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type == "meta":
            return False
        return tensor.untyped_storage()._cdata in self._known

    def put(self, tensor: torch.Tensor, *, on_gpu: bool) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            if not on_gpu:
                self._known.pop(storage._cdata, None)
                return
            # A reference keeps the address from being used again, and is let go of once the storage is gone.
            if len(self._known) % 4096 == 4095:
                self._known = {key: ref for key, ref in self._known.items() if not ref.expired()}
            self._known[storage._cdata] = StorageWeakRef(storage)


class _Kernels(TorchDispatchMode):
    """Operations, those of backward passes too: refuses mixed devices, and notes where results lie."""

    def __init__(self, storages: _Storages, functions: _Functions) -> None:
        super().__init__()
        self._storages, self._functions = storages, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.device.type != "meta"]
        gpu = [t for t in tensors if self._storages.on_gpu(t)]
        if gpu and func not in _BETWEEN_DEVICES:
            for tensor in tensors:
                index = func in _INDEXED_FROM_HOST and not tensor.is_floating_point()
                if tensor.dim() and not index and not self._storages.on_gpu(tensor):
                    raise WrongDeviceError(f"{func}: {[(tuple(t.shape), self._storages.on_gpu(t)) for t in tensors]}")
        result = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in tensors}
        if gpu or (not tensors and self._functions.makes_on_gpu):
            for made in tree_leaves(result):
                fresh = isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in known
                if fresh and made.device.type != "meta":
                    self._storages.put(made, on_gpu=True)
        return result


class _Functions(TorchFunctionMode):
    """Calls from Python: what names a device names the host instead, and the results are noted."""

    def __init__(self, kind: str, storages: _Storages) -> None:
        super().__init__()
        self._kind, self._storages = kind, storages
        self.device = torch.device(kind, 0)
        self.makes_on_gpu = False

    def _is_gpu(self, value: Any) -> bool:
        if isinstance(value, str) and value.split(":")[0] == self._kind:
            return True
        return isinstance(value, torch.device) and value.type == self._kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and args and isinstance(args[0], torch.Tensor):
            return self._attribute(func, args, kwargs)
        if func in _ABOUT_DEVICES:
            return func(*args, **kwargs)
        if func in _READS and self._storages.on_gpu(args[0]):
            raise WrongDeviceError(f"{name} of a tensor on the GPU")
        if func is torch.Tensor.cpu:
            return self._moved(args[0], args[0], on_gpu=False)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        return self._made(func, args, kwargs)

    def _attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._storages.on_gpu(args[0]):
            if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
                return self.device
            if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return self._kind == "cuda"
            if func == torch.Tensor.is_mps.__get__:  # type: ignore[attr-defined]
                return self._kind == "mps"
            if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
                return False
        return func(*args, **kwargs)

    def _to(self, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in rest:
            if isinstance(value, torch.device | str):
                device = value
            elif isinstance(value, torch.Tensor):
                device, dtype = self.device if self._storages.on_gpu(value) else "cpu", value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
        kept = tensor if dtype is None else tensor.to(dtype, copy=kwargs.get("copy", False))
        if device is None:
            return kept
        if torch.device(device).type == "meta":
            return kept.to("meta")
        return self._moved(tensor, kept, on_gpu=self._is_gpu(device))

    def _moved(self, tensor: torch.Tensor, kept: torch.Tensor, *, on_gpu: bool) -> torch.Tensor:
        """``kept``, which came of ``tensor`` on the device of that, on the device asked for."""
        if self._storages.on_gpu(tensor) == on_gpu:
            return kept
        return _Move.apply(kept, self._storages, on_gpu)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        named = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.device) or self._is_gpu(v)]
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # needs a driver
        before = self.makes_on_gpu
        if named:
            self.makes_on_gpu = any(self._is_gpu(v) for v in named)
        elif leaves:
            self.makes_on_gpu = any(self._storages.on_gpu(t) for t in leaves)
        else:
            self.makes_on_gpu = False
        try:
            host = tree_map(lambda v: torch.device("cpu") if self._is_gpu(v) else v, (args, kwargs))
            result = func(*host[0], **host[1])
            if named and not self.makes_on_gpu and isinstance(result, torch.Tensor):
                self._storages.put(result, on_gpu=False)
            elif named and isinstance(result, torch.Tensor) and not self._storages.on_gpu(result):
                taken = {t.untyped_storage()._cdata for t in leaves}
                if result.untyped_storage()._cdata in taken:
                    return self._moved(result, result, on_gpu=True)
                self._storages.put(result, on_gpu=True)
            return result
        finally:
            self.makes_on_gpu = before


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, storages: _Storages, on_gpu: bool) -> torch.Tensor:
        ctx.storages, ctx.on_gpu = storages, on_gpu
        return _copied(tensor, storages, on_gpu)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, None, None]:
        return _copied(gradient, ctx.storages, not ctx.on_gpu), None, None


def _copied(tensor: torch.Tensor, storages: _Storages, on_gpu: bool) -> torch.Tensor:
    copy = tensor.detach().clone()
    storages.put(copy, on_gpu=on_gpu)
    return copy


class _PaperBackend(DeviceBackend):
    """Memory counters of a device of 4 GiB of which nothing is used; copies are done when they are asked for."""

    def free_bytes(self) -> int:
        return 4 << 30

    def fuses_attention(self, dtype: torch.dtype) -> bool:
        return self.device.type == "cuda"

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 1 << 20

    def set_memory_limit(self, limit_bytes: int | None) -> bool:
        return True


class _HostGenerator(torch.Generator):
    """Of the host, whatever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls)


class _Event:
    """Done as soon as it is recorded."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass


@contextlib.contextmanager
def paper_gpu(monkeypatch: pytest.MonkeyPatch, kind: str = "cuda") -> Iterator[torch.device]:
    """Within the context, this thread has a GPU of that kind, and lopt-lite chooses it when asked to."""
    storages = _Storages()
    functions = _Functions(kind, storages)
    kernels = _Kernels(storages, functions)
    engine, chosen, real_backend = torch.autograd.graph._engine_run_backward, devices.choose_device, devices.backend

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        # Python switches a mode off within the calls it sees; backward passes run Python of their own.
        with functions:
            return engine(*args, **kwargs)

    def choose(name: str) -> torch.device:
        return functions.device if name == kind else chosen(name)

    def backend(device: torch.device) -> DeviceBackend:
        return _PaperBackend(device) if device.type == kind else real_backend(device)

    for module in (torch.autograd.graph, torch.autograd):
        monkeypatch.setattr(module, "_engine_run_backward", run_backward)
    # Also where they were imported by name.
    for module in [m for name, m in sys.modules.items() if name.startswith("lopt_lite")]:
        for name, real, instead in (("choose_device", chosen, choose), ("backend", real_backend, backend)):
            if getattr(module, name, None) is real:
                monkeypatch.setattr(module, name, instead)
    monkeypatch.setattr(torch, "Event", _Event)
    monkeypatch.setattr(torch, "Generator", _HostGenerator)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU on paper")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    with functions, kernels:
        yield functions.device
