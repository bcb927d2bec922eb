"""4-bit matrices: what is read back is what a plain reading of the format says, whatever the width."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from lopt_lite.checkpoints.nf4 import (
    dequantize,
    dequantize_matrix,
    quantize_matrix,
    renewed,
    state_of,
    without_tensors,
)
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.errors import ModelError

CPU = torch.device("cpu")
#: The levels of QLoRA (arXiv:2305.14314), appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SHAPES = [(16, 32), (64, 64), (64, 96), (33, 80), (96, 160), (8, 192), (1, 64), (10, 130), (7, 33), (32, 33), (64, 100)]


def _read_plainly(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Two values a byte, the high half first; each block has a scale, in most checkpoints stored in 8 bits."""
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    halves = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)
    elements = state.shape.numel()
    levels = torch.tensor(LEVELS)[halves.long()][:elements]
    return (levels * scales.repeat_interleave(state.blocksize)[:elements]).reshape(state.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_any_width_is_read_as_the_format_says(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    tensors = quantize_matrix("w", weight, dtype=dtype, device=CPU)
    plain = _read_plainly(tensors["w"], state_of("w", tensors, CPU))
    read = dequantize_matrix("w", tensors, CPU)
    assert (read.dtype, read.shape) == (dtype, shape)
    torch.testing.assert_close(read, plain.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    # A tenth is what 4 bits cost normally distributed values.
    assert float((read.float() - weight).norm() / weight.norm()) < 0.12


def test_widths_that_bitsandbytes_reads_rightly_keep_its_bits():
    torch.manual_seed(0)
    tensors = quantize_matrix("w", torch.randn(48, 192), dtype=torch.bfloat16, device=CPU)
    state = state_of("w", tensors, CPU)
    assert torch.equal(dequantize(tensors["w"], state), bnb.dequantize_4bit(tensors["w"], state))


def test_a_state_that_is_known_is_renewed_without_looking_at_values(monkeypatch):
    torch.manual_seed(0)
    tensors = quantize_matrix("w", torch.randn(48, 96), dtype=torch.bfloat16, device=CPU)
    known = without_tensors(state_of("w", tensors, CPU))
    assert known.absmax is known.code is known.state2.absmax is known.state2.code is None
    expected = dequantize_matrix("w", tensors, CPU)
    elsewhere = {name: tensor.clone() for name, tensor in tensors.items()}
    monkeypatch.setattr(bnb.QuantState, "from_dict", None)
    assert torch.equal(dequantize(elsewhere["w"], renewed(known, "w", elsewhere, CPU)), expected)


def _packed_by_bitsandbytes(weight: torch.Tensor, *, block_size: int, nested: bool) -> dict[str, torch.Tensor]:
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=nested, quant_type="nf4")
    return {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_blocks_of_any_size_that_others_may_have_used_are_read(block_size, nested):
    """A width that is no multiple of the block size was scaled wrongly, in silence."""
    torch.manual_seed(0)
    for shape in SHAPES:
        tensors = _packed_by_bitsandbytes(torch.randn(shape), block_size=block_size, nested=nested)
        state = state_of("w", tensors, CPU)
        assert (state.blocksize, state.nested) == (block_size, nested)
        plain = _read_plainly(tensors["w"], state)
        torch.testing.assert_close(dequantize(tensors["w"], state), plain, rtol=1e-5, atol=1e-6)


def _state(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return json.loads(bytes(tensors["w" + STATE_SUFFIX].tolist()))


def _with_state(tensors: dict[str, torch.Tensor], text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    tensors["w" + STATE_SUFFIX] = torch.tensor(list(content), dtype=torch.uint8)


_BAD_STATES: dict[str, tuple[str | bytes, str]] = {
    "zeros": (bytes(90), "not valid JSON"),
    "no text": (b"\xff\xfe", "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
    "nested too deeply": ("[" * 5000, "not valid JSON"),
    "a list": ("[1, 2]", r"is \[1, 2\]"),
    "a number": ("5", "is 5"),
    "empty": ("{}", "is {}"),
}
_BAD_VALUES: dict[str, tuple[str, Any]] = {
    "shape of a number": ("shape", 5),
    "shape of one number": ("shape", [64]),
    "shape of three numbers": ("shape", [2, 32, 64]),
    "shape of nothing": ("shape", [0, 64]),
    "shape of fractions": ("shape", [64.0, 64]),
    "shape of truths": ("shape", [True, 64]),
    "blocks of nothing": ("blocksize", 0),
    "blocks of less": ("blocksize", -64),
    "blocks of 48": ("blocksize", 48),
    "blocks of text": ("blocksize", "64"),
    "blocks of fractions": ("blocksize", 64.0),
    "an unknown dtype": ("dtype", "nonsense"),
    "a dtype of no weights": ("dtype", "int8"),
    "a dtype that is a list": ("dtype", ["float32"]),
    "another type": ("quant_type", "fp4"),
    "other nested blocks": ("nested_blocksize", 64),
    "another nested dtype": ("nested_dtype", "float64"),
    "an offset of text": ("nested_offset", "0.1"),
    "an endless offset": ("nested_offset", 1e300),
    "an offset of many digits": ("nested_offset", 10**400),
}


def _refused(tensors: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        state_of("w", tensors, CPU)
    assert caught.value.expected and "unquantised" in str(caught.value.fix)


@pytest.mark.parametrize("name", _BAD_STATES)
def test_a_state_that_is_none_is_refused(name):
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    text, match = _BAD_STATES[name]
    _with_state(tensors, text)
    _refused(tensors, match)


@pytest.mark.parametrize("name", _BAD_VALUES)
def test_a_state_that_says_what_cannot_be_is_refused_and_the_value_told(name):
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    key, value = _BAD_VALUES[name]
    _with_state(tensors, json.dumps({**_state(tensors), key: value}))
    _refused(tensors, rf"w\.quant_state\.bitsandbytes__nf4 has {key} ")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_an_offset_that_is_no_number_is_refused(text):
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    offset = json.dumps(_state(tensors)["nested_offset"])
    _with_state(tensors, json.dumps(_state(tensors)).replace(offset, text))
    _refused(tensors, "not valid JSON|nested_offset inf")


@pytest.mark.parametrize("key", ["shape", "blocksize", "dtype", "quant_type", "nested_offset"])
def test_a_state_that_lacks_something_is_refused(key):
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    _with_state(tensors, json.dumps({k: v for k, v in _state(tensors).items() if k != key}))
    _refused(tensors, "has the keys")


def test_a_state_that_says_more_is_refused():
    """bitsandbytes stops at what it does not know."""
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    _with_state(tensors, json.dumps({**_state(tensors), "colour": "blue"}))
    _refused(tensors, "has the keys")


def test_a_state_of_another_type_or_without_end_is_refused():
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    for state in (tensors["w" + STATE_SUFFIX].float(), torch.zeros(1 << 20, dtype=torch.uint8)):
        _refused({**tensors, "w" + STATE_SUFFIX: state}, "is (F32|U8) of shape")


def test_a_matrix_without_its_state_is_refused():
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    del tensors["w" + STATE_SUFFIX]
    _refused(tensors, f"lacks w{STATE_SUFFIX}")


@pytest.mark.parametrize("suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_each_side_tensor_has_to_be_there_with_its_size_and_type(suffix):
    tensors = quantize_matrix("w", torch.randn(64, 64), dtype=torch.bfloat16, device=CPU)
    name = f"w{suffix}"
    whole = tensors[name]
    for wrong in (whole[:-1], torch.cat([whole, whole]), whole.reshape(1, -1, 1), whole.to(torch.float16)):
        _refused({**tensors, name: wrong}, rf"tensor {name} of a 4-bit matrix is ")
    del tensors[name]
    _refused(tensors, rf"lacks {name}$|lacks {name}\n")


def test_side_tensors_that_the_state_does_not_speak_of_are_refused():
    tensors = _packed_by_bitsandbytes(torch.randn(64, 64), block_size=64, nested=False)
    _refused({**tensors, "w.nested_absmax": torch.ones(1)}, r"has w\.nested_absmax")
