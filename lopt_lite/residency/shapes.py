"""What a model weighs, layer by layer, from its architecture alone: no weights are read and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lopt_lite.checkpoints.nf4_layout import packed_specs
from lopt_lite.residency import short_attention
from lopt_lite.residency.head_cost import HeadShapes
from lopt_lite.residency.layer_cost import ActivationCost, activation_cost, layer_kinds, row_state_bytes, try_layers
from lopt_lite.residency.mask_cost import MaskCost, mask_cost, narrow_windows, wide_windows

if TYPE_CHECKING:
    from lopt_lite.checkpoints.skeleton import Skeleton

#: Names (within a layer, given its index) of the modules that get a LoRA adapter.
TargetNames = Callable[[int], Sequence[str]]

#: AdamW in float32: parameter, gradient, two moments.
_LORA_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class LayerShapes:
    """One layer.

    Attributes
    ----------
    stored_bytes:
        As it lies in the store.
    dense_bytes:
        With every weight in the compute dtype.
    largest_matrix:
        Elements of its largest weight.
    trained_parameters:
        Parameters that training changes.
    activations:
        What a token costs in it, adapters included.
    adapting_bytes_per_token:
        What the widest adapter makes of a token for a moment, where it is not fused with its module: 0 without any.
    longest_without_mask, activations_with_mask:
        What a token costs in longer rows, where these have a mask that shorter ones have not; empty where not.
    """

    stored_bytes: int
    dense_bytes: int
    largest_matrix: int
    trained_parameters: int
    activations: ActivationCost
    adapting_bytes_per_token: int = 0
    longest_without_mask: int = 0
    activations_with_mask: tuple[ActivationCost, ...] = ()

    def cost(self, row_length: float) -> ActivationCost:
        """What a token costs in rows of so many tokens at most."""
        if self.activations_with_mask and row_length > self.longest_without_mask:
            return self.activations_with_mask[0]
        return self.activations

    def kept_bytes_per_token(self, row_length: float) -> float:
        """Activations that autograd keeps of each token, in rows of so many tokens."""
        cost = self.cost(row_length)
        return cost.saved_bytes_per_token + cost.saved_bytes_per_pair * row_length

    def kept_bytes(self, tokens: int, *, rows: int, row_length: int) -> int:
        """Activations that autograd keeps of ``tokens`` tokens in ``rows`` rows at most, of ``row_length`` at most."""
        return int(tokens * self.kept_bytes_per_token(row_length)) + rows * self.cost(row_length).saved_bytes_per_row

    def inside_bytes(self, tokens: int, *, rows: int, row_length: int) -> int:
        """What exists of them for a moment, beside what is kept."""
        cost = self.cost(row_length)
        of_token = cost.transient_bytes_per_token + cost.transient_bytes_per_pair * row_length
        return tokens * of_token + rows * cost.saved_bytes_per_row


@dataclass(frozen=True)
class Tuning:
    """What is trained: LoRA adapters of rank ``rank`` on ``targets``, or (``rank`` None) all weights of a layer.

    Attributes
    ----------
    dropout:
        Whether adapters have dropout, which keeps its mask.
    eight_bit:
        Full tuning with Adam's moments in 8 bits.
    fused_attention:
        Whether the device has an attention that keeps no weights of all pairs of tokens.
    """

    targets: TargetNames = lambda index: ()
    rank: int | None = None
    dropout: bool = False
    eight_bit: bool = False
    fused_attention: bool = True


@dataclass(frozen=True)
class ModelShapes:
    """A whole model, and what a token of it costs.

    Attributes
    ----------
    itemsize:
        Bytes of a number of the compute dtype.
    quantised:
        Whether the store is NF4.
    state_bytes_per_parameter:
        Value, gradient and optimiser state of a trained parameter; 0 without training.
    masks:
        What masks of all pairs of tokens take.
    short_attention_heads:
        Query heads whose scores exist for a moment on the CPU, where rows are short; 0: they never do.
    cache_bytes_per_token:
        Keys and values of one token in all layers, where what follows it is generated.
    cache_bytes_per_row:
        What all layers keep of a row then, however long it is: the states of state spaces.
    """

    hidden: int
    vocabulary: int
    head: HeadShapes
    itemsize: int
    quantised: bool
    layers: tuple[LayerShapes, ...]
    state_bytes_per_parameter: float
    full: bool
    masks: MaskCost = field(default_factory=MaskCost)
    short_attention_heads: int = 0
    cache_bytes_per_token: int = 0
    cache_bytes_per_row: int = 0

    def cache_bytes(self, tokens: int) -> int:
        """What all layers keep of a row of so many tokens, where what follows it is generated."""
        return tokens * self.cache_bytes_per_token + self.cache_bytes_per_row

    @property
    def measured(self) -> bool:
        """False where a layer cannot run without values (routed experts): its activations are a formula's estimate."""
        return all(layer.activations.measured for layer in self.layers)

    @property
    def largest_shard(self) -> int:
        """Bytes of the largest layer in the store: the size of a slab."""
        return max(layer.stored_bytes for layer in self.layers)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest weight of any layer."""
        return max(layer.largest_matrix for layer in self.layers)

    @property
    def head_bytes(self) -> int:
        """The LM head in the compute dtype."""
        return self.vocabulary * self.hidden * self.itemsize

    def stored_bytes(self, first: int, end: int) -> int:
        """Bytes of layers ``first`` to ``end`` (exclusive) in the store."""
        return sum(layer.stored_bytes for layer in self.layers[first:end])

    def dense_bytes(self, first: int, end: int) -> int:
        """Bytes of layers ``first`` to ``end`` (exclusive) in the compute dtype."""
        return sum(layer.dense_bytes for layer in self.layers[first:end])

    def kept_bytes(self, first: int, end: int, *, depth: int, tokens: int, rows: int, row_length: int) -> int:
        """What ``depth`` of the layers keep, of those that keep most. See :meth:`LayerShapes.kept_bytes`."""
        layers = self.layers[first:end]
        return sum(sorted(layer.kept_bytes(tokens, rows=rows, row_length=row_length) for layer in layers)[-depth:])

    def inside_bytes(self, first: int, end: int, *, tokens: int, rows: int, row_length: int) -> int:
        """What exists for a moment in the layer that needs most. See :meth:`LayerShapes.inside_bytes`."""
        layers = self.layers[first:end]
        return max(layer.inside_bytes(tokens, rows=rows, row_length=row_length) for layer in layers)

    def adapting_bytes(self, first: int, end: int, *, tokens: int) -> int:
        """What adapters make of ``tokens`` for a moment, outside training steps: see :class:`LayerShapes`."""
        return tokens * max(layer.adapting_bytes_per_token for layer in self.layers[first:end])

    def trained_parameters(self, first: int, end: int) -> int:
        """Trained parameters of layers ``first`` to ``end`` (exclusive)."""
        return sum(layer.trained_parameters for layer in self.layers[first:end])


def model_shapes(
    skeleton: Skeleton, *, quantize: str, stored_dtype: torch.dtype, tuning: Tuning | None = None
) -> ModelShapes:
    """The shapes of a model.

    Parameters
    ----------
    quantize, stored_dtype:
        The store's kind: ``"nf4"`` or ``"none"``, and the dtype of what is not 4 bits.
    tuning:
        What is trained; None without training.

    Raises
    ------
    ModelError
        A layer cannot run by itself.
    """
    try_layers(skeleton)
    kinds = layer_kinds(skeleton)
    masks = mask_cost(skeleton)
    with wide_windows(skeleton):
        costs = {index: _activation_cost(skeleton, index, tuning) for index in sorted(set(kinds))}
    layers = tuple(
        _layer_shapes(skeleton, index, quantize, stored_dtype, tuning, costs[kind]) for index, kind in enumerate(kinds)
    )
    if masks.longest_without:
        with narrow_windows(skeleton):
            with_mask = {index: _activation_cost(skeleton, index, tuning) for index in costs}
        layers = tuple(
            replace(layer, longest_without_mask=masks.longest_without, activations_with_mask=(with_mask[kind],))
            for layer, kind in zip(layers, kinds, strict=True)
        )
    return ModelShapes(
        hidden=skeleton.hidden_size,
        vocabulary=skeleton.vocabulary_rows,
        head=HeadShapes.of(skeleton.config, stored=stored_dtype, compute=skeleton.dtype),
        itemsize=skeleton.dtype.itemsize,
        quantised=quantize == "nf4",
        layers=layers,
        state_bytes_per_parameter=_state_bytes(tuning, skeleton.dtype.itemsize),
        full=tuning is not None and tuning.rank is None,
        masks=masks,
        short_attention_heads=short_attention.heads_of(skeleton.config, skeleton.dtype),
        cache_bytes_per_token=_cache_bytes_per_token(skeleton),
        cache_bytes_per_row=row_state_bytes(skeleton),
    )


def _cache_bytes_per_token(skeleton: Skeleton) -> int:
    # Layers of Gemma 4 have heads of unlike sizes, and its config does not say one for all.
    configs = getattr(skeleton.config, "per_layer_config", None) or [skeleton.config] * skeleton.layer_count
    return sum(_cached_numbers(config) for config in configs) * skeleton.dtype.itemsize


def _cached_numbers(config: Any) -> int:
    """Elements of a token's key and value in one layer."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * kept * width)


