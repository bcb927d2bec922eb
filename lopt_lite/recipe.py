"""The defaults that follow from the model and the data. Why they are these: docs/recipe.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: (loss of the answers, the anchor's weight): the least and the most, and between them by the weight's logarithm.
_LIGHT, _HEAVY = (2.0, 0.3), (5.0, 3.0)


#: How fast the best rate falls with the width; and the rate of models of other kinds, unless a Llama's is lower.
_LLAMA, _QWEN, _OTHERS = 0.78, 0.0775, 4e-4


@dataclass(frozen=True)
class ModelKind:
    """What the defaults ask of a model.

    Attributes
    ----------
    architecture:
        The name of its class in transformers.
    hidden_size, layers:
        Width of its hidden states, and how many layers it has.
    """

    architecture: str
    hidden_size: int
    layers: int


def lora_rate(model: ModelKind) -> float:
    """The adapters' learning rate, two digits of it: 5e-4 (2000 / width)^p, no more than at a width of 512.

    The law was fitted to the best rates of two families of models by "LoRA Without Regret" (Schulman et al., 2025; the
    function ``get_lr`` of its tinker-cookbook): p is 0.78 for Llama, 0.0775 for Qwen. Others have 4e-4, or what a Llama
    has if that is lower.
    """
    llama, qwen = (5e-4 * (2000 / max(model.hidden_size, 512)) ** power for power in (_LLAMA, _QWEN))
    if model.architecture.startswith("Llama"):
        rate = llama
    elif model.architecture.startswith("Qwen"):
        rate = qwen
    else:
        rate = min(llama, _OTHERS)
    return float(f"{rate:.2g}")


def larger_last_block(layers: int) -> int:
    """Layers of the last of two blocks when the first learns nothing: three quarters of them."""
    return max(1, 3 * layers // 4)


def anchor_weight(loss: float) -> float:
    """The anchor's weight, two digits of it, where answers cost the model so many nats a token before.

    The less likely answers are to the untouched model, the further it is moved to give them, and the more it forgets.
    """
    share = (loss - _LIGHT[0]) / (_HEAVY[0] - _LIGHT[0])
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0
    return float(f"{_LIGHT[1] * (_HEAVY[1] / _LIGHT[1]) ** share:.2g}")
