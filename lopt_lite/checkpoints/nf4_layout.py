"""How an NF4 matrix lies in a checkpoint: names, sizes, and its state, without bitsandbytes (slow to import)."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lopt_lite.checkpoints.header import DTYPE_NAMES, parse_json_strictly
from lopt_lite.checkpoints.shard_writer import TensorSpec
from lopt_lite.errors import ModelError

BLOCK_SIZE = 64
#: bitsandbytes writes no other one, and its products on a GPU take it for granted.
_NESTED_BLOCK_SIZE = 256
#: The JSON side tensor is padded to a fixed size with spaces, so that a shard's layout is known before its content.
STATE_BYTES = 256
#: Ending of the tensor in which bitsandbytes says how a weight is packed.
STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"

#: What bitsandbytes takes (``quantize_4bit``).
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE_DTYPES = ("bfloat16", "float16", "float32")
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
#: Far more than the few words of a state need: what is longer is not read.
_MOST_STATE_BYTES = 1 << 16
_STATE_IS = f"JSON text in at most {_MOST_STATE_BYTES:,} bytes (U8)"
_FIX = "get the checkpoint again, or bring the unquantised one: it is quantised to 4 bits here"


@dataclass(frozen=True)
class PackedState:
    """What the JSON side tensor of a packed matrix says of it, checked.

    Attributes
    ----------
    shape:
        [out, in] of the matrix.
    block_size:
        How many of its values share a scale.
    nested:
        Whether the scales are quantised too ("double quantisation").
    """

    shape: tuple[int, int]
    block_size: int
    nested: bool


def packed_specs(
    name: str, shape: tuple[int, ...], *, block_size: int = BLOCK_SIZE, nested: bool = True
) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that NF4 makes of a matrix ``name``; see :class:`PackedState`."""
    elements = shape[0] * shape[1]
    blocks = -(-elements // block_size)
    nested_scales = [
        TensorSpec(name + ".nested_absmax", torch.float32, (-(-blocks // _NESTED_BLOCK_SIZE),)),
        TensorSpec(name + ".nested_quant_map", torch.float32, (256,)),
    ]
    return [
        TensorSpec(name, torch.uint8, (-(-elements // 2), 1)),
        TensorSpec(name + ".absmax", torch.uint8 if nested else torch.float32, (blocks,)),
        TensorSpec(name + ".quant_map", torch.float32, (16,)),
        *(nested_scales if nested else []),
        TensorSpec(name + STATE_SUFFIX, torch.uint8, (STATE_BYTES,)),
    ]


def check_packed(
    name: str, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read_state: Callable[[], torch.Tensor]
) -> PackedState:
    """Check a packed matrix and its side tensors, as far as that goes without reading more than its state.

    Parameters
    ----------
    name:
        The matrix.
    found:
        Dtype and shape of the packed matrix and of each of its side tensors, by their full names.
    read_state:
        Reads the side tensor that holds the state; called only where its size makes sense.

    Raises
    ------
    ModelError
        The state is none that bitsandbytes can read, or the tensors are not those that follow from it.
    """
    if name + STATE_SUFFIX not in found:
        raise ModelError(f"the 4-bit matrix {name} lacks {name + STATE_SUFFIX}", expected=_STATE_IS, fix=_FIX)
    dtype, shape = found[name + STATE_SUFFIX]
    if dtype != torch.uint8 or torch.Size(shape).numel() > _MOST_STATE_BYTES:
        raise ModelError(
            f"the NF4 state {name + STATE_SUFFIX} is {_told(dtype, shape)}",
            expected=_STATE_IS,
            fix=_FIX,
        )
    state = _parse_state(name, bytes(read_state().reshape(-1).tolist()))
    specs = {s.name: s for s in packed_specs(name, state.shape, block_size=state.block_size, nested=state.nested)}
    says = f"as its state says (shape {list(state.shape)}, blocks of {state.block_size} values)"
    for spec in specs.values():
        expected = _told(spec.dtype, spec.shape)
        if spec.name not in found:
            raise ModelError(f"the 4-bit matrix {name} lacks {spec.name}", expected=f"{expected}, {says}", fix=_FIX)
        if spec.name != name + STATE_SUFFIX and found[spec.name] != (spec.dtype, spec.shape):
            raise ModelError(
                f"the tensor {spec.name} of a 4-bit matrix is {_told(*found[spec.name])}",
                expected=f"{expected}, {says}",
                fix=_FIX,
            )
    for extra in found.keys() - specs.keys():
        raise ModelError(
            f"the 4-bit matrix {name} has {extra}",
            expected="none: its state speaks of no quantised scales",
            fix=_FIX,
        )
    return state


def _parse_state(name: str, text: bytes) -> PackedState:
    """What the JSON of the state of matrix ``name`` says.

    Raises
    ------
    ModelError
        It is not JSON, lacks something, or says what bitsandbytes does not take.
    """
    what = f"the NF4 state {name + STATE_SUFFIX}"
    try:
        state = parse_json_strictly(text)
    except ValueError as error:
        raise ModelError(f"{what} is not valid JSON: {error}", expected="what bitsandbytes writes", fix=_FIX) from error
    keys = set(state) if isinstance(state, dict) else set()
    if keys not in (_STATE_KEYS, _STATE_KEYS | _NESTED_KEYS):
        found = f"has the keys {', '.join(sorted(keys))}" if keys else f"is {reprlib.repr(state)}"
        raise ModelError(
            f"{what} {found}",
            expected=f"{', '.join(sorted(_STATE_KEYS))}, and with quantised scales {', '.join(sorted(_NESTED_KEYS))}",
            fix=_FIX,
        )
    nested = keys > _NESTED_KEYS
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "quant_type": (lambda v: v == "nf4", "nf4"),
        "blocksize": (lambda v: _is_whole(v) and v in _BLOCK_SIZES, f"one of {', '.join(map(str, _BLOCK_SIZES))}"),
        "dtype": (lambda v: v in _STATE_DTYPES, f"one of {', '.join(_STATE_DTYPES)}"),
        "shape": (_is_matrix_shape, "two whole numbers above 0"),
    }
    if nested:
        wanted |= {
            "nested_blocksize": (lambda v: _is_whole(v) and v == _NESTED_BLOCK_SIZE, str(_NESTED_BLOCK_SIZE)),
            "nested_dtype": (lambda v: v == "float32", "float32"),
            "nested_offset": (_is_float32, "a finite number"),
        }
    for key, (is_right, expected) in wanted.items():
        if not is_right(state[key]):
            raise ModelError(f"{what} has {key} {reprlib.repr(state[key])}", expected=expected, fix=_FIX)
    return PackedState(shape=(state["shape"][0], state["shape"][1]), block_size=state["blocksize"], nested=nested)


def _told(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{DTYPE_NAMES[dtype]} of shape {list(shape)}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_matrix_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(size) and size > 0 for size in value)


def _is_float32(value: Any) -> bool:
    # Compared and not converted: a whole number may be too large for any float. NaN compares as false.
    return (_is_whole(value) or isinstance(value, float)) and abs(value) <= torch.finfo(torch.float32).max
