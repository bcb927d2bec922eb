"""What planning has to know of a model: found out from its config.json, and remembered.

Building a model's skeleton takes moments, importing the library that can do it takes seconds. What came of it is
therefore kept in the user's cache directory, by the content of config.json and everything else that it depends on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from lopt_lite import user_cache
from lopt_lite.checkpoints.locate import ModelDescription
from lopt_lite.residency.shapes import LayerShapes, ModelShapes, model_shapes
from lopt_lite.settings import TrainSettings

if TYPE_CHECKING:
    from lopt_lite.checkpoints.skeleton import Skeleton

FILE_NAME = "models.json"
#: Part of the key: facts found out in another way are not comparable.
_VERSION = 1


@dataclass(frozen=True)
class ModelFacts:
    """A model in numbers.

    Attributes
    ----------
    shapes:
        See :class:`ModelShapes`.
    active_parameters:
        For each layer, the parameters that each token is multiplied with.
    parameters:
        All parameters of the model.
    around_bytes:
        What the store holds beside the layers: embedding, LM head, norms.
    """

    architecture: str
    shapes: ModelShapes
    active_parameters: tuple[int, ...]
    parameters: int
    around_bytes: int


def stored_dtype(settings: TrainSettings) -> torch.dtype:
    """The type of what a store holds that is not 4 bits."""
    return torch.bfloat16 if settings.quantize == "nf4" else _compute_dtype(settings)


def facts_of(skeleton: Skeleton, settings: TrainSettings) -> ModelFacts:
    """The facts of an open skeleton.

    Raises
    ------
    SettingsError
        ``--lora-targets`` names a module that no layer has.
    """
    from lopt_lite.training.targets import tuning  # here, as it imports the skeleton's libraries

    kept = stored_dtype(settings)
    shapes = model_shapes(skeleton, quantize=settings.quantize, stored_dtype=kept, tuning=tuning(skeleton, settings))
    names = set(skeleton.root_names) | {skeleton.embedding_name}
    around = sum(torch.Size(skeleton.state_shapes[name]).numel() for name in names)
    layers = [
        sum(torch.Size(shape).numel() for shape in skeleton.layer_parameters(index).values())
        for index in range(skeleton.layer_count)
    ]
    return ModelFacts(
        architecture=skeleton.architecture,
        shapes=shapes,
        active_parameters=tuple(_active_parameters(skeleton, index) for index in range(skeleton.layer_count)),
        parameters=sum(layers) + around,
        around_bytes=around * kept.itemsize,
    )


def model_facts(model: ModelDescription, settings: TrainSettings) -> ModelFacts:
    """The facts of a model, remembered or found out now.

    Raises
    ------
    ModelError
        See :class:`~lopt_lite.checkpoints.skeleton.Skeleton`.
    SettingsError
        ``--lora-targets`` names a module that no layer has.
    """
    key = _key(model.config, settings)
    known = user_cache.recall(FILE_NAME, key)
    if known is not None:
        return _from_json(known)
    from lopt_lite.checkpoints.skeleton import Skeleton  # here, as its libraries take seconds

    facts = facts_of(Skeleton(model, dtype=_compute_dtype(settings)), settings)
    user_cache.remember(FILE_NAME, key, asdict(facts))
    return facts


def _from_json(value: dict[str, Any]) -> ModelFacts:
    shapes = ModelShapes(**{**value["shapes"], "layers": tuple(LayerShapes(**x) for x in value["shapes"]["layers"])})
    facts = ModelFacts(**{**value, "shapes": shapes})
    return replace(facts, active_parameters=tuple(facts.active_parameters))


def _compute_dtype(settings: TrainSettings) -> torch.dtype:
    return torch.float32 if settings.dtype == "float32" else torch.bfloat16


def _key(config: dict[str, Any], settings: TrainSettings) -> str:
    releases = {name: metadata.version(name) for name in ("lopt-lite", "torch", "transformers")}
    asked = [settings.quantize, settings.dtype, settings.tune, settings.lora_r, settings.lora_dropout > 0]
    fields = [*ModelShapes.__dataclass_fields__, *LayerShapes.__dataclass_fields__]
    text = json.dumps([_VERSION, config, releases, asked, settings.lora_targets, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _active_parameters(skeleton: Skeleton, index: int) -> int:
    """Matrices count whole, matrices of routed experts by the share that a token goes through."""
    experts = chosen = 1
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = int(getattr(skeleton.config, name, 0) or 0) or experts
    chosen = int(getattr(skeleton.config, "num_experts_per_tok", 0) or 0) or experts
    total = 0.0
    for shape in skeleton.layer_parameters(index).values():
        size = torch.Size(shape).numel()
        total += size * min(1.0, chosen / experts) if len(shape) == 3 and shape[0] == experts else size
    return round(total)
