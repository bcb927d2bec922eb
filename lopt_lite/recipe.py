"""The defaults that follow from the model and the data. Why they are these: docs/recipe.md."""

from __future__ import annotations

#: The anchor's weight: tokens of an average answer that make it 1, and its bounds.
_ANSWER_TOKENS, _LEAST_WEIGHT, _MOST_WEIGHT = 40, 0.1, 3.0


def lora_rate(hidden_size: int) -> float:
    """The adapters' learning rate for a width, two digits of it: 5e-4 (2000 / width)^0.78, no more than at 512.

    The law was fitted to the best rates of Llama models by "LoRA Without Regret" (Schulman et al., 2025; the function
    ``get_lr`` of its tinker-cookbook).
    """
    return float(f"{5e-4 * (2000 / max(hidden_size, 512)) ** 0.78:.2g}")


def anchor_weight(answer_tokens: float) -> float:
    """The anchor's weight for answers of so many tokens on average, two digits of it: 40 / tokens, from 0.1 to 3.

    The shorter the answers, the less they say of how the model is to go on, and the more of it is forgotten.
    """
    return float(f"{min(_MOST_WEIGHT, max(_LEAST_WEIGHT, _ANSWER_TOKENS / max(answer_tokens, 1))):.2g}")


def larger_last_block(layers: int) -> int:
    """Layers of the last of two blocks when the first learns nothing: three quarters of them."""
    return max(1, 3 * layers // 4)
