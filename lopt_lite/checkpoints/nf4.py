"""NF4 (QLoRA, arXiv:2305.14314) of one matrix, in the tensors and names that bitsandbytes and transformers use."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import torch

from lopt_lite.checkpoints.nf4_layout import BLOCK_SIZE, STATE_BYTES, STATE_SUFFIX, check_packed


def quantize_matrix(
    name: str, weight: torch.Tensor, *, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Quantise one matrix.

    Parameters
    ----------
    weight:
        [out, in], floating point.
    dtype:
        The dtype that dequantisation yields.
    device:
        Where to compute.

    Returns
    -------
    dict
        The tensors of :func:`~lopt_lite.checkpoints.nf4_layout.packed_specs`, on the CPU.
    """
    packed, state = bnb.quantize_4bit(
        weight.to(device).contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    tensors = {name: packed}
    for key, value in state.as_dict(packed=True).items():
        tensors[f"{name}.{key}"] = value
    text = bytes(tensors[name + STATE_SUFFIX].tolist())
    tensors[name + STATE_SUFFIX] = torch.frombuffer(bytearray(text.ljust(STATE_BYTES)), dtype=torch.uint8)
    return {key: value.detach().cpu() for key, value in tensors.items()}


def state_of(name: str, tensors: dict[str, torch.Tensor], device: torch.device) -> bnb.QuantState:
    """Rebuild bitsandbytes' quantisation state of matrix ``name`` from its side tensors.

    Raises
    ------
    ModelError
        A side tensor is missing or makes no sense.
    """
    parts = {k: v for k, v in tensors.items() if k == name or k.startswith(name + ".")}
    found = {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()}
    check_packed(name, found, lambda: parts[name + STATE_SUFFIX])
    sides = {k[len(name) + 1 :]: v for k, v in parts.items() if k != name}
    return bnb.QuantState.from_dict(sides, device=device)


def without_tensors(state: bnb.QuantState) -> bnb.QuantState:
    """A copy of ``state`` that keeps only what is no tensor of the store's; for :func:`renewed`."""
    bare = copy.copy(state)
    bare.absmax = bare.code = None
    if bare.nested:
        bare.state2 = copy.copy(bare.state2)
        bare.state2.absmax = bare.state2.code = None
    return bare


def renewed(bare: bnb.QuantState, name: str, tensors: dict[str, torch.Tensor], device: torch.device) -> bnb.QuantState:
    """What :func:`state_of` gives for the same matrix whose tensors lie elsewhere, without reading a value.

    A value that lies on a device is waited for, and everything that was queued before it.

    Parameters
    ----------
    bare:
        What :func:`without_tensors` left of it.
    """
    state = copy.copy(bare)
    state.absmax, state.code = (tensors[f"{name}.{key}"].to(device) for key in ("absmax", "quant_map"))
    if state.nested:
        state.state2 = second = copy.copy(state.state2)
        second.absmax, second.code = (tensors[f"{name}.nested_{key}"].to(device) for key in ("absmax", "quant_map"))
    return state


def dequantize_matrix(name: str, tensors: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The matrix [out, in] that NF4 tensors stand for, in the dtype they were made for, on ``device``."""
    return dequantize(tensors[name].to(device), state_of(name, tensors, device))


def dequantize(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """The matrix [out, in] that ``packed`` (uint8, two values a byte) stands for, in ``state``'s dtype.

    bitsandbytes 0.50's kernel for CPUs takes it that rows begin where blocks do, and scales matrices of other widths
    wrongly. It gets those in rows of a block each, or as one long row.
    """
    if packed.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return bnb.dequantize_4bit(packed, state)
    elements = state.shape.numel()
    rows = elements // state.blocksize if elements % state.blocksize == 0 else 1
    aligned = copy.copy(state)
    aligned.shape = torch.Size((rows, elements // rows))
    return bnb.dequantize_4bit(packed, aligned).reshape(state.shape)
