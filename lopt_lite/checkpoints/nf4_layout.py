"""How many bytes of what an NF4 matrix is: names and sizes alone, without bitsandbytes (slow to import)."""

from __future__ import annotations

import torch

from lopt_lite.checkpoints.shard_writer import TensorSpec

BLOCK_SIZE = 64
_NESTED_BLOCK_SIZE = 256
#: The JSON side tensor is padded to a fixed size with spaces, so that a shard's layout is known before its content.
STATE_BYTES = 256
#: Ending of the tensor in which bitsandbytes says how a weight is packed.
STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"


def packed_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that NF4 with double quantisation makes of a matrix ``name``."""
    elements = shape[0] * shape[1]
    blocks = -(-elements // BLOCK_SIZE)
    return [
        TensorSpec(name, torch.uint8, (-(-elements // 2), 1)),
        TensorSpec(name + ".absmax", torch.uint8, (blocks,)),
        TensorSpec(name + ".quant_map", torch.float32, (16,)),
        TensorSpec(name + ".nested_absmax", torch.float32, (-(-blocks // _NESTED_BLOCK_SIZE),)),
        TensorSpec(name + ".nested_quant_map", torch.float32, (256,)),
        TensorSpec(name + STATE_SUFFIX, torch.uint8, (STATE_BYTES,)),
    ]
