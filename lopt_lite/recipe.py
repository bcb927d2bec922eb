"""The defaults that follow from the model and the data. Why they are these: docs/recipe.md."""

from __future__ import annotations

import math

#: (loss of the answers, the anchor's weight): the least and the most, and between them by the weight's logarithm.
_LIGHT, _HEAVY = (2.0, 0.3), (5.0, 3.0)


def lora_rate(hidden_size: int) -> float:
    """The adapters' learning rate for a width, two digits of it: 5e-4 (2000 / width)^0.78, no more than at 512.

    The law was fitted to the best rates of Llama models by "LoRA Without Regret" (Schulman et al., 2025; the function
    ``get_lr`` of its tinker-cookbook).
    """
    return float(f"{5e-4 * (2000 / max(hidden_size, 512)) ** 0.78:.2g}")


def larger_last_block(layers: int) -> int:
    """Layers of the last of two blocks when the first learns nothing: three quarters of them."""
    return max(1, 3 * layers // 4)


def anchor_weight(loss: float) -> float:
    """The anchor's weight, two digits of it, where answers cost the untouched model so many nats a token.

    The less likely answers are to the untouched model, the further it is moved to give them, and the more it forgets.
    """
    share = (loss - _LIGHT[0]) / (_HEAVY[0] - _LIGHT[0])
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0
    return float(f"{_LIGHT[1] * (_HEAVY[1] / _LIGHT[1]) ** share:.2g}")
