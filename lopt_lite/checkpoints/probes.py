"""Short runs of a model's own code, before any weight is there, that tell how its layers are to be driven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_lite.checkpoints.layer_calls import LayerProxy, StopForward, split_hidden
from lopt_lite.checkpoints.trial import does_not_fit, is_the_models
from lopt_lite.errors import ModelError

#: What a layer's proxy makes of the hidden state for the model.
AsLayerOutput = Callable[[torch.Tensor], Any]


def _just_hidden(hidden: torch.Tensor) -> Any:
    return hidden


def _in_a_tuple(hidden: torch.Tensor) -> Any:
    return (hidden,)


def _with_attention_weights(hidden: torch.Tensor) -> Any:
    return hidden, None


#: What layers may return, as their model expects it.
_LAYER_OUTPUTS: tuple[AsLayerOutput, ...] = (_just_hidden, _in_a_tuple, _with_attention_weights)


def what_layers_return(model: PreTrainedModel, proxies: list[LayerProxy]) -> AsLayerOutput:
    """Try all conventions on a tiny batch and look at what the code after the last layer receives.

    Raises
    ------
    ModelError
        The model works with none of them.
    """
    architecture = type(model).__name__
    raised: Exception | None = None
    for convention in _LAYER_OUTPUTS:
        try:
            if _hidden_survives(model, proxies, convention):
                return convention
        except Exception as error:
            if not is_the_models(error):
                raise
            raised = raised or error
    found = "does not pass one hidden state from layer to layer, so lopt-lite cannot train it"
    if raised is not None:
        raise does_not_fit(architecture, found, raised) from raised
    raise ModelError(
        f"{architecture} {found}",
        expected="a decoder whose layers each take the hidden state of the one before and return their own",
        fix="choose another model",
    )


def _hidden_survives(model: PreTrainedModel, proxies: list[LayerProxy], convention: AsLayerOutput) -> bool:
    shape = (2, 3, int(model.config.hidden_size))  # two rows, so that indexing a tensor as if it were a tuple shows
    generator = torch.Generator().manual_seed(0)
    seen: list[bool] = []
    returned: list[torch.Tensor] = []

    def layer_called(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if seen and not seen[-1]:
            raise StopForward
        _, hidden = split_hidden(args, kwargs)
        seen.append(isinstance(hidden, torch.Tensor) and tuple(hidden.shape) == shape)
        if not seen[-1]:
            raise StopForward
        # Whatever the model computes between its layers would be left out where they are run one by one.
        if returned and not torch.equal(hidden, returned[-1]):
            seen[-1] = False
            raise StopForward
        returned.append(torch.randn(shape, generator=generator).to(hidden))
        return convention(returned[-1])

    def after_layers(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(seen) >= len(proxies):
            value = args[0] if args else None
            seen.append(isinstance(value, torch.Tensor) and tuple(value.shape) == shape)
            raise StopForward

    notes = [proxy.note for proxy in proxies]
    for proxy in proxies:
        proxy.note = layer_called
    leaves = [m for m in model.modules() if not isinstance(m, LayerProxy) and not list(m.children())]
    hooks = [leaf.register_forward_pre_hook(after_layers) for leaf in leaves]
    try:
        with torch.no_grad(), meta_root_on_cpu(model):
            model.base_model(input_ids=torch.zeros(shape[:2], dtype=torch.long), use_cache=False, return_dict=True)
    except StopForward:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for proxy, note in zip(proxies, notes, strict=True):
            proxy.note = note
    return len(seen) >= len(proxies) and all(seen)


class meta_root_on_cpu:
    """For the length of a probe: small parameters outside the layers hold zeros on the CPU instead of being meta.

    Modules before the layers (position embeddings, embedding norms) run in the probe, and cannot on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        # LM head and input embedding are large, and neither runs: the embedding's stand-in gives zeros.
        unused = [self._model.get_output_embeddings(), self._model.get_input_embeddings().wrapped]
        for module in self._model.modules():
            if any(module is other for other in unused):
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    self._saved.append((module, leaf, parameter))
                    module._parameters[leaf] = nn.Parameter(
                        torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False
                    )

    def __exit__(self, *exc: object) -> None:
        for module, leaf, parameter in self._saved:
            module._parameters[leaf] = parameter
