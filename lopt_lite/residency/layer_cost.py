"""What one layer's activations cost per token, found by running it on the meta device: shapes only, no arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter, tree_map

from lopt_lite.attention import AttentionCall, Before, replaced_attention
from lopt_lite.checkpoints.local_mask import LocalMask
from lopt_lite.checkpoints.trial import trial
from lopt_lite.residency import lora_cost
from lopt_lite.residency.fitting_attention import fitting_attention, is_fused
from lopt_lite.residency.fused import fused_modules
from lopt_lite.residency.mask_cost import is_mask
from lopt_lite.residency.rms_norm import fuse_norms

if TYPE_CHECKING:
    from lopt_lite.checkpoints.layer_calls import LayerCall
    from lopt_lite.checkpoints.skeleton import Skeleton

#: Length of the row with which a layer is seen to run at all.
_TRIED_TOKENS = 8
#: Lengths of rows that are measured: the short one, and the long one and twice as long where a model takes them. The
#: long ones tell apart what grows with the square of the length (attention without a fused kernel). State spaces fill
#: rows up to a multiple of 64 to 256 tokens: the short one tells what a row costs however short it is.
_SHORT_TOKENS, _LONG_TOKENS = 2, 512
#: What a row costs beyond its tokens is taken for filling up when it is worth more tokens than this.
_ROUNDING_TOKENS = 4
#: What is raised on the meta device by code that looks at values, such as the routing of tokens to experts.
_NEEDS_VALUES = (RuntimeError, NotImplementedError)
#: What layers call the cache that they are given: transformers renamed it.
_CACHE_NAMES = ("cache", "past_key_values")
#: A small tensor that is kept of each token, beside its values: objects of tensors, views and operations, of which
#: there are several for each that is kept. Fitted to measured peaks of Jamba and RecurrentGemma.
_TENSOR_BYTES = 6500
#: Widths of a layer's widest activation that exist for a moment beside what it keeps.
_TRANSIENT_WIDTHS = 2.5


@dataclass(frozen=True)
class ActivationCost:
    """Costs of a layer, in bytes per token.

    Attributes
    ----------
    saved_bytes_per_token, saved_bytes_per_pair, saved_bytes_per_row:
        Activations that autograd keeps for the backward pass: of each token, of each pair of tokens of a row
        (attention weights, where the architecture has no fused kernel for them), and at most of each row beyond its
        tokens (where rows are filled up to whole chunks).
    transient_bytes_per_token, transient_bytes_per_pair:
        An estimate of what else exists for a moment within a layer's backward pass, fitted to measured peaks.
    measured:
        False where the layer could not run on the meta device and a formula had to do.
    """

    saved_bytes_per_token: int
    saved_bytes_per_pair: int
    saved_bytes_per_row: int
    transient_bytes_per_token: int
    transient_bytes_per_pair: int
    measured: bool


def layer_kinds(skeleton: Skeleton) -> list[int]:
    """For each layer, the first layer that costs what it costs.

    Those are alike whose parameters have the same names and shapes, and which config.json says to be of one type.
    """
    types = getattr(skeleton.config, "layer_types", None)
    types = types if types and len(types) == skeleton.layer_count else [None] * skeleton.layer_count
    first: dict[Any, int] = {}
    return [
        first.setdefault((types[i], *sorted(skeleton.layer_parameters(i).items())), i)
        for i in range(skeleton.layer_count)
    ]


def try_layers(skeleton: Skeleton) -> None:
    """Run one layer of each kind by itself, on the meta device.

    Raises
    ------
    ModelError
        Its code fails, for another reason than that there are no values: it needs what another layer has left.
    """
    calls = skeleton.probe(_TRIED_TOKENS)
    # Where some layers lean on others those are the later ones, and of another kind if they lack parameters.
    last_of_kind = {kind: index for index, kind in enumerate(layer_kinds(skeleton))}
    for index in last_of_kind.values():
        with (
            torch.no_grad(),
            trial(skeleton.architecture, f"has a layer ({index + 1}) that cannot run by itself"),
            suppress(*_NEEDS_VALUES),
        ):
            _run(skeleton, calls[index], skeleton.layer_template(index).to("meta"), _TRIED_TOKENS)


def activation_cost(
    skeleton: Skeleton,
    index: int,
    *,
    targets: Sequence[str],
    rank: int,
    dropout: bool,
    full: bool,
    fused_attention: bool = True,
) -> ActivationCost:
    """Measure layer ``index``.

    Parameters
    ----------
    targets, rank, dropout:
        Names (within the layer) of the modules that get a LoRA adapter, and what it is like.
    full:
        Whether the layer's own weights are trained, so that every matrix product keeps its input.
    fused_attention:
        Whether the device has an attention that keeps no weights of all pairs of tokens.

    Raises
    ------
    ModelError
        The layer's code fails, for another reason than that there are no values.
    """
    layer = skeleton.layer_template(index).to("meta")
    for parameter in layer.parameters():
        parameter.requires_grad_(full)
    if not full and skeleton.dtype != torch.float32:
        fuse_norms(layer)
    shapes = {n: torch.Size(shape) for n, shape in skeleton.layer_parameters(index).items()}
    widest = max(shape[0] for shape in shapes.values() if len(shape) > 1)
    with trial(skeleton.architecture, "has layers that cannot be tried out as they are trained"):
        found = _measured_bytes(skeleton, index, layer, () if dropout else targets, fused_attention=fused_attention)
    saved, pairs, row = found or (_estimated_saved_bytes(skeleton, list(shapes.values())), 0, 0)
    transient = round(_TRANSIENT_WIDTHS * widest * skeleton.dtype.itemsize)
    if row:
        # Whatever works in chunks makes tensors of all pairs of a chunk's tokens, and it keeps most of them.
        transient = max(transient, saved)
    widths = [_input_width(layer.get_submodule(target)) for target in targets]
    saved += lora_cost.saved_bytes_per_token(widths, rank=rank, dtype=skeleton.dtype, dropout=dropout)
    of_pairs = max(pairs, _score_bytes(skeleton)) if pairs else 0
    return ActivationCost(saved, pairs, row, transient, of_pairs, found is not None)


def _score_bytes(skeleton: Skeleton) -> int:
    """Of a pair of tokens: for each head its score in float32, and two gradients in the compute dtype.

    Where tokens to attend to are chosen first (DeepSeek's sparse attention), scores are made twice by other heads.
    """
    heads, choosing = (int(getattr(skeleton.config, name, 0) or 0) for name in ("num_attention_heads", "index_n_heads"))
    return max(1, heads) * (4 + 2 * skeleton.dtype.itemsize) + choosing * 2 * 4


def row_state_bytes(skeleton: Skeleton) -> int:
    """What the layers keep of a row while it is continued, however long it is: states of state spaces and the like.

    Found by giving layers on the meta device a cache of transformers'. Keys and values grow with the row and do not
    count; nor does the state of a layer that cannot run without values.
    """
    from transformers import DynamicCache  # here, as most plans have no need of it

    cache = DynamicCache(config=skeleton.config)
    with_state = [index for index, kept in enumerate(cache.layers) if hasattr(kept, "recurrent_states")]
    if not with_state:
        return 0
    calls, kinds = skeleton.probe(_TRIED_TOKENS), layer_kinds(skeleton)
    found = 0
    for index, layers in Counter(kinds[index] for index in with_state).items():
        call = calls[index]
        given = {name: cache for name in _CACHE_NAMES if name in call.kwargs}
        # Some ask for a cache of their own class, which has no such state in transformers'.
        with torch.no_grad(), suppress(*_NEEDS_VALUES, AttributeError):
            changed = replace(call, kwargs={**call.kwargs, **given})
            _run(skeleton, changed, skeleton.layer_template(index).to("meta"), _TRIED_TOKENS)
        found += layers * sum(state.numel() * state.element_size() for state in _states(cache.layers[index]))
    return found


def _states(kept: Any) -> list[torch.Tensor]:
    """The states, of one row, in a layer of transformers' cache."""
    return [state for part in (kept.conv_states, kept.recurrent_states) for state in part.values() if state is not None]


def _measured_bytes(
    skeleton: Skeleton, index: int, layer: nn.Module, kept: Sequence[str], *, fused_attention: bool
) -> tuple[int, int, int] | None:
    """Bytes that a layer keeps of a token, of a pair and of a row; None where it cannot run without values."""
    attention = _fused_attention if fused_attention else nullcontext
    least, short = _SHORT_TOKENS, _LONG_TOKENS
    if skeleton.most_positions:
        short = max(least, min(short, skeleton.most_positions // 2))
    long = 2 * short
    try:
        saved = [_saved(skeleton, index, layer, tokens, kept, attention) for tokens in (least, short, long)]
    except _NEEDS_VALUES:
        return None
    fewest, few, many = (sum(storage.nbytes() for storage in of_one) for of_one in saved)
    # few = a * short + b * short ** 2, and the same with many and long.
    pairs = max(0, round((many / long - few / short) / (long - short)))
    tokens = few // short - pairs * short
    row = fewest - tokens * least - pairs * least**2
    # Some state spaces go through a row token by token, and keep small tensors of each.
    of_each_token = (len(saved[2]) - len(saved[1])) // (long - short)
    return tokens + of_each_token * _TENSOR_BYTES, pairs, row if row > _ROUNDING_TOKENS * tokens else 0


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused attention kernel: it keeps what goes in, what comes out, and a number per row and head.

    It also keeps a dense mask, in the dtype of what it computes.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if isinstance(mask, LocalMask):
            mask = None
        elif mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums, mask)
        return output


def _fused_attention() -> AbstractContextManager[None]:
    """On the meta device PyTorch takes its slow attention, which keeps other tensors than the kernels of real ones."""

    def attend(call: AttentionCall, before: Before) -> torch.Tensor:
        if not is_fused(call):
            return before(call)
        output: torch.Tensor = _FusedAttention.apply(call.query, call.key, call.value, call.attn_mask)
        return output

    return replaced_attention(attend)


def _input_width(module: nn.Module) -> int:
    """What goes into an adaptable module: ``nn.Linear`` [out, in] or GPT-2's ``Conv1D`` [in, out]."""
    assert isinstance(module.weight, torch.Tensor)
    return int(module.weight.shape[1 if isinstance(module, nn.Linear) else 0])


def _estimated_saved_bytes(skeleton: Skeleton, shapes: list[torch.Size]) -> int:
    """Input and output of every matrix, and the norms."""
    widths = sum(shape[-1] + shape[-2] for shape in shapes if len(shape) > 1)
    return skeleton.dtype.itemsize * (widths + 12 * skeleton.hidden_size)


def _saved(
    skeleton: Skeleton,
    index: int,
    layer: nn.Module,
    tokens: int,
    kept: Sequence[str],
    attention: Callable[[], AbstractContextManager[None]],
) -> list[torch.UntypedStorage]:
    """What a layer keeps of the probe's tokens, the inputs of the modules called in ``kept`` included."""
    call = _on_meta(skeleton.probe(tokens)[index])
    # Masks that all layers are given are counted once for all: see mask_cost.py.
    given = [value for value in tree_iter((call.args, call.kwargs)) if isinstance(value, torch.Tensor)]
    masks = [value for value in given if is_mask(value, tokens) and not isinstance(value, LocalMask)]
    not_counted = {tensor.untyped_storage()._cdata for tensor in (*layer.parameters(), *masks)}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in not_counted:
            storages[storage._cdata] = storage
        return tensor

    with (
        attention(),
        fitting_attention(),
        fused_modules(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        lora_cost.noting_inputs(layer, kept, note),
    ):
        output = _run(skeleton, call, layer, tokens)
    note(output)
    return list(storages.values())


def _run(skeleton: Skeleton, call: LayerCall, layer: nn.Module, tokens: int) -> torch.Tensor:
    """A layer's output on the meta device, [1, tokens, hidden]."""
    shape = (1, tokens, skeleton.hidden_size)
    hidden = torch.empty(shape, dtype=skeleton.dtype, device="meta", requires_grad=True)
    return _on_meta(call).run(layer, hidden)


def _on_meta(call: LayerCall) -> LayerCall:
    """The same call with tensors on the meta device."""

    def move(value: Any) -> Any:
        if isinstance(value, LocalMask):
            return value.on("meta")
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(move, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)
