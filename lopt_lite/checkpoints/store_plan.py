"""Which tensors a store holds, and in which of its shards they lie: known before any of them is read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lopt_lite.checkpoints.locate import ModelFiles
from lopt_lite.checkpoints.names import NF4_SUFFIXES, Recipe
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX, check_packed, packed_specs
from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store_index import EMBEDDING_SHARD, HEAD_SHARD, layer_shard
from lopt_lite.errors import ModelError


@dataclass(frozen=True)
class StoreSource:
    """What a store is made from, and how.

    Attributes
    ----------
    recipes:
        How each tensor of the model is made of those in its files, by its name in the model.
    quantize:
        ``"nf4"``, for the linear modules of layers, or ``"none"``.
    dtype:
        Type of what stays unquantised.
    unties:
        Whether the LM head becomes a tensor of its own, where the model ties it to its embedding.
    """

    files: ModelFiles
    skeleton: Skeleton
    recipes: dict[str, Recipe]
    quantize: str
    dtype: torch.dtype
    unties: bool

    @property
    def nf4(self) -> bool:
        """Whether linear modules of layers are quantised."""
        return self.quantize == "nf4"

    @property
    def dtype_name(self) -> str:
        """``dtype`` as configs write it."""
        return str(self.dtype).removeprefix("torch.")


@dataclass
class ShardPlan:
    """One shard to write.

    Attributes
    ----------
    specs:
        Its tensors.
    quantized:
        Names of matrices that are quantised when they are made.
    copied:
        Tensors of matrices that the model's files hold in 4 bits already and that stay as they are: from the name in
        the store to the name in the files.
    """

    name: str
    specs: list[TensorSpec] = field(default_factory=list)
    quantized: set[str] = field(default_factory=set)
    copied: dict[str, str] = field(default_factory=dict)


def check_tensors(source: StoreSource) -> None:
    """Look for every tensor that the model needs, and at its shape; of 4-bit matrices at all that is beside them.

    Raises
    ------
    ModelError
        A tensor is missing, or has another shape than the config says; or a 4-bit matrix cannot be read.
    """
    skeleton, recipes = source.skeleton, source.recipes
    needed = [n for i in range(skeleton.layer_count) for n in _full_names(source, i)] + [
        n for n in skeleton.root_names if n in dict(skeleton.model.named_parameters()) or n == skeleton.head_name
    ]
    needed.append(skeleton.embedding_name)
    missing = [n for n in needed if n not in recipes]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(
            f"the checkpoint {source.files.origin} lacks {shown}",
            expected=f"the tensors of {skeleton.architecture}, as config.json describes it",
            fix="check that config.json belongs to these weights and that every shard is there",
        )
    for name, recipe in recipes.items():
        shapes = [_shape(source, given) for given, _ in recipe.sources]
        if recipe.converter is None and shapes[0] != skeleton.state_shapes[name]:
            raise ModelError(
                f"tensor {recipe.sources[0][0]} has shape {list(shapes[0])}",
                expected=f"{list(skeleton.state_shapes[name])}, from config.json",
                fix="check that config.json belongs to these weights",
            )


def _shape(source: StoreSource, given: str) -> tuple[int, ...]:
    """The shape of a tensor of the model's files, of a 4-bit one that of the matrix it stands for."""
    weights = source.files.weights
    if not is_packed(source, given):
        return weights.info(given).shape
    infos = [weights.info(given + suffix) for suffix in ("", *NF4_SUFFIXES) if given + suffix in weights]
    found = {info.name: (info.dtype, info.shape) for info in infos}
    return check_packed(given, found, lambda: weights.read(given + STATE_SUFFIX)).shape


def is_packed(source: StoreSource, given: str) -> bool:
    """Whether the model's files hold the tensor ``given`` in 4 bits."""
    return given + STATE_SUFFIX in source.files.weights


def plan_shards(source: StoreSource, layers: range | None) -> list[ShardPlan]:
    """The shards of these layers alone, or with None of the whole model, in the order in which they are written."""
    if layers is None:
        embedding = ShardPlan(EMBEDDING_SHARD)
        _plan_tensor(source, embedding, source.skeleton.embedding_name, quantize=False)
        middle = [_plan_layer(source, index) for index in range(source.skeleton.layer_count)]
        plans = [embedding, *middle, _plan_head(source)]
    else:
        plans = [_plan_layer(source, index) for index in layers]
    for plan in plans:
        plan.specs = aligned_order(plan.specs)
    return plans


def _plan_layer(source: StoreSource, index: int) -> ShardPlan:
    skeleton = source.skeleton
    plan = ShardPlan(layer_shard(index))
    prefix = skeleton.layer_prefix(index)
    linear = {f"{prefix}{n}.weight" for n in skeleton.linear_names(index)}
    buffers = [prefix + n for n in skeleton.layer_buffer_names(index) if prefix + n in source.recipes]
    for name in _full_names(source, index) + sorted(buffers):
        _plan_tensor(source, plan, name, quantize=name in linear)
    return plan


def _plan_head(source: StoreSource) -> ShardPlan:
    skeleton = source.skeleton
    head = ShardPlan(HEAD_SHARD)
    for name in skeleton.root_names:
        if name != skeleton.embedding_name and name in source.recipes:
            _plan_tensor(source, head, name, quantize=False)
    if source.unties:
        shape = skeleton.state_shapes[skeleton.head_name]
        head.specs.append(TensorSpec(skeleton.head_name, source.dtype, shape))
    return head


def _plan_tensor(source: StoreSource, plan: ShardPlan, name: str, *, quantize: bool) -> None:
    weights, shape = source.files.weights, source.skeleton.state_shapes[name]
    recipe = source.recipes[name]
    given = recipe.sources[0][0]
    # Elsewhere (the LM head, say) what is in 4 bits is dequantised: nothing reads packed matrices there.
    if quantize and source.nf4 and recipe.converter is None and is_packed(source, given):
        for suffix in ("", *NF4_SUFFIXES):
            if given + suffix in weights:
                info = weights.info(given + suffix)
                plan.specs.append(TensorSpec(name + suffix, info.dtype, info.shape))
                plan.copied[name + suffix] = given + suffix
    elif quantize and source.nf4:
        plan.specs += packed_specs(name, shape)
        plan.quantized.add(name)
    else:
        floating = weights.info(given).dtype.is_floating_point or is_packed(source, given)
        plan.specs.append(TensorSpec(name, source.dtype if floating else weights.info(given).dtype, shape))


def _full_names(source: StoreSource, index: int) -> list[str]:
    prefix = source.skeleton.layer_prefix(index)
    return [prefix + n for n in source.skeleton.layer_parameters(index)]
