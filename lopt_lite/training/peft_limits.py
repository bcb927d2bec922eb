"""Modules on which PEFT, given the finished adapter, would not put it: those get none.

In models that have experts anywhere, PEFT takes some names of linear modules for the experts that older releases of
transformers had (``gate_proj`` of the dense layers of a DeepSeek or Qwen3 mixture), and drops what was trained there
with a warning. Of models with state spaces it refuses others (``out_proj``).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lopt_lite.checkpoints.skeleton import Skeleton

#: Names that PEFT refuses in some models.
_OF_STATE_SPACES = {"out_proj", "conv1d"}


#: What was found out. It takes PEFT's import, and layers ask for it one by one.
_known: WeakKeyDictionary[Skeleton, frozenset[str]] = WeakKeyDictionary()


def refused_by_peft(skeleton: Skeleton) -> frozenset[str]:
    """Last parts of the names of modules that could carry an adapter, and on which PEFT would not put it."""
    if skeleton not in _known:
        _known[skeleton] = _refused(skeleton)
    return _known[skeleton]


def _refused(skeleton: Skeleton) -> frozenset[str]:
    first_with: dict[str, int] = {}
    for index in range(skeleton.layer_count):
        for name in skeleton.adaptable_names(index):
            first_with.setdefault(name.rpartition(".")[2], index)
    has_experts = get_checkpoint_conversion_mapping(str(skeleton.config.model_type)) is not None
    doubtful = [leaf for leaf in first_with if has_experts or leaf in _OF_STATE_SPACES]
    return frozenset(leaf for leaf in doubtful if not _takes(skeleton, first_with[leaf], leaf))


def _takes(skeleton: Skeleton, index: int, leaf: str) -> bool:
    """Whether PEFT puts an adapter on all modules of layer ``index`` that are called ``leaf``, when told to."""
    # Here, as it takes seconds.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = nn.Module()
    model.config, model.layer = skeleton.config, skeleton.layer_template(index)
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[leaf]), model)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return False  # whatever keeps it from that, it would keep the finished adapter from being loaded
    names = [name for name in skeleton.adaptable_names(index) if name.rpartition(".")[2] == leaf]
    return all(isinstance(model.layer.get_submodule(name), BaseTunerLayer) for name in names)
