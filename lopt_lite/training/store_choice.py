"""Which prepared weights a run works with: the same for a plan and for the run itself."""

from __future__ import annotations

from pathlib import Path

from lopt_lite.checkpoints.locate import ModelFiles
from lopt_lite.checkpoints.store_index import standing_store, store_info
from lopt_lite.settings import TrainSettings
from lopt_lite.training.model_facts import stored_dtype


def store_directory(settings: TrainSettings, model: ModelFiles | None, own: Path) -> Path:
    """``--store``; or MODEL itself when it is a store of the kind asked for; or the run's ``own``.

    ``model`` is None where its weights are not here yet.

    Raises
    ------
    ModelError
        MODEL is a store with a damaged index.
    """
    if settings.store is not None:
        return Path(settings.store)
    if model is not None:
        # Nothing makes a store again that was brought as the model: a damaged one is refused here.
        store_info(_weights_directory(model))
        if is_store_for(settings, _weights_directory(model)):
            return _weights_directory(model)
    return own


def is_store_for(settings: TrainSettings, directory: Path) -> bool:
    """Whether ``directory`` holds a complete store of the kind asked for."""
    info = standing_store(directory)
    wanted = (settings.quantize, str(stored_dtype(settings)).removeprefix("torch."))
    return info is not None and (info.quantize, info.dtype) == wanted


def is_model(settings: TrainSettings, model: ModelFiles, directory: Path) -> bool:
    """Whether the store in ``directory`` is MODEL itself, so that there is nothing to make."""
    return directory.resolve() == _weights_directory(model).resolve() and is_store_for(settings, directory)


def _weights_directory(model: ModelFiles) -> Path:
    """Where MODEL's weights lie. With ``--config DIR`` its config.json may lie beside the weights of another model."""
    return model.weights.file_of(model.weights.names()[0]).parent
