"""What planning has to know of a model: found out from its config.json, and remembered.

Building a model's skeleton takes moments, importing the library that can do it takes seconds. What came of it is
therefore kept in the user's cache directory, by the content of config.json and everything else that it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lopt_lite import user_cache
from lopt_lite.checkpoints.locate import ModelDescription
from lopt_lite.devices import backend, choose_device
from lopt_lite.recipe import ModelKind
from lopt_lite.residency.shapes import ModelShapes, model_shapes
from lopt_lite.settings import TrainSettings

if TYPE_CHECKING:
    from lopt_lite.checkpoints.skeleton import Skeleton

FILE_NAME = "models.json"


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
    most_positions:
        Most tokens of an example, None where the model sets no limit.
    """

    architecture: str
    shapes: ModelShapes
    active_parameters: tuple[int, ...]
    parameters: int
    around_bytes: int
    most_positions: int | None

    @property
    def kind(self) -> ModelKind:
        """What the defaults ask of it."""
        return ModelKind(self.architecture, self.shapes.hidden, len(self.shapes.layers))


def stored_dtype(settings: TrainSettings) -> torch.dtype:
    """The type of what a store holds that is not 4 bits."""
    return torch.bfloat16 if settings.quantize == "nf4" else compute_dtype(settings)


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
        most_positions=skeleton.most_positions,
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
    with contextlib.suppress(
        TypeError, KeyError, ValueError, AttributeError
    ):  # nothing is there, or something else than was remembered
        return typing.cast(ModelFacts, _decode(ModelFacts, user_cache.recall(FILE_NAME, key)))
    from lopt_lite.checkpoints.skeleton import Skeleton  # here, as its libraries take seconds

    facts = facts_of(Skeleton(model, dtype=compute_dtype(settings)), settings)
    user_cache.remember(FILE_NAME, key, _encode(facts))
    return facts


def _encode(value: Any) -> Any:
    """A record as JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _decode(kind: Any, value: Any) -> Any:
    """What :func:`_encode` made JSON of.

    Raises
    ------
    TypeError, KeyError, ValueError, AttributeError
        It is something else.
    """
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{name: _decode(hints[name], item) for name, item in dict(value).items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_decode(typing.get_args(kind)[0], item) for item in value)
    return getattr(torch, value) if kind is torch.dtype else value


def _field_names(kind: Any) -> list[Any]:
    """The names of a record's fields, and of theirs."""
    hints = typing.get_type_hints(kind)
    inner = [
        part for hint in hints.values() for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)
    ]
    return [*hints, *(_field_names(part) for part in inner)]


def compute_dtype(settings: TrainSettings) -> torch.dtype:
    """The type to compute in."""
    return torch.float32 if settings.dtype == "float32" else torch.bfloat16


def _key(config: dict[str, Any], settings: TrainSettings) -> str:
    releases = {name: metadata.version(name) for name in ("torch", "transformers")}
    # Adam's moments in full tuning, and attention, depend on what the device has.
    device = choose_device(settings.device)
    has = [device.type if settings.tune == "full" else None, backend(device).fuses_attention(compute_dtype(settings))]
    asked = [settings.quantize, settings.dtype, settings.tune, *has, settings.lora_r, settings.lora_dropout > 0]
    text = json.dumps(
        [_own_code(), config, releases, asked, settings.lora_targets, _field_names(ModelFacts)], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _own_code() -> str:
    """A hash of the code that facts are found out with: facts found out in another way are not comparable."""
    rooms = Path(__file__).parent.parent
    sources = sorted([*(rooms / "checkpoints").glob("*.py"), *(rooms / "residency").glob("*.py"), Path(__file__)])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _active_parameters(skeleton: Skeleton, index: int) -> int:
    """Matrices count whole, matrices of routed experts by the share that a token goes through."""
    experts, chosen = 1, 0
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = int(getattr(skeleton.config, name, 0) or 0) or experts
    for name in ("top_k_experts", "num_experts_per_tok"):
        chosen = int(getattr(skeleton.config, name, 0) or 0) or chosen
    chosen = chosen or experts
    total = 0.0
    for shape in skeleton.layer_parameters(index).values():
        size = torch.Size(shape).numel()
        total += size * min(1.0, chosen / experts) if len(shape) == 3 and shape[0] == experts else size
    return round(total)
