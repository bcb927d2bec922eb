"""Local losses of the blocks before the last."""

from __future__ import annotations

import torch
from torch import nn

from lopt_lite.seeds import derive_seed


class ReconstructionHead(nn.Module):
    """Predicts a block's input from its output: LayerNorm, Linear to a quarter, GELU, Linear back; float32.

    Source: LoPT (arXiv:2605.04913): Xavier-uniform weights with gain 0.1, zero biases. The head is scaffolding of
    training and no part of the result.

    Parameters
    ----------
    hidden_size:
        Width of hidden states.
    seed:
        Decides the starting weights.
    """

    def __init__(self, hidden_size: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "reconstruction head"))
            self.norm = nn.LayerNorm(hidden_size)
            self.down = nn.Linear(hidden_size, max(1, hidden_size // 4))
            self.up = nn.Linear(max(1, hidden_size // 4), hidden_size)
            for linear in (self.down, self.up):
                nn.init.xavier_uniform_(linear.weight, gain=0.1)
                nn.init.zeros_(linear.bias)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """Block outputs [..., hidden] of any float dtype -> predicted block inputs [..., hidden], float32."""
        return self.up(nn.functional.gelu(self.down(self.norm(output.float()))))


def reconstruction_loss(
    head: ReconstructionHead,
    output: torch.Tensor,
    block_input: torch.Tensor,
    real: torch.Tensor,
    *,
    tokens: int,
) -> torch.Tensor:
    """Mean squared error between the head's prediction and the block's input, over real tokens, in float32.

    Parameters
    ----------
    output, block_input:
        [rows, tokens, hidden]; no gradient goes to the input.
    real:
        bool [rows, tokens], False at padding.
    tokens:
        Real tokens of the whole optimiser step, what the sum is divided by (times the hidden size).
    """
    target = block_input.detach()[real].float()
    error = head(output[real]) - target
    return error.square().sum() / (tokens * output.shape[-1])


def matching_loss(output: torch.Tensor, target: torch.Tensor, real: torch.Tensor, *, tokens: int) -> torch.Tensor:
    """Mean squared difference between a block's output and its target, over real tokens, in float32.

    Parameters
    ----------
    output, target:
        [rows, tokens, hidden].
    real, tokens:
        As for :func:`reconstruction_loss`.
    """
    error = output[real].float() - target[real].float()
    return error.square().sum() / (tokens * output.shape[-1])
