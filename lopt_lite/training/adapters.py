"""LoRA adapters on single layers, by PEFT."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.errors import RunDirectoryError
from lopt_lite.residency.rms_norm import fuse_norms
from lopt_lite.seeds import derive_seed
from lopt_lite.settings import TrainSettings
from lopt_lite.training.low_rank import fuse
from lopt_lite.training.targets import target_names

_ADAPTER = "default"
_HALVES = ("lora_A", "lora_B")


def lora_config(settings: TrainSettings, targets: list[str]) -> LoraConfig:
    """PEFT's description of the adapter on modules called ``targets``."""
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach_adapter(layer: nn.Module, index: int, *, skeleton: Skeleton, settings: TrainSettings) -> None:
    """Put a new adapter on a layer; its start depends on (seed, layer) alone.

    Parameters are float32 whatever the layer's dtype, because updates of a small learning rate would be lost in
    bfloat16; products are made in the layer's dtype, from copies of them. (By itself PEFT turns every input into
    float32, which made a training step of SmolLM2-135M 1.4 times as long on the CPU.) Nothing else of the layer is
    trainable afterwards.
    """
    targets = target_names(skeleton, index, settings)
    if not targets:
        return
    # PEFT chooses its 4-bit LoRA class by this attribute of the module that it is given.
    if any(isinstance(m, bnb.nn.Linear4bit) for m in layer.modules()):
        layer.is_loaded_in_4bit = True
    config = lora_config(settings, targets)
    config.fan_in_fan_out = any(not isinstance(layer.get_submodule(t), nn.Linear) for t in targets)
    inject_adapter_in_model(config, layer, adapter_name=_ADAPTER)
    adapter = {id(p) for p in adapter_parameters(layer).values()}
    for parameter in layer.parameters():
        if id(parameter) in adapter:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False)
    # Started anew in float32: PEFT's own start was rounded to the dtype of the weight beside it. And on the CPU: each
    # kind of device has random numbers of its own.
    places = {p: p.device for p in adapter_parameters(layer).values() if p.device.type != "meta"}
    for parameter in places:
        parameter.data = torch.empty_like(parameter, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "adapter", index))
        for module in layer.modules():
            if isinstance(module, BaseTunerLayer):
                module.reset_lora_parameters(_ADAPTER, True)
    for parameter, device in places.items():
        parameter.data = parameter.data.to(device)
    if skeleton.dtype != torch.float32:
        _compute_in_the_inputs_dtype(layer)
        fuse(layer, _ADAPTER)
        fuse_norms(layer)


class _CastLinear(nn.Linear):
    """A linear module with float32 weights that computes in the dtype of its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


def _compute_in_the_inputs_dtype(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
            for half in _HALVES:
                # The same module in another class: thousands of new ones would take memory of their own.
                getattr(module, half)[_ADAPTER].__class__ = _CastLinear


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's adapter parameters by PEFT's file name within the layer (``self_attn.q_proj.lora_A.weight``)."""
    return {
        name.replace(f".{_ADAPTER}.", "."): parameter
        for name, parameter in layer.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def load_adapter(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved values into the adapter of a layer; names as :func:`adapter_parameters`.

    Raises
    ------
    RunDirectoryError
        They are of other modules than those that get an adapter.
    """
    parameters = adapter_parameters(layer)
    others = sorted(set(tensors) ^ set(parameters))
    if others:
        raise RunDirectoryError(
            f"the run's adapter is of other modules than this version of lopt-lite adapts ({others[0]})",
            fix="train again with --fresh: what PEFT would not load is not trained any more",
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def enable_adapter(layer: nn.Module, enabled: bool) -> None:
    """Switch a layer between itself with its adapter and itself without."""
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def set_training(layer: nn.Module, training: bool) -> None:
    """Turn the adapter's dropout on or off; the model's own dropout stays off."""
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            for dropout in module.lora_dropout.values():
                dropout.train(training)
