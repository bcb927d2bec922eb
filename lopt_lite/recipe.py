"""The defaults that follow from the model and the data. Why they are these: docs/recipe.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Nats a token that likely answers cost a model at most, and unlikely ones at least; between them there are degrees.
_LIKELY, _UNLIKELY = 2.0, 5.0

#: For likely answers and for unlikely ones: the anchor's weight, and what a short run multiplies the model's rate by.
_WEIGHTS, _RATES = (0.3, 3.0), (2.0, 0.6)

#: Steps up to which a run is short, and from which it is long; between them there are degrees.
_SHORT, _LONG = 100, 1000

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
    """The adapters' learning rate in a long run, two digits of it: 5e-4 (2000 / width)^p, at most that at width 512.

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


def is_short(steps: int) -> bool:
    """Whether a run of so many steps has a rate of its own."""
    return steps < _LONG


def short_run_rate(rate: float, loss: float, steps: int) -> float:
    """The adapters' rate in a run of so many steps, whose answers cost the model so many nats a token before.

    Likely answers ask for small changes, and in a short run for fast ones; unlikely ones move the model far enough. In
    a long run it is the ``rate`` of :func:`lora_rate`, which was fitted to such.
    """
    short = math.log(_LONG / steps) / math.log(_LONG / _SHORT)
    factor = _between(_RATES, _unlikely(loss)) ** min(1.0, max(0.0, short))
    return float(f"{rate * factor:.2g}")


def larger_last_block(layers: int) -> int:
    """Layers of the last of two blocks when the first learns nothing: three quarters of them."""
    return max(1, 3 * layers // 4)


def anchor_weight(loss: float) -> float:
    """The anchor's weight, two digits of it, where answers cost the model so many nats a token before.

    The less likely answers are to the untouched model, the further it is moved to give them, and the more it forgets.
    """
    return float(f"{_between(_WEIGHTS, _unlikely(loss)):.2g}")


def _unlikely(loss: float) -> float:
    """How far answers are from what the model would have given: 0 to 1."""
    share = (loss - _LIKELY) / (_UNLIKELY - _LIKELY)
    return min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0


def _between(ends: tuple[float, float], share: float) -> float:
    """So far from the first to the second, by their logarithms."""
    first, second = ends
    return first * (second / first) ** share