def _state_bytes(tuning: Tuning | None, itemsize: int) -> float:
    if tuning is None:
        return 0
    if tuning.rank is not None:
        return _LORA_BYTES_PER_PARAMETER
    # Value and gradient in the compute dtype; moments of one byte each with a float32 scale per 256, or in float32.
    return 2 * itemsize + (2 * (1 + 4 / 256) if tuning.eight_bit else 8)


def _activation_cost(skeleton: Skeleton, index: int, tuning: Tuning | None) -> ActivationCost:
    rank = None if tuning is None else tuning.rank
    return activation_cost(
        skeleton,
        index,
        targets=[] if tuning is None or rank is None else list(tuning.targets(index)),
        rank=rank or 0,
        dropout=tuning is not None and tuning.dropout,
        full=tuning is not None and rank is None,
        fused_attention=tuning is None or tuning.fused_attention,
    )


def _layer_shapes(
    skeleton: Skeleton,
    index: int,
    quantize: str,
    stored_dtype: torch.dtype,
    tuning: Tuning | None,
    activations: ActivationCost,
) -> LayerShapes:
    shapes = skeleton.layer_parameters(index)
    linear = {f"{name}.weight" for name in skeleton.linear_names(index)}
    stored = 0
    for name, shape in shapes.items():
        if quantize == "nf4" and name in linear:
            stored += sum(spec.nbytes for spec in packed_specs(name, shape))
        else:
            stored += torch.Size(shape).numel() * stored_dtype.itemsize
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    trained = adapting = 0
    rank = None if tuning is None else tuning.rank
    if tuning is not None and rank is None:
        trained = elements
    elif tuning is not None and rank is not None:
        adapted = [shapes[f"{target}.weight"] for target in tuning.targets(index)]
        trained = sum(rank * sum(shape) for shape in adapted)
        # PEFT's product, and a scaled copy of it. (GPT-2's matrices have their sides the other way round.)
        adapting = 2 * skeleton.dtype.itemsize * max((max(shape) for shape in adapted), default=0)
    return LayerShapes(
        stored_bytes=stored,
        dense_bytes=elements * skeleton.dtype.itemsize,
        largest_matrix=max(torch.Size(shape).numel() for shape in shapes.values()),
        trained_parameters=trained,
        activations=activations,
        adapting_bytes_per_token=adapting,
    )
