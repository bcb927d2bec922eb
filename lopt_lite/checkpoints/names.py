"""Which tensors of a checkpoint make which tensors of the model.

Most names are the same on both sides. Older checkpoints use other names, base-model checkpoints lack a prefix, and
mixture-of-experts checkpoints keep one matrix per expert where the model has one fused tensor. transformers knows all
this (its weight conversions); here it is turned into a plan that needs only one model tensor's sources in memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.errors import ModelError

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

#: Endings of the tensors that bitsandbytes keeps beside a packed 4-bit weight.
NF4_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE_SUFFIX)


@dataclass
class Recipe:
    """How one or more model tensors (``targets``) are made from checkpoint tensors."""

    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint name, source pattern)
    converter: WeightConverter | None = None

    def make(self, read: Callable[[str], torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """Read the sources and return the target tensors by model name."""
        if self.converter is None:
            return {self.targets[0]: read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.targets[0], name, pattern, read(name))
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def split_nf4_suffix(name: str) -> tuple[str, str]:
    """Split ``x.weight.absmax`` into ``x.weight`` and ``.absmax``; the second is empty for other tensors."""
    for suffix in NF4_SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)], suffix
    return name, ""


def plan_names(checkpoint_names: Iterable[str], model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """Match checkpoint tensors with model tensors.

    Parameters
    ----------
    checkpoint_names:
        Every tensor name in the checkpoint. Side tensors of NF4 weights are matched by their weight's name.
    model:
        The transformers model (meta is enough), for its conversions.
    shapes:
        Shapes of the model's tensors by name.

    Returns
    -------
    dict
        A recipe for each model tensor found. A recipe that makes several appears under each of them. Checkpoint tensors
        that the model does not use are left out, as transformers does.

    Raises
    ------
    ModelError
        Two checkpoint tensors claim the same model tensor.
    """
    # Imported here: it takes a second, and looking at a model's files needs none of it.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = dict.fromkeys(shapes, True)
    prefix = model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    for name in sorted(checkpoint_names, key=_natural_key):
        base, suffix = split_nf4_suffix(name)
        if suffix:
            continue
        if base in known:
            target, pattern = base, None
        else:
            target, pattern = rename_source_key(base, renamings, converters, prefix, known)
        if target not in known and pattern is None:
            target, pattern = rename_source_key(base, [], [], prefix, known)
        if target not in known:
            continue
        if pattern is None:
            if target in recipes:
                other = recipes[target].sources[0][0]
                raise ModelError(f"the tensors {other} and {name} are both {target} to this architecture")
            recipes[target] = Recipe([target], [(name, name)])
            continue
        recipe = recipes.get(target)
        if recipe is None or recipe.converter is None:
            recipe = recipes[target] = Recipe([target], converter=by_pattern[pattern])
        recipe.sources.append((name, pattern))
    for target, recipe in list(recipes.items()):
        if recipe.converter is not None and len(recipe.converter.target_patterns) > 1:
            first, *others = recipe.converter.target_patterns
            for other in others:
                sibling = target.replace(first, other)
                if sibling in known:
                    recipe.targets.append(sibling)
                    recipes[sibling] = recipe
    return recipes


def unused_names(checkpoint_names: Iterable[str], recipes: dict[str, Recipe], model: Any) -> list[str]:
    """Checkpoint tensors that no recipe uses and that the user may miss.

    Parameters
    ----------
    checkpoint_names:
        Every tensor name in the checkpoint.
    recipes:
        What :func:`plan_names` made of them.
    model:
        The transformers model: its class says what of its checkpoints is left out on purpose (layers that predict
        further tokens, masks).

    Returns
    -------
    list
        Their names, in natural order. Side tensors of NF4 weights do not count.
    """
    used = {name for recipe in recipes.values() for name, _ in recipe.sources}
    # The last two were kept by older releases of transformers, which computes them now. It leaves them out as well.
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"\.inv_freq$", r"(^|\.)position_ids$"]
    left_out = re.compile("|".join(f"({pattern})" for pattern in ignored))
    return [
        name
        for name in sorted(checkpoint_names, key=_natural_key)
        if name not in used
        and not split_nf4_suffix(name)[1]
        # Patterns are of the whole model's names; a checkpoint of the base model lacks the prefix.
        and not any(left_out.search(full) for full in (name, f"{model.base_model_prefix}.{name}"))
    ]


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sort ``experts.10`` after ``experts.9``, as the fused order requires."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
